"""DO THE DECODE KERNELS COMPUTE WHAT THEIR TWINS SAY? On a GPU, in bf16, before any timing."""

import torch
from torch import Tensor

from bench.tune_decode import PRODUCTS
from tests.tiny_model import published_config, random_decoder
from xverse.engine.step import DecodeStep
from xverse.kernels import attend_triton, multiply_rows_triton, reference
from xverse.kernels.cuts import Cut, Scratch
from xverse.kernels.reference import Norm
from xverse.model.cache import Growing
from xverse.model.fuse import fuse


def distance(fast: Tensor, twin: Tensor) -> float:
    """|fast - twin| / |twin|; NaN anywhere gives NaN, which no limit passes."""
    return float((fast.double() - twin.double()).norm() / twin.double().norm())


def check_products() -> None:
    """Against the twin in fp64, whose sums are exact: what is left is rounding to bf16."""
    for name, product in PRODUCTS.items():
        weight = torch.randn(product.outputs, product.inputs, device="cuda").bfloat16() / 64
        norm_D = 1 + torch.randn(product.inputs, device="cuda").bfloat16() / 8
        outputs = product.outputs // 2 if product.gated else product.outputs
        for tokens in (1, 2, 8, 16, 17, 33, 64):
            x = torch.randn(tokens, product.inputs, device="cuda").bfloat16()
            residual = torch.randn(tokens, outputs, device="cuda").bfloat16()
            for in_fp32 in (True, False):
                norm = Norm(norm_D, 1e-6, in_fp32) if product.norm else None
                extra = residual if product.residual else None
                normed = x if norm is None else reference.rms_norm(
                    x, norm_D, 1e-6, weight_in_fp32=in_fp32)  # fmt: skip
                exact = reference.multiply_rows(
                    normed.double(), weight.double(), gated=product.gated,
                    residual_TN=None if extra is None else extra.double(),
                )  # fmt: skip
                for pdl in (False, True):
                    fast = multiply_rows_triton.multiply_rows(
                        x, weight, norm=norm, residual_TN=extra, gated=product.gated, pdl=pdl
                    )
                    error = distance(fast, exact)
                    assert error < 5e-3, (name, tokens, in_fp32, pdl, error)
        print(f"{name}: within {error:.1e} of fp64, 1 to 64 tokens", flush=True)


def check_attention() -> None:
    for heads, kv_heads, size, page_size in (
        (32, 32, 128, 256), (32, 8, 128, 16), (12, 4, 64, 64), (32, 32, 80, 32), (64, 1, 128, 128),
    ):  # fmt: skip
        for positions in ([0], [257], [0, 1, 31, 32, 33, 500, 1023, 64]):
            tokens, pages = len(positions), 1024 // page_size
            places = torch.tensor(positions, dtype=torch.int32, device="cuda")
            order = torch.randperm(tokens * pages, device="cuda").view(tokens, pages).int()
            pool = (tokens * pages, kv_heads, page_size, size)
            keys, values = (torch.randn(pool, device="cuda").bfloat16() for _ in range(2))
            twin_keys, twin_values = keys.clone(), values.clone()
            angles = torch.randn(1024, size // 2, device="cuda").repeat(1, 2)
            cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size, device="cuda").bfloat16()
            twin = reference.rotate_store_attend(
                qkv, cos, sin, places, order, twin_keys, twin_values
            )
            for pdl in (False, True):
                for cut in (None, Cut(), Cut(parts=3)):
                    scratch = Scratch.reserve(tokens, heads, kv_heads, size, "cuda", cut=cut)
                    first = None
                    for _ in range(3):
                        fast = attend_triton.rotate_store_attend(
                            qkv, cos, sin, places, order, keys, values, scratch=scratch, pdl=pdl
                        )
                        assert first is None or torch.equal(first, fast), "equal bits again"
                        first = fast
                    error = distance(fast, twin)
                    case = (heads, kv_heads, size, page_size, positions, pdl, cut, error)
                    assert error < 8e-3, case
                    assert torch.equal(keys, twin_keys), case
                    assert torch.equal(values, twin_values), case
        print(
            f"attention {heads}/{kv_heads} heads of {size}, pages of {page_size}: {error:.1e}",
            flush=True,
        )


@torch.inference_mode()
def check_small_model() -> None:
    """Forty steps of a small model beside the plain decoder in fp32 and in bf16."""
    config = published_config() | {"num_attention_heads": 4, "hidden_size": 256}
    config |= {"intermediate_size": 704}
    decoder = fuse(random_decoder(config).cuda())
    exact = fuse(random_decoder(config).cuda().float())
    shape = decoder.shape
    pool = (6, shape.num_key_value_heads, 16, shape.head_dim)
    keys, values = (
        [torch.zeros(pool, device="cuda").bfloat16() for _ in decoder.model.layers]
        for _ in range(2)
    )
    table = torch.tensor([[4, 0, 5], [1, 3, 2]], dtype=torch.int32, device="cuda")
    step = DecodeStep(decoder, keys, values, table)
    doors = [Growing(shape, 2, dtype=d, device="cuda") for d in (torch.bfloat16, torch.float32)]
    replay = step.capture()
    ids = (torch.arange(80, device="cuda").view(40, 2) * 7) % shape.vocab_size
    ours, theirs = [], []
    for place, pair in enumerate(ids):
        step.ids.copy_(pair)
        step.positions.fill_(place)
        fused = replay().clone()
        plain, truth = (
            model(pair, door.extend([1, 1]), door)
            for model, door in zip((decoder, exact), doors, strict=True)
        )
        ours.append(distance(fused, truth))
        theirs.append(distance(plain, truth))
    mean, plain_mean = sum(ours) / len(ours), sum(theirs) / len(theirs)
    print(f"small model, distance to fp32: fused step {mean:.4f}, plain decoder {plain_mean:.4f}")
    assert mean < 1.3 * plain_mean + 1e-3


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check_products()
    check_attention()
    check_small_model()
    print("all equal")


if __name__ == "__main__":
    main()
