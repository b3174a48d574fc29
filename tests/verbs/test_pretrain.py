"""Pre-training as a person asks for it: shards in, a model folder out that every verb takes."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_tokenizer
from xverse import cli
from xverse.checkpoint.folder import verify_manifest
from xverse.data.shard_writer import write_shards
from xverse.device import child_environment
from xverse.text.tokenizer import Tokenizer
from xverse.train.journal import last_steps, read_events
from xverse.verbs import pretrain

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
        tokenizer_sha256=tokenizer.sha256(),
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
    held = ("--validation", str(shards), "--keep.evaluate-every", "30", "--keep.evaluate-rows", "4")
    assert cli.run([*words(shards, out, shape, int(steps)), *held]) == 0
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


def words(shards: Path, out: Path, shape: Path, steps: int) -> list[str]:
    paths = ["pretrain", str(shards), "--out", str(out), "--shape", str(shape)]
    return [*paths, "--steps", str(steps), *RUN, *SHORT]


def test_a_stopped_run_exits_with_75_and_the_same_command_goes_on(
    tmp_path: Path, shards: Path, shape: Path
) -> None:
    """SIGTERM as soon as the first step stands in the journal."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "xverse", *words(shards, out, shape, 5000)]
    child = subprocess.Popen(command, env=child_environment())
    metrics = out / "run" / "metrics.jsonl"
    while not (metrics.exists() and b'"step"' in metrics.read_bytes()):
        assert child.poll() is None, "it ended before its first step"
        time.sleep(0.01)
    child.terminate()
    assert child.wait() == pretrain.STOPPED == 75
    made = len(last_steps(read_events(metrics)))
    assert not (out / "config.json").exists()
    assert cli.run(words(shards, out, shape, made + 2)) == 0
    assert len(last_steps(read_events(metrics))) == made + 2
    assert (out / "config.json").exists()
    events = [event["event"] for event in read_events(metrics)]
    assert events.count("start") == 2
    assert (out / "run" / "loss.png").exists() or find_spec("matplotlib") is None


def test_a_dry_run_tells_and_writes_nothing(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["pretrain", str(shards), "--out", str(out), "--dry-run", "--shape", "xverse-7b"]
    assert cli.run([*line, "--json"]) == 0
    told = report(capsys)
    assert told["parameters"] == 7_299_846_144
    assert cli.run(line) == 0
    assert "masters" in capsys.readouterr().out
    assert not out.exists()


def test_going_on_from_a_model_with_a_longer_context(
    tmp_path: Path, shards: Path, shape: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run(words(shards, first, shape, 3)) == 0
    line = ["pretrain", str(shards), "--out", str(second), "--start", str(first), "--steps", "2"]
    longer = ("--row-tokens", "256", "--rope-theta", "500000", "--rows-per-step", "2")
    assert cli.run([*line, *longer, *SHORT]) == 0
    config = json.loads((second / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (500000.0, 256)
    before, after = (
        last_steps(read_events(folder / "run" / "metrics.jsonl")) for folder in (first, second)
    )
    assert after[0]["loss"] < before[0]["loss"]  # it knew something already
    assert verify_manifest(second) == []


def test_what_cannot_be_is_told(
    tmp_path: Path, shards: Path, shape: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_shape(tmp_path, shards, vocab_size=100)
    other = tmp_path / "other"
    write_tiny_tokenizer(other)
    file = other / "tokenizer.json"
    facts = json.loads(file.read_text("utf-8"))
    facts["model"]["merges"].pop()
    file.write_text(json.dumps(facts), "utf-8")
    out = tmp_path / "out"
    for changed, why in (
        (["--shape", str(small)], "The shards have"),
        (["--shape", "xverse-9b"], "There is no shape 'xverse-9b'"),
        (["--shape", "from-depth:0"], "cannot be"),
        (["--tokenizer", str(other)], "is not the tokenizer that made the shards"),
        (["--mesh.tensor", "2"], "The mesh has 2 devices, and there are 1 processes"),
    ):
        assert cli.run([*words(shards, out, shape, 2), *changed]) == 1
        assert why in capsys.readouterr().err
