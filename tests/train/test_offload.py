"""Offload: the host updates what it keeps, and no number of the run is another for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.train.test_loop import at_pass, events, losses
from tests.train.tiny import ALONE, options, tiny_run, tiny_shape
from xverse.errors import XverseError
from xverse.kernels.reference_train import AdamW
from xverse.model.catalog import CATALOG
from xverse.parallel.axes import Axes
from xverse.parallel.ranks import Ranks
from xverse.train import build, fit, manifest, offload
from xverse.train.objective import Part
from xverse.train.offload import Ferry, Load
from xverse.train.options import Computing, Keeping, Training, Updating, Watching
from xverse.train.stop import Stop
from xverse.train.tuning import FineTuning, Lora

Offload = Literal["none", "optimizer", "parameters"]
RULE = AdamW(rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, step=3, scale=0.5, seed=7)
LEAN = {"master": "none", "moments": "bfloat16"}
KINDS = [  # of computing, master, moments
    ("float32", {}),
    ("bfloat16", {}),
    ("bfloat16", LEAN),
]


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that small weights have several."""
    monkeypatch.setattr(offload, "PIECE", 192)


@pytest.fixture(scope="module")
def grouped() -> Iterator[Ranks]:
    ranks = Ranks.start("cpu", grouped=True)
    yield ranks
    ranks.close()


def asked(kind: Offload, dtype: str = "float32", **changes: Any) -> Training:
    update = {"warmup_steps": 2, "learning_rate": 3e-3, "clip": 0.5} | changes.pop("update", {})
    compute = Computing(dtype=dtype, offload=kind)  # type: ignore[arg-type]
    return options(compute=compute, update=Updating(**update), **changes)


def run(folder: Path, training: Training, ranks: Ranks, **named: Any) -> dict[str, torch.Tensor]:
    """The final state of a run to its last step."""
    decoder = build.fresh(tiny_shape(), training, ranks)
    it = tiny_run(folder, training, decoder=decoder, ranks=ranks, **named)
    assert it.run(Stop()) == "done"
    return {name: tensor.clone() for name, tensor in it.optimizer.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("dtype", "update"), KINDS)
def test_a_run_is_the_same_wherever_the_host_keeps_what(
    tmp_path: Path, grouped: Ranks, dtype: str, update: dict[str, Any]
) -> None:
    """Twenty steps of two passes, often clipped, and evaluated between."""
    kinds: dict[Offload, Ranks] = {"none": ALONE, "optimizer": ALONE, "parameters": grouped}
    found = {}
    for kind, ranks in kinds.items():
        training = asked(kind, dtype, update=update, steps=20, keep=Keeping(evaluate_every=8))
        found[kind] = run(tmp_path / kind, training, ranks, validation=True)
    for kind in ("optimizer", "parameters"):
        assert losses(tmp_path / kind) == losses(tmp_path / "none")
        assert_same(found[kind], found["none"])
    assert max(event["norm"] for event in events(tmp_path / "none", "step")) > 0.5  # type: ignore[type-var]


@pytest.mark.parametrize("way", [("none", "optimizer", "parameters"), ("parameters", "none")])
def test_a_run_goes_on_with_offload_switched_on_or_off(
    tmp_path: Path, grouped: Ranks, way: tuple[Offload, ...]
) -> None:
    """In bf16 with masters: each part of the run keeps them elsewhere."""
    training = asked("none", "bfloat16", steps=4 * len(way))
    whole = run(tmp_path / "whole", training, ALONE)
    for number, kind in enumerate(way, start=1):
        ranks = grouped if kind == "parameters" else ALONE
        parted = asked(kind, "bfloat16", steps=4 * number)
        # The schedule is that of the whole run, whose first steps these are.
        parted = parted if number == len(way) else _stopping(parted, len(way) * 4)
        found = _run_until(tmp_path / "parted", parted, ranks, 4 * number)
    assert_same(found, whole)
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")


def _stopping(training: Training, steps: int) -> Training:
    from dataclasses import replace

    return replace(training, steps=steps)


def _run_until(
    folder: Path, training: Training, ranks: Ranks, last: int
) -> dict[str, torch.Tensor]:
    """A run that is asked to stop in the step after which it shall."""
    stop = Stop()
    decoder = build.fresh(tiny_shape(), training, ranks)
    it = tiny_run(folder, training, decoder=decoder, ranks=ranks)
    update = it.optimizer.update

    def updated(number: int, rate: float, scale: float) -> None:
        update(number, rate, scale)
        if number + 1 == last < training.steps:
            stop.ask("SIGTERM")

    vars(it.optimizer)["update"] = updated
    it.run(stop)
    assert it.step == last
    return {name: tensor.clone() for name, tensor in it.optimizer.tensors().items()}


