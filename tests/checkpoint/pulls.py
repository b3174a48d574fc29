"""What the tests of pulling share: a model on the fake hubs, and how it looks on the disk."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.checkpoint.fake_hubs import MODEL, FakeHub
from xverse.errors import XverseError

Source = Literal["hf", "modelscope"]
BOTH = pytest.mark.parametrize("source", ["hf", "modelscope"])
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
CARD = b"---\nlicense: apache-2.0\nlicense_name: xverse\n---\n# XVERSE\n"


def repository() -> dict[str, bytes]:
    dice = random.Random(0)
    shards = {name: dice.randbytes(1_000_000 + 400_000 * n) for n, name in enumerate(SHARDS)}
    index = {"weight_map": {f"layer.{n}": name for n, name in enumerate(SHARDS)}}
    return {
        ".gitattributes": b"*.bin filter=lfs\n",
        ".hidden/config.json": b"{}",
        "README.md": CARD,
        "MODEL_LICENSE.pdf": b"%PDF terms",
        "config.json": b'{"model_type": "xverse"}',
        "tokenizer.json": b'{"model": {}}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "modeling_xverse.py": b"open('canary', 'w')\n",
        "pytorch_model.bin": dice.randbytes(5000),
        "pytorch_model.bin.index.json": b"{}",
        "empty.txt": b"",
    }


KEPT = sorted(
    name
    for name in repository()
    if not name.startswith(".") and not name.endswith(".py") and "pytorch_model" not in name
)


def prepare(hub: FakeHub, source: Source) -> None:
    hub.branch = "main" if source == "hf" else "master"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a pulled folder but our own notes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if not name.startswith(".xverse/")}


def expected(hub: FakeHub) -> dict[str, bytes]:
    return {name: hub.files[name] for name in KEPT}


def assert_says(error: XverseError, *words: str) -> None:
    for word in words:
        assert word in str(error)
    assert all((error.what, error.why, error.fix))


def start_pull(source: Source, cache_dir: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from xverse.checkpoint.hub import pull; "
        "pull(sys.argv[1], source=sys.argv[2], cache_dir=sys.argv[3])"
    )
    return subprocess.Popen([sys.executable, "-c", code, MODEL, source, str(cache_dir)])
