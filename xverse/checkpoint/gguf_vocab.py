"""TOKENIZER -> GGUF. Tokens, scores or merges, and special ids, such that llama.cpp reads the same.

llama.cpp cuts no text for its SentencePiece kind ("llama"): it merges the pair of pieces whose
whole has the best score. XVERSE's tokenizer is a BPE that first cuts at spaces, digits and
punctuation. As none of its tokens reaches over such a cut, the cuts make no difference, and scores
that fall in the order of the merges give the same ids. ByteLevel vocabularies become "gpt2".
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from xverse.checkpoint.gguf_tokenizer import BYTE, CONTROL, CUTS, NORMAL, UNUSED, USER_DEFINED
from xverse.errors import XverseError
from xverse.log import logger
from xverse.text.spelling import BYTE_TOKEN
from xverse.text.tokenizer import Tokenizer

_GPT2 = CUTS["gpt-2"].patterns[0]
_KNOWN_STEPS = {"Metaspace", "Digits", "Punctuation"}  # of a pre-tokenizer, beside ByteLevel's


def vocabulary_of(tokenizer: Tokenizer, rows: int, end_ids: Sequence[int]) -> dict[str, object]:
    """The metadata "tokenizer.ggml.*" of `tokenizer` in a model with `rows` embeddings.

    `end_ids` end an answer, the first one first. XverseError where llama.cpp has no tokenizer that
    gives the same ids.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or tokenizer.vocab_size > rows:
        raise _inexpressible(f"It is a {model['type']} of {tokenizer.vocab_size} ids, {rows} fit")
    merges = [_pair(merge) for merge in model["merges"]]
    byte_level = (state["decoder"] or {}).get("type") == "ByteLevel"
    spell = _byte_level if byte_level else _sentencepiece
    facts = spell(tokenizer, state, merges)
    tokens, types = _tokens(tokenizer, rows, byte_level)
    facts |= {"tokens": tokens, "token_type": types}
    if not byte_level:
        facts["scores"] = _scores(tokens, merges)
    facts |= _special(tokenizer, end_ids)
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}


def differing(tokenizer: Tokenizer, other: Tokenizer) -> tuple[int, int]:
    """How many texts were encoded by both, and how many of them to different ids.

    The texts are all pieces that merging makes, alone and each behind another one: where two ways
    to merge could disagree, it would be here.
    """
    present = set(tokenizer.backend.get_vocab().values()) - tokenizer.special_ids
    spelled = (tokenizer.token_bytes(id) for id in sorted(present))
    pieces = [text for data in spelled if len(text := data.decode(errors="ignore")) > 1]
    far = len(pieces) // 2
    pairs = zip(pieces, pieces[far:] + pieces[:far], strict=True)
    texts = pieces + [first + second for first, second in pairs]
    theirs = (other.encode(text, add_special=False) for text in texts)
    ours = (tokenizer.encode(text, add_special=False) for text in texts)
    return len(texts), sum(a != b for a, b in zip(ours, theirs, strict=True))


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _byte_level(
    tokenizer: Tokenizer, state: Mapping[str, object], merges: list[tuple[str, str]]
) -> dict[str, object]:
    """The pre-tokenizer of llama.cpp that cuts as this one does, and the merges as they are."""
    if state["normalizer"] is not None:
        raise _inexpressible("It normalizes text before cutting it")
    patterns: list[str] = []
    for step in _steps(state["pre_tokenizer"]):
        patterns += _patterns(step)
    model = state["model"]
    assert isinstance(model, Mapping)
    whole_first = bool(model.get("ignore_merges"))
    for name, cut in CUTS.items():
        if cut.patterns == tuple(patterns) and cut.whole_first == whole_first:
            lines = [f"{left} {right}" for left, right in merges]
            return {"model": "gpt2", "pre": name, "merges": lines}
    raise _inexpressible(f"It cuts text by {patterns!r:.200}")


def _steps(state: object) -> Iterator[Mapping[str, object]]:
    """The steps of a pre-tokenizer or normalizer, sequences flattened."""
    if isinstance(state, Mapping):
        inner = state.get("pretokenizers", state.get("normalizers"))
        for step in inner if isinstance(inner, list) else []:
            yield from _steps(step)
        if not isinstance(inner, list):
            yield state


