"""CORPUS -> SHARDS. The stages of a preparation as datatrove pipelines, and who executes them."""

import copy
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xverse.data.lock import let_go, wait_for_turn
from xverse.data.plan import STATISTICS, Plan
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.log import counter

POLL_S = 0.2


@dataclass(frozen=True)
class Execution:
    """Who does the work."""

    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int = 1
    """Tasks at the same time; on Slurm and Ray, over all machines."""
    slurm: dict[str, str] = field(default_factory=dict)
    """partition and time, and whatever else datatrove's Slurm executor takes."""


@dataclass(frozen=True)
class Stage:
    """One pipeline, run for every task before the next stage begins."""

    name: str
    steps: list[Any]
    tasks: int


def prepare(plan: Plan, execution: Execution) -> dict[str, Any] | None:
    """Carry out `plan`, from where it was left; its statistics, or None where Slurm has it now.

    Raises XverseError where datatrove is missing, the input is too dirty, or nothing is left.
    """
    _require_datatrove()
    if plan.claim() != "done":
        wait_for_turn(plan.work)
        stages = build_stages(plan)
        try:
            if execution.executor == "local":
                _run_here(plan, stages, execution.workers)
            else:
                _run_elsewhere(plan, stages, execution)
        finally:
            let_go(plan.work)
    if not (plan.out / STATISTICS).is_file():
        return None
    if execution.executor != "slurm":
        shutil.rmtree(plan.work, ignore_errors=True)
    return read_json(plan.out / STATISTICS)


def build_stages(plan: Plan) -> list[Stage]:
    """The stages: each reads what those before it have written into the work folder."""
    from datatrove.pipeline.dedup import (
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    from xverse.data import steps

    work, tasks, dedup = plan.work, len(plan.tasks), plan.settings.dedup
    hashing = HashConfig(precision=64, hash_fc="sha1")  # Python's own; xxhash is one more package
    exact = ExactDedupConfig(content_getter=steps.text_of, hash_config=hashing)
    near = MinhashConfig(hash_config=hashing)

    def folder(name: str) -> str:
        (work / name).mkdir(exist_ok=True)
        return str(work / name)

    def distinct() -> list[Any]:
        kept: list[Any] = [steps.Kept(work)]
        return kept if dedup == "none" else [*kept, ExactDedupFilter(folder("exact"), exact)]

    stages: list[tuple[str, list[Any], int]] = [
        ("read", [steps.Read(plan), steps.Keep(work)], tasks),
        ("check", [steps.CheckDirt(plan)], 1),
    ]
    if dedup != "none":
        signatures = folder("exact-signatures")
        stages += [
            ("exact-signatures", [steps.Kept(work), ExactDedupSignature(signatures, exact)], tasks),
            ("exact-duplicates", [ExactFindDedups(signatures, folder("exact"), exact)], 1),
        ]
    last: list[Any] = [*distinct(), steps.Count(work, "distinct")]
    if dedup == "near":
        signatures, pairs = folder("near-signatures"), folder("near-pairs")
        stages += [
            ("near-signatures", [*distinct(), steps.NearSignature(signatures, near)], tasks),
            ("near-pairs", [MinhashDedupBuckets(signatures, pairs, config=near)], near.num_buckets),
            ("near-duplicates", [MinhashDedupCluster(pairs, folder("near"), near)], 1),
        ]
        last.append(MinhashDedupFilter(folder("near")))
    stages += [
        ("shards", [*last, steps.Tokenize(plan)], tasks),
        ("publish", [steps.Publish(plan)], 1),
    ]
    return [Stage(name, [steps.Hold(work), *parts], count) for name, parts, count in stages]


def _run_here(plan: Plan, stages: list[Stage], workers: int) -> None:
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor

    # Workers of all stages fork from one process that has imported everything: 0.1 s, not 2 s.
    multiprocess.set_forkserver_preload(["xverse.data.steps"])
    for stage in stages:
        logs = plan.work / "logs" / stage.name
        executor = LocalPipelineExecutor(
            stage.steps, stage.tasks, min(workers, stage.tasks), logging_dir=str(logs)
        )
        with _progress(stage, logs / "completions"):
            if min(workers, stage.tasks) > 1:
                executor.run()
                continue
            # As executor.run() does for one worker, but for the process that it starts to
            # share a queue, which outlives a killed parent.
            for rank in executor.get_incomplete_ranks():
                once = copy.copy(executor)
                once.pipeline = copy.deepcopy(stage.steps)
                once._run_for_rank(rank)


def _run_elsewhere(plan: Plan, stages: list[Stage], execution: Execution) -> None:
    """Each stage waits for the one before; the last one's run() starts them all."""
    executor_class = _executor_class(execution.executor)
    before: Any = None
    for stage in stages:
        before = executor_class(
            stage.steps,
            tasks=stage.tasks,
            workers=min(execution.workers, stage.tasks),
            logging_dir=str(plan.work / "logs" / stage.name),
            depends=before,
            **execution.slurm,
            **({"job_name": f"xverse-{stage.name}"} if execution.executor == "slurm" else {}),
        )
    before.run()


def _executor_class(name: str) -> Any:
    if name == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        return SlurmPipelineExecutor
    try:
        import ray
        from datatrove.executor import RayPipelineExecutor
    except ImportError as error:
        raise XverseError(
            "Ray can't execute this.", str(error), 'Run pip install "xverse-llm[data,ray]".'
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return RayPipelineExecutor


@contextmanager
def _progress(stage: Stage, completions: Path) -> Iterator[None]:
    """A bar that counts the tasks which datatrove has marked as completed."""
    done = threading.Event()

    def watch(one_more: Callable[[], None]) -> None:
        seen, going = 0, True
        while going:
            going = not done.wait(POLL_S)
            now = len(list(completions.glob("*")))
            for _ in range(now - seen):
                one_more()
            seen = now

    with counter(stage.tasks, stage.name) as one_more:
        watcher = threading.Thread(target=watch, args=[one_more], daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _require_datatrove() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's bars; ours counts its tasks
    try:
        import datatrove.pipeline.dedup  # noqa: F401
    except ImportError as error:
        raise XverseError(
            "A corpus can't be prepared.",
            f"{error}: datatrove is part of an extra.",
            'Run pip install "xverse-llm[data]".',
        ) from error
