"""TEXT <-> IDS. The tokenizer: loads old and new files, encodes safely, decodes by bytes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers.processors import TemplateProcessing

from xverse.errors import XverseError
from xverse.files import read_json
from xverse.log import logger
from xverse.text.repair import (
    DAMAGED,
    MAX_FILE_BYTES,
    find_chat_template,
    modernize,
    read_optional,
    token_text,
)
from xverse.text.spelling import read_spelling

Result = TypeVar("Result")

# Names of XVERSE's own special tokens, for folders whose config files name none.
XVERSE_SPECIALS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<pad>"}


class Tokenizer:
    """A Rust `tokenizers.Tokenizer`, the names of its special tokens, and its exact bytes."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        config: Mapping[str, object] | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Take `backend` over; `add_bos` None leaves what its post-processor adds as it is."""
        self.backend = backend
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.chat_template = chat_template
        self.config: Mapping[str, object] = dict(config or {})
        backend.no_truncation()  # a limit saved in the file would cut texts silently
        backend.no_padding()
        for token in (bos_token, eos_token, pad_token):
            self._mark_special(token)
        if add_bos is not None:
            self._set_post_processor(add_bos)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_text = {id: token.content for id, token in added.items()}
        self._spelling = read_spelling(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder, or of one tokenizer.json; XverseError if it is bad."""
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise XverseError(
                f"There is no tokenizer at {file}.",
                "A tokenizer is read from tokenizer.json; tokenizer.model alone is not enough.",
                "Give a model folder that has tokenizer.json, or the file itself.",
            )
        content = read_json(file, max_bytes=MAX_FILE_BYTES)
        if modernize(content):
            logger.info("%s: Metaspace brought to its modern form", file)
        backend = _guard(
            f"{file} is not a tokenizer that can be used.",
            lambda: tokenizers.Tokenizer.from_str(json.dumps(content)),
        )
        config = read_optional(file.parent / "tokenizer_config.json")
        bos, eos, pad = (
            _special_name(kind, file.parent, config, backend) for kind in XVERSE_SPECIALS
        )
        return cls(
            backend,
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
            chat_template=find_chat_template(file.parent, config),
            config=config,
        )

    @property
    def bos_id(self) -> int | None:
        """Id that begins a text, where the model has one; XVERSE never puts it into a prompt."""
        return self._id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """Id that ends an answer."""
        return self._id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id that fills a batch up."""
        return self._id(self.pad_token)

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1: the rows that an embedding needs."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def strips_leading_space(self) -> bool:
        """Whether a decoded text loses one leading space, as SentencePiece has it."""
        return self._spelling.strips_leading_space

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Ids of `text`.

        `add_special`: with what the file's own post-processor adds (nothing for XVERSE).
        `parse_special`: "<|endoftext|>" in `text` is the special token; else it is plain text, and
        no special id comes from `text`. Raises XverseError for text that UTF-8 can't hold.
        """
        backend = self.backend if parse_special else self._plain
        encoding = _guard(
            "The text can't be encoded.",
            lambda: backend.encode(_sound(text), add_special_tokens=add_special),
        )
        ids: list[int] = encoding.ids
        if parse_special or self.special_ids.isdisjoint(ids):
            return ids
        # Some models can spell a special token by merges alone; then it is written out instead.
        ids = []
        for id, was_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            ids += self._spell(id) if id in self.special_ids and not was_added else [id]
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text as `encode` gives them without anything added, on every core.

        `tokenizers` spreads a batch over threads; TOKENIZERS_PARALLELISM=false keeps it to one.
        """
        sound = [_sound(text) for text in texts]
        encodings = _guard(
            "The texts can't be encoded.",
            lambda: self._plain.encode_batch_fast(sound, add_special_tokens=False),
        )
        return [
            encoding.ids
            if self.special_ids.isdisjoint(encoding.ids)
            else self.encode(text, add_special=False)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. XverseError for unknown ids."""
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join([self.token_bytes(id) for id in ids if id not in skipped])
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes that `id` stands for; of a special token, the bytes of its name."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._compute_bytes(id)
        return known

    def sha256(self) -> str:
        """Hex sha256 of tokenizer.json as `save` writes it: the same for all files that mean it."""
        return hashlib.sha256(self.backend.to_str(pretty=True).encode()).hexdigest()

    def save(
        self,
        folder: str | Path,
        *,
        chat_template: str | None = None,
        chat_format: str | None = None,
    ) -> None:
        """Write tokenizer.json in its modern form, and tokenizer_config.json, into `folder`.

        `chat_template` (Jinja) and `chat_format` (a format's name) are recorded there; without
        them, the tokenizer's own template is.
        """
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        config.pop("auto_map", None)  # names code files, which we never run nor copy
        config |= {"bos_token": self.bos_token, "eos_token": self.eos_token}
        config |= {"pad_token": self.pad_token, "clean_up_tokenization_spaces": False}
        config["chat_template"] = chat_template or self.chat_template
        if chat_format:
            config["xverse_chat_format"] = chat_format
        config = {key: value for key, value in config.items() if value is not None}
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8")
            written = json.dumps(config, ensure_ascii=False, indent=2)
            (target / "tokenizer_config.json").write_text(written + "\n", "utf-8")
            (target / "chat_template.jinja").unlink(missing_ok=True)  # it would outrank the config
        except OSError as error:
            raise XverseError(
                f"The tokenizer can't be saved to {target}.", str(error), "Choose another folder."
            ) from error

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second backend that takes special tokens in the text for plain text.

        A copy, because the switch belongs to the backend: flipping it for each call would race.
        """
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _mark_special(self, token: str | None) -> None:
        if token is None:
            return
        if self.backend.token_to_id(token) is None:
            raise XverseError(
                f"The special token {token!r} is not in the vocabulary.",
                "The tokenizer's config names a token that its tokenizer.json doesn't have.",
                DAMAGED,
            )
        added = self.backend.get_added_tokens_decoder().values()
        if not any(entry.special and entry.content == token for entry in added):
            marked = tokenizers.AddedToken(token, special=True, normalized=False)
            self.backend.add_special_tokens([marked])

    def _set_post_processor(self, add_bos: bool) -> None:
        if not add_bos:
            self.backend.post_processor = None
            return
        if self.bos_token is None:
            raise XverseError(
                "The tokenizer is to add a first token, and has none.",
                "add_bos is on, and no bos_token is named.",
                "Name the bos_token, or turn add_bos off.",
            )
        bos = self.bos_token
        self.backend.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, self.bos_id)]
        )

    def _spell(self, id: int) -> list[int]:
        """Ids of the single characters (or else bytes) of the special token `id`'s name."""
        spelled: list[int] = []
        for character in self._added_text[id]:
            found = self.backend.token_to_id(character)
            names = [f"<0x{byte:02X}>" for byte in character.encode()]
            parts = [found] if found is not None else [self.backend.token_to_id(n) for n in names]
            if None in parts:
                raise XverseError(
                    f"The text contains {self._added_text[id]!r}, which can't be written as text.",
                    f"The vocabulary has no token for {character!r} alone.",
                    "Take the special token out of the text.",
                )
            spelled += [part for part in parts if part is not None]
        return spelled

    def _compute_bytes(self, id: int) -> bytes:
        token = self.backend.id_to_token(id) if 0 <= id < 1 << 32 else None
        if token is None:
            raise XverseError(
                f"There is no token with id {id}.",
                f"The vocabulary has {self.vocab_size:,} ids.",
                "Check that the model and the tokenizer belong together.",
            )
        if id in self.special_ids:
            return token.encode()
        return self._spelling.bytes_of(token, added=id in self._added_text)


