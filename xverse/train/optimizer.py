"""GRADIENTS -> BETTER WEIGHTS. AdamW, or Muon for the matrices; what they keep, and in which form.

A weight that computes in bf16 has a master in fp32 beside it, or is rounded at random. Every rank
holds the part of all this that it holds of the weight. With a ferry, what is kept is in the host's
memory and is updated there (see offload).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from xverse.kernels import dispatch, reference_train
from xverse.kernels.reference_train import AdamW
from xverse.model.decoder import Decoder
from xverse.parallel.layout import Layout, copies, whole_weights
from xverse.train.offload import Ferry, Load
from xverse.train.options import Updating

MOMENTUM = 0.95  # of Muon, with Nesterov's look ahead


@dataclass
class Slot:
    """A weight and what the optimizer keeps of it."""

    name: str
    parameter: nn.Parameter
    weight: Tensor  # in fp32, or the parameter itself; with a ferry, in the host's memory
    first: Tensor
    second: Tensor | None  # none: Muon's
    decay: float


class Optimizer:
    """Updates every weight of a decoder that has a gradient."""

    def __init__(
        self,
        decoder: Decoder,
        options: Updating,
        *,
        seed: int = 0,
        layout: Layout | None = None,
        ferry: Ferry | None = None,
    ) -> None:
        """With a `ferry`, `layout` is one of tensors in the host's memory."""
        self.options, self.seed, self.layout, self.ferry = options, seed, layout, ferry
        wanted = getattr(torch, options.moments)
        self.slots = [
            self._slot(name, parameter, wanted, options)
            for name, parameter in decoder.named_parameters()
            if parameter.requires_grad
        ]
        assert self.slots, "a decoder to train has weights that want a gradient"

    def _slot(
        self, name: str, parameter: nn.Parameter, moments: torch.dtype, options: Updating
    ) -> Slot:
        matrix = parameter.dim() > 1 and not name.startswith(("model.embed_tokens", "lm_head"))
        muon = options.optimizer == "muon" and matrix and not name.endswith("router.weight")
        plain = self._view(name, parameter)
        single = plain.dtype == torch.float32 or options.master == "none"
        return Slot(
            name,
            parameter,
            plain if single else plain.float(),
            torch.zeros_like(plain, dtype=torch.float32 if muon else moments),
            None if muon else torch.zeros_like(plain, dtype=moments),
            # Norms and biases scale and shift, and rare tokens would forget what they learned.
            options.weight_decay if matrix or name.startswith("lm_head") else 0.0,
        )

    def _view(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The weight where it is updated: the model's own, or with a ferry a copy on the host."""
        memory = _local(parameter.detach())
        if self.ferry is not None:
            memory = memory.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return self.layout.view(name, parameter, memory) if self.layout else memory

    def squares(self) -> Tensor:
        """Sum of the squares of all gradients that this rank holds, fp32; a copy counts by its
        share, so that the ranks' sums add up."""
        by_copies: dict[int, list[Tensor]] = {}
        for slot in self.slots:
            if slot.parameter.grad is not None:
                gradient = slot.parameter.grad
                by_copies.setdefault(copies(slot.weight), []).append(_local(gradient))
        assert by_copies, "a backward pass comes before"
        total = torch.zeros((), device=next(iter(by_copies.values()))[0].device)
        for number, gradients in by_copies.items():
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
            total += torch.stack(norms).square().sum() / number
        return total

    def clear(self) -> None:
        for slot in self.slots:
            slot.parameter.grad = None

    @torch.no_grad()
    def update(self, number: int, rate: float, scale: float) -> None:
        """Update `number`, counted from 0, with the gradients times `scale`; they are cleared."""
        if self.ferry is not None:
            self.ferry.carry(self._loads(number, rate, scale))
            return
        for index, slot in enumerate(self.slots):
            if slot.parameter.grad is None:
                continue
            if slot.second is None:
                self._muon(slot, rate, scale)
            else:
                rule = self._rule(index, number, rate, scale)
                weight, copy = _local(slot.weight), self._copy(slot)
                call = dispatch.adamw(weight.device).call
                gradient = _local(slot.parameter.grad)
                call(weight, gradient, _local(slot.first), _local(slot.second), rule, copy)
            slot.parameter.grad = None

    def _rule(self, index: int, number: int, rate: float, scale: float) -> AdamW:
        """The numbers of update `number` for slot `index`."""
        options = self.options
        return AdamW(
            rate=rate,
            beta1=options.beta1,
            beta2=options.beta2,
            epsilon=options.epsilon,
            decay=self.slots[index].decay,
            step=number + 1,
            scale=scale,
            seed=(self.seed * 7919 + number) * len(self.slots) * 4 + index * 4,
        )

    def _loads(self, number: int, rate: float, scale: float) -> Iterator[Load]:
        """What the ferry carries; of each gradient nothing else holds on."""
        for index, slot in enumerate(self.slots):
            gradient, slot.parameter.grad = slot.parameter.grad, None
            if gradient is None:
                continue
            assert slot.second is not None, "Muon is not offloaded"
            parts = (gradient, slot.parameter.detach(), slot.weight, slot.first, slot.second)
            yield Load(*map(_flat, parts), self._rule(index, number, rate, scale))

    def tensors(self) -> dict[str, Tensor]:
        """All that must be kept of weights and optimizer, by name; views, not copies."""
        found: dict[str, Tensor] = {}
        for slot in self.slots:
            found[f"weight.{slot.name}"] = slot.weight
            found[f"first.{slot.name}"] = slot.first
            if slot.second is not None:
                found[f"second.{slot.name}"] = slot.second
        return found

    @torch.no_grad()
    def adopt(self) -> None:
        """Give the model the weights of the masters, after `tensors` were filled."""
        for slot in self.slots:
            if (copy := self._copy(slot)) is not None:
                copy.copy_(_local(slot.weight))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in the best form there is, one by one; every rank must ask for all."""
        own = ((slot.name, slot.weight) for slot in self.slots)
        return whole_weights(own, self.layout) if self.layout else own

    def _muon(self, slot: Slot, rate: float, scale: float) -> None:
        assert slot.parameter.grad is not None
        gradient = _local(slot.parameter.grad).float() * scale
        momentum = _local(slot.first)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        direction = _direction(ahead, slot.weight)
        weight = _local(slot.weight)
        if weight.dtype == torch.float32:
            reference_train.muon(
                weight, direction, rate=rate, decay=slot.decay, copy=self._copy(slot)
            )
            return
        moved = weight.float()
        reference_train.muon(moved, direction, rate=rate, decay=slot.decay)
        weight.copy_(moved)

    def _copy(self, slot: Slot) -> Tensor | None:
        """The weight that the model computes with, where it is not the one that is updated."""
        plain = _local(slot.parameter.detach())
        return None if self.ferry is None and plain.dtype == slot.weight.dtype else plain


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tensor: Tensor) -> Tensor:
    local = _local(tensor)
    assert local.is_contiguous(), "pieces of it are pieces of memory"
    return local.view(-1)


def _direction(local: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the directions of the matrices of which `local` is its part.

    Experts that are spread whole stay where they are; other matrices are cut, and every rank
    computes with all of them.
    """
    if not isinstance(like, DTensor) or local.shape[-2:] == like.shape[-2:]:
        return reference_train.muon_direction(local)
    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    made = reference_train.muon_direction(whole)
    return distribute_tensor(made, mesh, placements, src_data_rank=None).to_local()
