"""xverse tokenizer and xverse prepare, as they are typed."""

import json
import random
from pathlib import Path

import pytest

from xverse.cli import run
from xverse.data.shards import Shards
from xverse.text.tokenizer import Tokenizer

WORDS = ["water", "river", "stone", "light", "morning", "garden", "letter", "house", "winter"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents, and one line that is none."""
    chance = random.Random(3)
    rows = [
        {"text": " ".join(chance.choices(WORDS, k=60)) + f" {number}", "lang": "en", "kind": "web"}
        for number in range(40)
    ]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n", "utf-8")
    return file


def test_from_text_to_shards(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove.pipeline.dedup")
    options = ["--vocab-size", "600", "--out", str(tmp_path / "tokenizer"), "--max-dirty", "0.1"]
    assert run(["tokenizer", "train", str(corpus), *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["documents"] == 40
    assert facts["dirty_lines"] == {"bad JSON": 1}
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == facts["vocab_size"] <= 600

    shown = ["tokenizer", "show", str(tmp_path / "tokenizer"), str(corpus), "--max-dirty", "0.1"]
    assert run([*shown, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"]["bytes"] == 256
    assert facts["layout"]["special"]["<|endoftext|>"] == 3
    assert facts["layout"]["form"] == "xverse"
    [languages] = facts["compression"].values()
    assert languages["en"]["tokens_per_word"] < 1.5
    assert run(shown) == 0
    captured = capsys.readouterr()
    assert "bytes" in captured.out
    assert captured.err.splitlines()[-1].startswith("next: xverse prepare")

    prepared = ["prepare", str(corpus), "--tokenizer", str(tmp_path / "tokenizer")]
    prepared += ["--out", str(tmp_path / "shards"), "--max-dirty", "0.1", "--workers", "1"]
    assert run(prepared) == 0
    captured = capsys.readouterr()
    assert "40 documents read, 40 kept" in captured.out
    assert f"next: xverse pretrain {tmp_path / 'shards'} --out DIR" in captured.err
    shards = Shards.open(tmp_path / "shards", verify=True)
    held_out = Shards.open(tmp_path / "shards" / "validation", verify=True)
    assert shards.documents + held_out.documents == 40


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["train"], "needs a path"),
        (["train", "CORPUS"], "nowhere to put"),
        (["train", "missing.jsonl", "--out", "new"], "not a corpus file"),
        (["train", "CORPUS", "--out", "FULL"], "is there already"),
        (["train", "CORPUS", "--out", "new", "--max-dirty", "0"], "Too many lines"),
        (["train", "CORPUS", "--out", "new", "--max-dirty", "1", "--vocab-size", "9"], "too small"),
        (["show", "missing"], "no tokenizer"),
    ],
)
def test_what_cannot_be_done_is_told(
    corpus: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"CORPUS": str(corpus), "FULL": str(corpus.parent)}
    assert run(["tokenizer", *(names.get(word, word) for word in words)]) == 1
    assert why in capsys.readouterr().err
    assert not Path("new").exists()
