"""A published folder becomes safetensors: same bits, no code, whole or not at all."""

import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.text.tiny import write_tiny_tokenizer
from xverse.checkpoint.convert import convert_to_safetensors, save_weights
from xverse.checkpoint.folder import verify_manifest
from xverse.checkpoint.weights import open_weights
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.text.tokenizer import Tokenizer

CONFIG = {"model_type": "xverse", "auto_map": {"AutoModel": "modeling_xverse.X"}, "hidden_size": 4}


def publish(folder: Path, shards: int = 8) -> dict[str, Tensor]:
    """A folder laid out as XVERSE's own: .bin shards, legacy tokenizer, code with a canary."""
    folder.mkdir()
    dice = torch.Generator().manual_seed(0)
    embedding = torch.randn(32, 4, generator=dice).bfloat16()
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    for i in range(shards):
        tensors[f"model.layers.{i}.q.weight"] = torch.randn(4, 6, generator=dice).half().t()
        tensors[f"model.layers.{i}.norm.weight"] = torch.ones(3 + i, dtype=torch.float32)
    tensors["step"] = torch.tensor(7)
    tensors["flags"] = torch.tensor([True, False, True])
    for i in range(shards):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        content = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        torch.save(content, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "modeling_xverse.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    (folder / "MODEL_LICENSE.pdf").write_bytes(b"%PDF")
    (folder / "README.md").write_text("# XVERSE")
    (folder / "photo.png").write_bytes(b"")
    write_tiny_tokenizer(folder)
    return {name: value for name, value in tensors.items() if "inv_freq" not in name}


def test_a_published_folder_is_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    tensors = publish(source)
    with caplog.at_level(logging.INFO, "xverse"):
        convert_to_safetensors(source, target, max_shard_bytes=300)
    weights = open_weights(target)
    assert weights.infos().keys() == tensors.keys()
    for name, value in tensors.items():
        read = weights.read(name, value.dtype)
        assert torch.equal(read, value)
        assert (weights.infos()[name].dtype, read.shape) == (value.dtype, value.shape)
    assert not (source / "canary").exists()
    assert sorted(path.name for path in target.iterdir() if "model-" not in path.name) == [
        "MODEL_LICENSE.pdf",
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "left behind: config.json: auto_map, modeling_xverse.py, photo.png" in caplog.text
    assert read_json(target / "config.json") == {"model_type": "xverse", "hidden_size": 4}
    assert read_json(target / "generation_config.json") == {"temperature": 0.5}
    assert Tokenizer.load(target).encode("Hi 你好") == Tokenizer.load(source).encode("Hi 你好")
    assert verify_manifest(target) == []
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_shards_are_named_bounded_and_standard(tmp_path: Path) -> None:
    tensors = publish(tmp_path / "source")
    convert_to_safetensors(tmp_path / "source", tmp_path / "target", max_shard_bytes=300)
    index = read_json(tmp_path / "target" / "model.safetensors.index.json")
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    assert weight_map.keys() == tensors.keys()
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert [file.name for file in files] == names
    assert set(weight_map.values()) == set(names)
    assert len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 300  # noqa: SIM118
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_converted_folder_converts_to_the_same_bits(tmp_path: Path) -> None:
    publish(tmp_path / "source")
    convert_to_safetensors(tmp_path / "source", tmp_path / "once", max_shard_bytes=300)
    convert_to_safetensors(tmp_path / "once", tmp_path / "twice")
    once, twice = open_weights(tmp_path / "once"), open_weights(tmp_path / "twice")
    assert once.infos().keys() == twice.infos().keys()
    for name, info in once.infos().items():
        assert torch.equal(once.read(name, info.dtype), twice.read(name, info.dtype))


def test_a_target_that_holds_something_is_kept(tmp_path: Path) -> None:
    publish(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("precious")
    with pytest.raises(XverseError, match="there already"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "mine").read_text() == "precious"
    with pytest.raises(XverseError, match="there already"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "source" / "README.md")
    with pytest.raises(XverseError, match="there already"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "source")
    (tmp_path / "target" / "mine").unlink()
    convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert verify_manifest(tmp_path / "target") == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(XverseError, match="No space left"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    monkeypatch.undo()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    with pytest.raises(XverseError):
        convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "file").write_text("")
    with pytest.raises(XverseError, match="cannot be written"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "file" / "target")


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(XverseError, match="no room"):
        convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_links_do_not_gather_files_from_elsewhere(tmp_path: Path) -> None:
    publish(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    for name in ("LICENSE", "vocab.json"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "secret")
    convert_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target" / "LICENSE").exists()
    assert not (tmp_path / "target" / "vocab.json").exists()


def test_a_hub_cache_is_converted(tmp_path: Path) -> None:
    tensors = publish(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert_to_safetensors(snapshot, tmp_path / "target")
    assert open_weights(tmp_path / "target").infos().keys() == tensors.keys()
    assert not (tmp_path / "target" / "MODEL_LICENSE.pdf").is_symlink()


def test_save_weights_takes_tensors_one_by_one(tmp_path: Path) -> None:
    """At most one shard is alive while the next tensor is made."""
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        made: list[weakref.ref[Tensor]] = []
        for i in range(12):
            alive.append(sum(ref() is not None for ref in made))
            tensor = torch.full((25,), float(i))
            made.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor

    save_weights(tensors(), tmp_path / "new", max_shard_bytes=300)
    assert max(alive) <= 4  # three of a shard, and one that did not fit
    weights = open_weights(tmp_path / "new")
    for i in range(12):
        assert torch.equal(weights.read(f"w{i}", torch.float32), torch.full((25,), float(i)))


def test_save_weights_refuses_what_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match=r"no dtype for torch\.complex64"):
        save_weights([("w", torch.zeros(1, dtype=torch.complex64))], tmp_path)
    with pytest.raises(XverseError, match="'w' occurs twice"):
        save_weights([("w", torch.zeros(1)), ("w", torch.ones(1))], tmp_path)


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    mixed = [
        ("a", torch.ones(3, dtype=torch.bool)),
        ("b", torch.ones(5, dtype=torch.bfloat16)),
        ("c", torch.ones(3, dtype=torch.float32)),
        ("d", torch.tensor(1)),
        ("e", torch.zeros(0, 4)),
        ("f", torch.ones(3, 2).t()),
        ("权重", torch.ones(1, dtype=torch.float64)),
    ]
    save_weights(mixed, tmp_path)
    weights = open_weights(tmp_path)
    for name, value in mixed:
        read = weights.read(name, value.dtype)
        assert torch.equal(read, value)
        assert read.data_ptr() % value.dtype.itemsize == 0


MEASURE = """
import sys, threading, time
from pathlib import Path
from xverse.checkpoint.convert import convert_to_safetensors

def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

start, peak, done = anonymous(), 0, threading.Event()
def watch() -> None:
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
convert_to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=20 * 2**20)
done.set()
watcher.join()
print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_converting_200_mb_takes_little_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {f"w{i}": torch.full((5 * 2**20,), i, dtype=torch.bfloat16) for i in range(20)}
    torch.save(tensors, source / "pytorch_model.bin")
    nbytes = (source / "pytorch_model.bin").stat().st_size
    assert nbytes > 200e6
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "target")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    print(f"{int(ran.stdout) / 1e6:.1f} MB anonymous for a file of {nbytes / 1e6:.0f} MB")
    assert int(ran.stdout) < nbytes / 10
    assert verify_manifest(tmp_path / "target") == []
