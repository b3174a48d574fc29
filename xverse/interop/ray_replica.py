"""ONE REPLICA. A server on loopback that lives as long as the process that started it.

`python -m xverse.interop.ray_replica` reads its options as one line of JSON, writes where it
listens as another, and ends in order when its standard input does.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from xverse.checkpoint.resolve import title_of
from xverse.server.messages import Start
from xverse.server.options import ServeOptions
from xverse.server.run import Listening, serve


def options_of(told: Mapping[str, Any]) -> ServeOptions:
    """What a replica was told, as the server takes it."""
    start = Start(**told["start"])
    return ServeOptions(
        start=start,
        name=told["name"] or title_of(start.model),
        port=0,
        keys=tuple(told["keys"]),
        **told["limits"],
    )


def main() -> None:
    """Serve until standard input ends."""
    options = options_of(json.loads(sys.stdin.readline()))
    serve(options, listening=_say_where)


def _say_where(found: Listening) -> None:
    print(json.dumps({"url": found.url}), flush=True)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    """A pipe closes however its other end dies."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