def _patterns(step: Mapping[str, object]) -> list[str]:
    """The patterns by which this step cuts, matches and gaps both kept."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return [r"\p{N}"]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "invert": False} if (
            step["behavior"] == "Isolated"
        ):
            return [regex]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [_GPT2] if step.get("use_regex", True) else []
    raise _inexpressible(f"It has the step {dict(step)!r:.120}")


def _sentencepiece(
    tokenizer: Tokenizer, state: Mapping[str, object], merges: list[tuple[str, str]]
) -> dict[str, object]:
    """Whether a space is put before a text; XverseError where cuts or bytes would be different."""
    model = state["model"]
    assert isinstance(model, Mapping)
    if not model.get("byte_fallback") or model.get("ignore_merges"):
        raise _inexpressible("What has no token does not become bytes in it")
    prefix = False
    for step in _steps(state["normalizer"]):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise _inexpressible(f"It has the step {dict(step)!r:.120}")
    steps = list(_steps(state["pre_tokenizer"]))
    for step in steps:
        if step["type"] not in _KNOWN_STEPS or step.get("replacement", "▁") != "▁":
            raise _inexpressible(f"It has the step {dict(step)!r:.120}")
        if step["type"] == "Metaspace" and step.get("prepend_scheme") != "never":
            prefix = True
            logger.warning("llama.cpp puts a space before texts that begin with one, too")
    cutter = tokenizer.backend.pre_tokenizer
    wholes = [(left + right).replace("▁", " ") for left, right in merges]
    over = [whole for whole in wholes if cutter and len(cutter.pre_tokenize_str(whole)) > 1]
    if over and not prefix:
        raise _inexpressible(f"{len(over)} of its tokens reach over its cuts, such as {over[0]!r}")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """A score for each token: the earlier its first merge, the better; no merge is the worst."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _tokens(tokenizer: Tokenizer, rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """What is written for each id, and of what type it is; ids without a token are unused."""
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, types = [], []
    for id in range(rows):
        token, kind = tokenizer.backend.id_to_token(id), NORMAL
        if token is None:
            token, kind = f"[UNUSED_{id}]", UNUSED
        elif id in added:
            kind = CONTROL if added[id].special else USER_DEFINED
            _name_habits(added[id].content, added[id].lstrip, added[id].rstrip)
        elif not byte_level and BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        elif "\0" in token:
            kind = UNUSED  # llama.cpp reads up to the zero byte, and takes the byte token instead
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _name_habits(token: str, lstrip: bool, rstrip: bool) -> None:
    if lstrip or rstrip:
        logger.warning("%s swallows spaces around it; llama.cpp leaves them in the text", token)


def _special(tokenizer: Tokenizer, end_ids: Sequence[int]) -> dict[str, object]:
    """Ids of the special tokens, and whether texts begin or end with one."""
    ends = list(end_ids) or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    if tokenizer.eos_id in ends:
        ends.sort(key=lambda id: id != tokenizer.eos_id)
    if len(ends) > 2:
        logger.warning("GGUF has places for two ids that end an answer; not in it: %s", ends[2:])
    named = {"bos": tokenizer.bos_id, "padding": tokenizer.pad_id}
    named |= dict(zip(("eos", "eot"), ends, strict=False))
    ids: dict[str, object] = {f"{k}_token_id": id for k, id in named.items() if id is not None}
    plain, framed = tokenizer.encode("a", add_special=False), tokenizer.encode("a")
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), -1)
    before, after = framed[:at], framed[at + len(plain) :]
    if at < 0 or before not in ([], [tokenizer.bos_id]) or after not in ([], ends[:1]):
        raise _inexpressible("It puts more around a text than a first and a last token")
    return ids | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _inexpressible(why: str) -> XverseError:
    return XverseError(
        "This tokenizer can't be written into a GGUF file.",
        f"{why}, and llama.cpp has no tokenizer that does so.",
        "Export to safetensors, which keeps the tokenizer as it is.",
    )
