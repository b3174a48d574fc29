"""Pre-training as a person asks for it: shards in, a model folder out that every verb takes."""

import json
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_tokenizer
from xverse import cli
from xverse.data.shard_writer import write_shards
from xverse.data.shards import file_sha256
from xverse.text.tokenizer import Tokenizer
from xverse.train.journal import last_steps, read_events

SENTENCES = (
    "The model is here in the house on the hill.",
    "Is the tin in the inn? The tin is in the inn.",
    "你好，我是语言模型，很高兴。",
    "天气很好，习得知识。",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some sentences over and over, tokenized, with their tokenizer beside them."""
    folder = tmp_path_factory.mktemp("shards")
    write_tiny_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    documents = [
        (tokenizer.encode(text), "en" if text.isascii() else "zh", "web")
        for number in range(40)
        for text in (SENTENCES[number % 4],)
    ]
    write_shards(
        folder,
        documents,
        vocab_size=tokenizer.vocab_size,
        end_id=3,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
    )
    return folder


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_shape(tmp_path_factory.mktemp("shape"), shards)


def write_shape(folder: Path, shards: Path, **changes: object) -> Path:
    config = {
        "model_type": "xverse",
        "vocab_size": Tokenizer.load(shards).vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


RUN = ("--row-tokens", "64", "--rows-per-step", "4", "--update.learning-rate", "5e-3")
SHORT = ("--update.warmup-steps", "5", "--device", "cpu", "--json")


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("changes", "steps", "most"),
    [
        ({}, "60", 0.6),
        ({"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}, "60", 0.6),
    ],
    ids=["dense", "mixture"],
)
def test_a_model_learns_and_answers(
    tmp_path: Path,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    steps: str,
    most: float,
) -> None:
    shape, out = write_shape(tmp_path, shards, **changes), tmp_path / "out"
    words = ["pretrain", str(shards), "--out", str(out), "--shape", str(shape), "--steps", steps]
    held = ("--validation", str(shards), "--keep.evaluate-every", "30", "--keep.evaluate-rows", "4")
    assert cli.run([*words, *RUN, *SHORT, *held]) == 0
    found = report(capsys)
    assert found["outcome"] == "done"
    assert isinstance(found["loss"], float)
    assert found["loss"] < most
    events = list(read_events(out / "run" / "metrics.jsonl"))
    assert last_steps(iter(events))[0]["loss"] > 5  # ln 382: it knew nothing
    assert {"loss.en", "loss.zh"} <= [e for e in events if e["event"] == "evaluate"][-1].keys()

    prompt = ["generate", str(out), "The model is here", "--temperature", "0", "--device", "cpu"]
    assert cli.run([*prompt, "--max-tokens", "24", "--repetition-penalty", "1"]) == 0
    assert capsys.readouterr().out.startswith(" in the house")