@pytest.mark.parametrize("kind", ["optimizer", "parameters"])
def test_bad_steps_are_skipped_and_rolled_back(
    tmp_path: Path, grouped: Ranks, kind: Offload
) -> None:
    ranks = grouped if kind == "parameters" else ALONE
    watch = Watching(patience=2)

    def harm(part: Part) -> Part:
        return Part(part.loss * float("nan"), part.also)

    found = {}
    for one, where in (("none", ALONE), (kind, ranks)):
        training = asked(one, watch=watch)  # type: ignore[arg-type]
        objective = at_pass(9, harm)
        found[one] = run(tmp_path / one, training, where, objective=objective)
        (bad,) = events(tmp_path / one, "bad")
        assert bad["step"] == 4
    assert_same(found[kind], found["none"])
    # Two in a row, and the checkpoint is taken.
    spoiled = {"count": 0}

    def twice(decoder: Any, batch: Any, units: int) -> Part:
        from xverse.train.objective import pretrain

        spoiled["count"] += 1
        part = pretrain(decoder, batch, units)
        return harm(part) if 13 <= spoiled["count"] <= 16 else part

    state = run(tmp_path / "back", asked(kind, watch=watch), ranks, objective=twice)
    assert [event["step"] for event in events(tmp_path / "back", "rollback")] == [4]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_nothing_is_copied_for_a_checkpoint_and_updates_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: what it gets is the state as it stood when the save was asked for."""
    import time

    real = manifest.sync_folder
    seen: list[bool] = []

    def slow(folder: Path) -> None:
        time.sleep(0.05)
        real(folder)

    monkeypatch.setattr("xverse.train.checkpoints.sync_folder", slow)
    it = tiny_run(tmp_path, asked("optimizer", keep=Keeping(save_every=1, keep=20)))
    update = it.optimizer.update

    def updated(number: int, rate: float, scale: float) -> None:
        seen.append(it.checkpoints.busy)
        update(number, rate, scale)

    vars(it.optimizer)["update"] = updated
    assert it.run(Stop()) == "done"
    assert seen == [False] * 12
    assert not it.checkpoints._staging._host
    kept = {name: torch.full_like(t, -1) for name, t in it.optimizer.tensors().items()}
    assert it.checkpoints.load(kept) is not None
    assert_same(kept, it.optimizer.tensors())


def test_gradients_are_let_go_as_they_are_used() -> None:
    """While a piece is updated, no more are held than are under way."""
    held: set[int] = set()
    most = 0

    class Counted(torch.Tensor):
        """A gradient that says when it is gone."""

    def loads() -> Iterator[Load]:
        import weakref

        nonlocal most
        for number in range(12):
            gradient = torch.ones(150).as_subclass(Counted)
            held.add(number)
            weakref.finalize(gradient, held.discard, number)
            most = max(most, len(held))
            states = [torch.zeros(150) for _ in range(4)]
            yield Load(gradient, *states, RULE)

    Ferry(torch.device("cpu"), pinned=True).carry(loads())
    assert most <= offload.PLACES + 3
    assert not held


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: asked("optimizer", update={"optimizer": "muon"}), "muon cannot be offloaded"),
        (lambda: asked("parameters", mesh=Axes(tensor=2)), "'tensor' of"),
        (
            lambda: FineTuning(compute=Computing(offload="parameters"), weights="qlora"),
            "integers of qlora",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_told(make: Any, why: str) -> None:
    with pytest.raises(XverseError, match=why):
        make()


def test_the_plan_counts_device_and_host_apart() -> None:
    """7B in bf16 with everything of AdamW in fp32: 2 bytes a weight, 2 of gradients, 12 on the
    host; with the parameters on the host too, two blocks and both ends are on the device."""
    shape = CATALOG["xverse-7b"]
    count = shape.num_parameters
    training = options(
        row_tokens=2048,
        rows_per_step=1,
        rows_per_pass=1,
        compute=Computing(dtype="bfloat16", recompute="full"),
    )
    plan = fit.plan(shape, training, Lora(), dtype="bfloat16", ranks=1, dpo=False)
    full, optimizer, parameters = (plan["full" + name] for name in fit.OFFLOADED.values())
    assert full.total == pytest.approx(16 * count, rel=0.01)
    assert full.host == 12 * count  # a checkpoint's copy
    assert optimizer.total == pytest.approx(4 * count, rel=0.02)
    assert optimizer.host == pytest.approx(12 * count, rel=0.01)
    assert parameters.weights == parameters.moments == parameters.masters == 0
    assert parameters.host == 16 * count
    assert [fit.cards(one) for one in (full, optimizer, parameters)] == [
        {"24 GB": False, "48 GB": False, "80 GB": False},
        {"24 GB": False, "48 GB": True, "80 GB": True},
        {"24 GB": True, "48 GB": True, "80 GB": True},
    ]
    assert "qlora int4" in plan
    assert not any(name.startswith("qlora") and "offloaded" in name for name in plan)
