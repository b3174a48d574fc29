"""Checkpoints: the newest that is whole is read, whatever happened to the others or to a save."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.tiny import ALONE
from xverse.errors import XverseError
from xverse.train import manifest
from xverse.train.checkpoints import Checkpoints
from xverse.train.manifest import published


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((8, 4), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}


def make(folder: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, ALONE, keep=keep)


def save(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoints = make(folder, keep)
        checkpoints.save(step, tensors(step), {"step": step})
        checkpoints.wait()


def load(folder: Path) -> tuple[int, tuple[str, ...]]:
    """The step that is loaded, all of it of that step, and what was refused."""
    found = tensors(-1)
    told = make(folder).load(found)
    assert told is not None
    assert all((tensor == told.step).all() for tensor in found.values())
    assert told.facts == {"step": told.step}
    return told.step, told.refused


def test_the_newest_is_read_and_old_ones_go(tmp_path: Path) -> None:
    assert make(tmp_path).load(tensors(0)) is None
    save(tmp_path, 5, 10, 20, keep=2)
    assert load(tmp_path) == (20, ())
    assert [step for step, _ in published(tmp_path)] == [10, 20]
    assert not list(tmp_path.glob(".*"))


def test_what_is_saved_is_what_stood_there_when_it_was_asked_for(tmp_path: Path) -> None:
    values = tensors(7)
    checkpoints = make(tmp_path)
    checkpoints.save(7, values, {"step": 7})
    for tensor in values.values():
        tensor.fill_(99)
    checkpoints.wait()
    assert load(tmp_path) == (7, ())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flips": (lambda place: flip(next(place.glob("shard-*"))), "sha256"),
    "a file is cut": (lambda place: os.truncate(next(place.glob("shard-*")), 100), "bytes"),
    "a file is gone": (lambda place: next(place.glob("shard-*")).unlink(), "cannot be read"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "missing"),
    "an empty manifest": (lambda place: (place / "manifest.json").write_text(""), "empty"),
    "half a manifest": (lambda place: os.truncate(place / "manifest.json", 90), "not valid JSON"),
    "another step": (
        lambda place: (place / "manifest.json").write_text(
            json.dumps(json.loads((place / "manifest.json").read_text()) | {"step": 9})
        ),
        "changed after",
    ),
    "generators": (lambda place: flip(place / "rank-00000.json"), "sha256"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_taken(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path, 1, 2)
    harm, why = HARM[name]
    harm(tmp_path / "step-00000002")
    step, refused = load(tmp_path)
    assert step == 1
    assert len(refused) == 1
    assert refused[0].startswith("step-00000002: ")
    assert why in refused[0]
    save(tmp_path, 2)  # reached again, it takes the damaged one's place
    assert load(tmp_path) == (2, ())


def test_where_none_is_whole_the_run_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(XverseError, match="None of the checkpoints"):
        load(tmp_path)


@pytest.mark.parametrize("place", range(0, 12, 2))
def test_a_save_on_a_full_disk_fails_aloud_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """The disk is full from the n-th sync or rename on; the first is that of the tensors."""
    save(tmp_path, 1)
    calls = 0

    def full(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls > place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(os.fsync))
        patch.setattr(Path, "rename", full(Path.rename))
        failure: XverseError | None = None
        try:
            save(tmp_path, 2)
        except XverseError as error:
            failure = error
    if failure is None:
        assert calls <= place
        assert load(tmp_path)[0] == 2
    else:
        assert "No space left" in failure.why
        assert load(tmp_path)[0] in (1, 2)
    save(tmp_path, 3)
    assert load(tmp_path) == (3, ())
    assert not list(tmp_path.glob(".*"))


def test_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    import random

    import numpy as np

    save(tmp_path, 1)
    drawn = random.random(), np.random.rand(), torch.rand(3)
    load(tmp_path)
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    save(tmp_path, 1)
    names = {file.suffix for file in (tmp_path / "step-00000001").iterdir()}
    assert names == {".safetensors", ".json"}
    assert manifest.FORMAT == 1, "another format needs a way to read this one"
