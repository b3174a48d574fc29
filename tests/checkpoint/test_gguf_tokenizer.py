import io
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch

from tests.checkpoint.tiny_gguf import ARRAY, BOOL, F32, I32, STRING, U32, Draft, add, smollm2
from tests.text.tiny import write_tiny_tokenizer
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_tokenizer import CUTS, tokenizer_of
from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS = (
    "The capital of France is Paris, isn't it? WE'LL see; they're sure I'M not.",
    "def f(x: int):\n\treturn x ** 2  # 1,234.5e-6\n\n\n    if a[0] == b'\\x00':\n     pass\n",
    "  leading,   inner and trailing spaces   \n \n\t ",
    "人工智能正在改变世界：2024年，第3次。",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 문장입니다. 숫자 12345",
    "Привет, мир! Как дела? Ёлка №5",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε, שלום עולם",
    "Café déjà vu, naïve façade, über, señor, smörgåsbord, İstanbul, ﬁ",
    "👩‍👩‍👧‍👦 🇨🇳🚀 e\u0301 \u200b\u3000\u00a0|\u2028|",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
)


def opened(draft: Draft, folder: Path) -> GgufFile:
    return GgufFile.open(draft.write(folder / "model.gguf"))


def vocabulary(kind: str, tokens: Sequence[str], types: Sequence[int] | None = None) -> Draft:
    draft = Draft().put("tokenizer.ggml.model", STRING, kind)
    draft.put("tokenizer.ggml.tokens", ARRAY, (STRING, list(tokens)))
    types = [NORMAL] * len(tokens) if types is None else types
    return draft.put("tokenizer.ggml.token_type", ARRAY, (I32, list(types)))


def byte_level(**special: int) -> Draft:
    """A byte-level vocabulary of a few letters, digits and merges, cut as gpt-2's."""
    tokens = ["<end>", "<begin>", "<tool>", *"Ġabc123!", "ab", "Ġa", "Ġab", "abc", "12"]
    types = [CONTROL, CONTROL, USER_DEFINED, *[NORMAL] * (len(tokens) - 3)]
    draft = vocabulary("gpt2", tokens, types).put("tokenizer.ggml.pre", STRING, "gpt-2")
    merges = ["Ġ a", "a b", "Ġa b", "ab c", "1 2"]
    draft.put("tokenizer.ggml.merges", ARRAY, (STRING, merges))
    for role, id in {"bos": 1, "eos": 0, **special}.items():
        draft.put(f"tokenizer.ggml.{role}_token_id", U32, id)
    return draft


def names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str | None]:
    return [tokenizer.backend.id_to_token(id) for id in ids]


def test_ids_of_a_real_file_are_those_of_llama_cpp() -> None:
    tokenizer = tokenizer_of(GgufFile.open(smollm2()))
    # Recorded with llama.cpp, build of October 2026; digits of every script stand alone.
    golden = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "½ Ⅷ ١٢٣": [16738, 216, 173, 223, 117, 216, 164, 111, 164, 112, 164, 113],
    }
    for text, ids in golden.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_special_tokens_and_template_of_a_real_file() -> None:
    tokenizer = tokenizer_of(GgufFile.open(smollm2()))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.vocab_size == 49152
    assert "<|im_start|>" in (tokenizer.chat_template or "")
    assert tokenizer.config == {"add_bos_token": False, "add_eos_token": False}
    text = "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.encode(text, parse_special=True) == [1, 4093, 198, 6004, 2]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_ids_of_a_real_file_are_those_of_transformers() -> None:
    """Save for digits after two spaces or more, and digits of other scripts: transformers'
    conversion then cuts as GPT-2 does, where llama.cpp first sets every digit apart."""
    transformers = pytest.importorskip("transformers")
    path = smollm2()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = tokenizer_of(GgufFile.open(path))
    for text in TEXTS:
        ids = tokenizer.encode(text, parse_special=True)
        assert ids == reference(text).input_ids
        assert tokenizer.decode(ids, skip_special=False) == text


def test_byte_level_merges_and_specials(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(opened(byte_level(), tmp_path))
    assert names(tokenizer, tokenizer.encode("abc ab 12")) == ["abc", "Ġab", "Ġ", "12"]
    assert names(tokenizer, tokenizer.encode("a<tool>b")) == ["a", "<tool>", "b"]
    parsed = tokenizer.encode("a<begin>b<end>", parse_special=True)
    assert names(tokenizer, parsed) == ["a", "<begin>", "b", "<end>"]
    assert tokenizer.special_ids == {0, 1}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "a"),
        ({"bos": 1}, "<begin> a"),
        ({"eos": 1}, "a <end>"),
        ({"bos": 1, "eos": 1}, "<begin> a <end>"),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says_so(
    tmp_path: Path, said: dict[str, int], expected: str
) -> None:
    draft = byte_level()
    for role, value in said.items():
        draft.put(f"tokenizer.ggml.add_{role}_token", BOOL, value)
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    assert names(tokenizer, tokenizer.encode("a")) == expected.split()
    assert names(tokenizer, tokenizer.encode("a", add_special=False)) == ["a"]


