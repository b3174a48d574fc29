"""HOW MUCH DO MORE GPUS GIVE? XVERSE-13B's shape, random weights, bf16, one process a GPU.

`python -m bench.tp_gpu [GPUS]` on a machine with that many (2). First it is checked that sums and
gathers through shared memory are right to the bit over 1000 replays of a graph with ever other
numbers, and that a sharded model computes what the whole one does. Then what a sum costs, by this
package, by PyTorch's one-shot kernel and by NCCL; then a decode step on one GPU and on all.

`python -m bench.tp_gpu GPUS engine` checks instead that an LLM over the GPUs answers as over one,
and tells when a process of it is killed.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.check_decode import distance
from bench.decode_gpu import fused_step, greedy, prefilled, random_model, seconds_per_token
from bench.kv_door import copy_bandwidth
from bench.record import record
from xverse.kernels import allreduce_triton as kernels
from xverse.kernels import reference
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.parallel.mesh import Mesh, share_memory
from xverse.parallel.plan import local_shape, vocabulary_share
from xverse.parallel.tensor import connect, keep_part, shard

SHAPE = CATALOG["xverse-13b-2"]
HIDDEN, VOCABULARY = SHAPE.hidden_size, SHAPE.vocab_size
SUMS_A_STEP = 2 * SHAPE.num_hidden_layers
BATCHES = (1, 8, 16)


class Alone:
    """A mesh that leaves the sums out: what the products of one rank cost, with wrong numbers."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size, self.columns = mesh.rank, mesh.size, 0

    def reserve(self, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        self.columns = vocabulary

    def reduce(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        return x_TD if residual_TD is None else residual_TD + x_TD

    def gather(self, x_TN: Tensor) -> Tensor:
        return torch.nn.functional.pad(x_TN, (0, self.columns - x_TN.shape[1]))


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def ever_other(size: tuple[int, ...], ranks: int, turn: Tensor) -> Tensor:
    """What each rank has in this turn, known to all: [ranks, *size], bf16."""
    places = torch.arange(ranks * torch.Size(size).numel(), device="cuda").view(ranks, *size)
    return (((places + 1) * (turn * 7 + 3) % 1021 - 510) / 16).bfloat16()


def check_sums(mesh: Mesh) -> dict[str, int]:
    """Numbers that were not those of the reference, over all replays: none, or it raises."""
    turn = torch.zeros((), dtype=torch.int64, device="cuda")
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")

    def work() -> None:
        turn.add_(1)
        for rows in (1, 16, 1, 3, 64):
            parts = ever_other((rows, HIDDEN), mesh.size, turn + rows)
            residual = ever_other((rows, HIDDEN), 1, turn)[0] if rows != 3 else None
            y = mesh.reduce(parts[mesh.rank].contiguous(), residual)
            wrong[0] += (y != reference.add_parts(parts, residual)).sum()
        for rows in (1, 5):
            whole = ever_other((rows, VOCABULARY), 1, turn)[0]
            share = vocabulary_share(VOCABULARY, mesh.size)
            mine = whole[:, mesh.rank * share : (mesh.rank + 1) * share].contiguous()
            wrong[1] += (mesh.gather(mine) != whole).sum()

    graph = captured(work)
    for replay in range(1000):
        graph.replay()
        if replay % 97 == mesh.rank:
            torch.cuda.synchronize()
            time.sleep(0.003)  # now this rank is late, now that one
    torch.cuda.synchronize()
    found = {"sums": int(wrong[0]), "gathers": int(wrong[1])}
    assert not any(found.values()), found
    return found


def us_per_call(work: Callable[[], object], calls: int = SUMS_A_STEP) -> float:
    """Median over replays of a graph of as many calls as a step of 13B makes."""

    def many() -> None:
        for _ in range(calls):
            work()

    graph = captured(many)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 5 / calls)
    return round(1e6 * sorted(times)[len(times) // 2], 2)


def time_sums(mesh: Mesh) -> dict[str, object]:
    """Microseconds of a sum with its residual, by who computes it; of a gather of logits too."""
    found: dict[str, object] = {
        f"{rows} rows": _ways_to_sum(mesh, *torch.randn(2, rows, HIDDEN, device="cuda").bfloat16())
        for rows in (1, 8, 16, 64)
    }
    share = vocabulary_share(VOCABULARY, mesh.size)
    mine = torch.randn(1, VOCABULARY, device="cuda").bfloat16()
    mine = mine[:, mesh.rank * share : (mesh.rank + 1) * share].contiguous()
    found["gather of logits, 1 row"] = _timed(lambda: lambda: mesh.gather(mine))
    return found


def _ways_to_sum(mesh: Mesh, x: Tensor, residual: Tensor) -> dict[str, float | str]:
    group = dist.group.WORLD
    assert group is not None, "the mesh has started"
    found = {
        f"ours, {block} words a program": _timed(partial(_ours, mesh, x, residual, block))
        for block in (256, 512, 1024, 2048)
    }
    found["PyTorch's one-shot, and an addition"] = _timed(partial(_one_shot, x, residual, group))
    found["NCCL, and an addition"] = _timed(lambda: lambda: (dist.all_reduce(x), residual + x))
    return found


def _ours(mesh: Mesh, x: Tensor, residual: Tensor, block: int) -> Callable[[], object]:
    exchange = share_memory(mesh, kernels.REDUCED_ROWS * HIDDEN // 2, block)
    return lambda: kernels.add_parts(x, exchange, residual, pdl=True)


def _one_shot(x: Tensor, residual: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    from torch.distributed import _symmetric_memory as symmetric

    shared = symmetric.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric.rendezvous(shared, group.group_name)
    shared.copy_(x)
    operation = torch.ops.symm_mem.one_shot_all_reduce
    return lambda: residual + operation(shared, "sum", group.group_name)


def _timed(make: Callable[[], Callable[[], object]]) -> float | str:
    try:
        return us_per_call(make())
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0][:200]}"


def check_model(mesh: Mesh) -> dict[str, float]:
    """A small model: distance of its logits from those in fp32 on one GPU, whole and sharded."""
    shape = ModelShape(
        "llama", vocab_size=1001, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, head_dim=64, max_position_embeddings=2048,
        attention_bias=True,
    )  # fmt: skip

    def made(dtype: torch.dtype) -> Decoder:
        with torch.device("cuda"):
            decoder = initialize(Decoder(shape), std=0.05, seed=1)
        return decoder.bfloat16().to(dtype).requires_grad_(False).eval()

    def logits(decoder: Decoder, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        door = prefilled(decoder, 3, dtype)
        step = fused_step(decoder, door) if dtype == torch.bfloat16 else None
        first = torch.tensor([7, 8, 9], device="cuda")
        plain = decoder(first, door.extend([1] * 3), door)
        if step is None:
            return plain, plain
        step.ids.copy_(first)
        step.positions.fill_(128)
        return plain, step.capture()().clone()

    exact = logits(fuse(made(torch.float32)), torch.float32)[0]
    exact_sharded = logits(fuse(shard(made(torch.float32), mesh)), torch.float32)[0]
    whole, whole_step = logits(fuse(made(torch.bfloat16)), torch.bfloat16)
    sharded, sharded_step = logits(fuse(shard(made(torch.bfloat16), mesh)), torch.bfloat16)
    apart = {
        "fp32, sharded": distance(exact_sharded, exact),
        "bf16, whole": distance(whole, exact),
        "bf16, sharded": distance(sharded, exact),
        "bf16, whole, fused step": distance(whole_step, exact),
        "bf16, sharded, fused step": distance(sharded_step, exact),
    }
    assert apart["fp32, sharded"] < 1e-4, apart
    for way in ("bf16, sharded", "bf16, sharded, fused step"):
        assert apart[way] < 1.5 * apart["bf16, whole"] + 1e-3, apart
    return {way: round(value, 6) for way, value in apart.items()}


def part_of_13b(mesh: Mesh | Alone) -> Decoder:
    """This rank's part, made in place: no GPU ever has the whole."""
    decoder = random_model(local_shape(SHAPE, mesh.size))
    assert decoder.lm_head is not None, "13B has a head of its own"
    decoder.lm_head = keep_part("lm_head", decoder.lm_head, SHAPE, mesh.rank, mesh.size)
    decoder.shape = SHAPE
    return connect(decoder, mesh)


def tokens_per_s(decoder: Decoder, rows: int) -> float:
    """Greedy, 128 tokens in and 256 out, `rows` sequences at a time."""
    step = fused_step(decoder, prefilled(decoder, rows, torch.bfloat16))
    replay = step.capture(greedy(step.ids, step.positions))
    return rows / seconds_per_token(replay, step.positions)


def speeds(mesh: Mesh) -> dict[str, object]:
    """Tokens a second of 13B on one GPU and on all, and on one with its part alone."""
    found: dict[str, dict[str, float]] = {f"batch {rows}": {} for rows in BATCHES}
    ways: dict[str, Callable[[], Decoder] | None] = {
        "one GPU": (lambda: random_model(SHAPE)) if mesh.rank == 0 else None,
        f"{mesh.size} GPUs": lambda: part_of_13b(mesh),
        f"{mesh.size} GPUs, sums left out": lambda: part_of_13b(Alone(mesh)),
    }
    for way, make in ways.items():
        if make is not None:
            decoder = make()
            for rows in BATCHES:
                found[f"batch {rows}"][way] = round(tokens_per_s(decoder, rows), 1)
            del decoder
            torch.cuda.empty_cache()
        mesh.all(True)
        _say(mesh, way, found)
    figures: dict[str, object] = dict(found)
    if mesh.rank == 0:
        one, more = found["batch 1"]["one GPU"], found["batch 1"][f"{mesh.size} GPUs"]
        figures["batch 1, times one GPU"] = round(more / one, 3)
    return figures


def check_engine(size: int) -> dict[str, object]:
    """An LLM of a small folder over the GPUs and over one: the same ids; then a process dies."""
    from tests.tiny_model import write_published_folder
    from xverse import LLM, Sampling, XverseError
    from xverse.engine.spread import SpreadEngine

    sampling = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=48, ignore_eos=True)
    prompts = ["Hello", "The 1 and 2", "北京的天气", "a"] * 3
    facts: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "XVERSE-Tiny"
        write_published_folder(path)
        for dtype in ("float32", "bfloat16"):
            one = LLM(path, dtype=dtype, device="cuda", kv_tokens=4096)
            spread = LLM(path, dtype=dtype, device="cuda", kv_tokens=4096, tensor_parallel=size)
            expected, found = one.generate(prompts, sampling), spread.generate(prompts, sampling)
            same = [a.tokens == b.tokens for a, b in zip(found, expected, strict=True)]
            facts[f"{dtype}, equal answers of {len(same)}"] = sum(same)
            print(facts, flush=True)
            assert all(same) or dtype != "float32", "in fp32 no two logits are that close"
            spread.close()
        # Memory as the engines find it, and more rows than one kernel sums.
        spread = LLM(path, device="cuda", tensor_parallel=size, speculate=8)
        assert isinstance(spread.engine, SpreadEngine)
        facts["kv_tokens"] = spread.engine.capacity
        print(facts, flush=True)
        many = [f"{prompt} {i}" for i in range(12) for prompt in prompts]
        assert all(len(answer.tokens) == 48 for answer in spread.generate(many, sampling))
        random = Sampling(temperature=1.0, max_tokens=48, ignore_eos=True)
        assert all(len(answer.tokens) == 48 for answer in spread.generate(prompts[:4], random))
    engine = spread.engine
    assert isinstance(engine, SpreadEngine)
    stream = spread.stream("Hello", sampling)
    next(stream)
    engine._workers.processes[0].kill()
    start = time.perf_counter()
    try:
        for _ in stream:
            pass
        facts["killed process"] = "not noticed"
    except XverseError as error:
        facts["killed process"] = f"{time.perf_counter() - start:.2f} s: {error.what}"
    spread.close()
    facts["closed after"] = f"{time.perf_counter() - start:.2f} s"
    return facts


def _say(mesh: Mesh, *words: object) -> None:
    if mesh.rank == 0:
        print(*words, flush=True)


@torch.inference_mode()
def run(rank: int, size: int, meeting: Path) -> None:
    """What every rank does; rank 0 writes it down."""
    torch.backends.cuda.matmul.allow_tf32 = False
    mesh = Mesh.start(meeting, rank, size, torch.device("cuda", rank))
    mesh.reserve(HIDDEN, VOCABULARY, torch.bfloat16)
    figures: dict[str, object] = {
        "gpus": size,
        "model": "XVERSE-13B-2's shape, random weights, bf16; 128 tokens in, 256 out, greedy",
        "wrong_numbers_in_1000_replays": check_sums(mesh),
    }
    _say(mesh, figures)
    figures["us_per_sum_of_80_in_a_graph"] = time_sums(mesh)
    _say(mesh, figures["us_per_sum_of_80_in_a_graph"])
    figures["distance_of_logits_to_fp32"] = check_model(mesh)
    _say(mesh, figures["distance_of_logits_to_fp32"])
    figures["tokens_per_s"] = speeds(mesh)
    if rank == 0:
        figures["copy_bandwidth_TB_per_s"] = round(copy_bandwidth() / 1e12, 3)
        print(figures)
        print(record(f"tp{size}_h200", figures, ("triton",)))
    mesh.all(True)
    mesh.close()


def main() -> None:
    arguments = sys.argv[1:]
    size = int(arguments[0]) if arguments else 2
    if arguments[1:] == ["engine"]:
        print(check_engine(size))
        return
    if arguments[1:]:
        run(int(arguments[1]), size, Path(arguments[2]))
        return
    module = [sys.executable, "-m", "bench.tp_gpu", str(size)]
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        others = [subprocess.Popen([*module, str(rank), str(meeting)]) for rank in range(1, size)]
        try:
            run(0, size, meeting)
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
