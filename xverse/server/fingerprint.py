"""WHAT ANSWERS -> A SHORT NAME. OpenAI's system_fingerprint: other weights, options or code, and
the same seed may give another answer."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

import xverse
from xverse.checkpoint.load import Checkpoint
from xverse.server.messages import Start

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SAMPLE = 2**16  # bytes of each end of a file: reading 130 GB whole would take minutes


def fingerprint(checkpoint: Checkpoint, start: Start, device: str) -> str:
    """The name of this model as it is served on a device; the same on every like machine."""
    options = msgspec.to_builtins(start)
    # Where it lies says nothing about what it is, nor what may be added to it.
    for name in [name for name in options if name == "model" or "adapter" in name]:
        del options[name]
    facts = {
        "versions": [xverse.__version__, version("torch")],
        "device": device.partition(":")[0],
        "options": options,
        "config": checkpoint.config,
        "generation_config": checkpoint.generation_config,
        "weights": list(_samples(checkpoint.path)),
    }
    told = json.dumps(facts, sort_keys=True, default=str).encode()
    return f"fp_{hashlib.sha256(told).hexdigest()[:12]}"


def adapter_fingerprint(base: str, folder: Path) -> str:
    """The name of a model with an adapter, `base` being the model's own."""
    config = (folder / "adapter_config.json").read_bytes()
    facts = [base, hashlib.sha256(config).hexdigest(), *_samples(folder)]
    return f"fp_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}"


def _samples(path: Path) -> Iterator[tuple[str, int, str]]:
    """Name, size and a hash of both ends of each file of weights."""
    files = [path] if path.is_file() else [f for kind in WEIGHTS for f in path.glob(kind)]
    for file in sorted(files):
        size = file.stat().st_size
        with file.open("rb") as stream:
            ends = stream.read(SAMPLE)
            stream.seek(max(0, size - SAMPLE))
            ends += stream.read(SAMPLE)
        yield ("" if path.is_file() else file.name), size, hashlib.sha256(ends).hexdigest()
