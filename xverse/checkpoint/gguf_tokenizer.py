"""GGUF -> TOKENIZER. Rebuilds the tokenizer inside a GGUF file: the BPE and SentencePiece kinds.

What the metadata means is llama.cpp's decision (`llama-vocab.cpp`), so it is followed here: the
table of pre-tokenizers, which of them add a beginning of sequence, and the space that is put
before every stretch of SentencePiece text. A file that does not say enough is refused, not guessed.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_header import unreadable
from xverse.errors import XverseError
from xverse.log import logger, warn_once
from xverse.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SENTENCEPIECE_ROLES = {"unknown": 0, "bos": 1, "eos": 2}  # where the file names none
FRAME = ("bos", "eos")  # what may stand before and behind a text
CHAT_FORMAT = "xverse.chat_format"  # a key of our own: as tokenizer_config.json names the format

# Deriving merges looks at every way to cut a token in two, so tokens may not be arbitrarily long.
MAX_PIECE_CHARACTERS = 256
MAX_VOCABULARY_CHARACTERS = 2**23

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_DIGITS
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_DIGITS


@dataclass(frozen=True)
class Cut:
    """How text is cut before merging: by each pattern in turn, matches and gaps both kept."""

    patterns: tuple[str, ...]
    whole_first: bool = False  # a stretch that is a token as it stands needs no merges
    add_bos: bool = False  # where the file does not say


_PLAIN = Cut((_GPT2,))
_DIGITS = Cut((r"\p{N}", _GPT2))
_LLAMA = Cut((_LLAMA3,), whole_first=True, add_bos=True)
_QWEN = Cut((_QWEN2,))

# tokenizer.ggml.pre
CUTS = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Cut((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN),
}


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer inside `file`, or where that is not enough the tokenizer.json beside the file.

    Raises XverseError where neither tells how text becomes tokens.
    """
    lacking = _lacking(file)
    if lacking:
        return _beside(file, lacking)
    vocabulary = _Vocabulary(file)
    if file.get("tokenizer.ggml.model", str) == "gpt2":
        cut = CUTS[file.get("tokenizer.ggml.pre", str) or ""]
        backend, add_bos = _byte_level(vocabulary, cut), cut.add_bos
    else:
        backend, add_bos = _sentencepiece(vocabulary), True
    vocabulary.add_special(backend)
    config = vocabulary.frame(backend, add_bos)
    named = file.get(CHAT_FORMAT, str)
    if named is not None:
        config["xverse_chat_format"] = named
    return Tokenizer(
        backend,
        bos_token=vocabulary.named("bos"),
        eos_token=vocabulary.named("eos"),
        pad_token=vocabulary.named("padding"),
        chat_template=file.get("tokenizer.chat_template", str),
        config=config,
    )


def _lacking(file: GgufFile) -> str | None:
    """Why the metadata does not determine a tokenizer, or None where it does."""
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    has_merges = "tokenizer.ggml.merges" in file.metadata
    if kind == "gpt2":
        if pre not in CUTS:
            return f"Its pre-tokenizer is {pre!r:.60}; known are {', '.join(CUTS)}."
        return None if has_merges else "It holds no merges."
    if kind == "llama":
        if has_merges or "tokenizer.ggml.scores" in file.metadata:
            return None
        return "It holds neither scores nor merges, as the published XVERSE files do not."
    return f"It is of kind {kind!r:.60}; known are gpt2 and llama."


def _beside(file: GgufFile, lacking: str) -> Tokenizer:
    path = file.path.with_name("tokenizer.json")
    if not path.is_file():
        raise XverseError(
            f"{file.path.name} does not say how text becomes tokens.",
            lacking,
            f"Put the model's tokenizer.json into the folder {path.parent}.",
        )
    logger.info("%s: %s Using %s.", file.path.name, lacking, path)
    return Tokenizer.load(path)


