"""WHAT FINE-TUNING IS TOLD. The options of adapters and of preferences; nothing heavy."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from xverse.errors import XverseError
from xverse.train.options import Training

Weights = Literal["full", "lora", "qlora"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters: which layers have one, and how large it is."""

    rank: int = 8
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that a training step leaves out."""
    targets: tuple[str, ...] = TARGETS
    """Names of linear layers, which have one in every block."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that high ranks learn as fast (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the lengths of the weights' rows apart from their directions (Liu et al. 2024)."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise _impossible("rank", self.rank, "it is a whole number from 1 on")
        if not 0 <= self.dropout < 1:
            raise _impossible("dropout", self.dropout, "it is a share below 1")
        if not self.alpha > 0:
            raise _impossible("alpha", self.alpha, "it is a number above 0")
        if not self.targets:
            raise _impossible("targets", self.targets, "some layer must learn")

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Learning from preferences (Rafailov et al. 2023)."""

    weights: Weights = "lora"
    """What learns; full keeps a second model, which adapters need not: without them it is it."""
    beta: float = 0.1
    """How much it costs to go away from the model that was given."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be the wrong way round."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise _impossible("beta", self.beta, "it is a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise _impossible("label_smoothing", self.label_smoothing, "it is a share below 0.5")


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """A whole run of fine-tuning."""

    model: str = ""
    documents: int = 0
    """Samples that are learned from, or twice the pairs."""
    packing: bool = True
    weights: Weights = "full"
    dpo: bool = False
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        super().__post_init__()
        mesh = self.mesh
        cut = [n for n in ("tensor", "pipeline", "context", "expert") if getattr(mesh, n) > 1]
        if cut and (self.dpo or self.weights != "full"):
            raise XverseError(
                f"Adapters and preferences cannot be trained over {cut[0]!r} of [mesh].",
                "The layers they stand on, or the pairs they compare, would be in parts.",
                "Take data and shard alone, or --method full.",
            )
        if self.compute.offload == "parameters" and self.weights == "qlora":
            raise XverseError(
                "The integers of qlora cannot be offloaded.",
                "FSDP2 brings weights with a gradient to the device, and integers have none.",
                "Take --method lora, or compute.offload optimizer.",
            )

    def fixed(self) -> dict[str, object]:
        """As `Training.fixed`."""
        names = ("model", "documents", "packing", "weights", "dpo")
        facts = super().fixed() | {name: getattr(self, name) for name in names}
        if self.weights == "full":
            return facts
        # As JSON gives it back, in which there are no tuples.
        return facts | {"lora": dataclasses.asdict(self.lora) | {"targets": [*self.lora.targets]}}


def _impossible(name: str, value: object, why: str) -> XverseError:
    return XverseError(f"The option {name} = {value!r} cannot be.", why + ".", "Correct it.")
