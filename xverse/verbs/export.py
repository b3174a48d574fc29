"""Write a model in another form: safetensors, GGUF, a folder for Ollama, an adapter taken in."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xverse import log
from xverse.errors import XverseError

GgufType = Literal["f16", "bf16", "q8_0", "q6_k", "q4_k", "q4_0"]
GGUF = "model.gguf"  # in a folder for Ollama


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse export` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, GGUF file, alias or hub id; quantized folders too."""
    out: Annotated[str, tyro.conf.Positional]
    """The new folder (for gguf the new .gguf file); it must not exist, or be an empty folder."""
    to: Literal["safetensors", "gguf", "ollama", "merged"] = "safetensors"
    """safetensors: the same values, of a GGUF file as numbers; gguf: one file; ollama: that file
    and a Modelfile; merged: the model with an adapter taken in."""
    adapter: str = ""
    """PEFT folder that --to merged takes in, as `xverse finetune` writes it."""
    type: GgufType | None = None
    """How a GGUF file stores matrices; f16 where not given, q4_k is llama.cpp's Q4_K_M."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Write it whole or not at all, and print where it is."""
    from xverse.checkpoint.resolve import resolve

    log.setup("INFO")  # what stays behind, such as code, is told
    out = Path(config.out).expanduser()
    _require_adapter(config)
    if config.to == "merged":
        facts, following = _merged(config, resolve(config.model), out)
    elif config.to == "safetensors":
        facts, following = _safetensors(config, resolve(config.model), out)
    elif config.to == "gguf":
        facts, following = _gguf(config, resolve(config.model), out)
    else:
        facts, following = _ollama(config, resolve(config.model), out)
    print(json.dumps(facts) if config.json else out)
    if not config.json:
        print(f"next: {following}", file=sys.stderr)
    return 0


def _require_adapter(config: Config) -> None:
    """Raise XverseError unless an adapter is named exactly where it has a meaning."""
    if (config.to == "merged") is not bool(config.adapter):
        raise XverseError(
            "--to merged and --adapter go together.",
            "An adapter is taken into a model, and only then is there one to name.",
            "Name the PEFT folder with --adapter, or leave both out.",
        )
    if config.to == "merged" and config.type is not None:
        raise XverseError(
            f"--type {config.type} has no meaning for merged.",
            "The model keeps its dtype.",
            "Leave it out, and export the merged folder --to gguf then.",
        )


def _merged(config: Config, model: Path, out: Path) -> tuple[dict[str, object], str]:
    from xverse.checkpoint.merge import merge

    merge(model, Path(config.adapter).expanduser(), out)
    return {"folder": str(out), "adapter": config.adapter}, f"xverse chat {out}"


def _safetensors(config: Config, model: Path, out: Path) -> tuple[dict[str, object], str]:
    from xverse.checkpoint.convert import convert_to_safetensors

    if config.type is not None:
        raise XverseError(
            f"--type {config.type} has no meaning for safetensors.",
            "Their values stay as they are.",
            "Leave it out, or add --to gguf.",
        )
    if model.is_file():
        from xverse.checkpoint.gguf_unpack import unpack_gguf

        dtype = str(unpack_gguf(model, out)).removeprefix("torch.")
        return {"folder": str(out), "dtype": dtype}, f"xverse chat {out}"
    convert_to_safetensors(model, out)
    return {"folder": str(out)}, f"xverse chat {out}"


def _gguf(config: Config, model: Path, out: Path) -> tuple[dict[str, object], str]:
    from xverse.checkpoint.gguf_export import export_gguf

    if out.suffix != ".gguf":
        raise XverseError(
            f"{out} is no name of a GGUF file.",
            "Programs tell such files by their ending.",
            f"Call it {out}.gguf.",
        )
    written = export_gguf(model, out, config.type or "f16")
    return written.facts(), f"xverse chat {out}"


def _ollama(config: Config, model: Path, out: Path) -> tuple[dict[str, object], str]:
    from xverse.checkpoint.gguf_export import export_gguf
    from xverse.checkpoint.ollama import modelfile_of
    from xverse.checkpoint.whole import whole_folder

    with whole_folder(out.absolute()) as aside:
        text = modelfile_of(model, GGUF)
        written = export_gguf(model, aside / GGUF, config.type or "f16")
        (aside / "Modelfile").write_text(text, "utf-8")
    facts = written.facts() | {"file": str(out / GGUF), "modelfile": str(out / "Modelfile")}
    return facts, f"ollama create {out.name} -f {out / 'Modelfile'}"