class _Vocabulary:
    """The tokens of a file, checked: one id each, no more of them than the model has rows."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        tokens = file.get_list("tokenizer.ggml.tokens", str)
        if not tokens:
            raise unreadable(file.path, "its tokenizer has no tokens")
        # An empty token can never be written; it keeps its id under a name of its own.
        self.tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        self.has_bytes = all(f"<0x{byte:02X}>" in self.ids for byte in range(256))
        types = file.get_list("tokenizer.ggml.token_type", int)
        self.types = [NORMAL] * len(tokens) if types is None else types
        is_sentencepiece = file.get("tokenizer.ggml.model", str) == "llama"
        self.roles = SENTENCEPIECE_ROLES if is_sentencepiece else {}
        embedding = file.tensors.get("token_embd.weight")
        rows = embedding.shape[0] if embedding else len(tokens)
        if len(self.ids) != len(tokens) or len(self.types) != len(tokens) or len(tokens) > rows:
            raise unreadable(
                file.path,
                f"its {len(tokens)} tokens, {len(self.ids)} of them distinct, have"
                f" {len(self.types)} types and {rows} embeddings",
            )

    def named(self, role: str) -> str | None:
        """The token that has a role such as "bos", or None where there is none."""
        id = self.file.get(f"tokenizer.ggml.{role}_token_id", int)
        id = self.roles.get(role) if id is None else id
        if id is None:
            return None
        if not 0 <= id < len(self.tokens):
            raise unreadable(self.file.path, f"its {role} token {id} is not in the vocabulary")
        return self.tokens[id]

    def merges(self) -> list[tuple[str, str]]:
        """The merges as the file lists them; both halves and the whole are tokens."""
        merges = []
        for line in self.file.get_list("tokenizer.ggml.merges", str) or []:
            space = line.find(" ", 1)  # a half may itself begin with a space
            left, right = line[:space], line[space + 1 :]
            if space < 0 or not {left, right, left + right} <= self.ids.keys():
                raise unreadable(self.file.path, f"the merge {line!r:.80} is not of its tokens")
            merges.append((left, right))
        return merges

    def merges_by_score(self, scores: list[float]) -> list[tuple[str, str]]:
        """The merges that amount to SentencePiece's BPE: the pair whose whole scores best first."""
        usable = {t: scores[id] for id, t in enumerate(self.tokens) if self.types[id] == NORMAL}
        pieces = sorted((p for p in usable if len(p) > 1), key=lambda p: (-usable[p], self.ids[p]))
        if max(map(len, pieces), default=0) > MAX_PIECE_CHARACTERS:
            raise unreadable(self.file.path, "it has tokens too long to be pieces of text")
        if sum(map(len, pieces)) > MAX_VOCABULARY_CHARACTERS:
            raise unreadable(self.file.path, "its vocabulary is too large")
        if len(pieces) > 1 and usable[pieces[0]] == usable[pieces[-1]]:
            raise unreadable(self.file.path, "all its tokens have the same score, which ranks none")
        merges = []
        for piece in pieces:
            for at in range(1, len(piece)):
                left, right = piece[:at], piece[at:]
                if left in usable and right in usable:
                    merges.append((left, right))
        return merges

    def add_special(self, backend: Backend) -> None:
        """Make control tokens special, and let user-defined ones be found whole in any text."""
        roles = {self.named(role) for role in ("bos", "eos", "padding")}
        # Without byte tokens, the unknown token is what ordinary text comes to: not special then.
        special_types = {CONTROL, UNKNOWN} if self.has_bytes else {CONTROL}
        added = []
        for token, kind in zip(self.tokens, self.types, strict=True):
            special = kind in special_types or token in roles
            if special or kind == USER_DEFINED:
                added.append(AddedToken(token, special=special, normalized=False))
        backend.add_tokens(added)

    def frame(self, backend: Backend, add_bos: bool) -> dict[str, object]:
        """Put BOS before and EOS behind a text where the file wants them; gives the config."""
        wanted = {role: self.file.get(f"tokenizer.ggml.add_{role}_token", bool) for role in FRAME}
        for role, want in wanted.items():
            if want and self.named(role) is None:
                raise unreadable(self.file.path, f"it wants a token {role} added and names none")
        if wanted["bos"] is None:
            wanted["bos"] = add_bos and self.named("bos") is not None
        tokens = {role: self.named(role) for role, want in wanted.items() if want}
        if tokens:
            before, after = (role if role in tokens else None for role in FRAME)
            backend.post_processor = processors.TemplateProcessing(
                single=[part for part in (before, "$A", after) if part],
                special_tokens=[
                    {"id": role, "ids": [self.ids[token]], "tokens": [token]}
                    for role, token in tokens.items()
                    if token
                ],
            )
        return {f"add_{role}_token": role in tokens for role in FRAME}


def _byte_level(vocabulary: _Vocabulary, cut: Cut) -> Backend:
    """GPT-2's kind: text is cut by patterns, and bytes are written as printable characters."""
    absent = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.ids.keys())
    if absent:
        logger.info("the vocabulary has no token for %d bytes, which vanish from text", len(absent))
    backend = Backend(
        models.BPE(vocabulary.ids, vocabulary.merges(), ignore_merges=cut.whole_first)
    )
    splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in cut.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary) -> Backend:
    """SentencePiece's kind: spaces become "▁", nothing is cut, what has no token becomes bytes."""
    file, ids = vocabulary.file, vocabulary.ids
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if file.metadata.get(f"tokenizer.ggml.{key}"):
            warn_once(f"{file.path.name}: {key} is left aside, as llama.cpp does for this kind.")
    scores = file.get_list("tokenizer.ggml.scores", float)
    if scores is not None and len(scores) != len(vocabulary.tokens):
        raise unreadable(file.path, "it has not one score for each of its tokens")
    model = models.BPE(
        ids,
        vocabulary.merges() if scores is None else vocabulary.merges_by_score(scores),
        unk_token=vocabulary.named("unknown"),
        fuse_unk=True,
        byte_fallback=vocabulary.has_bytes,
    )
    backend = Backend(model)
    # Not Metaspace: that adds no space before a text which begins with one, and llama.cpp does.
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool) is False:
        backend.normalizer = spaces
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend
