"""Fine-tuning as a person asks for it: conversations in, a model or an adapter out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_model import write_published_folder
from xverse import cli
from xverse.checkpoint.adapter import read_adapter
from xverse.checkpoint.load import load
from xverse.model.cache import Packed
from xverse.train import lora
from xverse.train.journal import last_steps, read_events
from xverse.train.tuning import Lora

ANSWERS = (
    ("Who is here?", "The model is here."),
    ("Where is the tin?", "The tin is in the inn."),
    ("你好吗？", "我很好，谢谢。"),
    ("天气怎样？", "天气很好。"),
)
FEW = ("--row-tokens", "96", "--rows-per-step", "4", "--rows-per-pass", "2", "--device", "cpu")
SHORT = ("--update.warmup-steps", "2", "--keep.evaluate-every", "5", "--held-out", "4", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_published_folder(folder, shards=1)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": ANSWERS[i % 4][0], "output": ANSWERS[i % 4][1]} for i in range(44)]
    return write_rows(tmp_path_factory.mktemp("data") / "answers.jsonl", rows)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for number in range(24):
        (asked, answer), (_, other) = ANSWERS[number % 4], ANSWERS[(number + 1) % 4]
        rows.append({"instruction": asked, "input": "", "chosen": answer, "rejected": other})
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def finetune(model: Path, data: Path, out: Path, *words: str) -> int:
    return cli.run(["finetune", str(model), str(data), "--out", str(out), *FEW, *SHORT, *words])


def evaluations(out: Path) -> list[dict[str, Any]]:
    events = read_events(out / "run" / "metrics.jsonl")
    return [event for event in events if event["event"] == "evaluate"]


def logits(decoder: Any) -> torch.Tensor:
    kv = Packed((12,))
    return decoder(torch.arange(12) * 5 % 300, kv.positions(), kv).float()


def test_all_weights_learn_and_the_folder_answers(
    tmp_path: Path, model: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "full", "--epochs", "6", "--update.learning-rate", "2e-3")
    assert finetune(model, conversations, tmp_path, *words, "--format", "default") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["outcome"] == "done"
    held = [event["loss"] for event in evaluations(tmp_path)]
    assert told["best"]["loss"] == min(held) < 0.5 * held[0]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["xverse_chat_format"] == "default"
    generation = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))
    assert generation["top_k"] == 30  # of the model that it began with
    ask = ["generate", str(tmp_path), "Who is here?", "--chat", "--temperature", "0"]
    assert cli.run([*ask, "--device", "cpu", "--repetition-penalty", "1"]) == 0
    assert capsys.readouterr().out.strip() == "The model is here."


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_learns_and_is_merged(
    tmp_path: Path, model: Path, conversations: Path, method: str
) -> None:
    words = ("--method", method, "--epochs", "3", "--update.learning-rate", "5e-3")
    assert finetune(model, conversations, tmp_path / "a", *words, "--lora.rank", "4") == 0
    held = [event["loss"] for event in evaluations(tmp_path / "a")]
    assert held[-1] < 0.8 * held[0]
    adapter = read_adapter(tmp_path / "a")
    assert len(adapter.weights) == 4 * 7
    assert adapter.chat_format == "v2"
    [saved] = list((tmp_path / "a" / "run" / "checkpoints").glob("*/shard-*"))[-1:]
    assert saved.stat().st_size < 3.5 * adapter.nbytes  # its weights and their two moments

    export = ["export", str(model), str(tmp_path / "b"), "--to", "merged", "--adapter"]
    assert cli.run([*export, str(tmp_path / "a")]) == 0
    base, merged = (load(folder, device="cpu").decoder for folder in (model, tmp_path / "b"))
    plain = logits(base)
    for name, change in adapter.weights.items():
        scale = adapter.scale(name)
        weight_ND = base.get_submodule(name).weight.float() + scale * change.b_NR @ change.a_RD
        assert torch.equal(merged.get_submodule(name).weight, weight_ND.bfloat16())
        lora.put_on(base, name, change.a_RD, change.b_NR, scale)
    learned = logits(base)
    assert (learned - plain).norm() > 0.1 * plain.norm()
    assert (logits(merged) - learned).norm() < 0.04 * learned.norm()  # bf16, and large weights


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_preferences_are_learned(
    tmp_path: Path, model: Path, preferences: Path, weights: str
) -> None:
    words = ("--method", "dpo", "--dpo.weights", weights, "--epochs", "3", "--read.cutoff", "48")
    rate = ("--update.learning-rate", "5e-3" if weights == "lora" else "2e-4")
    assert finetune(model, preferences, tmp_path, *words, *rate) == 0
    steps = last_steps(read_events(tmp_path / "run" / "metrics.jsonl"))
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: it is its reference
    assert steps[0]["rewards.margin"] == pytest.approx(0, abs=1e-3)
    last = evaluations(tmp_path)[-1]
    assert last["rewards.accuracy"] == 1.0
    assert last["rewards.margin"] > 0.1
    assert last["loss"] < 0.65


def test_a_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, model: Path, conversations: Path
) -> None:
    """With dropout and noise, which are random."""
    words = ("--lora.dropout", "0.1", "--noise", "5", "--keep.save-every", "4", "--steps")
    for name, steps in (("whole", ["8"]), ("parts", ["4", "8"])):
        for count in steps:
            schedule = ("--update.schedule", "constant")
            assert finetune(model, conversations, tmp_path / name, *words, count, *schedule) == 0
    whole, parts = (
        [step["loss"] for step in last_steps(read_events(tmp_path / name / "run/metrics.jsonl"))]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole) == 8


def test_a_run_without_hope_ends(tmp_path: Path, model: Path, conversations: Path) -> None:
    """A rate that only does harm: the first evaluation is the best, and its weights are taken."""
    words = ("--steps", "30", "--update.learning-rate", "3", "--keep.evaluate-every", "1")
    assert finetune(model, conversations, tmp_path, *words, "--keep.patience", "3") == 0
    events = list(read_events(tmp_path / "run" / "metrics.jsonl"))
    held = [event["loss"] for event in events if event["event"] == "evaluate"]
    assert len(held) < 30
    [best] = [event for event in events if event["event"] == "best"]
    assert best["loss"] == min(held)
    assert len(held) == best["step"] + 3


def test_a_dry_run_tells_what_fits(
    tmp_path: Path, model: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert finetune(model, conversations, out, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["rows_read"] > 0
    offloaded = {f"full, {what} offloaded" for what in ("optimizer", "parameters")}
    assert set(plan["memory_bytes"]) == {"full", "lora", "qlora int8", "qlora int4"} | offloaded
    assert all(all(found["fits"].values()) for found in plan["memory_bytes"].values())
    line = ["finetune", str(model), str(conversations), "--out", str(out), *FEW, "--dry-run"]
    assert cli.run(line) == 0
    assert "qlora int4" in capsys.readouterr().out
    assert not out.exists()


def test_what_cannot_be_is_told(
    tmp_path: Path,
    model: Path,
    conversations: Path,
    preferences: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for data, changed, why in (
        (conversations, ["--method", "dpo"], "There are no pairs"),
        (preferences, ["--read.cutoff", "48"], "The data are pairs"),
        (conversations, ["--rows-per-step", "3"], "cannot be shared"),
        (conversations, ["--lora.targets", "q_prj"], "Did you mean 'q_proj'"),
        (conversations, ["--format", "v9"], "There is no chat format 'v9'"),
        (conversations, ["--noise", "-1"], "The noise -1 cannot be"),
        (conversations, ["--held-out", "0"], "no best evaluation"),
        (conversations, ["--compute.fp8"], "do not multiply in FP8"),
    ):
        assert finetune(model, data, tmp_path / "out", *changed) == 1
        assert why in capsys.readouterr().err
    export = ["export", str(model), str(tmp_path / "b"), "--adapter", str(tmp_path)]
    assert cli.run(export) == 1
    assert "go together" in capsys.readouterr().err


def test_what_the_plan_counts_is_what_there_is() -> None:
    from tests.train.tiny import tiny_decoder
    from xverse.train.fit import adapter_parameters

    mixture = {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 2}
    for changes in ({}, mixture):
        for dora in (False, True):
            options = Lora(rank=3, dora=dora)
            decoder = lora.add_lora(tiny_decoder(**changes), options)
            learning = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
            assert adapter_parameters(decoder.shape, options) == learning


@pytest.mark.parametrize(("method", "most"), [("qlora int4", 10e9), ("lora", 20e9)])
def test_a_model_of_7b_fits_small_cards(method: str, most: float) -> None:
    from xverse.model.catalog import CATALOG
    from xverse.train.fit import needs
    from xverse.train.options import Computing
    from xverse.train.tuning import FineTuning

    options = FineTuning(row_tokens=2048, compute=Computing(recompute="full"))
    found = needs(CATALOG["xverse-7b"], options, method, Lora(), dtype="bfloat16", ranks=1)
    assert found.total < most
