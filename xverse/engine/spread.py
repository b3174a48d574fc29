"""ONE ENGINE, MANY DEVICES. Rank 0 of a model that is spread: it tells the others what it does."""

import contextlib
import secrets
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from xverse.checkpoint.load import Model, open_checkpoint
from xverse.checkpoint.resolve import resolve
from xverse.device import pick_device
from xverse.engine.engine import Engine, Output
from xverse.engine.message import digest, encode_request
from xverse.engine.options import EngineOptions
from xverse.engine.paged import Paged
from xverse.engine.request import Request
from xverse.engine.speculate import Speculation
from xverse.engine.worker import Job, Seat
from xverse.engine.workers import Workers
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.parallel import plan
from xverse.parallel.mesh import require_alone

GRACE_S = 3.0  # for the end of a process to become known, once something it was needed for failed


class SpreadEngine:
    """An engine of which every device computes a part; `engine` is the one of rank 0.

    One thread at a time may use it, as with `Engine`. Where a process ends or a step fails, every
    later call raises XverseError, and no process is left behind.
    """

    def __init__(self, engine: Engine, workers: Workers) -> None:
        self.engine = engine
        self._workers = workers
        self._last = digest([])
        self._finalizer = weakref.finalize(self, workers.close)

    @property
    def options(self) -> EngineOptions:
        return self.engine.options

    @property
    def decoder(self) -> Decoder:
        """Rank 0's part of the model."""
        return self.engine.decoder

    @property
    def kv(self) -> Paged:
        """Rank 0's keys and values."""
        return self.engine.kv

    @property
    def speculation(self) -> Speculation:
        """As every rank counts it."""
        return self.engine.speculation

    @property
    def step_tokens(self) -> int:
        """As `Engine.step_tokens`."""
        return self.engine.step_tokens

    @property
    def max_running(self) -> int:
        """As `Engine.max_running`."""
        return self.engine.max_running

    @property
    def capacity(self) -> int:
        """Tokens that the KV memory holds, of all requests together."""
        return self.engine.capacity

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self.engine.busy

    def add(self, request: Request) -> int:
        """As `Engine.add`; a request without a seed gets one here, the same for all ranks."""
        self._workers.require()
        sampling = request.sampling
        if sampling is not None and sampling.grammar is not None:
            raise XverseError(
                "A model that is spread over devices cannot hold answers to a grammar.",
                "When a grammar is compiled is a matter of time, and all devices must act alike.",
                "Leave the grammar out, or load the model without tensor_parallel.",
            )
        if sampling is not None and sampling.seed is None:
            request = replace(request, sampling=replace(sampling, seed=secrets.randbits(62)))
        with _uninterrupted():
            number = self.engine.add(request)
            command = {"do": "add", "number": number, "request": encode_request(request)}
            self._workers.tell(command)
        return number

    def prepare(self) -> None:
        """As `Engine.prepare`, on all devices."""
        with _uninterrupted():
            self._workers.tell({"do": "prepare"})
            self.engine.prepare()

    def abort(self, number: int) -> None:
        """As `Engine.abort`. Never raises: whether all are there is for the next step to see."""
        with _uninterrupted():
            self.engine.abort(number)
            with contextlib.suppress(XverseError):
                self._workers.tell({"do": "abort", "number": number})

    def step(self) -> Sequence[Output]:
        """As `Engine.step`, on all devices. Raises XverseError where one of them is gone."""
        self._workers.require()
        if not self.engine.busy:
            return []
        with _uninterrupted():
            self._workers.tell({"do": "step", "last": self._last})
            try:
                outputs = self.engine.step()
            except BaseException as error:  # from here on the ranks are no longer alike
                if self._workers.gone.wait(GRACE_S):
                    raise self._workers.failed() from error
                self._workers.failed(_broken(error))
                raise
            if self._workers.gone.is_set():
                raise self._workers.failed()  # what was computed without it means nothing
            self._last = digest(outputs)
        return outputs

    def close(self) -> None:
        """End the other processes; the engine is of no more use."""
        self._finalizer()


def spread(
    model: str | Path,
    size: int,
    *,
    dtype: str,
    device: str,
    quantize: int | None,
    options: EngineOptions,
) -> tuple[Model, SpreadEngine]:
    """Load a model in parts on `size` devices of this machine, one process each.

    The model given back has rank 0's part. Raises XverseError where the model does not divide,
    devices are missing or different, and for whatever any of the processes fails of.
    """
    path = resolve(model)
    plan.check(open_checkpoint(path).shape, size)
    job = Job(str(path), size, _kind(device, size), dtype, quantize, options)
    require_alone()
    workers = Workers(job)
    try:
        seat = Seat(job, 0, model)
        facts = [seat.facts(), *workers.hear()]
        _require_alike([fact["device"] for fact in facts])
        workers.tell({"meeting": str(workers.meeting)})
        workers.mesh = seat.meet(workers.meeting)
        engine = seat.start(workers.mesh)
        workers.hear()  # that they are ready
    except BaseException as error:
        if isinstance(error, RuntimeError) and workers.gone.wait(GRACE_S):
            why = workers.failed()  # what it went of, and not that it is missed
        else:
            why = workers.failed(_broken(error))
        workers.close()
        if isinstance(error, RuntimeError):
            raise why from error
        raise
    return seat.model, SpreadEngine(engine, workers)


def _kind(device: str, size: int) -> str:
    place = pick_device(device)
    if ":" in device:
        raise XverseError(
            f"A model cannot be spread over {size} devices and run on {device!r}.",
            "That names a single one.",
            'Give "cuda", and choose GPUs with CUDA_VISIBLE_DEVICES.',
        )
    if place.type == "cuda" and torch.cuda.device_count() < size:
        raise XverseError(
            f"There are not {size} GPUs to spread the model over.",
            f"PyTorch sees {torch.cuda.device_count()}.",
            "Lower tensor_parallel, or make more of them visible.",
        )
    return place.type


def _require_alike(names: Sequence[str]) -> None:
    if len(set(names)) > 1:
        raise XverseError(
            f"The devices are not alike: {', '.join(sorted(set(names)))}.",
            "Different kinds round differently, and could choose different tokens.",
            "Choose equal GPUs with CUDA_VISIBLE_DEVICES.",
        )


def _broken(error: BaseException) -> XverseError:
    if isinstance(error, XverseError):
        return error
    words = str(error).splitlines()
    return XverseError(
        f"The model stopped in the middle of its work: {type(error).__name__}.",
        words[0][:500] if words else "It was interrupted.",
        "Load it again.",
    )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until all ranks have done the same; a second one comes through."""
    old = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(old):
        yield
        return
    came: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if came:
        old(signal.SIGINT, came[0])
