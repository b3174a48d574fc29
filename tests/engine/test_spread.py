"""A model over several processes answers as one does, and its processes never stay behind."""

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.tiny_model import write_published_folder
from xverse import LLM, Grammar, Sampling, XverseError
from xverse.checkpoint.load import load
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request
from xverse.engine.spread import SpreadEngine, spread
from xverse.engine.worker import Job, keep
from xverse.engine.workers import Workers
from xverse.parallel.tensor import keep_part
from xverse.quant.quantize import quantize, quantize_module
from xverse.quant.recipe import Recipe

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=24, ignore_eos=True)
RANDOM = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)
PROMPTS = ["Hello", "The 1 and 2", "北京的天气", "a", "Tell me (now), please: is it so?"]
ROOM = 256  # tokens of KV memory: five of these answers and a few prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", kv_tokens=ROOM)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    llm = LLM(folder, dtype="float32", kv_tokens=ROOM, tensor_parallel=2)
    yield llm
    llm.close()


def engine_of(llm: LLM) -> SpreadEngine:
    assert isinstance(llm.engine, SpreadEngine)
    return llm.engine


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "seeded"])
def test_answers_are_those_of_one_process(one: LLM, two: LLM, sampling: Sampling) -> None:
    assert two.generate(PROMPTS, sampling) == one.generate(PROMPTS, sampling)
    assert two.title == one.title == "XVERSE-Tiny-Chat"
    assert two.engine.capacity == one.engine.capacity


def test_scores_are_those_of_one_process(one: LLM, two: LLM) -> None:
    text = "The 1 and 2 and (so) on"
    found = [logprob.logprob for logprob in two.logprobs(text)]
    assert found == pytest.approx([logprob.logprob for logprob in one.logprobs(text)], abs=1e-4)


def test_without_a_seed_the_ranks_draw_alike(two: LLM) -> None:
    """Each step tells the other rank what the last one gave here, and it would object."""
    free = Sampling(temperature=1.5, max_tokens=12, ignore_eos=True)
    answers = {two.generate("Hello", free).tokens for _ in range(4)}
    assert len(answers) == 4
    two.generate("Hello", GREEDY)


def test_preemption(one: LLM, two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = engine_of(two).engine.scheduler
    preempted = 0
    plain = scheduler._preempt

    def count(generation: object) -> None:
        nonlocal preempted
        preempted += 1
        plain(generation)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "_preempt", count)
    many = PROMPTS * 3
    answers = two.generate(many, Sampling(**vars(GREEDY) | {"max_tokens": 40}))
    assert preempted > 0
    assert answers == one.generate(many, Sampling(**vars(GREEDY) | {"max_tokens": 40}))


def test_readers_that_go_away(one: LLM, two: LLM) -> None:
    for _ in range(3):
        stream = two.stream("The 1 and 2", GREEDY)
        next(stream)
        stream.close()
    assert not two.engine.busy
    assert two.generate(PROMPTS, GREEDY) == one.generate(PROMPTS, GREEDY)
    pages = engine_of(two).engine.pages
    assert pages.available == pages.count


def test_what_one_process_refuses_leaves_the_ranks_together(two: LLM) -> None:
    with pytest.raises(XverseError, match="does not fit"):
        two.engine.add(Request((5,) * 20, Sampling(max_tokens=ROOM).over({})))
    assert len(two.generate("Hello", GREEDY).tokens) == 24


def test_grammars_are_refused_at_once(two: LLM) -> None:
    with pytest.raises(XverseError, match="spread over devices"):
        two.generate("Hello", replace(GREEDY, grammar=Grammar.regex("[a-z]")))
    assert not two.engine.busy


def test_ctrl_c_waits_for_the_step(two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(two).engine
    plain = engine.step
    steps = 0

    def interrupted() -> object:
        nonlocal steps
        steps += 1
        if steps == 2:
            signal.raise_signal(signal.SIGINT)
        return plain()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        two.generate("Hello", GREEDY)
    monkeypatch.undo()
    assert not two.engine.busy
    assert len(two.generate("Hello", GREEDY).tokens) == 24


def test_a_second_model_beside_it_is_refused(folder: Path, two: LLM) -> None:
    with pytest.raises(XverseError, match="process group"):
        LLM(folder, tensor_parallel=2)


def test_a_killed_process_is_told_and_nothing_stays(folder: Path, two: LLM) -> None:
    """The last one to use the fixture's model; after it another one can be loaded."""
    workers = engine_of(two)._workers
    stream = two.stream("Hello", GREEDY)
    next(stream)
    workers.processes[0].kill()
    start = time.monotonic()
    with pytest.raises(XverseError, match="rank 1 of the model ended with code -9"):
        list(stream)
    assert time.monotonic() - start < 30
    with pytest.raises(XverseError, match="ended with code -9"):
        two.generate("Hello", GREEDY)
    two.close()
    two.close()
    assert all(process.returncode is not None for process in workers.processes)
    assert not torch.distributed.is_initialized()


def test_a_process_ends_with_rank_0(folder: Path) -> None:
    """As the system closes the line when rank 0 is killed; and it loads, and says so."""
    job = Job(str(folder), 2, "cpu", "float32", None, EngineOptions(kv_tokens=ROOM))
    workers = Workers(job)
    (fact,) = workers.hear()
    assert fact == {"device": "CPU"}
    workers.lines[0].end.shutdown(2)
    workers.processes[0].wait(20)
    workers.close()


def test_what_a_process_fails_of_is_told(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "nowhere"), 2, "cpu", "float32", None, EngineOptions())
    workers = Workers(job)
    with pytest.raises(XverseError, match="nowhere"):
        workers.hear()
    workers.close()
    with pytest.raises(XverseError, match="nowhere"):
        workers.tell({"do": "step"})


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("moe", [False, True])
def test_a_rank_loads_its_part_of_what_is_rounded_whole(
    tmp_path: Path, bits: int | None, moe: bool
) -> None:
    """Rounded after the cut, a row would have another scale on every rank."""
    write_published_folder(tmp_path / "model", moe=moe)
    whole = load(tmp_path / "model", dtype="float32").decoder
    if bits is not None:
        quantize(whole, bits)
    for rank in range(2):
        job = Job(str(tmp_path / "model"), 2, "cpu", "float32", bits, EngineOptions(kv_tokens=ROOM))
        found = load(job.model, dtype="float32", keep=partial(keep, job, rank)).decoder
        modules = dict(found.named_modules())
        for name, module in whole.named_modules():
            part = keep_part(name, module, whole.shape, rank, 2)
            for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                if "." not in key:
                    assert torch.equal(getattr(modules[name], key), tensor), f"{name}.{key}"


def test_what_is_quantized_is_not_quantized_again(folder: Path) -> None:
    layer = quantize(load(folder).decoder, 8).model.layers[0].mlp.down_proj
    with pytest.raises(XverseError, match="quantized already"):
        quantize_module("model.layers.0.mlp.down_proj", layer, Recipe.of(4))


@pytest.mark.parametrize(
    ("size", "device", "why"),
    [
        (3, "cpu", "1, 2, 4"),
        (0, "cpu", "from 1 to 8"),
        (2, "cuda:0", "not on this machine|names a single one"),
    ],
)
def test_what_cannot_be_spread_is_refused_at_once(
    folder: Path, size: int, device: str, why: str
) -> None:
    with pytest.raises(XverseError, match=why):
        spread(folder, size, dtype="auto", device=device, quantize=None, options=EngineOptions())
