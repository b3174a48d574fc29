"""The published fine-tuning command: every argument of it, on one process and on two."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import write_published_folder
from xverse.device import child_environment
from xverse.errors import XverseError
from xverse.train.deepspeed import Asked, read_deepspeed
from xverse.train.journal import last_steps, read_events
from xverse.verbs import _train_bash

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = """--stage sft --model_name_or_path MODEL --do_train --dataset alpaca_gpt4_en
--template default --finetuning_type full --output_dir OUT --overwrite_cache
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4
--preprocessing_num_workers 1 --lr_scheduler_type cosine --logging_steps 10 --save_steps 200
--eval_steps 200 --learning_rate 2e-5 --max_grad_norm 0.5 --num_train_epochs 2.0
--evaluation_strategy steps --load_best_model_at_end --plot_loss --bf16 --padding_side right
--deepspeed deepspeed.json"""
DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "contiguous_gradients": True,
    },
}
ASKED = Asked(
    ranks=2,
    rows_per_pass=4,
    passes=4,
    clip=0.5,
    bf16=True,
    learning_rate=2e-5,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    weight_decay=0.0,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a data set under its published name, and DeepSpeed's file."""
    folder = tmp_path_factory.mktemp("place")
    write_published_folder(folder / "model", shards=1)
    (folder / "data").mkdir()
    rows = [
        {"instruction": f"Say {n} in the house.", "input": "", "output": f"The tin is {n * 7}."}
        for n in range(60)
    ]
    (folder / "data" / "gpt4.json").write_text(json.dumps(rows))
    info = {"alpaca_gpt4_en": {"file_name": "gpt4.json"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    return folder


def words(place: Path, out: str, **changes: str | None) -> list[str]:
    """The published arguments; a change of None takes one out."""
    text = PUBLISHED.replace("MODEL", str(place / "model")).replace("OUT", str(place / out))
    found = shlex.split(text.replace("deepspeed.json", str(place / "deepspeed.json")))
    for name, value in ({"dataset_dir": str(place / "data")} | changes).items():
        flag = f"--{name}"
        if flag in found:
            at = found.index(flag)
            takes = at + 1 < len(found) and not found[at + 1].startswith("--")
            del found[at : at + 1 + takes]
        if value is not None:
            found += [flag, *([value] if value else [])]
    return found


def test_every_published_argument_and_key_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _train_bash.main(words(place, "dry", dry_run="")) == 0
    told = capsys.readouterr().out
    for name in shlex.split(PUBLISHED):
        if name.startswith("--"):
            assert name.removeprefix("--") in told
    for key in DEEPSPEED["zero_optimization"]:
        assert f"zero_optimization.{key}" in told
    assert "nothing: rows are flat" in told
    assert "1 % is held out" in told
    assert not (place / "dry").exists()


@pytest.mark.parametrize("name", ["--learning_rat", "--zero_stage"])
def test_an_unknown_argument_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as end:
        _train_bash.main([*words(place, "x"), name, "1"])
    assert end.value.code == 2
    assert name in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    """The command in fp32 with a small set and short intervals, on one process and on two."""
    auto = DEEPSPEED | {"bf16": {"enabled": "auto"}}
    (place / "deepspeed.json").write_text(json.dumps(auto))
    short = {"bf16": None, "save_steps": "3", "eval_steps": "3", "logging_steps": "2"}
    short |= {"val_size": "6", "learning_rate": "1e-3"}
    assert _train_bash.main(words(place, "one", **short)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    halved = words(place, "two", **short, gradient_accumulation_steps="2")
    result = subprocess.run(
        [*command, str(ROOT / "examples" / "train_bash.py"), *halved],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=850,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: place / name for name in ("one", "two")}


def metrics(out: Path) -> list[dict[str, Any]]:
    return list(read_events(out / "run" / "metrics.jsonl"))


def test_two_processes_give_the_losses_of_one(runs: dict[str, Path]) -> None:
    one, two = (last_steps(iter(metrics(runs[name]))) for name in ("one", "two"))
    assert len(one) == len(two) == 7  # 2 epochs of 54 rows, 16 a step
    assert [s["loss"] for s in two] == pytest.approx([s["loss"] for s in one], rel=1e-5)
    held = [[e["loss"] for e in metrics(out) if e["event"] == "evaluate"] for out in runs.values()]
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    assert len(held[0]) == 3


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_files_that_scripts_read_are_there(runs: dict[str, Path], name: str) -> None:
    out = runs[name]
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    fields = {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time"}
    assert all(fields | {"remaining_time"} <= line.keys() for line in lines)
    learned = [line for line in lines if "loss" in line]
    assert [line["current_steps"] for line in learned] == [2, 4, 6, 7]
    assert all("learning_rate" in line for line in learned)
    steps = last_steps(iter(metrics(out)))
    assert learned[0]["loss"] == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    held = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(held) == 3
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 7
    assert state["best_metric"] == min(held)
    assert len(state["log_history"]) == len(lines)
    results = json.loads((out / "train_results.json").read_text())
    assert {"epoch", "train_loss", "train_runtime", "train_steps_per_second"} <= results.keys()
    assert (out / "all_results.json").exists()
    for picture in ("training_loss.png", "training_eval_loss.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "model.safetensors.index.json").exists()
    config = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert config["xverse_chat_format"] == "default"


@pytest.mark.parametrize(
    ("stage", "data", "reshard"), [(0, 2, False), (1, 1, False), (2, 1, False), (3, 1, True)]
)
def test_stages_are_spread_by_fsdp(stage: int, data: int, reshard: bool) -> None:
    mapped = read_deepspeed({"zero_optimization": {"stage": stage}}, ASKED)
    assert (mapped.data, mapped.reshard) == (data, reshard)


def offload(stage: int, **sections: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **sections}}


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("config", "became"),
    [
        (offload(2), ("none", True)),
        (offload(2, offload_optimizer=None, offload_param={"device": "none"}), ("none", True)),
        (offload(2, offload_optimizer=CPU), ("optimizer", True)),
        (offload(1, offload_optimizer=CPU | {"pin_memory": False}), ("optimizer", False)),
        (offload(3, offload_param=CPU | {"pin_memory": True}), ("parameters", True)),
        (offload(3, offload_param=CPU, offload_optimizer=CPU), ("parameters", True)),
    ],
)
def test_offload_is_told_and_taken(config: dict[str, Any], became: tuple[str, bool]) -> None:
    mapped = read_deepspeed(config, ASKED)
    assert (mapped.offload, mapped.pinned) == became
    told = {row.key: row.became for row in mapped.rows}
    for key, section in config["zero_optimization"].items():
        if key != "stage":
            here = told[f"zero_optimization.{key}.device"]
            assert ("on the host" in here) is (section is not None and section["device"] == "cpu")
            names = section or {}
            assert all(f"zero_optimization.{key}.{name}" in told for name in names)


def test_every_key_of_the_published_file_has_a_row() -> None:
    rows = read_deepspeed(DEEPSPEED, ASKED).rows
    flat = [*(set(DEEPSPEED) - {"bf16", "zero_optimization"}), "bf16.enabled"]
    flat += [f"zero_optimization.{key}" for key in DEEPSPEED["zero_optimization"]]
    assert sorted(row.key for row in rows) == sorted(flat)
    assert next(row.became for row in rows if row.key == "gradient_clipping") == "0.5"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"zero_optimisation": {}}, "Did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "the stages are 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": 2, "overlap_com": 1}}, "Did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}}, "no meaning here"),
        (
            offload(3, offload_optimizer={"device": "nvme", "nvme_path": "x"}),
            "no disks",
        ),
        (offload(2, offload_param={"device": "cpu"}), "for stage 3"),
        (offload(3, offload_param={"device": "cpu", "ratio": 0.3}), "all of it is offloaded"),
        (offload(3, offload_param={"device": "cpu", "pin_memori": True}), "mean 'pin_memory'"),
        (offload(2, offload_optimizer="cpu"), "an object of options"),
        (offload(2, offload_optimizer={"device": "cpu", "pin_memory": 2}), "true or false"),
        (
            offload(3, offload_param={"pin_memory": True}, offload_optimizer={"pin_memory": False}),
            "the same for all",
        ),
        ({"zero_optimization": 2}, "an object of options"),
        ({"gradient_clipping": 1.0}, "and the command 0.5"),
        ({"train_batch_size": 16}, "and the command 32"),
        ({"bf16": {"enabled": False}}, "and the command True"),
        ({"fp16": {"enabled": True}}, "fp16 is not built"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' has no meaning"),
        ({"optimizer": {"type": "Lamb"}}, "AdamW is there"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "and the command 2e-05"),
    ],
)
def test_what_a_file_cannot_say_is_told(config: dict[str, object], why: str) -> None:
    with pytest.raises(XverseError, match=why):
        read_deepspeed(config, ASKED)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"do_train": None}, "nothing to do"),
        ({"fp16": ""}, "fp16 is not built"),
        ({"quantization_bit": "4"}, "cannot be"),
        ({"dataset": "alpaca_gpt4_zh"}, "alpaca_gpt4_zh"),
    ],
)
def test_what_cannot_be_asked_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], why: str
) -> None:
    alone = {"deepspeed": None, "dry_run": ""} | changes
    assert _train_bash.main(words(place, "x", **alone)) == 1
    assert why in capsys.readouterr().err
