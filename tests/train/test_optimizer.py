"""The optimizer: AdamW is PyTorch's, masters keep what bf16 loses, Muon moves along directions."""

import pytest
import torch

from tests.train.tiny import tiny_decoder
from xverse.train.optimizer import Optimizer
from xverse.train.options import Updating


def gradients(decoder: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)


def test_adamw_is_pytorchs() -> None:
    ours, theirs = tiny_decoder(), tiny_decoder()
    options = Updating(weight_decay=0.1)
    optimizer = Optimizer(ours, options)
    decayed = [slot.name for slot in optimizer.slots if slot.decay]
    assert any("q_proj" in name for name in decayed)
    assert not any("norm" in name or "embed" in name for name in decayed)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if n in decayed]},
        {
            "params": [p for n, p in theirs.named_parameters() if n not in decayed],
            "weight_decay": 0,
        },
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.update(step, 1e-2, 1.0)
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_small_updates_add_up_with_a_master_and_with_random_rounding() -> None:
    """1e-4 of a weight of one is below bf16's last place: without either, nothing would move."""
    for changes in ({"master": "float32"}, {"master": "none", "moments": "bfloat16"}):
        decoder = tiny_decoder(torch.bfloat16).requires_grad_(False)
        weight = decoder.model.norm.weight.requires_grad_(True)
        optimizer = Optimizer(decoder, Updating(weight_decay=0.0, **changes))  # type: ignore[arg-type]
        for step in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.update(step, 1e-4, 1.0)
        assert weight.float().mean().item() == pytest.approx(0.99, abs=0.003), changes


def test_masters_are_what_is_kept_and_the_model_follows_them() -> None:
    decoder = tiny_decoder(torch.bfloat16)
    optimizer = Optimizer(decoder, Updating())
    kept = optimizer.tensors()
    assert all(t.dtype == torch.float32 for t in kept.values())
    for tensor in kept.values():
        tensor.fill_(0.1)
    optimizer.adopt()
    assert all((p == torch.tensor(0.1).bfloat16()).all() for p in decoder.parameters())


def test_squares_and_clearing() -> None:
    decoder = tiny_decoder()
    optimizer = Optimizer(decoder, Updating())
    gradients(decoder, 1)
    whole = sum(p.grad.square().sum().item() for p in decoder.parameters() if p.grad is not None)
    assert optimizer.squares().item() == pytest.approx(whole, rel=1e-5)
    before = [p.clone() for p in decoder.parameters()]
    optimizer.clear()
    optimizer.update(0, 1.0, 1.0)  # nothing has a gradient: nothing moves
    assert all(map(torch.equal, before, decoder.parameters()))


def test_muon_moves_matrices_along_orthogonal_directions_and_adamw_the_rest() -> None:
    decoder = tiny_decoder()
    optimizer = Optimizer(decoder, Updating(optimizer="muon", weight_decay=0.0))
    by_muon = {slot.name for slot in optimizer.slots if slot.second is None}
    assert by_muon == {n for n, _ in decoder.named_parameters() if "proj" in n}
    layer = decoder.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    gradients(decoder, 3)
    optimizer.update(0, 1e-2, 1.0)
    values = torch.linalg.svdvals(layer.weight.detach() - before)
    assert values.min() > 0.5 * values.max()  # the gradient's own are spread over 1 : 8
    elements = (layer.weight.detach() - before).square().mean().sqrt().item()
    assert elements == pytest.approx(0.2 * 1e-2, rel=0.3)  # as large as AdamW's usually are
