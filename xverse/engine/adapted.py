"""DECODER -> ITS TWIN THAT VARIES BY ROW. What adapters add behind linear layers, row by row.

The twin has the decoder's own weights, and the decoder does not know of it: whoever runs without
an adapter runs as if there were none.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.checkpoint.adapter import Adapter, linear_sizes, require_fit
from xverse.errors import XverseError
from xverse.kernels import multiply
from xverse.model.decoder import Decoder
from xverse.model.feedforward import Experts
from xverse.model.linear import Linear, SideBySide
from xverse.parallel.tensor import Reduced
from xverse.quant.linear import QuantizedLinear
from xverse.quant.prepare import PackedBlock

# Layers that take additions, and the published ones that each is made of, in their order.
LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
} | {n: (n,) for n in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Change:
    """What an adapter makes of a layer: y + B A x, the scale being in B. With DoRA the sum, less
    the layer's bias, is multiplied by `gain_N`: magnitudes over the lengths of the summed rows."""

    a_RD: Tensor
    b_NR: Tensor
    gain_N: Tensor | None = None
    parts: tuple[tuple[int, int], ...] = ()  # outputs and rank of each published layer

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        parts = (self.a_RD, self.b_NR, self.gain_N)
        return sum(part.nbytes for part in parts if part is not None)

    def applied(self, x_TD: Tensor, y_TN: Tensor, bias_N: Tensor | None) -> Tensor:
        """The layer's outputs as the adapter has them.

        Few rows are filled up to a fixed number, so that a row's bits do not depend on how many
        others have the same adapter.
        """
        rows = len(x_TD)
        if rows < multiply.ROWS:
            x_TD = functional.pad(x_TD, (0, 0, 0, multiply.ROWS - rows))
        sum_TN = y_TN + multiply.linear(multiply.linear(x_TD, self.a_RD), self.b_NR)[:rows]
        if self.gain_N is None:
            return sum_TN
        if bias_N is None:
            return sum_TN * self.gain_N
        return (sum_TN - bias_N) * self.gain_N + bias_N


@dataclass(eq=False)
class Loaded:
    """An adapter in memory. Its `number` is never given again: keys and values that were computed
    with it are found by it. `users` are the requests that have it."""

    name: str
    number: int
    changes: dict[str, Change]
    users: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(change.nbytes for change in self.changes.values())


# Adds in place, by name of layer, to its outputs what adapters in slots make of its inputs.
AddInSlots = Callable[[str, Tensor, Tensor, Tensor | None], None]


@dataclass
class Groups:
    """Which rows of the step under way are changed how: changes by name of layer, and the rows,
    None for all; or by what lies in slots (`adapter_slots.py`)."""

    now: list[tuple[Mapping[str, Change], Tensor | None]] = field(default_factory=list)
    in_slots: AddInSlots | None = None


class Adapted(nn.Module):
    """A linear layer, and behind it what the step's adapters make of their rows."""

    def __init__(self, layer: nn.Module, name: str, groups: Groups) -> None:
        super().__init__()
        self.layer, self.name, self.groups = layer, name, groups

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TN: Tensor = self.layer(x_TD)
        bias = getattr(self.layer, "bias", None)
        if self.groups.in_slots is not None:
            self.groups.in_slots(self.name, y_TN, x_TD, bias)
        for changes, rows in self.groups.now:
            change = changes.get(self.name)
            if change is None:
                continue
            if rows is None:
                y_TN = change.applied(x_TD, y_TN, bias)
            else:
                y_TN[rows] = change.applied(x_TD[rows], y_TN[rows], bias)
        return y_TN


def adapted(decoder: Decoder, groups: Groups) -> Decoder:
    """The twin of a decoder, fused or not. XverseError where layers cannot be added to."""
    twin = _twin(decoder, "", groups)
    assert isinstance(twin, Decoder), "a copy of it"
    return twin


