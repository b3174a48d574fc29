"""NAMES -> SHAPES. The published XVERSE models, exact to the parameter.

XVERSE-13B-256K and MoE-A36B are missing on purpose: parts of their configs were never seen, so
they are read from the checkpoint alone.
"""

from xverse.errors import XverseError
from xverse.model.shape import ModelShape


def _dense(
    hidden: int, width: int, layers: int, heads: int, vocab: int, context: int
) -> ModelShape:
    return ModelShape(
        model_type="xverse",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
    )


def from_depth(depth: int, vocab_size: int, context: int) -> ModelShape:
    """A dense XVERSE by one number, its layers: 64 units of width for each, in whole heads.

    Heads have 128 elements, and 64 below a width of 1,024; the feed-forward has 8/3 of the width,
    rounded up to 256, as in every published dense model.
    """
    if depth < 1:
        raise XverseError(
            f"A model of {depth} layers cannot be.",
            "Depth counts the layers.",
            "Give a depth of 1 or more, such as from-depth:12.",
        )
    size = 128 if depth >= 16 else 64
    hidden = -(-64 * depth // size) * size
    width = -(-(8 * hidden // 3) // 256) * 256
    return _dense(hidden, width, depth, hidden // size, vocab_size, context)


CATALOG: dict[str, ModelShape] = {
    "xverse-7b": _dense(4096, 11008, 32, 32, 100534, 8192),
    "xverse-13b": _dense(5120, 13824, 40, 40, 100278, 8192),
    "xverse-13b-2": _dense(5120, 13824, 40, 40, 100534, 8192),
    "xverse-65b": _dense(8192, 22016, 80, 64, 100534, 16384),
    "xverse-moe-a4.2b": ModelShape(
        model_type="xverse",
        vocab_size=100534,
        hidden_size=2560,
        intermediate_size=1728,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=80,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        num_experts=64,
        moe_top_k=6,
        num_shared_experts=2,
    ),
}
