"""Write a model folder in another form: pickled weights as safetensors."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xverse import log


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse export` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, alias or hub id."""
    out: Annotated[str, tyro.conf.Positional]
    """The new folder; it must not exist, or be empty."""
    to: Literal["safetensors"] = "safetensors"
    """The form of the weights; values stay as they are."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Write the folder whole or not at all, and print where it is."""
    from xverse.checkpoint.convert import convert_to_safetensors
    from xverse.checkpoint.resolve import resolve

    log.setup("INFO")  # what stays behind, such as code, is told
    out = Path(config.out).expanduser()
    convert_to_safetensors(resolve(config.model), out)
    print(json.dumps({"folder": str(out)}) if config.json else out)
    if not config.json:
        print(f"next: xverse chat {out}", file=sys.stderr)
    return 0
