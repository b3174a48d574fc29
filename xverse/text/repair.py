"""OLD FILE -> MODERN FILE. Tokenizer JSON is read, and what today's libraries refuse is mended."""

from collections.abc import Mapping
from pathlib import Path

from xverse.errors import XverseError
from xverse.files import read_json

MAX_FILE_BYTES = 256 << 20  # the largest published tokenizer.json is about 35 MB
DAMAGED = "Download the file again, or take tokenizer.json from the model's original folder."


def read_optional(path: Path) -> dict[str, object]:
    """The JSON object in the file `path`; {} where there is no such file."""
    return read_json(path, max_bytes=MAX_FILE_BYTES) if path.is_file() else {}


def modernize(tokenizer: dict[str, object]) -> bool:
    """Bring tokenizer.json content up to date in place; whether anything had to change.

    Published XVERSE files give Metaspace `add_prefix_space` without the `prepend_scheme` that
    replaced it; tokenizers >= 0.19 then assumes "always" and refuses the contradiction.
    """
    parts = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    changed = False
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        if part.get("type") == "Sequence":
            for key in ("pretokenizers", "decoders"):
                members = part.get(key)
                parts += members if isinstance(members, list) else []
        legacy = part.get("type") == "Metaspace" and "prepend_scheme" not in part
        if legacy and isinstance(part.get("add_prefix_space"), bool):
            part["prepend_scheme"] = "always" if part.pop("add_prefix_space") else "never"
            changed = True
    return changed


def token_text(value: object) -> str | None:
    """A token as config files write it: a string, or an object whose `content` is one."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def find_chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The folder's Jinja chat template: chat_template.jinja, else the one in the config."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise XverseError(f"{path} can't be read.", str(error), DAMAGED) from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates: [{"name": ..., "template": ...}]
        entries = [entry for entry in found if isinstance(entry, dict)]
        named = (entry.get("template") for entry in entries if entry.get("name") == "default")
        found = next(named, None)
    return found if isinstance(found, str) else None
