"""Old, damaged and hostile tokenizer files: mended, or refused in words."""

import copy
import json
import random
from pathlib import Path

import pytest

from tests.text.tiny import tiny_tokenizer_json, write_tiny_tokenizer
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.text.repair import modernize
from xverse.text.tokenizer import Tokenizer

Json = dict[str, object]


def metaspace(**options: object) -> Json:
    return {"type": "Metaspace", "replacement": "▁", **options}


@pytest.mark.parametrize(("prefix", "scheme"), [(False, "never"), (True, "always")])
def test_metaspace_gets_its_prepend_scheme(prefix: bool, scheme: str) -> None:
    content: Json = {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Sequence", "pretokenizers": [metaspace(add_prefix_space=prefix)]}
            ],
        },
        "decoder": metaspace(add_prefix_space=prefix),
    }
    assert modernize(content)
    assert content["decoder"] == metaspace(prepend_scheme=scheme)
    assert (
        metaspace(prepend_scheme=scheme)
        == (
            content["pre_tokenizer"]["pretokenizers"][0]["pretokenizers"][0]  # type: ignore[index]
        )
    )


def test_modern_files_stay_as_they_are() -> None:
    content = tiny_tokenizer_json(legacy=False)
    before = copy.deepcopy(content)
    assert not modernize(content)
    assert content == before


def test_a_prefix_space_loads_and_decodes_without_it(tmp_path: Path) -> None:
    text = json.dumps(tiny_tokenizer_json()).replace(
        '"add_prefix_space": false', '"add_prefix_space": true'
    )
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the") == tokenizer.encode(" the")
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def broken(change: str) -> str:
    """tokenizer.json with one thing wrong."""
    content = tiny_tokenizer_json(legacy=False)
    model = content["model"]
    assert isinstance(model, dict)
    if change == "unknown decoder":
        content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    elif change == "no decoder":
        content["decoder"] = None
    elif change == "decoder that replaces by nothing":
        content["decoder"] = {"type": "Replace", "pattern": {"String": "▁"}, "content": ""}
    elif change == "merge of unknown tokens":
        model["merges"].append("Ω Ψ")
    elif change == "merge that is no pair":
        model["merges"].append("abc")
    elif change == "no vocabulary":
        del model["vocab"]
    elif change == "no model":
        del content["model"]
    elif change == "negative id":
        model["vocab"]["!"] = -5
    elif change == "ids that are texts":
        model["vocab"] = {token: str(id) for token, id in model["vocab"].items()}
    elif change == "contradicting metaspace":
        content["pre_tokenizer"] = metaspace(add_prefix_space=False, prepend_scheme="always")
    elif change == "pre-tokenizer that is a number":
        content["pre_tokenizer"] = 7
    elif change == "special token of another id":
        content["added_tokens"] = [{"id": 77777, "content": "<x>", "special": "yes"}]
    elif change == "regular expression that is none":
        content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "x"}
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"pre_tokenizer":' + '{"type":"Sequence","pretokenizers":[' * 400,
        '{"version": "9.9", "model": {"type": "Quantum"}}',
        *map(
            broken,
            [
                "unknown decoder",
                "no decoder",
                "decoder that replaces by nothing",
                "merge of unknown tokens",
                "merge that is no pair",
                "no vocabulary",
                "no model",
                "negative id",
                "ids that are texts",
                "contradicting metaspace",
                "pre-tokenizer that is a number",
                "special token of another id",
                "regular expression that is none",
            ],
        ),
    ],
)
def test_hostile_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(XverseError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(XverseError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_random_damage_never_crashes(tmp_path: Path) -> None:
    good = json.dumps(tiny_tokenizer_json(), ensure_ascii=False).encode()
    dice = random.Random(3)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data))
            data[at : at + dice.randint(0, 9)] = dice.randbytes(dice.randint(0, 3))
        (tmp_path / "tokenizer.json").write_bytes(data)
        try:
            tokenizer = Tokenizer.load(tmp_path)
            tokenizer.decode(tokenizer.encode("a 你好 <sep>"))
        except XverseError:
            continue


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(300 << 20)  # sparse
    with pytest.raises(XverseError, match="too large"):
        read_json(path)


def test_a_bad_config_beside_it_is_named(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(XverseError, match="tokenizer_config"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(XverseError, match="<nowhere>"):
        Tokenizer.load(tmp_path)
