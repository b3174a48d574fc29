"""The experts' GPU kernels against their plain twins, in Triton's interpreter, on the CPU."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference, reference_experts
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Mixture, Plain, Stacks

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import experts_triton, grouped_triton, parts_triton, route_triton
from xverse.kernels.experts_triton import Tiles
from xverse.kernels.grouped_triton import Cut
from xverse.kernels.parts_triton import ExpertTile

HIDDEN, WIDTH, TOP_K = 48, 40, 2  # no multiples of the blocks below
SMALL = ExpertTile(32, 32, stages=2)
CUT = Cut(16, SMALL, SMALL)


def seeded(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}[twin.dtype]
    return torch.allclose(fast, twin, rtol=tolerance, atol=4 * tolerance)


def mixture_of(experts: int, shared: int, dtype: torch.dtype) -> Mixture:
    gate_up = seeded(2 * shared * WIDTH, HIDDEN, dtype=dtype) / 8 if shared else None
    down = seeded(HIDDEN, shared * WIDTH, dtype=dtype) / 8 if shared else None
    return Mixture(seeded(experts, HIDDEN) / 2, stacks_of(experts, dtype), gate_up, down, TOP_K)


def stacks_of(experts: int, dtype: torch.dtype) -> Stacks:
    size = (experts, WIDTH, HIDDEN)
    gate, up = (seeded(*size, dtype=dtype, seed=seed) / 8 for seed in range(2))
    return Stacks(gate, up, seeded(experts, HIDDEN, WIDTH, dtype=dtype) / 8)


def norm_of(dtype: torch.dtype, weight_in_fp32: bool = False) -> Norm:
    return Norm(1 + seeded(HIDDEN, dtype=dtype) / 4, 1e-5, weight_in_fp32)


@pytest.mark.parametrize(
    ("dtype", "router_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2],
)
def test_router(dtype: torch.dtype, router_dtype: torch.dtype) -> None:
    x, router = seeded(5, HIDDEN, dtype=dtype), seeded(6, HIDDEN, dtype=router_dtype) / 2
    for weight_in_fp32 in (True, False):
        norm = norm_of(dtype, weight_in_fp32)
        scratch = route_triton.Scratch.reserve(5, 6, "cpu")
        normed, weights, chosen = route_triton.route_rows(x, router, 3, norm, scratch=scratch)
        twin = reference.rms_norm(x, norm.weight_D, norm.eps, weight_in_fp32=weight_in_fp32)
        twin_weights, twin_chosen = reference.route(normed, router, 3)
        assert close(normed, twin)
        assert torch.equal(chosen.long(), twin_chosen)
        assert torch.allclose(weights.float(), twin_weights.float(), atol=2**-8)
        assert not scratch.arrived.any()


def test_of_equal_scores_the_lower_number_is_chosen_and_none_twice() -> None:
    _, weights, chosen = route_triton.route_rows(
        seeded(2, HIDDEN), torch.zeros(5, HIDDEN), 3, norm_of(torch.float32)
    )
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 1 / 3), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "shared", "weight_in_fp32", "tile"),
    [
        (torch.float32, 0, True, ExpertTile(16, 32)),
        (torch.float32, 2, False, ExpertTile(32, 64)),
        (torch.float16, 2, True, ExpertTile(16, 32)),
        (torch.bfloat16, 1, False, ExpertTile(32, 32)),
    ],
)
def test_one_token(dtype: torch.dtype, shared: int, weight_in_fp32: bool, tile: ExpertTile) -> None:
    mixture, norm = mixture_of(5, shared, dtype), norm_of(dtype, weight_in_fp32)
    x = seeded(1, HIDDEN, dtype=dtype)
    fast = experts_triton.mixture_rows(x, mixture, norm, tiles=Tiles(tile, tile))
    assert close(fast, reference_experts.mixture_rows(x, mixture, norm))


@pytest.mark.parametrize(
    ("tokens", "dtype", "shared"),
    [  # two bring fewer choices than there are experts
        (2, torch.float32, 2),
        (2, torch.float16, 0),
        (5, torch.float16, 1),
        (16, torch.float32, 2),
    ],
)
def test_some_tokens(tokens: int, dtype: torch.dtype, shared: int) -> None:
    mixture, norm = mixture_of(5, shared, dtype), norm_of(dtype)
    x = seeded(tokens, HIDDEN, dtype=dtype)
    fast = experts_triton.mixture_rows(x, mixture, norm, tiles=Tiles(SMALL, SMALL))
    assert close(fast, reference_experts.mixture_rows(x, mixture, norm))


@pytest.mark.parametrize("chosen", [[[3, 1]] * 3, [[0, 4], [4, 0], [2, 4]]])
def test_experts_that_several_tokens_chose(chosen: list[list[int]]) -> None:
    """One pair for all, and one expert at different places; choices, 6, below the experts, 8."""
    stacks, ids = stacks_of(8, torch.float32), torch.tensor(chosen, dtype=torch.int32)
    x, weights = seeded(3, HIDDEN), seeded(3, 2).softmax(-1)
    inner = parts_triton.some_rows(x, ids, stacks[:2], None, SMALL, shared=0)
    parts = parts_triton.some_rows(inner, ids, stacks[2:], None, SMALL, shared=0)
    fast = parts_triton.sum_parts(parts, weights, None)
    assert close(fast, reference_experts.mix_experts(x, weights, ids, Plain(stacks)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_token_that_is_not_a_number_stays_alone(tokens: int) -> None:
    mixture, norm = mixture_of(5, 2, torch.float32), norm_of(torch.float32)
    tiles = Tiles(ExpertTile(16, 32), ExpertTile(16, 32)) if tokens == 1 else Tiles(SMALL, SMALL)
    x = seeded(tokens, HIDDEN)
    x[0, 7] = float("nan")
    y = experts_triton.mixture_rows(x, mixture, norm, tiles=tiles)
    assert y[0].isnan().all()
    assert close(y[1:], reference_experts.mixture_rows(x[1:], mixture, norm))


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (20, torch.float16)])
def test_sorted_tokens(tokens: int, dtype: torch.dtype) -> None:
    experts = Plain(stacks_of(5, dtype))
    x = seeded(tokens, HIDDEN, dtype=dtype)
    weights, chosen = reference.route(x, seeded(5, HIDDEN) / 2, TOP_K)
    fast = grouped_triton.mix_experts(x, weights, chosen, experts, cut=CUT)
    assert close(fast, reference_experts.mix_experts(x, weights, chosen, experts))


@pytest.mark.parametrize("expert", [0, 4])
def test_sorted_tokens_that_all_chose_one_expert(expert: int) -> None:
    """Three blocks of it, the last one not full, and not a single one of the others."""
    experts = Plain(stacks_of(5, torch.float32))
    x, weights = seeded(37, HIDDEN), seeded(37, 1).sigmoid()
    chosen = torch.full((37, 1), expert)
    fast = grouped_triton.mix_experts(x, weights, chosen, experts, cut=CUT)
    assert close(fast, weights * experts(x, expert))


def test_a_mixture_of_sorted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_triton, "choose_cut", lambda *_: CUT)
    mixture, norm = mixture_of(3, 1, torch.float32), norm_of(torch.float32)
    x = seeded(18, HIDDEN)
    fast = grouped_triton.mixture_rows(x, mixture, norm)
    assert close(fast, reference_experts.mixture_rows(x, mixture, norm))


@pytest.mark.parametrize("inputs", [1, 100, 1000, 1728, 2560, 4096, 12000])
def test_one_row_tiles_are_powers_of_two_and_mostly_full(inputs: int) -> None:
    gate_up, down = experts_triton.choose_tiles(1, inputs, 1728)
    assert gate_up.outputs * gate_up.inputs == 1024 * gate_up.warps
    assert gate_up.inputs & (gate_up.inputs - 1) == 0
    blocks = -(-inputs // gate_up.inputs)
    assert gate_up.inputs == 128 or inputs >= 0.84 * blocks * gate_up.inputs
    assert down.inputs == 2048


def test_blocks_grow_with_the_choices_of_an_expert() -> None:
    sizes = [grouped_triton.choose_cut(choices, 64).choices for choices in (64, 3000, 12288)]
    assert sizes == [16, 64, 128]
