"""EVALUATION ON ONE GPU. XVERSE-7B's shape, random weights, its own tokenizer, the real questions.

    check         label log-probabilities through the prefix tree beside the plain decoder's (20 s)
    mmlu-bf16     all 14,042 questions, 5 examples each (65 s)
    mmlu-notree   a few whole subjects with the tree and without it, and what all would take (65 s)
    mmlu-fp8kv    as mmlu-bf16, keys and values in fp8 (65 s)
    mmlu-fp8      as mmlu-bf16, weights, and keys and values, in fp8 (50 s)
    suite         `xverse evaluate --tasks published`: eleven benchmarks, one command (300 s); what
                  mmlu-bf16 has asked in the same run is not asked again, and its time is added
    host          all of MMLU past an engine whose device answers at once, what the host does for
                  it; for a CPU, and only when it is named (40 s on two cores)

Random weights end no answer, so every answer that is written has its full length. The code is that
of `xverse evaluate`; only the weights are made on the device instead of read. Where nothing of
the workshop can be reached, the data comes as one archive of 7 MB:

    python -m bench.eval_gpu --pack eval_data.tar.xz          where $XVERSE_DATA is
    python -m bench.eval_gpu --data eval_data.tar.xz --sections check,mmlu-bf16,mmlu-notree

`--small` is a few questions for a tiny model on a CPU, through the same lines. Figures are saved
after each section, to bench/results/.
"""

import argparse
import gc
import json
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.eval_peers import data as data_folder
from bench.eval_watch import Silent, engine_of, measured
from bench.record import record
from xverse.checkpoint.load import Checkpoint, Model
from xverse.engine.agree import ROUNDING_STEPS
from xverse.engine.engine import Engine
from xverse.engine.llm import LLM
from xverse.engine.options import GPU_RUNNING, GPU_STEP, EngineOptions
from xverse.engine.request import Request
from xverse.errors import XverseError
from xverse.evals.choice import asks_of
from xverse.evals.evaluate import evaluate
from xverse.evals.harness import Options, run_tasks
from xverse.evals.item import Item, Task
from xverse.evals.local import LocalDoor
from xverse.evals.sandbox import require_sandbox
from xverse.evals.tasks import PUBLISHED, all_tasks
from xverse.model.cache import Packed
from xverse.model.catalog import CATALOG
from xverse.model.fresh import random_decoder
from xverse.model.shape import ModelShape
from xverse.quant.quantize import quantize
from xverse.text.tokenizer import Tokenizer

ON_GPU = ("check", "mmlu-bf16", "mmlu-notree", "mmlu-fp8kv", "mmlu-fp8", "suite")
SECTIONS = (*ON_GPU, "host")
TARGETS_S = {"mmlu-bf16": 120, "mmlu-fp8kv": 80, "mmlu-fp8": 80, "suite": 1200}
MODEL = "xverse-7b"
SMALL = ModelShape(
    model_type="xverse",
    vocab_size=100_534,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=8192,
)
# What the published suite reads, and nothing that it does not.
PACKED = (
    *("mmlu/dev", "mmlu/test", "ceval/dev", "ceval/val", "agieval", "gaokao-bench", "cmmlu"),
    *("race-middle", "commonsenseqa", "piqa", "gsm8k", "humaneval"),
)
TOKENIZER = "tokenizer/tokenizer.json"
SOME_SUBJECTS = 8  # of 57, for what takes long: 1,781 questions of 1,170 tokens on average


@dataclass
class Bench:
    """What all sections share: where data and results are, and the model of the moment."""

    args: argparse.Namespace
    data: Path
    work: Path
    device: torch.device
    figures: dict[str, Any] = field(default_factory=dict)
    _open: tuple[str, LocalDoor] | None = None

    def door(self, weights: str = "bf16", kv_dtype: str = "auto") -> LocalDoor:
        """The model with such weights and such keys and values; one at a time has the memory."""
        kind = f"{weights} {kv_dtype}"
        if self._open is None or self._open[0] != kind:
            self._open = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._open = kind, LocalDoor(self.llm(weights, kv_dtype))
        return self._open[1]

    def limit(self) -> int | None:
        """Questions of a task; all of them but with --small."""
        return 5 if self.args.small else None

    def save(self) -> None:
        """The figures so far, unless they are of a tiny model."""
        if not self.args.small:
            record(self.args.record, self.figures, ("triton", "tokenizers"))

    def llm(self, weights: str, kv_dtype: str) -> LLM:
        """A new model; tiny on a CPU."""
        tiny = self.device.type == "cpu"
        shape = SMALL if tiny else CATALOG[MODEL]
        dtype = torch.float32 if tiny else torch.bfloat16
        decoder = random_decoder(shape, dtype=dtype, device=self.device)
        if weights != "bf16":
            quantize(decoder, weights, method="rtn")
        tokenizer = Tokenizer.load(self.data.parent / TOKENIZER)
        folder = self.work / "no weights"
        folder.mkdir(exist_ok=True)
        checkpoint = Checkpoint(f"{MODEL}, random weights", folder, shape, {}, {})
        return LLM(
            Model(decoder, tokenizer, checkpoint),
            share_prefixes=True,
            kv_dtype="fp8" if kv_dtype == "fp8" else "auto",
            kv_tokens=32_768 if tiny else None,
        )


