"""METHOD -> MEMORY. What each way of fine-tuning needs of a device, and on which cards it fits."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

from xverse.errors import XverseError
from xverse.model.shape import ModelShape
from xverse.quant.gradient import NUMBERS
from xverse.train.options import Training
from xverse.train.predict import SIZES, Memory, memory
from xverse.train.tuning import Lora

CARDS = (24, 48, 80)  # GB: what consumer cards, workstation cards and an H100 have
ROOM = 0.94  # of a card's memory; the rest is the driver's and what allocation loses
METHODS = ("full", "lora", "qlora int8", "qlora int4")
OFFLOADED = {
    "none": "",
    "optimizer": ", optimizer offloaded",
    "parameters": ", parameters offloaded",
}


def needs(
    shape: ModelShape,
    options: Training,
    method: str,
    lora: Lora,
    *,
    dtype: str,
    ranks: int,
    dpo: bool = False,
) -> Memory:
    """Bytes on one device for one of METHODS."""
    size = SIZES[dtype]
    mesh = options.mesh.resolve(ranks)
    shards = mesh.shard * mesh.expert
    if method == "full":
        found = memory(shape, options, dtype=dtype, ranks=ranks)
        before = -(-size * shape.num_parameters // shards) if dpo else 0
        if options.compute.offload == "parameters":
            return replace(found, host=found.host + before)
        return replace(found, weights=found.weights + before)
    linear = shape.num_linear_parameters
    ends = size * (shape.num_parameters - linear)
    if method == "lora":
        frozen = -(-(ends + size * linear) // shards)
    else:
        bits = 8 if method.endswith("int8") else 4
        # Integers are on every device: FSDP spreads what has a gradient or is floating point.
        frozen = -(-ends // shards) + linear * bits // 8 + linear // 128 * size
    found = memory(
        shape,
        options,
        dtype=dtype,
        ranks=ranks,
        learned=adapter_parameters(shape, lora),
        frozen=frozen,
    )
    rows = 0 if method == "lora" else NUMBERS * (1 + 4 + 4 + size)
    return replace(found, gathered=found.gathered + rows)


def adapter_parameters(shape: ModelShape, lora: Lora) -> int:
    """How many parameters the adapters have."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv_heads, width = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size
    attention = {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, kv_heads),
        "v_proj": (hidden, kv_heads),
        "o_proj": (heads, hidden),
    }
    found = sum(_pair(attention[name], lora) for name in lora.targets if name in attention)
    for name in lora.targets:
        if name in attention:
            continue
        for count, wide in ((shape.num_experts or 1, width), (1, shape.num_shared_experts * width)):
            if wide:
                found += count * _pair((hidden, wide), lora, down=name == "down_proj")
    return found * shape.num_hidden_layers


def _pair(size: tuple[int, int], lora: Lora, *, down: bool = False) -> int:
    inputs, outputs = reversed(size) if down else size
    return lora.rank * (inputs + outputs) + (outputs if lora.dora else 0)


def cards(found: Memory) -> dict[str, bool]:
    """Whether that fits on each of CARDS."""
    return {f"{size} GB": found.total <= size * 1e9 * ROOM for size in CARDS}


def plan(
    shape: ModelShape, options: Training, lora: Lora, *, dtype: str, ranks: int, dpo: bool
) -> Mapping[str, Memory]:
    """What every method would need, the full one also with what can be offloaded."""
    return {
        method + OFFLOADED[told.compute.offload]: needs(
            shape, told, method, lora, dtype=dtype, ranks=ranks, dpo=dpo
        )
        for method, told in _ways(options)
    }


def _ways(options: Training) -> Iterator[tuple[str, Training]]:
    """Methods, and the options that they would have."""
    for told in offloads(options):
        asked = told.compute.offload in ("none", options.compute.offload)
        for method in METHODS if asked else ("full",):
            if not (method.startswith("qlora") and told.compute.offload == "parameters"):
                yield method, told


def offloads(options: Training) -> Iterator[Training]:
    """The options with all that can be offloaded: nothing, the optimizer, and parameters."""
    plain = Training(**{field.name: getattr(options, field.name) for field in fields(Training)})
    for offload in OFFLOADED:
        with contextlib.suppress(XverseError):  # an optimizer or a mesh that cannot be
            yield replace(plain, compute=replace(options.compute, offload=offload))