def _guard(what: str, action: Callable[[], Result]) -> Result:
    """Run `action` in the Rust library; what it raises, panics too, becomes an XverseError."""
    try:
        return action()
    except (XverseError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is a BaseException, not an Exception
        raise XverseError(what, str(error) or type(error).__name__, DAMAGED) from error


def _sound(text: str) -> str:
    """`text` itself, if it is a string that UTF-8 can hold."""
    try:
        text.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        raise XverseError(
            "The text can't be encoded.",
            f"{error}: it is no string, or holds half of a surrogate pair.",
            "Decode the input with errors='replace' before it comes here.",
        ) from error
    return text


def _special_name(
    kind: str, folder: Path, config: Mapping[str, object], backend: tokenizers.Tokenizer
) -> str | None:
    """The bos, eos or pad token by name: as the config files say, else XVERSE's own."""
    key = f"{kind}_token"
    named = token_text(config.get(key))
    named = named or token_text(read_optional(folder / "special_tokens_map.json").get(key))
    if named:
        return named
    id = read_optional(folder / "config.json").get(f"{key}_id")
    id = id[0] if isinstance(id, list) and id else id
    if isinstance(id, int) and 0 <= id < 1 << 32:
        return backend.id_to_token(id)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return XVERSE_SPECIALS[kind] if XVERSE_SPECIALS[kind] in added else None