def part_of(task: Task, items: Sequence[Item]) -> Task:
    """The task with these items only."""
    return replace(task, load=lambda folder, shots: items)


def some_subjects(bench: Bench, count: int) -> Task:
    """Whole subjects of MMLU, evenly chosen by their names."""
    task = all_tasks()["mmlu"]
    items = task.items(bench.data)
    subjects = sorted({item.group for item in items})
    chosen = {subjects[place * len(subjects) // count] for place in range(count)}
    some = [item for item in items if item.group in chosen]
    return part_of(task, some[: bench.limit()])


def check(bench: Bench, door: LocalDoor, *, rounded: bool = False) -> dict[str, Any]:
    """Log-probabilities of labels, of questions that share examples, beside the plain decoder's.

    Logits of random weights have a standard deviation of 1.3. The plain decoder has the same
    weights; where the engine has rounded keys and values, or activations, it has not.
    """
    task = all_tasks()["mmlu"]
    items = task.items(bench.data)
    subjects = sorted({item.group for item in items})[:: 16 if bench.args.small else 9]
    some = [[i for i in items if i.group == subject][:3] for subject in subjects]
    worst, squares, count, spread, picks = 0.0, 0.0, 0, 0.0, 0
    for number, group in enumerate(some):
        asks = [ask for item in group for ask in asks_of(task, item, 5, False)]
        found = door.read(asks, f"check {number}")
        for ask, reading in zip(asks, found, strict=True):
            (request,) = door._plan(ask, "")
            plain = plain_labels(door, request)
            apart = [abs(a - b) for a, b in zip(reading.logprobs, plain[0], strict=True)]
            worst, spread = max(worst, *apart), max(spread, plain[1])
            squares, count = squares + sum(x * x for x in apart), count + len(apart)
            order = sorted(range(len(apart)), key=plain[0].__getitem__)
            picks += max(range(len(apart)), key=reading.logprobs.__getitem__) == order[-1]
    eps = torch.finfo(torch.bfloat16 if rounded else door.llm.decoder.dtype).eps
    allowed = ROUNDING_STEPS * (2 if rounded else 1) * eps * spread
    return {
        "questions": count // 4,
        "same_pick": picks,
        "largest_difference": round(worst, 5),
        "rms_difference": round((squares / count) ** 0.5, 5),
        "allowed": round(allowed, 4),
        "sound": worst <= allowed,
        "reused_tokens": engine_of(door).scheduler.reused_tokens,
    }


@torch.inference_mode()
def plain_labels(door: LocalDoor, request: Request) -> tuple[list[float], float]:
    """The labels' log-probabilities by the decoder alone, and the largest logit's size."""
    decoder = door.llm.decoder
    kv = Packed([len(request.ids)], decoder.device)
    ids_T = torch.tensor(request.ids, device=decoder.device)
    last = torch.tensor([len(request.ids) - 1], device=decoder.device)
    logits_V = decoder(ids_T, kv.positions(), kv, last)[0].float()
    found = logits_V.log_softmax(-1)[torch.tensor(request.labels, device=decoder.device)]
    return found.tolist(), float(logits_V.abs().max())


def checked(bench: Bench) -> dict[str, Any]:
    """The check of the bf16 model; it also compiles the kernels."""
    found = check(bench, bench.door())
    assert found["sound"], found
    return found


def mmlu(bench: Bench, name: str, weights: str, kv_dtype: str) -> dict[str, Any]:
    """The whole of MMLU, report included; its first questions are asked before, to warm up."""
    door = bench.door(weights, kv_dtype)
    first = check(bench, door, rounded="fp8" in (weights, kv_dtype))
    run_tasks(door, [some_subjects(bench, 1)], bench.data, bench.work / f"{name} warm", Options())
    figures = measured(door, lambda: asked(bench, door, name, "mmlu"), bench.args.most_s)
    return figures | {"check": first}


def asked(bench: Bench, door: LocalDoor, out: str, tasks: str) -> int:
    """`xverse evaluate --tasks ...`; how many questions it reports on."""
    report = evaluate(
        door, tasks, out=bench.work / out, data=bench.data, limit=bench.limit(), plots=False
    )
    return sum(figure.n for figure in report.figures)


def without_tree(bench: Bench) -> dict[str, Any]:
    """The same whole subjects with the prefix tree and without; all of MMLU by tokens a second."""
    door, task = bench.door(), some_subjects(bench, SOME_SUBJECTS)
    pages, most_s = engine_of(door).pages, bench.args.most_s
    found: dict[str, Any] = {"subjects": SOME_SUBJECTS}

    def work(out: str) -> int:
        (result,) = run_tasks(door, [task], bench.data, bench.work / out, Options())
        return len(result.items)

    for name, share in (("with_tree", True), ("without_tree", False)):
        pages.share = share
        try:
            found[name] = measured(door, lambda out=name: work(out), most_s)  # type: ignore[misc]
        finally:
            pages.share = True
    found["ratio"] = round(found["without_tree"]["seconds"] / found["with_tree"]["seconds"], 2)
    whole = bench.figures.get("mmlu-bf16")
    if whole and not bench.args.small:
        rate = found["without_tree"]["prompt_tokens_per_s"]
        scaled = whole["prompt_tokens"] / rate
        found["all_questions_without_tree_s"] = round(scaled, 1)
        found["all_questions_ratio"] = round(scaled / whole["seconds"], 2)
    return found


def suite(bench: Bench) -> dict[str, Any]:
    """The published suite; where no sandbox can be had, HumanEval's programs are not run."""
    door, most_s = bench.door(), bench.args.most_s
    note = "programs were run in the sandbox"
    with ExitStack() as patches:
        try:
            require_sandbox()
        except XverseError as error:
            note = f"HumanEval's programs were written and not run: {error.why}"
            plain = replace(all_tasks()["humaneval"], grade=lambda i, s: 0.0, sandboxed=False)
            tasks = [plain if name == "humaneval" else all_tasks()[name] for name in PUBLISHED]
            patches.enter_context(mock.patch("xverse.evals.evaluate.tasks_of", return_value=tasks))
        found = measured(door, lambda: asked(bench, door, "mmlu-bf16", "published"), most_s)
    before = bench.figures.get("mmlu-bf16", {}).get("seconds", 0.0)
    found["seconds_of_mmlu_before"] = before
    found["seconds_in_all"] = round(found["seconds"] + before, 2)
    return found | {"note": note}


def host(bench: Bench) -> dict[str, Any]:
    """Batches, steps and memory as they are on the H200, and nothing computed."""
    options = EngineOptions(245_232, step_tokens=GPU_STEP, max_running=GPU_RUNNING)
    with (
        mock.patch.object(Engine, "_runner", return_value=Silent()),
        mock.patch.object(EngineOptions, "on", return_value=options),
    ):
        door = LocalDoor(bench.llm("bf16", "auto"))
    engine_of(door).overlap, door.batch = True, 512
    return measured(door, lambda: asked(bench, door, "host", "mmlu"), bench.args.most_s)


def run(bench: Bench, name: str) -> dict[str, Any]:
    """One section."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "check": lambda: checked(bench),
        "mmlu-bf16": lambda: mmlu(bench, name, "bf16", "auto"),
        "mmlu-notree": lambda: without_tree(bench),
        "mmlu-fp8kv": lambda: mmlu(bench, name, "bf16", "fp8"),
        "mmlu-fp8": lambda: mmlu(bench, name, "fp8", "fp8"),
        "suite": lambda: suite(bench),
        "host": lambda: host(bench),
    }
    found = kinds[name]()
    if name in TARGETS_S:
        seconds = found.get("seconds_in_all", found["seconds"])
        found |= {"target_s": TARGETS_S[name], "target_met": seconds <= TARGETS_S[name]}
    return found


def pack(file: Path) -> None:
    """Write the archive of what the sections read."""
    with tarfile.open(file, "w:xz") as archive:
        for name in PACKED:
            archive.add(data_folder() / name, f"eval/{name}")
        archive.add(data_folder().parent / TOKENIZER, TOKENIZER)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The published benchmarks on one GPU.")
    parser.add_argument("--sections", default=",".join(ON_GPU), help="%(default)s; and host")
    parser.add_argument("--most-s", type=float, default=500, help="of a section; it then stops")
    parser.add_argument("--data", type=Path, help="the archive; else $XVERSE_DATA")
    parser.add_argument("--pack", type=Path, help="write that archive, and do nothing else")
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--record", default="eval_h200", help="name of the JSON file")
    args = parser.parse_args()
    args.sections = args.sections.split(",")
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there are no sections {sorted(unknown)}")
    return args


def main() -> None:
    """Section by section; one that fails is told, and the next begins."""
    args = arguments()
    if args.pack is not None:
        pack(args.pack)
        return
    with tempfile.TemporaryDirectory() as place:
        data = data_folder()
        if args.data is not None:
            with tarfile.open(args.data) as archive:
                archive.extractall(place, filter="data")
            data = Path(place) / "eval"
        device = torch.device("cpu" if args.small or args.sections == ["host"] else "cuda")
        bench = Bench(args, data, Path(place), device)
        bench.figures["model"] = f"{MODEL} shape, random weights, XVERSE's own tokenizer"
        for name in args.sections:
            start = time.perf_counter()
            try:
                bench.figures[name] = run(bench, name)
            except Exception:
                traceback.print_exc()
                bench.figures[f"{name} failed"] = traceback.format_exc(limit=-3)
            print(f"{name}: {time.perf_counter() - start:.1f} s in all", flush=True)
            print(json.dumps(bench.figures.get(name), indent=1), flush=True)
            bench.save()


if __name__ == "__main__":
    main()
