"""WHICH PARTS, HOW SMALL. What of a model gets which scheme, and the names of the usual ways."""

from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from xverse.config import nearest
from xverse.errors import XverseError
from xverse.model.embedding import Embedding
from xverse.model.linear import Linear, StackedLinear
from xverse.model.shape import ModelShape
from xverse.quant.scheme import Scheme

EMBEDDING = "model.embed_tokens"
LEAST_GROUP = 16  # with fewer columns a scale takes more than a quarter of what 4 bits do


@dataclass(frozen=True)
class Recipe:
    """Schemes for the linear layers of the blocks, for the head, and for the embedding.

    Norms and routers always stay as they are. A tied head is the embedding, and goes with that.
    """

    scheme: Scheme
    head: Scheme | None = None
    embedding: Scheme | None = None

    @classmethod
    def of(cls, what: "int | str | Scheme | Recipe") -> "Recipe":
        """The recipe meant by 8 or 4 (the published schemes), a name, a scheme, or a recipe."""
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Scheme):
            return cls(what)
        if not isinstance(what, str):
            return cls(Scheme(what))
        if what not in NAMED:
            raise XverseError(
                f"There is no quantization called {what!r:.60}.{nearest(what, NAMED)}",
                f"Known are: {', '.join(NAMED)}.",
                "Use one of these names.",
            )
        return NAMED[what]

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """What becomes of the module `name` of a decoder; None: it stays as it is."""
        if name == EMBEDDING:
            return self.embedding if isinstance(module, Embedding) else None
        if not isinstance(module, Linear | StackedLinear) or name.endswith(".router"):
            return None
        return self.head if name == "lm_head" else self.scheme

    def fitting(self, shape: ModelShape) -> Self:
        """The same for a model of this shape: groups are halved until they divide the inputs of
        every layer, and a tied head has no scheme of its own.

        One size for a whole model, as readers of such folders expect. XverseError where none does.
        """
        heads = shape.num_attention_heads * shape.head_dim
        inputs = {shape.hidden_size, shape.intermediate_size, heads}
        if shape.num_shared_experts:
            inputs.add(shape.intermediate_size * shape.num_shared_experts)
        fitted = [
            None if scheme is None else _halved(scheme, inputs)
            for scheme in (self.scheme, self.head, self.embedding)
        ]
        if shape.tie_word_embeddings:
            fitted[1] = None
        assert fitted[0] is not None, "the blocks have a scheme"
        return replace(self, scheme=fitted[0], head=fitted[1], embedding=fitted[2])

    def __str__(self) -> str:
        ends = {"head": self.head, "embedding": self.embedding}
        return "; ".join(
            [str(self.scheme), *(f"{name} {scheme}" for name, scheme in ends.items() if scheme)]
        )


def _halved(scheme: Scheme, inputs: set[int]) -> Scheme:
    size = scheme.group_size
    if size is None:
        return scheme
    while any(columns % size for columns in inputs):
        if size % 2 or size // 2 < LEAST_GROUP:
            raise XverseError(
                f"Groups of {scheme.group_size} columns do not fit this model.",
                f"Its layers take {sorted(inputs)} inputs, which they and their halves, down to "
                f"{LEAST_GROUP}, do not divide.",
                'Use one scale for each row: "int8-row" or "int4-row".',
            )
        size //= 2
    return replace(scheme, group_size=size)


NAMED = {
    "int8": Recipe(Scheme(8, 128), head=Scheme(8)),
    "int4": Recipe(Scheme(4, 128), head=Scheme(8)),
    "int8-row": Recipe(Scheme(8)),
    "int4-row": Recipe(Scheme(4)),
    "fp8": Recipe(Scheme(8, kind="float")),
}
