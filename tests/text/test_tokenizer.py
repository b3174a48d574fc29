"""The tokenizer: golden ids, the published file's facts, safety, repair, saving."""

import json
import random
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import shared_data
from tests.text.languages import HARD, SENTENCES
from tests.text.tiny import CONFIG, SPECIALS, tiny_tokenizer_json, write_tiny_tokenizer
from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

EISENHOWER = "德怀特·D·艾森豪威尔在1953年至1961年间担任美国总统,所以他一共任职了8年"
# fmt: off
EISENHOWER_IDS = [
    23091, 23164, 27893, 185, 71, 185, 31994, 25450, 34534, 21629, 22160, 20900, 52, 60, 56, 54,
    22768, 31855, 52, 60, 57, 52, 22768, 36976, 23873, 18807, 98280, 23223, 31067, 47, 98076, 18770,
    18556, 19437, 18807, 31432, 18690, 59, 22768,
]
# fmt: on


def test_golden_ids(real: Tokenizer) -> None:
    assert real.encode(EISENHOWER) == EISENHOWER_IDS
    assert real.decode(EISENHOWER_IDS) == EISENHOWER
    capital = [96740, 98398, 97896, 96604, 98030, 96884, 96636]
    assert real.encode(" The capital of France is") == capital


def test_id_layout_of_the_published_file(real: Tokenizer) -> None:
    assert real.vocab_size == 100534
    assert (real.pad_id, real.bos_id, real.eos_id) == (1, 2, 3)
    assert real.special_ids == frozenset(range(6))
    assert [real.token_bytes(i).decode() for i in range(6)] == list(SPECIALS)
    assert real.token_bytes(6) == b"\x00"
    assert real.encode("!0A9a·") == [36, 51, 68, 60, 100, 185]
    assert real.encode("一龥") == [ord("一") - 1412, ord("龥") - 1412]  # the CJK block
    assert real.encode(" t") == [96568]  # the first merge
    assert real.encode(" solution")[-1] == 100276  # and the last
    assert real.encode("\n\n") == [100277, 100277]
    assert real.encode("\r") == [100278 + 13]
    assert real.encode("   ") == [9044, 9044, 9044]
    assert [real.encode(" " + letter) for letter in "ABCD"] == [[96637], [96679], [96639], [96689]]
    assert [real.token_bytes(100278 + byte) for byte in range(256)] == [
        bytes([byte]) for byte in range(256)
    ]


def test_published_and_modern_file_are_the_same(real: Tokenizer) -> None:
    modern = Tokenizer.load(shared_data("tokenizer/tokenizer.modern.json"))
    for text in [*SENTENCES.values(), *HARD.values(), EISENHOWER]:
        assert modern.encode(text) == real.encode(text)


def test_there_are_enough_languages() -> None:
    assert len(SENTENCES) >= 41


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD.values()])
def test_round_trip(text: str, real: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer in (real, tiny):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text().map(lambda text: text.replace("▁", " ")))
def test_any_text_round_trips(text: str, tiny: Tokenizer) -> None:
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert tiny.special_ids.isdisjoint(ids)


def test_100_000_random_strings(real: Tokenizer) -> None:
    dice = random.Random(1)
    planes = [(0x20, 0x7F), (0x4E00, 0x9FFF), (0, 0xD7FF), (0xE000, 0x10FFFF), (0x1F300, 0x1FAFF)]
    for _ in range(100_000):
        low, high = dice.choice(planes)
        text = "".join(chr(dice.randint(low, high)) for _ in range(dice.randint(0, 16)))
        text = text.replace("▁", " ")
        assert real.decode(real.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 478), max_size=30))
def test_any_ids_decode_to_their_bytes(ids: list[int], tiny: Tokenizer) -> None:
    data = b"".join(map(tiny.token_bytes, ids))
    assert tiny.decode(ids, skip_special=False) == data.decode("utf-8", errors="replace")


def test_special_looking_text_stays_text(tiny: Tokenizer) -> None:
    assert tiny.encode("a<|endoftext|>", parse_special=True) == [100, 3]
    ids = tiny.encode("a<|endoftext|>")
    assert ids[:3] == [100, 63, 127]  # a < |
    assert tiny.special_ids.isdisjoint(ids)
    assert tiny.decode(ids) == "a<|endoftext|>"
    assert tiny.decode([100, 3]) == "a"
    assert tiny.decode([100, 3], skip_special=False) == "a<|endoftext|>"


