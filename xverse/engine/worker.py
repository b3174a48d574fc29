"""ONE RANK. The part of a spread engine that one device computes, and its process.

All ranks run the same engine on the same commands, so that they decide alike; only the layers
differ. Rank 0 is in the caller's process (`engine/spread.py`); every other one is a process of
this file, and ends when its line to rank 0 does.
"""

import os
import select
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from xverse import log
from xverse.checkpoint.load import Model, load
from xverse.engine.engine import Engine
from xverse.engine.message import Line, Message, decode_request, digest, encode_error
from xverse.engine.options import EngineOptions
from xverse.errors import XverseError
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.parallel.mesh import Mesh
from xverse.parallel.tensor import connect, keep_part
from xverse.quant.quantize import quantize_module
from xverse.quant.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What every rank must know to load its part of a model; `device` is "cpu" or "cuda"."""

    model: str
    size: int
    device: str
    dtype: str
    quantize: int | None
    options: EngineOptions

    def to_message(self) -> Message:
        return asdict(self)

    @classmethod
    def of_message(cls, message: Message) -> "Job":
        return cls(**message | {"options": EngineOptions(**message["options"])})

    def place(self, rank: int) -> torch.device:
        """The device of a rank."""
        return torch.device(self.device, rank) if self.device == "cuda" else torch.device("cpu")


class Seat:
    """A rank's part of the model, loaded and not yet connected to the others."""

    def __init__(self, job: Job, rank: int, model: str | Path | None = None) -> None:
        """`model` is the name that a person gave it, for rank 0."""
        self.job, self.rank = job, rank
        self.device = job.place(rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        place = str(self.device)
        part = partial(keep, job, rank)
        self.model: Model = load(model or job.model, dtype=job.dtype, device=place, keep=part)
        fuse(self.model.decoder)

    def facts(self) -> Message:
        """What rank 0 must know of it before all start: the kind of device."""
        gpu = self.device.type == "cuda"
        return {"device": torch.cuda.get_device_name(self.device) if gpu else "CPU"}

    def meet(self, meeting: Path) -> Mesh:
        """Meet the other ranks."""
        return Mesh.start(meeting, self.rank, self.job.size, self.device)

    def start(self, mesh: Mesh) -> Engine:
        """The engine over this part. All ranks start at once: they try out their largest steps
        together, and keep as many tokens as the one with the least room can."""
        decoder = connect(self.model.decoder, mesh)
        return Engine(
            decoder, end_ids=self.model.end_ids, options=self.job.options, least=mesh.least
        )


def keep(job: Job, rank: int, shape: ModelShape, name: str, module: nn.Module) -> nn.Module:
    """What a rank keeps of a module that has just been loaded."""
    if job.quantize is not None:  # before it is cut: scales are those of whole rows
        module = quantize_module(name, module, Recipe.of(job.quantize).fitting(shape))
    return keep_part(name, module, shape, rank, job.size)


def follow(engine: Engine, line: Line) -> None:
    """Do what rank 0 does, until it says stop. Raises XverseError where the results differ."""
    last = digest([])
    while True:
        message = line.receive()
        match message["do"]:
            case "add":
                number = engine.add(decode_request(message["request"]))
                assert number == message["number"], "ranks count alike"
            case "abort":
                engine.abort(message["number"])
            case "step":
                if message["last"] != last:
                    raise XverseError(
                        "Two devices of one model came to different tokens.",
                        "They do not compute alike, or something but commands decides a step.",
                        "Run the model on one device, and report this.",
                    )
                last = digest(engine.step())
            case "prepare":
                engine.prepare()
            case "stop":
                return


def run(line: Line) -> None:
    """The life of a process of rank 1 and above."""
    first = line.receive()
    rank = int(first["rank"])
    log.setup(rank=rank)
    try:
        seat = Seat(Job.of_message(first["job"]), rank)
        line.send(seat.facts())
        start = line.receive()
        mesh = seat.meet(Path(start["meeting"]))
        engine = seat.start(mesh)
        line.send({"ready": True})
        follow(engine, line)
        mesh.close()
    except EOFError:
        return  # rank 0 is gone, or gave up
    except XverseError as error:
        line.send(encode_error(error))
    except Exception as error:
        what = f"Rank {rank} of the model failed: {type(error).__name__}."
        line.send(encode_error(XverseError(what, str(error)[:500], "Load the model again.")))
        traceback.print_exc()  # the end of the process leaves no time for the interpreter to do it


def _end_with(end: socket.socket) -> NoReturn:
    """End this process when the other end of the socket closes, whatever it is doing."""
    poll = select.poll()
    poll.register(end, 0)  # closing is reported unasked
    while not poll.poll():
        pass
    os._exit(1)


def main() -> None:
    """`python -m xverse.engine.worker FD`: a process that rank 0 started."""
    end = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=[end], daemon=True).start()
    run(Line(end))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # kernels that wait for a rank that is gone would keep the process


if __name__ == "__main__":
    main()