def test_llama_3_files_add_bos_unless_they_say_no(tmp_path: Path) -> None:
    draft = byte_level().put("tokenizer.ggml.pre", STRING, "llama-bpe")
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    assert names(tokenizer, tokenizer.encode("ab")) == ["<begin>", "ab"]
    assert tokenizer.config["add_bos_token"] is True
    tokenizer = tokenizer_of(opened(draft.put("tokenizer.ggml.add_bos_token", BOOL, 0), tmp_path))
    assert names(tokenizer, tokenizer.encode("ab")) == ["ab"]


def test_what_was_built_survives_being_saved(tmp_path: Path) -> None:
    draft = byte_level().put("tokenizer.ggml.add_bos_token", BOOL, 1)
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    for text in ("abc ab", "12 <tool><end>", ""):
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def stretches(pre: str, text: str) -> list[str]:
    """What the pre-tokenizer called `pre` cuts `text` into, seen before any merge."""
    parts = [text]
    for pattern in CUTS[pre].patterns:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        parts = [cut for part in parts for cut, _ in split.pre_tokenize_str(part)]
    return parts


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 2024", ",", " ok", "  \n", "\n", "X", "'", "S"]),
        (
            "smollm",
            ["It", "'s", " ", "2", "0", "2", "4", ",", " ok", "  \n", "\n", "X", "'", "S"],
        ),
        ("llama-bpe", ["It", "'s", " ", "202", "4", ",", " ok", "  \n\n", "X", "'S"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", ",", " ok", "  \n\n", "X", "'S"]),
        ("default", ["It", "'", "s", " ", "202", "4", ",", " ok", "  \n", "\n", "X", "'", "S"]),
    ],
)
def test_text_is_cut_as_the_name_of_the_pre_tokenizer_says(pre: str, expected: list[str]) -> None:
    assert "".join(expected) == "It's 2024, ok  \n\nX'S"
    assert stretches(pre, "It's 2024, ok  \n\nX'S") == expected


