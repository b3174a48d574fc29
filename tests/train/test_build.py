"""What is put around a decoder: it changes the cost of a step, and not what the step computes."""

from pathlib import Path

import pytest
import torch

from tests.train.tiny import ALONE, options, tiny_run, tiny_shape
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.shape import ModelShape
from xverse.train import balance, build
from xverse.train.journal import last_steps, read_events
from xverse.train.objective import pretrain
from xverse.train.options import Computing, Updating
from xverse.train.stop import Stop

MIXTURE = {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}


def losses(folder: Path, shape: ModelShape, compute: Computing, **changes: object) -> list[float]:
    training = options(compute=compute, steps=4, **changes)
    decoder = build.fresh(shape, training, ALONE)
    tiny_run(folder, training, decoder=decoder).run(Stop())
    return [facts["loss"] for facts in last_steps(read_events(folder / "metrics.jsonl"))]


@pytest.mark.parametrize("shape", [tiny_shape(), tiny_shape(**MIXTURE)], ids=["dense", "mixture"])
def test_recompute_changes_no_bit(tmp_path: Path, shape: ModelShape) -> None:
    plain, selective, full = (
        losses(tmp_path / how, shape, Computing(recompute=how))
        for how in ("none", "selective", "full")
    )
    assert plain == selective == full


def saved(how: str) -> int:
    """Bytes that a pass keeps for its backward pass."""
    decoder = build.recompute(build.fresh(tiny_shape(), options(), ALONE), how)
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    from xverse.data.loader import Batch

    ids = torch.zeros(64, dtype=torch.int64)
    batch = Batch(ids, ids, ids == 0, torch.arange(64), (64,))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pretrain(decoder, batch, 64)
    return sum(found.values())


def test_recompute_keeps_less() -> None:
    none, full = saved("none"), saved("full")
    assert full < none / 2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_share_their_code(recompute: str) -> None:
    """12 blocks are compiled once: a handful of graphs, and not 12 times as many, nor none."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    decoder = build.fresh(tiny_shape(num_hidden_layers=12), options(), ALONE)
    build.compiled(build.recompute(decoder, recompute), backend=counter)
    ids, positions = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    for _ in range(2):
        decoder.hidden(ids, positions, Packed((64,))).sum().backward()
    assert 0 < counter.frame_count <= 4


def test_bf16_follows_fp32_with_a_master_and_without(tmp_path: Path) -> None:
    shape = tiny_shape(**MIXTURE)
    exact = losses(tmp_path / "a", shape, Computing(dtype="float32"))
    master = losses(tmp_path / "b", shape, Computing(dtype="bfloat16"))
    lean = Updating(master="none", moments="bfloat16", warmup_steps=2, learning_rate=3e-3)
    alone = losses(tmp_path / "c", shape, Computing(dtype="bfloat16"), update=lean)
    assert master == pytest.approx(exact, abs=0.02)
    assert alone == pytest.approx(exact, abs=0.02)


def test_eight_bits_follow_bf16(tmp_path: Path) -> None:
    exact = losses(tmp_path / "a", tiny_shape(), Computing(dtype="bfloat16"))
    eight = losses(tmp_path / "b", tiny_shape(), Computing(dtype="bfloat16", fp8=True))
    assert eight != exact
    assert eight == pytest.approx(exact, abs=0.02)
    with pytest.raises(XverseError, match="multiples of 16"):
        build.fresh(tiny_shape(intermediate_size=50), options(compute=Computing(fp8=True)), ALONE)


def test_new_weights_are_as_published() -> None:
    decoder = build.fresh(tiny_shape(hidden_size=64, **MIXTURE), options(), ALONE)
    assert decoder.model.layers[0].mlp.router.weight.dtype == torch.float32
    assert decoder.model.layers[0].mlp.experts.up_proj.weight.std().item() == pytest.approx(
        0.02, rel=0.05
    )
    assert (decoder.model.norm.weight == 1).all()
    again = build.fresh(tiny_shape(hidden_size=64, **MIXTURE), options(), ALONE)
    assert all(map(torch.equal, decoder.parameters(), again.parameters()))


def test_the_balance_loss_is_one_where_all_are_used_alike_and_pushes_towards_it() -> None:
    even = torch.eye(4).repeat(8, 1) * 0.7 + 0.075
    assert balance.balance_loss(even, 1).item() == pytest.approx(1.0)
    lone = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).repeat(8, 1)
    assert balance.balance_loss(lone, 1).item() == pytest.approx(4 * 0.97)

    decoder = build.fresh(tiny_shape(**MIXTURE), options(), ALONE)
    mixture = decoder.model.layers[0].mlp
    x_TD = torch.randn(32, 32)
    gradients = []
    for factor in (0.0, 2.0):
        balance.weigh(decoder, factor, x_TD.device)
        mixture.router.weight.grad = None
        mixture(x_TD).sum().backward()
        gradients.append(mixture.router.weight.grad.clone())
    scores = mixture.router.scores(x_TD)
    wanted = torch.autograd.grad(2.0 * balance.balance_loss(scores, 2), mixture.router.weight)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, atol=1e-6, rtol=1e-4)
