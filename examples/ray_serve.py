"""Serve a model by several replicas, on one machine or on a Ray cluster.

python examples/ray_serve.py xverse/XVERSE-7B-Chat --replicas 2 --gpus 1
"""

import argparse
import os

from ray import serve

from xverse.interop.ray_serve import build_app


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder (on every machine), alias or hub id")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="for each replica")
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    key = os.environ.get("XVERSE_API_KEY")
    serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
    app = build_app(
        asked.model, replicas=asked.replicas, gpus=asked.gpus, keys=(key,) if key else ()
    )
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