def test_a_special_token_that_merges_can_spell_stays_text() -> None:
    content = tiny_tokenizer_json(legacy=False)
    model = content["model"]
    assert isinstance(model, dict)
    # "<sep>" is one word with nothing to split it, and merges build it from its letters.
    content["pre_tokenizer"] = None
    vocab = model["vocab"]
    vocab |= {"<s": 479, "<se": 480, "<sep": 481}
    model["merges"] = ["< s", "<s e", "<se p", "<sep >"]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    ids = tokenizer.encode("a<sep>")
    assert ids == [100, *(vocab[character] for character in "<sep>")]
    assert tokenizer.encode("a<sep>", parse_special=True) == [100, 0]


def test_nothing_is_added_to_xverse_text(tiny: Tokenizer) -> None:
    assert tiny.encode("a") == tiny.encode("a", add_special=False) == [100]


def test_add_bos_decides_over_the_file() -> None:
    def built(add_bos: bool | None) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(json.dumps(tiny_tokenizer_json(False)))
        return Tokenizer(backend, bos_token="<|startoftext|>", add_bos=add_bos)

    with_bos = built(True)
    assert with_bos.encode("a") == [2, 100]
    assert with_bos.encode("a", add_special=False) == [100]
    assert with_bos.encode("<|startoftext|>", parse_special=False)[0] == 2
    assert with_bos.encode("<|startoftext|>").count(2) == 1
    assert built(None).encode("a") == built(False).encode("a") == [100]


def test_a_named_token_becomes_special() -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(tiny_tokenizer_json(False)))
    tokenizer = Tokenizer(backend, eos_token="\n")
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.decode([100, tokenizer.eos_id or 0]) == "a"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 5, None, b"a"])
def test_text_that_is_none_is_named(text: object, tiny: Tokenizer) -> None:
    with pytest.raises(XverseError, match="can't be encoded"):
        tiny.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("id", [479, -1, 10**6, 2**40])
def test_unknown_ids_are_named(id: int, tiny: Tokenizer) -> None:
    with pytest.raises(XverseError, match=f"no token with id {id}"):
        tiny.decode([100, id])
    with pytest.raises(XverseError):
        tiny.token_bytes(id)


def test_saving_writes_the_modern_form(tiny: Tokenizer, tmp_path: Path) -> None:
    tiny.save(tmp_path, chat_template="{{ messages }}", chat_format="v2")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # no repair needed
    again = Tokenizer.load(tmp_path)
    for text in [*SENTENCES.values(), *HARD.values(), "<|endoftext|>"]:
        assert again.encode(text) == tiny.encode(text) == Tokenizer(saved).encode(text)
    assert again.chat_template == "{{ messages }}"
    assert again.config["xverse_chat_format"] == "v2"
    assert again.config["clean_up_tokenization_spaces"] is False
    assert (again.bos_id, again.eos_id, again.pad_id) == (2, 3, 1)


def test_saving_names_no_code(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    config = {**CONFIG, "auto_map": {"AutoTokenizer": ["evil.py", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path).save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_special_names_come_from_the_folder(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)

    def named(file: str, content: object) -> tuple[int | None, int | None, int | None]:
        (tmp_path / file).write_text(json.dumps(content))
        tokenizer = Tokenizer.load(tmp_path)
        return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id

    assert named("tokenizer_config.json", {}) == (2, 3, 1)  # XVERSE's own names
    assert named("config.json", {"eos_token_id": [4, 3], "bos_token_id": 5}) == (5, 4, 1)
    assert named("special_tokens_map.json", {"eos_token": {"content": "<sep>"}}) == (5, 0, 1)
    assert named("tokenizer_config.json", {"pad_token": "<sep>", "eos_token": None}) == (5, 0, 0)


def test_chat_template_is_found(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"
    Tokenizer.load(tmp_path).save(tmp_path)  # into the same folder: one template is left
    assert Tokenizer.load(tmp_path).chat_template == "file"
    Tokenizer.load(tmp_path).save(tmp_path, chat_template="new")
    assert Tokenizer.load(tmp_path).chat_template == "new"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [5, {"name": []}]}')
    assert Tokenizer.load(tmp_path).chat_template is None


def test_threads_share_one_tokenizer(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    wrong: list[int] = []

    def work(parse_special: bool) -> None:
        expected = [3] if parse_special else 13
        for _ in range(300):
            ids = tokenizer.encode("<|endoftext|>", parse_special=parse_special)
            if ids != expected and len(ids) != expected:
                wrong.append(len(ids))

    threads = [threading.Thread(target=work, args=(at % 2 == 0,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
