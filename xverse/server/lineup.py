"""NAMES -> WHAT ANSWERS. The model that is served and its adapters, by the names clients use."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xverse.checkpoint.adapter import chat_format_of
from xverse.checkpoint.load import Checkpoint
from xverse.errors import XverseError
from xverse.log import logger
from xverse.server.fingerprint import adapter_fingerprint
from xverse.server.refusals import Refusal
from xverse.text.chat import ChatFormat, chat_format
from xverse.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that clients can ask for as a model; its chat format where it has its own."""

    folder: Path
    created: int
    chat_format: str | None
    fingerprint: str = ""


class Lineup:
    """The model `name`, and its adapters in `folders`; more may be loaded from `adapters_dir`."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        folders: Mapping[str, str],
        adapters_dir: Path | None,
    ) -> None:
        self.name, self.checkpoint, self.tokenizer = name, checkpoint, tokenizer
        self.adapters_dir = adapters_dir
        self.changing = asyncio.Lock()  # one change of adapters at a time
        self.created = int(time.time())
        self._fingerprint = ""  # told by `note_ready`, before which nothing is answered
        self.adapters = {name: self.look_at(Path(at)) for name, at in folders.items()}

    @property
    def names(self) -> list[str]:
        """All that clients can ask for, the model itself first."""
        return [self.name, *self.adapters]

    @property
    def folders(self) -> dict[str, str]:
        """Where the adapters are that are served now."""
        return {name: str(entry.folder) for name, entry in self.adapters.items()}

    def note_ready(self, fingerprint: str, lost: Mapping[str, tuple[str, str, str]]) -> None:
        """An engine is ready: how its model is told from others, and which adapters it has not."""
        self._fingerprint = fingerprint
        for name, error in lost.items():
            if self.adapters.pop(name, None) is not None:
                logger.error("the adapter %s is gone: %s", name, XverseError(*error))
        self.adapters = {name: self._marked(each) for name, each in self.adapters.items()}

    def require(self, name: str) -> None:
        """Refusal (404) where a client means neither the model nor one of its adapters."""
        if name not in self.names:
            raise Refusal(
                404,
                f"There is no model {name!r:.200}; this server has "
                f"{', '.join(map(repr, self.names)):.1000}.",
                param="model",
                code="model_not_found",
            )

    def adapter(self, name: str) -> str | None:
        """What the engine calls the adapter; None for the model itself."""
        return None if name == self.name else name

    def fingerprint(self, name: str) -> str:
        """OpenAI's system_fingerprint of the model, or of it with an adapter."""
        entry = self.adapters.get(name)
        return self._fingerprint if entry is None else entry.fingerprint

    def chat_format(self, name: str | None) -> ChatFormat:
        """How conversations are written: as the adapter was trained where it says so, else as the
        model was."""
        entry = None if name is None else self.adapters.get(name)
        named = None if entry is None else entry.chat_format
        return chat_format(self.checkpoint.config, self.tokenizer, named)

    def look_at(self, folder: Path) -> ServedAdapter:
        """What an adapter's folder notes; XverseError where it is none, or of no known format."""
        named = chat_format_of(folder)
        if named is not None:
            chat_format(self.checkpoint.config, self.tokenizer, named)
        return self._marked(ServedAdapter(folder, int(time.time()), named))

    def _marked(self, entry: ServedAdapter) -> ServedAdapter:
        try:
            told = adapter_fingerprint(self._fingerprint, entry.folder)
        except OSError:  # the folder went, while the engine has what was in it
            return entry
        return replace(entry, fingerprint=told)
