"""Copies of what a checkpoint keeps: as it stood, each in a place of its own."""

import torch

from xverse.train import staging
from xverse.train.staging import Staging, in_slabs

SIZES = {"a": (3, 5), "b": (), "c": (0,), "d": (700,), "e": (1,)}


def tensors() -> dict[str, torch.Tensor]:
    kinds = (torch.float32, torch.bfloat16)
    made = {n: torch.randn(size).to(kinds[i % 2]) for i, (n, size) in enumerate(SIZES.items())}
    return made | {"turned": torch.randn(4, 6).T}


def test_what_is_copied_stays_as_it_was() -> None:
    given = tensors()
    before = {name: tensor.clone() for name, tensor in given.items()}
    place = Staging(torch.device("cpu"))
    place.reserve(given)
    copied = place.copy(given)
    for tensor in given.values():
        tensor.zero_()
    place.hold()
    place.finish()
    for name, tensor in before.items():
        assert torch.equal(copied[name], tensor)


def test_slabs_hold_each_tensor_apart(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(staging, "SLAB", 2048)
    given = tensors()
    found = in_slabs(dict(given), pinned=False)
    assert list(found) == list(given)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (given[name].shape, given[name].dtype)
        assert tensor.data_ptr() % tensor.element_size() == 0
        tensor.copy_(given[name])
    assert all(torch.equal(found[name], given[name]) for name in given)
    memories = {tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}
    assert 1 < len(memories) < 5
