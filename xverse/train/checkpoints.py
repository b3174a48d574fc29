"""RUN <-> DISK. Checkpoints: written beside the training, whole or not at all, read if sound.

checkpoints/step-00000500/
    shard-00001-model-00001-of-00001.safetensors   what rank 0 holds of weights and optimizer
    rank-00000.json                                its random generators, and sha256 of its files
    manifest.json                                  the run's facts, and sha256 of the files above

Tensors go through torch.distributed.checkpoint, as safetensors with their offsets: any number of
ranks can read what any other number wrote. Nothing is pickled.
"""

import contextlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from xverse.errors import XverseError
from xverse.files import read_json
from xverse.log import logger
from xverse.parallel.ranks import Ranks
from xverse.train import randomness
from xverse.train.manifest import (
    FORMAT,
    difference,
    file_facts,
    published,
    read_manifest,
    sync_folder,
    write_durably,
    write_manifest,
)
from xverse.train.shard_file import ShardWriter
from xverse.train.staging import Staging

FAILURES = (Exception, CheckpointException)  # the latter, PyTorch's own, is no Exception
READERS = 4  # files that are hashed at a time: a core each gives about 1.5 GB/s


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says of the run, and which newer ones were refused, and why."""

    step: int
    facts: Mapping[str, object]
    refused: tuple[str, ...]


class Checkpoints:
    """The checkpoints of a run. All ranks make the same calls in the same order.

    Without `copies` what is saved is in the host's memory, which may have no room for it twice: it
    is written from where it is, and `hold` waits for that.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, copies: bool = True) -> None:
        assert keep > 0
        self.folder, self.ranks, self.keep, self.copies = folder, ranks, keep, copies
        self.pinned = -1  # a step whose checkpoint is kept however old it is
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._staging = Staging(ranks.device)
        self.seconds = 0.0  # that the latest save took, beside the training

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to take the memory that saving them will need."""
        if self.copies:
            self._staging.reserve(tensors)

    def hold(self) -> None:
        """Have the device wait for what `save` still reads; before `tensors` are changed."""
        self._staging.hold()
        if not self.copies and self._thread is not None:
            self._thread.join()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Begin to write a checkpoint; `tensors` may change after `hold`.

        It waits for the one before. What fails is told by `wait`.
        """
        self.wait()
        staged = self._staging.copy(tensors) if self.copies else dict(tensors)
        own = {"generators": randomness.generators(self.ranks.device)}
        given = (step, staged, dict(facts), own)
        self._thread = threading.Thread(target=self._write, args=given, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises XverseError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise XverseError(
                f"A checkpoint could not be written to {self.folder}.",
                _reason(failure),
                "Check the disk's space and permissions; earlier checkpoints are unharmed.",
            ) from failure

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        check: Callable[[Mapping[str, object]], None] = lambda facts: None,
        only: int | None = None,
    ) -> Loaded | None:
        """Fill `tensors` from the newest checkpoint that is whole, or from that of the step `only`;
        `check` may object to its facts.

        None where there is no checkpoint at all. Raises XverseError where there are, and none of
        them is whole.
        """
        refused: list[str] = []
        for step in self._steps():
            if only is not None and step != only:
                continue
            place = self.folder / _name(step)
            manifest = self._checked(place)
            if isinstance(manifest, str):
                refused.append(f"{place.name}: {manifest}")
                logger.warning("checkpoint %s is refused: %s", place, manifest)
                continue
            facts = manifest["facts"]
            assert isinstance(facts, dict)
            check(facts)
            self._read(place, tensors)
            self._restore_generators(place)
            return Loaded(step, facts, tuple(refused))
        if refused:
            raise XverseError(
                f"None of the checkpoints in {self.folder} can be read.",
                "; ".join(refused),
                "Restore one from a backup, or remove the folder to begin again.",
            )
        return None

    def _steps(self) -> Iterator[int]:
        """Steps that have a checkpoint, the newest first, as rank 0 sees them."""
        found = [step for step, _ in published(self.folder)]
        for index in range(int(self.ranks.from_first(len(found)))):
            mine = found[-1 - index] if index < len(found) else 0
            yield int(self.ranks.from_first(mine))

    def _checked(self, place: Path) -> dict[str, object] | str:
        """The manifest, or why the checkpoint cannot be used; every rank hashes its share."""
        manifest = read_manifest(place)
        why = manifest if isinstance(manifest, str) else ""
        if not isinstance(manifest, str):
            files = manifest["files"]
            assert isinstance(files, dict)
            mine = sorted(files)[self.ranks.rank :: self.ranks.size]
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(lambda name: difference(place / name, files[name]), mine)
                why = next(filter(None, found), "")
        if self.ranks.any(bool(why)):
            return why or "another rank found it damaged"
        assert isinstance(manifest, dict)
        return manifest

    def _read(self, place: Path, tensors: Mapping[str, Tensor]) -> None:
        with _quiet():
            load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(place), thread_count=READERS),
                process_group=self.ranks.aside,
                no_dist=self.ranks.size == 1,
            )

    def _restore_generators(self, place: Path) -> None:
        """A rank beyond those that wrote it keeps its fresh ones."""
        own = place / _rank_name(self.ranks.rank)
        if own.exists():
            randomness.restore(read_json(own)["generators"], self.ranks.device)

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        facts: dict[str, object],
        own: dict[str, object],
    ) -> None:
        """The whole save, in its own thread; after each part ranks ask whether all succeeded."""
        began = time.monotonic()
        aside = self.folder / f".{_name(step)}.partial"
        parts: tuple[Callable[[], None], ...] = (
            lambda: self._make_room(aside),
            lambda: self._write_share(aside, tensors, own),
            lambda: self._publish(step, aside, facts),
        )
        for part in parts:
            try:
                part()
            except FAILURES as error:  # told by `wait`, in the thread that trains
                self._failure = error
            if self._somebody(self._failure is not None):
                self._failure = self._failure or OSError("another rank could not write its part")
                return
        self.seconds = time.monotonic() - began

    def _make_room(self, aside: Path) -> None:
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()

    def _write_share(self, aside: Path, tensors: dict[str, Tensor], own: dict[str, object]) -> None:
        self._staging.finish()
        writer = ShardWriter(aside)
        with _quiet():
            save(
                tensors,
                storage_writer=writer,
                process_group=self.ranks.aside,
                no_dist=self.ranks.size == 1,
            )
        own["files"] = writer.facts
        write_durably(aside / _rank_name(self.ranks.rank), own)

    def _publish(self, step: int, aside: Path, facts: dict[str, object]) -> None:
        if not self.ranks.first:
            return
        files: dict[str, object] = {}
        for rank in range(self.ranks.size):
            described = aside / _rank_name(rank)
            told = read_json(described)["files"]
            assert isinstance(told, dict)
            files |= told | {described.name: file_facts(described)}
        manifest: dict[str, object] = {
            "format": FORMAT,
            "step": step,
            "ranks": self.ranks.size,
            "facts": facts,
            "files": files,
        }
        write_manifest(aside, manifest)
        final = self.folder / _name(step)
        if final.exists():  # of a run that was rolled back, or a damaged one
            final.rename(self.folder / f".{final.name}.partial-{os.getpid()}")
        aside.rename(final)
        sync_folder(self.folder)
        self._forget()

    def _forget(self) -> None:
        """Remove checkpoints beyond those that are kept, and what was begun and never finished."""
        for step, place in published(self.folder)[: -self.keep]:
            if step != self.pinned:
                shutil.rmtree(place, ignore_errors=True)
        for place in self.folder.glob(".step-*.partial*"):
            shutil.rmtree(place, ignore_errors=True)

    def _somebody(self, failed: bool) -> bool:
        """Whether a rank failed; the writers of all ranks meet here."""
        if self.ranks.size == 1:
            return failed
        import torch
        import torch.distributed as dist

        found = torch.tensor(int(failed))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.ranks.aside)
        return bool(found)


def _reason(failure: BaseException) -> str:
    """In one line; PyTorch's own exception is a whole traceback."""
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1][:300] if lines else 'no more is known'}"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that one process saves alone, which is meant so here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        yield
