"""RANK 0 -> PROCESSES. The other ranks of a spread engine: started, told, watched, ended."""

import contextlib
import select
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from xverse.device import child_environment
from xverse.engine.message import Line, Message
from xverse.engine.worker import Job
from xverse.errors import XverseError
from xverse.parallel.mesh import Mesh

STOP_S = 10  # for processes to end by themselves


class Workers:
    """The processes of ranks 1 and above. `gone` is set when one of them ends by itself."""

    def __init__(self, job: Job) -> None:
        self.gone = threading.Event()
        self.mesh: Mesh | None = None
        self.lines: list[Line] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._failure: XverseError | None = None
        self._closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="xverse-")
        self.meeting = Path(self._folder.name, "meeting")
        for rank in range(1, job.size):
            self._spawn({"rank": rank, "job": job.to_message()})
        threading.Thread(target=self._watch, name="xverse ranks", daemon=True).start()

    def tell(self, message: Message) -> None:
        """Send to all. Raises XverseError where one is gone."""
        self.require()
        try:
            for line in self.lines:
                line.send(message)
        except OSError:
            raise self.failed() from None

    def hear(self) -> list[Message]:
        """The next message of each. Raises XverseError where one failed or is gone."""
        heard = []
        for line in self.lines:
            try:
                message = line.receive()
            except EOFError:
                raise self.failed() from None
            if "error" in message:
                raise self.failed(XverseError(*message["error"]))
            heard.append(message)
        return heard

    def require(self) -> None:
        """Raise XverseError where the processes are no more."""
        if self._failure is not None:
            raise self._failure

    def failed(self, error: XverseError | None = None) -> XverseError:
        """End all processes; why, by what was known first, or else by what the one said that is
        gone."""
        self._failure = self._failure or error or self._last_words()
        for process in self.processes:
            process.kill()
        return self._failure

    def close(self) -> None:
        """End all processes, and leave the mesh. Again is no harm."""
        self._closing = True
        mesh, self.mesh = self.mesh, None
        if self._failure is None:
            with contextlib.suppress(OSError):
                for line in self.lines:
                    line.send({"do": "stop"})
        elif mesh is not None:
            mesh.abandon()
        if mesh is not None:
            mesh.close()  # while the others do
        for process in self.processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for line in self.lines:
            line.end.close()
        self._folder.cleanup()
        closed = XverseError("This model is closed.", "`close` was called.", "Load it again.")
        self._failure = self._failure or closed

    def _spawn(self, first: Message) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "xverse.engine.worker", str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # whatever a library prints must not mix with answers
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for rank 0 to answer
            )
        self.processes.append(process)
        self.lines.append(Line(ours))
        self.lines[-1].send(first)

    def _watch(self) -> None:
        """Notice the end of a process, and free rank 0 from waiting for what it will not send."""
        poll = select.poll()
        for line in self.lines:
            poll.register(line.end, 0)  # closing is reported unasked
        while not poll.poll():
            pass
        if self._closing:
            return
        self.gone.set()
        if self.mesh is not None:
            self.mesh.abandon()

    def _last_words(self) -> XverseError:
        for rank, (process, line) in enumerate(zip(self.processes, self.lines, strict=True), 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            if process.returncode is None:
                continue
            with contextlib.suppress(EOFError):
                while "error" not in (message := line.receive()):
                    pass
                return XverseError(*message["error"])
            return XverseError(
                f"The process of rank {rank} of the model ended with code {process.returncode}.",
                "A negative code is a signal: -9 comes from the system where memory runs out.",
                "Look at what it wrote above, and load the model again.",
            )
        return XverseError(
            "A process of the model does not answer.", "Its line is closed.", "Load it again."
        )