def sentencepiece_draft(trained: bytes) -> Draft:
    """The vocabulary of a trained SentencePiece model, as llama.cpp's converters write it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_proto=trained)
    checks = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsByte, BYTE))
    ids = range(model.vocab_size())
    types = [next((kind for check, kind in checks if check(id)), NORMAL) for id in ids]
    draft = vocabulary("llama", [model.IdToPiece(id) for id in ids], types)
    draft.put("tokenizer.ggml.scores", ARRAY, (F32, [model.GetScore(id) for id in ids]))
    return draft.put("tokenizer.ggml.pre", STRING, "default")


def train(vocab_size: int, **options: object) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n")] * 3),
        model_writer=written,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def test_sentencepiece_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    trained = train(560, byte_fallback=True, character_coverage=0.98)
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=trained)
    tokenizer = tokenizer_of(opened(sentencepiece_draft(trained), tmp_path))
    runs = ["=" * length + " " * length + "a" * length for length in range(1, 40)]
    for text in (*TEXTS, *runs):
        ids = tokenizer.encode(text)
        assert ids == [1, *reference.Encode(text)]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.special_ids == {0, 1, 2}


def test_sentencepiece_without_bytes_has_its_unknown_token(tmp_path: Path) -> None:
    trained = train(420)
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=trained)
    draft = sentencepiece_draft(trained).put("tokenizer.ggml.add_bos_token", BOOL, 0)
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    for text in ("ՀայաստանΩ ok", "a Ж\U0001f9ea\U0001f9ea b", *TEXTS):
        assert tokenizer.encode(text) == reference.Encode(text)


def sentencepiece_tokens() -> Draft:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    pieces = ["▁a", "▁ab", "ab", "  ", "▁", "a", "b", "<tool>"]
    scores = [0.0] * len(tokens) + [-1.0, -2.0, -3.0, 0.0, -4.0, -5.0, -6.0, 0.0]
    types += [NORMAL] * 3 + [USER_DEFINED] + [NORMAL] * 3 + [USER_DEFINED]
    draft = vocabulary("llama", tokens + pieces, types)
    return draft.put("tokenizer.ggml.scores", ARRAY, (F32, scores))


def test_a_space_is_put_before_every_stretch_unless_the_file_says_no(tmp_path: Path) -> None:
    draft = sentencepiece_tokens()
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    ids = tokenizer.encode("ab<tool>ab  é", add_special=False)
    expected = ["▁ab", "<tool>", "▁ab", "  ", "▁", "<0xC3>", "<0xA9>"]
    assert names(tokenizer, ids) == expected
    draft.put("tokenizer.ggml.add_space_prefix", BOOL, 0)
    tokenizer = tokenizer_of(opened(draft, tmp_path))
    ids = tokenizer.encode("ab<tool>ab  é", add_special=False)
    assert names(tokenizer, ids) == ["ab", "<tool>", "ab", "  ", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "ab<tool>ab  é"


def test_files_without_scores_and_merges_are_refused(tmp_path: Path) -> None:
    draft = sentencepiece_tokens().drop("tokenizer.ggml.scores")
    with pytest.raises(XverseError, match=r"tokenizer\.json") as raised:
        tokenizer_of(opened(draft, tmp_path))
    assert "neither scores nor merges" in raised.value.why


def test_a_tokenizer_json_beside_the_file_helps_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_tokenizer(tmp_path)
    draft = sentencepiece_tokens().drop("tokenizer.ggml.scores")
    with caplog.at_level(logging.INFO, "xverse"):
        tokenizer = tokenizer_of(opened(draft, tmp_path))
    assert tokenizer.encode("The end") == Tokenizer.load(tmp_path).encode("The end")
    assert "neither scores nor merges" in caplog.text
    # One that is not needed is left alone.
    assert tokenizer_of(opened(byte_level(), tmp_path)).vocab_size == 16


REFUSED = {
    "no tokenizer": Draft(),
    "kind unknown": byte_level().put("tokenizer.ggml.model", STRING, "bert"),
    "kind a number": byte_level().put("tokenizer.ggml.model", U32, 1),
    "pre-tokenizer unknown": byte_level().put("tokenizer.ggml.pre", STRING, "deepseek-llm"),
    "pre-tokenizer absent": byte_level().drop("tokenizer.ggml.pre"),
    "merges absent": byte_level().drop("tokenizer.ggml.merges"),
    "merges are numbers": byte_level().put("tokenizer.ggml.merges", ARRAY, (U32, [1])),
    "merge of unknown tokens": byte_level().put("tokenizer.ggml.merges", ARRAY, (STRING, ["z a"])),
    "merge into no token": byte_level().put("tokenizer.ggml.merges", ARRAY, (STRING, ["b a"])),
    "merge without a space": byte_level().put("tokenizer.ggml.merges", ARRAY, (STRING, ["ab"])),
    "merge empty": byte_level().put("tokenizer.ggml.merges", ARRAY, (STRING, [""])),
    "tokens absent": byte_level().drop("tokenizer.ggml.tokens"),
    "tokens none": byte_level().put("tokenizer.ggml.tokens", ARRAY, (STRING, [])),
    "tokens are numbers": byte_level().put("tokenizer.ggml.tokens", ARRAY, (U32, [1, 2])),
    "tokens are text": byte_level().put("tokenizer.ggml.tokens", STRING, "abc"),
    "token twice": vocabulary("gpt2", ["a", "a"]).put("tokenizer.ggml.pre", STRING, "gpt-2"),
    "types too few": byte_level().put("tokenizer.ggml.token_type", ARRAY, (I32, [1])),
    "types are floats": byte_level().put("tokenizer.ggml.token_type", ARRAY, (F32, [1.0] * 16)),
    "bos beyond the vocabulary": byte_level(bos=16),
    "eos far beyond the vocabulary": byte_level(eos=2**32 - 1),
    "bos wanted and not named": byte_level()
    .drop("tokenizer.ggml.bos_token_id")
    .put("tokenizer.ggml.add_bos_token", BOOL, 1),
    "bos as text": byte_level().put("tokenizer.ggml.bos_token_id", STRING, "1"),
    "add_bos a number": byte_level().put("tokenizer.ggml.add_bos_token", U32, 1),
    "template a number": byte_level().put("tokenizer.chat_template", U32, 1),
    "scores too few": sentencepiece_tokens().put("tokenizer.ggml.scores", ARRAY, (F32, [0.0])),
    "scores not finite": sentencepiece_tokens().put(
        "tokenizer.ggml.scores", ARRAY, (F32, [float("nan")] * 267)
    ),
    "scores all the same": sentencepiece_tokens().put(
        "tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 267)
    ),
    "piece too long": vocabulary("llama", ["<unk>", "<s>", "</s>", "a" * 10**6]).put(
        "tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0.0, 0.0, 1.0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_is_not_whole_is_refused(tmp_path: Path, case: str) -> None:
    file = opened(REFUSED[case], tmp_path)
    with pytest.raises(XverseError) as raised:
        tokenizer_of(file)
    assert raised.value.fix


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    draft = byte_level()
    add(draft, "token_embd.weight", torch.zeros(15, 4))
    with pytest.raises(XverseError, match="15 embeddings"):
        tokenizer_of(opened(draft, tmp_path))
