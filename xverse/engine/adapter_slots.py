"""ADAPTERS -> SLOTS. Adapters where a step finds them by a number, in memory that stays in place.

A captured step reads the number of each row's slot, and so serves whoever lies there: adapters come
and go between steps, and what is captured stays.
"""

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor

from xverse.checkpoint.adapter import linear_sizes
from xverse.engine.adapted import LAYERS, Adapted, AddInSlots, Change, Loaded
from xverse.engine.residual import ManyRows, Matrix, Products, matrix, products
from xverse.engine.transfer import upload
from xverse.kernels import dispatch
from xverse.kernels.reference_adapt import JOINED, RANKS, Slots, empty_slots
from xverse.log import warn_once
from xverse.model.decoder import Decoder

NOBODY = -1  # the slot of rows without an adapter


class AdapterSlots:
    """`count` adapters of at most `rank`, in memory that is taken here: for each output and input
    of a layer, count * rank numbers. Whoever was not needed for longest gives way to who is."""

    def __init__(self, twin: Decoder, count: int, rank: int) -> None:
        """Empty slots for the layers of a decoder's twin (`adapted`)."""
        self.rank = -(-rank // RANKS) * RANKS
        device, dtype = twin.device, twin.dtype
        places = {
            name: module
            for name, module in twin.named_modules()
            # What is always asked beside experts is a part of their kernel.
            if isinstance(module, Adapted) and ".shared_experts." not in name
        }
        # Of all layers in one, so that they are written at once.
        self._ranks = torch.zeros(len(places), count, JOINED, dtype=torch.int32, device=device)
        self._layers: dict[str, Slots] = {}
        self._by_matrix: dict[int, Slots] = {}  # a step knows its matrices, and not their names
        sizes, like = linear_sizes(twin.shape), torch.empty(0, dtype=dtype, device=device)
        for (name, module), ranks_SL in zip(places.items(), self._ranks, strict=True):
            above, _, last = name.rpartition(".")
            joined = [sizes[f"{above}.{part}"] for part in LAYERS[last]]
            outputs, inputs = tuple(size[0] for size in joined), joined[0][1]
            slots = empty_slots(count, rank, inputs, outputs, like, ranks_SL)
            self._layers[name] = self._by_matrix[id(matrix(module.layer))] = slots
        self.add = dispatch.add_adapters(device, dtype).call
        self._owners: list[int | None] = [None] * count  # by slot, the number of an adapter
        self._used = list(range(count))  # the longest unused first

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        tensors = (t for s in self._layers.values() for t in (s.a_SLRD, s.b_SRN, s.gain_SN))
        return self._ranks.nbytes + sum(tensor.nbytes for tensor in tensors)

    def of(self, owner: Loaded | None) -> int | None:
        """The slot of an adapter, NOBODY of none; None where it has no slot."""
        if owner is None:
            return NOBODY
        return self._owners.index(owner.number) if owner.number in self._owners else None

    def seat(self, owners: Iterable[Loaded | None]) -> None:
        """Give those who compute the next step a slot, as far as there are enough; others keep
        theirs for as long as nobody needs it. Written behind the step that is under way."""
        wanted = {owner.number: owner for owner in owners if owner is not None}
        for number in wanted:
            if number in self._owners:
                self._touch(self._owners.index(number))
        for number, owner in wanted.items():
            if number in self._owners or not self._fits(owner):
                continue
            free = next((s for s in self._used if self._owners[s] not in wanted), None)
            if free is None:
                warn_once(
                    f"more adapters meet in a step than the {len(self._owners)} that have a slot; "
                    "the others are computed without CUDA graphs, and slower. Raise adapter_slots."
                )
                return
            self._write(free, owner)
            self._owners[free] = number
            self._touch(free)

    def computing(self, decoder: Decoder, rows: int, slot_T: Tensor) -> Products:
        """What multiplies in a step of so many rows, each with the adapter of its slot."""
        usual = products(decoder, rows)

        def product(x_TD: Tensor, weight_ND: Matrix, bias_N: Tensor | None) -> Tensor:
            y_TN = usual.product(x_TD, weight_ND, bias_N)
            slots = self._by_matrix.get(id(weight_ND))
            if slots is not None:
                self.add(y_TN, x_TD, slot_T, slots, bias_N)
            return y_TN

        return ManyRows(decoder.device, decoder.dtype, product)

    def behind(self, slot_T: Tensor) -> AddInSlots:
        """What adds behind the layers of the twin, to rows with the adapters of these slots."""

        def add(name: str, y_TN: Tensor, x_TD: Tensor, bias_N: Tensor | None) -> None:
            if name in self._layers:
                self.add(y_TN, x_TD, slot_T, self._layers[name], bias_N)

        return add

    def _touch(self, slot: int) -> None:
        self._used.remove(slot)
        self._used.append(slot)

    def _fits(self, owner: Loaded) -> bool:
        """Whether an adapter has room in a slot; if not, that is said once."""
        most = max((rank for c in owner.changes.values() for _, rank in c.parts), default=0)
        elsewhere = owner.changes.keys() - self._layers.keys()
        why_not = ""
        if most > self.rank:
            why_not = f"its rank is {most}, and slots are for {self.rank} (adapter_rank)"
        elif elsewhere:
            why_not = f"it changes {min(elsewhere)}, which is a part of a larger kernel"
        if why_not:
            warn_once(
                f"tokens with the adapter {owner.name!r:.100} are computed without CUDA graphs, "
                f"and slower: {why_not}."
            )
        return not why_not

    def _write(self, slot: int, owner: Loaded) -> None:
        ranks = []
        for name, slots in self._layers.items():
            change = owner.changes.get(name)
            parts = () if change is None else change.parts
            own = [rank for _, rank in parts]
            ranks.append([*own, *[0] * (JOINED - len(own))])
            if change is not None:
                _fill(slots, slot, change)
        self._ranks[:, slot] = upload(ranks, self._ranks.device, numpy.int32)


def _fill(slots: Slots, slot: int, change: Change) -> None:
    """Write a change of a layer into its slot: the parts of A apart, those of B side by side."""
    a_LRD, b_RN = slots.a_SLRD[slot].zero_(), slots.b_SRN[slot].zero_()
    row = column = 0
    for part, (outputs, rank) in enumerate(change.parts):
        a_LRD[part, :rank] = change.a_RD[column : column + rank]
        b_RN[:rank, row : row + outputs] = change.b_NR[
            row : row + outputs, column : column + rank
        ].T
        row, column = row + outputs, column + rank
    if change.gain_N is None:
        slots.gain_SN[slot].fill_(1)
    else:
        slots.gain_SN[slot] = change.gain_N
