"""NAMES -> ADAPTERS. Those an engine has loaded, who uses them, and the rows of a step by adapter.

Adapters come and go between two steps. A name that is unloaded, or given to another adapter, means
the new at once for requests that come after; those before it keep what they began with, whose
memory is free when the last of them ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy
import torch
from torch import Tensor

from xverse.checkpoint.adapter import Adapter
from xverse.engine.adapted import Groups, Loaded, adapted, changes_of
from xverse.engine.adapter_slots import NOBODY, AdapterSlots
from xverse.engine.memory import out_of_memory
from xverse.engine.transfer import upload
from xverse.errors import XverseError
from xverse.model.decoder import Decoder


class Adapters:
    """At most `most` names, and all of them in `most_bytes` together with those still in use."""

    def __init__(self, decoder: Decoder, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._groups = Groups()
        self._twin = adapted(decoder, self._groups)
        self._known: dict[str, Loaded] = {}
        self._leaving: list[Loaded] = []
        self._next = 1
        self.slots: AdapterSlots | None = None

    def take_slots(self, count: int, rank: int) -> None:
        """Have slots from now on, for a runner whose steps are captured; once for all. XverseError
        where the memory is not there."""
        if not count or self.slots is not None:
            return
        try:
            self.slots = AdapterSlots(self._twin, count, rank)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise XverseError(
                f"There is no memory for {count} adapters of rank {rank} in captured steps.",
                str(error).splitlines()[0],
                "Lower adapter_slots or adapter_rank; adapter_slots 0 does without, slower.",
            ) from error

    @property
    def names(self) -> list[str]:
        """Those that requests may ask for, the oldest first."""
        return list(self._known)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are in memory."""
        return sum(each.nbytes for each in (*self._known.values(), *self._leaving))

    def load(self, name: str, adapter: Adapter, *, replace: bool = False) -> None:
        """Take an adapter in; XverseError where the name is taken (unless to `replace` it), where
        it does not fit this model, or where there is no room."""
        old = self._known.get(name)
        if old is not None and not replace:
            raise XverseError(
                f"There is an adapter {name!r:.100} already.",
                "A name means one adapter.",
                "Unload it first, ask to replace it, or give another name.",
            )
        if old is None and len(self._known) >= self.most:
            raise XverseError(
                f"There is no place for the adapter {name!r:.100}.",
                f"{len(self._known)} are loaded, and there may be {self.most}.",
                "Unload another one, or raise max_adapters.",
            )
        loaded = Loaded(name, self._next, changes_of(adapter, self._twin, repr(name)[:100]))
        if self.nbytes + loaded.nbytes > self.most_bytes:
            raise XverseError(
                f"There is no memory for the adapter {name!r:.100}.",
                f"It takes {loaded.nbytes / 2**20:.1f} MiB; of {self.most_bytes / 2**20:.1f} MiB "
                f"{self.nbytes / 2**20:.1f} are taken.",
                "Unload another one (what requests still use is free when they end), or raise "
                "adapter_bytes.",
            )
        if old is not None:
            self.unload(name)
        self._next += 1
        self._known[name] = loaded

    def unload(self, name: str) -> None:
        """Forget a name; XverseError where nobody knows it."""
        self._require(name)
        gone = self._known.pop(name)
        if gone.users:
            self._leaving.append(gone)

    def hold(self, name: str) -> Loaded:
        """The adapter of this name for one more request, which must `release` it."""
        loaded = self._require(name)
        loaded.users += 1
        return loaded

    def release(self, loaded: Loaded) -> None:
        """A request that held it has ended."""
        loaded.users -= 1
        if not loaded.users and loaded in self._leaving:
            self._leaving.remove(loaded)

    @contextmanager
    def over(self, owners: Sequence[Loaded | None]) -> Iterator[Decoder]:
        """The decoder whose first rows belong to these adapters, one each; more rows to none,
        unless all are of one."""
        slot_T = self._slots_of(owners)
        if self.slots is not None and slot_T is not None:
            self._groups.in_slots = self.slots.behind(slot_T)
        self._groups.now = []
        for loaded in dict.fromkeys(owners):
            if loaded is None or (self.slots is not None and self.slots.of(loaded) is not None):
                continue
            own = [row for row, owner in enumerate(owners) if owner is loaded]
            rows = None
            if len(own) < len(owners):
                rows = torch.tensor(own, device=self._twin.device)
            self._groups.now.append((loaded.changes, rows))
        try:
            yield self._twin
        finally:
            self._groups.now, self._groups.in_slots = [], None

    def _slots_of(self, owners: Sequence[Loaded | None]) -> Tensor | None:
        """The slot of each row, on the device; None where nobody has one."""
        if self.slots is None:
            return None
        by_owner = {owner: self.slots.of(owner) for owner in dict.fromkeys(owners)}
        slots = {owner: NOBODY if slot is None else slot for owner, slot in by_owner.items()}
        if all(slot == NOBODY for slot in slots.values()):
            return None
        return upload([slots[owner] for owner in owners], self._twin.device, numpy.int32)

    def _require(self, name: str) -> Loaded:
        if name not in self._known:
            known = ", ".join(map(repr, self._known)) or "none"
            raise XverseError(
                f"There is no adapter {name!r:.100}.",
                f"Loaded are: {known:.300}.",
                "Load it first.",
            )
        return self._known[name]


def decoder_for(
    decoder: Decoder, adapters: Adapters | None, owners: Sequence[Loaded | None]
) -> AbstractContextManager[Decoder]:
    """What computes rows that belong to these adapters: the decoder itself where to none."""
    if adapters is None or not any(owners):
        return nullcontext(decoder)
    return adapters.over(owners)
