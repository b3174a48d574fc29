"""Measure a model here: latency, throughput and memory, also beside peers in the same run."""

import contextlib
import dataclasses
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from xverse.errors import XverseError
from xverse.log import progress
from xverse.verbs._benchmark_engine import (
    SubjectOptions,
    check,
    find_shape,
    is_quantized,
    open_engine,
)
from xverse.verbs._benchmark_plan import Cell, Plan, Workload, make_plan
from xverse.verbs._benchmark_report import (
    OURS,
    FirstToken,
    Latency,
    Load,
    Report,
    first_token_rows,
    latency_rows,
    load_rows,
)
from xverse.verbs._peers import Peer, PeerName, Subject, check_peer, open_peer

if TYPE_CHECKING:
    from xverse.engine.agree import Agreement
    from xverse.engine.engine import Engine
    from xverse.engine.measure import Measured, Steps
    from xverse.engine.spread import SpreadEngine
    from xverse.verbs._benchmark_report import Runs

LIBRARIES = ("torch", "triton", "transformers", "vllm", "llama-cpp-python")


@dataclass(frozen=True, kw_only=True)
class Config(SubjectOptions):
    """What `xverse benchmark` takes."""

    workload: Workload = "fixed"
    """Requests of one length, or of lengths drawn uniformly from ranges (seed 0)."""
    prompt_tokens: str | None = None
    """Length of prompts: 128, or with --workload uniform a range, 100-1024."""
    new_tokens: str | None = None
    """Length of answers, likewise; end ids do not end them."""
    first_token_prompts: str | None = None
    """Prompt lengths to measure the time to the first token of: 128,512,2048."""
    concurrency: str | None = None
    """How many requests at once, one table row each: 1,8,64 on a GPU and 1,4,16 on a CPU."""
    requests: int | None = None
    """Requests of each row; as many as run at once, or four times that if lengths vary."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    repeat: int = 3
    """Rounds of every figure, after one that is not timed."""
    peer: tyro.conf.UseAppendAction[tuple[PeerName, ...]] = ()
    """Time this library in the same run, in turn; may be given several times."""
    json: bool = False
    """Print one JSON object."""
    out: str | None = None
    """Write the JSON to this file, too."""


def run(config: Config) -> int:
    """Print the tables; 1 where the engine's answers are not those of the plain decoder."""
    from xverse.files import write_json

    report = benchmark(config)
    if config.out is not None:
        write_json(Path(config.out).expanduser(), report.to_json())
    if config.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        from xverse.verbs._benchmark_tables import show

        show(report)
    return 0 if report.sound else 1


def benchmark(config: Config) -> Report:
    """Check, then measure. XverseError, before anything is timed, for what cannot be measured."""
    from xverse.engine.footprint import bytes_per_token, copy_bandwidth, footprint

    for flag, count in (("repeat", config.repeat), ("tensor-parallel", config.tensor_parallel)):
        if count < 1:
            raise XverseError(
                f"--{flag} cannot be {count}.", "It counts rounds or GPUs.", "Give 1 or more."
            )
    subject, plan = _prepare(config)
    for name in config.peer:
        check_peer(name, subject)
    engine = open_engine(config, subject)
    agreement = check(engine, config)
    facts = _facts(config, subject, plan, engine, agreement)
    if agreement is not None and not agreement.sound:
        return Report(**facts)
    cells = plan.cells(subject.shape.vocab_size, config.temperature)
    for cell in progress(cells, total=len(cells), label="warming up"):
        cell.measure(engine, "warm")
    memory: dict[str, object] = dataclasses.asdict(footprint(engine))
    bandwidth, read = copy_bandwidth(subject.device), bytes_per_token(engine.decoder)
    memory |= {
        "copy_bandwidth_bytes_per_s": round(bandwidth),
        "bytes_read_per_token": read,
        "floor_tokens_per_s": round(bandwidth / read, 2),
    }
    peers: dict[str, Peer] = {
        name: open_peer(name, subject, engine.decoder) for name in dict.fromkeys(config.peer)
    }
    try:
        said = {name: _introduced(peer, agreement) for name, peer in peers.items()}
        runs = _runs({OURS: engine, **peers}, cells, config.repeat)
    finally:
        for peer in peers.values():
            peer.close()
    return Report(**facts, memory=memory, peers=said, **_rows(runs, plan, bandwidth / read))


