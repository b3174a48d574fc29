"""Fetch a model from Hugging Face or ModelScope; a second call resumes."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from xverse import log


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse pull` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, owner/name, or an alias of one."""
    source: Literal["auto", "hf", "modelscope"] = "auto"
    """Which hub; auto is $XVERSE_SOURCE, or else Hugging Face."""
    revision: str | None = None
    """Branch, tag or commit; the hub's default branch where none is given."""
    cache_dir: str | None = None
    """Put the files into CACHE_DIR/owner/name instead of the hub's own cache."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Fetch, verify, and print where the folder is."""
    from xverse.checkpoint.hub import pull
    from xverse.checkpoint.resolve import ALIASES

    log.setup("INFO")  # what is left out, and under which licence, belongs to the answer
    alias = ALIASES.get(config.model.lower())
    folder = pull(
        alias if isinstance(alias, str) else config.model,
        source=config.source,
        revision=config.revision,
        cache_dir=config.cache_dir,
    )
    print(json.dumps({"folder": str(folder)}) if config.json else folder)
    if not config.json:
        print(f"next: xverse chat {folder}", file=sys.stderr)
    return 0