def _twin(module: nn.Module, name: str, groups: Groups) -> nn.Module:
    if isinstance(module, Reduced):
        raise XverseError(
            "A model that is spread over devices takes no adapters.",
            "Each device has a part of every layer, and adapters come whole.",
            "Load it without tensor_parallel, or merge the adapter: xverse export --to merged.",
        )
    assert not isinstance(module, PackedBlock), "who wants adapters prepares layer by layer"
    if name.rpartition(".")[2] in LAYERS:
        return Adapted(module, name, groups)
    if isinstance(module, Experts) or not any(True for _ in module.children()):
        return module
    twin = copy.copy(module)  # parameters and buffers are those of the first
    twin._modules = {
        child: None if part is None else _twin(part, f"{name}.{child}".lstrip("."), groups)
        for child, part in module._modules.items()
    }
    return twin


@torch.no_grad()
def changes_of(adapter: Adapter, twin: Decoder, called: str) -> dict[str, Change]:
    """What an adapter makes of each layer of the twin, in the twin's dtype and on its device.

    Layers that were joined get one change of all their parts. `called` is the adapter's name in
    errors: XverseError where it belongs to another model, or changes what cannot be added to.
    """
    require_fit(adapter, twin.shape, called)
    sizes = linear_sizes(twin.shape)
    found: dict[str, Change] = {}
    used: set[str] = set()
    for name, module in twin.named_modules():
        if not isinstance(module, Adapted):
            continue
        above, _, last = name.rpartition(".")
        parts = [f"{above}.{part}" for part in LAYERS[last]]
        if used.isdisjoint(parts) and adapter.weights.keys().isdisjoint(parts):
            continue
        used.update(parts)
        outputs = [sizes[part][0] for part in parts]
        found[name] = _joined(adapter, parts, outputs, module.layer, twin)
    left = [name for name in adapter.weights if name not in used]
    if left:
        raise XverseError(
            f"The adapter {called} cannot be used beside others.",
            f"It changes {left[0][:120]}, and additions are made behind attention and dense "
            "feed-forward layers alone.",
            "Merge it into the model: xverse export --to merged.",
        )
    return found


def _joined(
    adapter: Adapter, parts: list[str], outputs: list[int], layer: nn.Module, twin: Decoder
) -> Change:
    """One change of a layer whose outputs are those of `parts`: factors A one below another, and
    B in blocks along the diagonal."""
    device, total = twin.device, sum(outputs)
    here = [part for part in parts if part in adapter.weights]
    a_RD = torch.cat([adapter.weights[part].a_RD.float() for part in here]).to(device)
    b_NR = torch.zeros(total, len(a_RD), device=device)
    lengths: Tensor | None = None
    gain_N = torch.ones(total, device=device)
    row = column = 0
    ranks: list[tuple[int, int]] = []
    for part, rows in zip(parts, outputs, strict=True):
        change = adapter.weights.get(part)
        ranks.append((rows, 0 if change is None else change.rank))
        if change is not None:
            block = change.b_NR.float().to(device) * adapter.scale(part)
            b_NR[row : row + rows, column : column + change.rank] = block
            if change.magnitude_N is not None:
                lengths = gain_N if lengths is None else lengths
                gain_N[row : row + rows] = change.magnitude_N.float().to(device)
            column += change.rank
        row += rows
    if lengths is None:
        return Change(a_RD.to(twin.dtype), b_NR.to(twin.dtype), parts=tuple(ranks))
    summed_ND = matrix_of(layer).to(device) + b_NR @ a_RD
    norms_N = torch.linalg.vector_norm(summed_ND, dim=1)
    row = 0
    for part, rows in zip(parts, outputs, strict=True):
        if part in here and adapter.weights[part].magnitude_N is not None:
            gain_N[row : row + rows] /= norms_N[row : row + rows]
        row += rows
    factors = a_RD.to(twin.dtype), b_NR.to(twin.dtype)
    return Change(*factors, gain_N.to(twin.dtype), tuple(ranks))


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight [N, D] of a linear layer in fp32; XverseError where it is only kept repacked."""
    if isinstance(layer, Linear):
        return layer.weight.float()
    if isinstance(layer, SideBySide):
        return torch.cat([matrix_of(part) for part in layer.parts])
    if isinstance(layer, QuantizedLinear):
        stored_ND = layer.dequantized().float()
        return stored_ND if layer.order is None else stored_ND[:, layer.order.argsort()]
    raise XverseError(
        "A DoRA adapter cannot be used on this model as it is loaded.",
        f"It needs the weights themselves, and a {type(layer).__name__} has them repacked.",
        "Load the model unquantized, or merge the adapter: xverse export --to merged.",
    )