def _prepare(config: Config) -> tuple[Subject, Plan]:
    """What is measured, and the plan; nothing but configs is read for it."""
    from xverse.device import pick_device

    device = pick_device(config.device)
    title, path, shape = find_shape(config)
    plan = make_plan(
        workload=config.workload,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        first_token_prompts=config.first_token_prompts,
        concurrency=config.concurrency,
        requests=config.requests,
        device=device.type,
        context=shape.context_length,
    )
    subject = Subject(
        title,
        path,
        shape,
        device,
        random_weights=config.random_weights,
        quantized=config.quantize is not None or is_quantized(path, config.random_weights),
        kv_dtype=config.kv_dtype,
        most_running=max(plan.concurrency),
        longest=plan.longest,
    )
    return subject, plan


def _runs(
    runners: "Mapping[str, Steps]", cells: Sequence[Cell], repeat: int
) -> "list[tuple[Cell, Runs]]":
    """Every cell, in turn by every runner, `repeat` times; peers warm up here as ours did."""
    found: list[tuple[Cell, Runs]] = []
    for cell in progress(cells, total=len(cells), label="measuring"):
        for who, steps in runners.items():
            if who != OURS:
                cell.measure(steps, "warm")
        runs: dict[str, list[Measured]] = {who: [] for who in runners}
        for number in range(repeat):
            for who, steps in runners.items():
                runs[who].append(cell.measure(steps, str(number)))
        found.append((cell, runs))
    return found


def _rows(runs: "list[tuple[Cell, Runs]]", plan: Plan, floor_tokens_per_s: float) -> dict[str, Any]:
    """The rows of the report's tables, by their names."""
    first: list[FirstToken] = []
    latency: list[Latency] = []
    load: list[Load] = []
    for cell, rounds in runs:
        if cell.kind == "first":
            first += first_token_rows(rounds)
            continue
        load += load_rows(rounds, cell.concurrency)
        if cell.concurrency == 1:
            latency += latency_rows(rounds, plan.prompt_tokens, plan.new_tokens, floor_tokens_per_s)
    return {"first_token": tuple(first), "latency": tuple(latency), "load": tuple(load)}


def _introduced(peer: Peer, agreement: "Agreement | None") -> dict[str, object]:
    """What a peer computes, and how many of the ids that we checked it begins with, too."""
    from xverse.engine.measure import measure_latency

    facts: dict[str, object] = {"computes": peer.computes}
    if agreement is not None and peer.same_weights:
        theirs = measure_latency(peer, [agreement.request]).answers[0].ids
        pairs = zip(agreement.ids, theirs, strict=True)
        differ = next((place for place, (our, their) in enumerate(pairs) if our != their), None)
        facts["equal_ids"] = len(theirs) if differ is None else differ
        facts["of_ids"] = len(theirs)
    return facts


def _facts(
    config: Config,
    subject: Subject,
    plan: Plan,
    engine: "Engine | SpreadEngine",
    agreement: "Agreement | None",
) -> dict[str, Any]:
    """What the report says before any figure."""
    return {
        "command": command_of(config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(subject),
        "model": {
            "title": subject.title,
            "parameters": subject.shape.num_parameters,
            "dtype": str(engine.decoder.dtype).removeprefix("torch."),
            "quantize": config.quantize,
            "random_weights": config.random_weights,
            "tensor_parallel": config.tensor_parallel,
        },
        "engine": dataclasses.asdict(engine.options),
        "workload": {
            "kind": plan.workload,
            "prompt_tokens": plan.prompt_tokens,
            "new_tokens": plan.new_tokens,
            "temperature": config.temperature,
            "repeat": config.repeat,
            "prompts": "random ids, seed 0; no request shares a page with another",
        },
        "correctness": _correctness(agreement),
    }


def _correctness(agreement: "Agreement | None") -> dict[str, object]:
    if agreement is None:
        why = "not checked: the plain decoder runs on one device, and this model is on several"
        return {"sound": None, "verdict": why}
    return {
        "sound": agreement.sound,
        "verdict": str(agreement),
        "ids": list(agreement.ids),
        "plain_ids": list(agreement.plain_ids),
        "ties": agreement.ties,
        "wrong": agreement.wrong,
    }


def _machine(subject: Subject) -> dict[str, object]:
    from xverse import __version__
    from xverse.device import machine_name, total_memory

    versions = {"xverse": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return {
        "name": machine_name(subject.device),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(subject.device),
        "memory_bytes": total_memory(subject.device),
        "versions": versions,
    }


def command_of(config: Config) -> str:
    """The words that ask for the same again: every option that is not at its default."""
    words = ["xverse", "benchmark", *([config.model] if config.model is not None else [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "model":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for one in values for word in (flag, str(one))]
    return shlex.join(words)
