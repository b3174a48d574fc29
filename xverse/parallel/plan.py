"""MODULE -> ITS PART. The table of what each rank keeps of which layer, and what divides."""

from dataclasses import dataclass, replace
from typing import Literal

from xverse.errors import XverseError
from xverse.model.shape import ModelShape

MOST_RANKS = 8  # GPUs that share one host's links

Side = Literal["outputs", "inputs"]
Unit = Literal["heads", "key heads", "width", "vocabulary"]

# Last name of a module -> which side of its matrix is cut, in units of what. Layers that give
# heads or inner columns are cut by outputs; those that take them by inputs, and their results are
# added over the ranks. All the rest, embedding, norms and router, every rank has whole.
TABLE: dict[str, tuple[Side, Unit]] = {
    "q_proj": ("outputs", "heads"),
    "k_proj": ("outputs", "key heads"),
    "v_proj": ("outputs", "key heads"),
    "o_proj": ("inputs", "heads"),
    "gate_proj": ("outputs", "width"),
    "up_proj": ("outputs", "width"),
    "down_proj": ("inputs", "width"),
    "lm_head": ("outputs", "vocabulary"),
}


@dataclass(frozen=True)
class Part:
    """One side of a matrix, of which units first..last, out of `units` equal ones, are kept."""

    side: Side
    first: int
    last: int
    units: int


def part_of(name: str, shape: ModelShape, rank: int, size: int) -> Part | None:
    """What rank `rank` of `size` keeps of the module `name`; None where it keeps the whole."""
    cut = TABLE.get(name.rpartition(".")[2])
    if cut is None:
        return None
    side, unit = cut
    if unit == "vocabulary":
        share = vocabulary_share(shape.vocab_size, size)
        first, last = (min(place * share, shape.vocab_size) for place in (rank, rank + 1))
        return Part(side, first, last, shape.vocab_size)
    if unit == "key heads" and size > shape.num_key_value_heads:
        # Fewer than ranks: several ranks have the same one, and other query heads of its group.
        head = rank * shape.num_key_value_heads // size
        return Part(side, head, head + 1, shape.num_key_value_heads)
    return Part(side, rank, rank + 1, size)


def vocabulary_share(vocabulary: int, size: int) -> int:
    """Rows of the vocabulary head on each rank; the last one may have fewer."""
    return -(-vocabulary // size)


def local_shape(shape: ModelShape, size: int) -> ModelShape:
    """The shape of what one rank computes; the vocabulary counts whole, as logits are gathered."""
    check(shape, size)
    return replace(
        shape,
        num_attention_heads=shape.num_attention_heads // size,
        num_key_value_heads=max(1, shape.num_key_value_heads // size),
        intermediate_size=shape.intermediate_size // size,
    )


def check(shape: ModelShape, size: int) -> None:
    """Raise XverseError where a model of this shape cannot be spread over `size` devices."""
    if type(size) is not int or not 1 <= size <= MOST_RANKS:
        raise XverseError(
            f"A model cannot be spread over {size!r:.60} devices.",
            f"It takes a whole number from 1 to {MOST_RANKS}: the GPUs of one machine.",
            "Give such a number as tensor_parallel.",
        )
    if not _divides(shape, size):
        fitting = [str(n) for n in range(1, MOST_RANKS + 1) if _divides(shape, n)]
        raise XverseError(
            f"This model cannot be spread over {size} devices.",
            f"Its {shape.num_attention_heads} heads, {shape.num_key_value_heads} key/value heads "
            f"and inner width of {shape.intermediate_size} do not divide evenly.",
            f"Give one of these as tensor_parallel: {', '.join(fitting)}.",
        )


def _divides(shape: ModelShape, size: int) -> bool:
    kv_heads = shape.num_key_value_heads
    shared = kv_heads % size == 0 or (size > kv_heads and size % kv_heads == 0)
    heads, width = shape.num_attention_heads, shape.intermediate_size
    return shared and heads % size == 0 and width % size == 0
