"""DO THE KERNELS OF EXPERTS COMPUTE WHAT THEIR TWINS SAY? On a GPU, in bf16, before any timing."""

from copy import deepcopy

import torch
from torch import Tensor

from bench.check_decode import distance
from tests.tiny_model import published_config
from xverse.engine.step import DecodeStep
from xverse.kernels import dispatch, reference, reference_experts
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Mixture, Plain, Stacks
from xverse.model.cache import Growing
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

SHAPE, LONG = CATALOG["xverse-moe-a4.2b"], 2048


def random_mixture(shape: ModelShape, *, std: float) -> Mixture:
    """One layer's experts with the router in fp32, as checkpoints have it."""
    hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    shared = width * shape.num_shared_experts

    def normal(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.bfloat16, device="cuda").normal_(0, std)

    return Mixture(
        normal(experts, hidden).float(),
        Stacks(
            normal(experts, width, hidden),
            normal(experts, width, hidden),
            normal(experts, hidden, width),
        ),
        normal(2 * shared, hidden),
        normal(hidden, shared),
        shape.moe_top_k,
    )


def in_fp32(mixture: Mixture) -> Mixture:
    router, stacks, gate_up, down, top_k = mixture
    assert gate_up is not None
    assert down is not None
    wide = Stacks(*(stack.float() for stack in stacks))
    return Mixture(router, wide, gate_up.float(), down.float(), top_k)


@torch.inference_mode()
def check_layer() -> dict[str, float]:
    """A layer at full size: distance of the kernels to fp32, which is what bf16 costs anyway."""
    mixture = random_mixture(SHAPE, std=0.05)  # so that the experts outweigh the residual
    wide = in_fp32(mixture)
    gain = 1 + torch.randn(SHAPE.hidden_size, device="cuda").bfloat16() / 8
    norm = Norm(gain, 1e-6, False)
    apart = {}
    for rows in (1, 2, 5, 8, 16, 17, 100, LONG):
        x = torch.randn(rows, SHAPE.hidden_size, device="cuda").bfloat16()
        # What is chosen hangs on the rounding of the norm, so the exact way takes the rounded one.
        normed = reference.rms_norm(x, gain, 1e-6, weight_in_fp32=False)
        weights, chosen = reference.route(normed, mixture.router_XD, mixture.top_k)
        exact = reference_experts.mix_experts(
            normed.float(), weights.float(), chosen, Plain(wide.stacks)
        )
        exact = x.float() + reference_experts.add_shared(exact, normed.float(), wide)
        plain = distance(reference_experts.mixture_rows(x, mixture, norm), exact)
        fast = dispatch.mixture_rows(x.device, x.dtype, rows, SHAPE.num_experts).call
        first = fast(x, mixture, norm)
        apart[str(rows)] = distance(first, exact)
        assert apart[str(rows)] < 1.3 * plain + 1e-3, (rows, apart, plain)
        assert all(torch.equal(first, fast(x, mixture, norm)) for _ in range(3)), "equal bits again"
    chosen = torch.full_like(chosen[:300], 63)  # all tokens on one expert, the last
    normed, weights = normed[:300], weights[:300]
    many = dispatch.mix_experts(x.device, x.dtype).call(
        normed, weights, chosen, Plain(mixture.stacks)
    )
    exact = reference_experts.mix_experts(
        normed.float(), weights.float(), chosen, Plain(wide.stacks)
    )
    assert distance(many, exact) < 1e-2, distance(many, exact)
    return {rows: round(value, 5) for rows, value in apart.items()}


@torch.inference_mode()
def check_small_model() -> dict[str, list[float]]:
    """Steps of a small model as a graph, and the plain decoder, beside the decoder in fp32."""
    config = published_config(moe=True) | {"hidden_size": 256, "intermediate_size": 192}
    shape = ModelShape.from_config(config)
    found = {}
    for rows in (1, 5, 16):
        decoder = fuse(initialize(Decoder(shape), std=0.05).requires_grad_(False).cuda().bfloat16())
        exact = deepcopy(decoder).float()
        pool = (3 * rows, shape.num_key_value_heads, 16, shape.head_dim)
        keys, values = (
            [torch.zeros(pool, device="cuda").bfloat16() for _ in decoder.model.layers]
            for _ in range(2)
        )
        table = torch.randperm(3 * rows, device="cuda").view(rows, 3).int()
        step = DecodeStep(decoder, keys, values, table)
        replay = step.capture()
        doors = [
            Growing(shape, rows, dtype=d, device="cuda") for d in (torch.bfloat16, torch.float)
        ]
        ours, theirs = [], []
        for place in range(40):
            ids = (torch.arange(rows, device="cuda") * 31 + place * 7) % shape.vocab_size
            step.ids.copy_(ids)
            step.positions.fill_(place)
            fused = replay().clone()
            plain, truth = (
                model(ids, door.extend([1] * rows), door)
                for model, door in zip((decoder, exact), doors, strict=True)
            )
            ours.append(distance(fused, truth))
            theirs.append(distance(plain, truth))
        means = [sum(ours) / len(ours), sum(theirs) / len(theirs)]
        assert means[0] < 1.3 * means[1] + 5e-3, (rows, means)
        found[str(rows)] = [round(mean, 4) for mean in means]
    return found


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    print("a layer, distance to fp32 by tokens:", check_layer(), flush=True)
    print("a small model, fused step and plain decoder:", check_small_model(), flush=True)


if __name__ == "__main__":
    main()
