"""Weights of every layout equal torch's own, bit for bit; damaged files are named."""

import json
import logging
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.archives import number, state_dict, storage, tensor, text, write_zip
from xverse.checkpoint.weights import (
    PickleFile,
    SafetensorsFile,
    ShardedWeights,
    Weights,
    is_dropped,
    open_weights,
)
from xverse.errors import XverseError

BASE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def equal_bits(a: Tensor, b: Tensor) -> bool:
    def raw(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def saved(tmp_path: Path, content: object, **options: object) -> PickleFile:
    torch.save(content, tmp_path / "pytorch_model.bin", **options)  # type: ignore[arg-type]
    return PickleFile(tmp_path / "pytorch_model.bin")


# ---- PyTorch files -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_dtype_equals_torch(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    values = (BASE * 4).abs().to(dtype)
    file = saved(tmp_path, {"w": values}, pickle_protocol=protocol)
    assert equal_bits(file.read("w"), values)
    assert file.infos["w"].dtype == dtype
    assert file.infos["w"].nbytes == values.nbytes


def test_every_kind_of_view_equals_torch(tmp_path: Path) -> None:
    views = {
        "whole": BASE,
        "offset": BASE[7:],
        "transposed": BASE.t(),
        "strided": BASE[::3, ::2],
        "column": BASE[:, 3],
        "scalar": BASE[5, 5],
        "empty": BASE[:0],
        "permuted": BASE.view(4, 16, 16).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(BASE[1:3]),
        "own": torch.tensor(3),
    }
    file = saved(tmp_path, views)
    assert len(file._members) < len(views)  # one storage is shared
    for name, value in views.items():
        assert equal_bits(file.read(name), value), name
        assert file.read(name).is_contiguous()


def test_a_module_state_dict_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    content = module.state_dict()
    assert isinstance(content, OrderedDict)
    assert hasattr(content, "_metadata")
    file = saved(tmp_path, content)
    assert file.infos.keys() == content.keys()
    for name, value in content.items():
        assert equal_bits(file.read(name), value)


def test_nested_state_dict_and_other_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"w": BASE, "step": 7, "notes": {"x": [1, None]}, "lr": 0.1}
    with caplog.at_level(logging.WARNING, "xverse"):
        file = saved(tmp_path, {"state_dict": tensors, "epoch": 3})
    assert list(file.infos) == ["w"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ignored 3 entries" in caplog.text


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": BASE})
    before = file.path.read_bytes()
    file.read("w").zero_()
    assert file.path.read_bytes() == before


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": BASE, "b": BASE.clone()})
    assert (
        file.read("a").untyped_storage().data_ptr() == file.read("b").untyped_storage().data_ptr()
    )
    save_file({"a": BASE}, tmp_path / "model.safetensors")
    other = SafetensorsFile(tmp_path / "model.safetensors")
    assert other.read("a").data_ptr() == other.read("a").data_ptr()


def test_unaligned_storages_are_read(tmp_path: Path) -> None:
    six = torch.arange(6, dtype=torch.float32)
    members = {"r/data.pkl": state_dict(w=tensor()), "r/data/0": six.numpy().tobytes()}
    path = tmp_path / "a.bin"
    offsets = set()
    for pad in range(4):
        write_zip(path, {"r/" + "p" * (pad + 1): b"", **members})
        file = PickleFile(path)
        offsets.add(file._members["r/data/0"].offset % 4)
        assert torch.equal(file.read("w"), six.view(2, 3))
    assert offsets == {0, 1, 2, 3}


def test_a_storage_beyond_4_gib_is_read(tmp_path: Path) -> None:
    count = 5 * 2**30  # bytes; a hole in a sparse file
    stored = storage(count=number(count), kind=b"ctorch\nByteStorage\n")
    end = storage(key=text("1"))
    shape = b"(" + number(2) + number(3) + b"t"
    pickled = state_dict(
        big=tensor(stored, number(count - 6), shape), last=tensor(end, number(0), shape)
    )
    six = torch.arange(6, dtype=torch.float32)
    members: dict[str, bytes | int] = {
        "r/data.pkl": pickled, "r/data/0": count, "r/data/1": six.numpy().tobytes(),
    }  # fmt: skip
    write_zip(tmp_path / "a.bin", members, zip64=True)
    file = PickleFile(tmp_path / "a.bin")
    assert torch.equal(file.read("big"), torch.zeros(2, 3, dtype=torch.uint8))
    assert torch.equal(file.read("last"), six.view(2, 3))


def refused(path: Path, match: str) -> XverseError:
    kind = SafetensorsFile if path.suffix == ".safetensors" else PickleFile
    with pytest.raises(XverseError, match=match) as caught:
        kind(path)
    assert path.name in caught.value.what
    return caught.value


def write_tar(path: Path) -> None:
    (path.parent / "member").write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "member")


OTHER_FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "before 1.6": (
        lambda path: torch.save({"w": BASE}, path, _use_new_zipfile_serialization=False),
        "before PyTorch 1.6",
    ),
    "tar": (write_tar, "before PyTorch 1.6"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
        "Git LFS pointer",
    ),
    "page": (lambda path: path.write_text("<html>404</html>"), "starts with b'<html>"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "folder": (lambda path: path.mkdir(), "missing"),
    "absent": (lambda path: None, "no such file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "leads nowhere"),
    "no pickle": (lambda path: write_zip(path, {"r/data/0": b""}), "0 pickles"),
    "two pickles": (
        lambda path: write_zip(path, {"a/data.pkl": b"", "b/data.pkl": b""}),
        "2 pickles",
    ),
    "deep pickle": (lambda path: write_zip(path, {"a/b/data.pkl": b"}."}), "1 pickles"),
    "big end first": (
        lambda path: write_zip(path, {"r/data.pkl": b"}.", "r/byteorder": b"big"}),
        "big end first",
    ),
    "large pickle": (lambda path: write_zip(path, {"r/data.pkl": 2**27}), "134217728 bytes"),
}


@pytest.mark.parametrize(("write", "match"), OTHER_FORMATS.values(), ids=OTHER_FORMATS.keys())
def test_other_files_are_named(tmp_path: Path, write: Callable[[Path], object], match: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    write(path)
    refused(path, match)


def test_a_truncated_download_names_file_and_size(tmp_path: Path) -> None:
    torch.save({"w": BASE}, tmp_path / "a.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    for end in [*range(4, len(whole), 397), len(whole) - 1]:
        (tmp_path / "a.bin").write_bytes(whole[:end])
        refused(tmp_path / "a.bin", f"after {end} bytes")


# ---- safetensors ---------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


HOSTILE = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "the file has 7"),
    "header beyond the file": (safetensors(one(), length=5000), "needs 5008 bytes"),
    "header of 2**64": (safetensors(one(), length=2**64 - 1), "needs 18446744073709551623 bytes"),
    "cut short": (safetensors(one(), bytes(23)), "should have 97 bytes, and has 96"),
    "too long": (safetensors(one(), bytes(25)), "should have"),
    "no JSON": (safetensors(b"{'w'"), "line 1"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "utf-8"),
    "array": (safetensors([1]), "object"),
    "name twice": (safetensors(b'{"w": 1, "w": 2}'), "more than once"),
    "deep": (safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested"),
    "unknown dtype": (safetensors(one(dtype="F4")), "dtype 'F4'"),
    "dtype a number": (safetensors(one(dtype=1)), "malformed"),
    "no shape": (safetensors({"w": {"dtype": "F32", "data_offsets": [0, 24]}}), "malformed"),
    "entry null": (safetensors({"w": None}), "malformed"),
    "negative size": (safetensors(one(shape=[-2, -3])), "malformed"),
    "true size": (safetensors(one(shape=[True, 6])), "malformed"),
    "float size": (safetensors(one(shape=[2.0, 3])), "malformed"),
    "huge shape": (safetensors(one(shape=[2**62, 2**62])), "not of 24 bytes"),
    "overflowing shape": (safetensors(one(shape=[2**33, 2**31, 6])), "not of 24 bytes"),
    "huge number": (safetensors(b'{"w": ' + b"9" * 5000 + b"}"), "larger than any"),
    "rank 1000": (safetensors(one(shape=[1] * 1000)), "malformed"),
    "shape of another size": (safetensors(one(shape=[2, 4])), "not of 24 bytes"),
    "backwards": (safetensors(one(data_offsets=[24, 0])), "not of -24 bytes"),
    "negative offset": (safetensors(one(data_offsets=[-24, 0])), "malformed"),
    "offset beyond": (safetensors(one(data_offsets=[2**40, 2**40 + 24])), "hole"),
    "three offsets": (safetensors(one(data_offsets=[0, 24, 24])), "malformed"),
    "hole": (safetensors(one(data_offsets=[4, 28]), bytes(28)), "hole"),
    "overlap": (safetensors({**one(), "v": one()["w"]}), "overlap"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}, **one()}), "metadata|invalid"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "no tensors": (safetensors({}, b""), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_safetensors_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(XverseError, match=match) as caught:
        open_weights(tmp_path)
    assert "model.safetensors" in caught.value.what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_equal_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (BASE * 4).abs().to(dtype)
    save_file({"w": values, "scalar": values[0, 0].clone()}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert equal_bits(file.read("w"), values)
    assert equal_bits(file.read("scalar"), values[0, 0])


# ---- folders -------------------------------------------------------------------------------------

SHARDS = 8
TENSORS = {f"model.layers.{i}.w": torch.full((4, 4), float(i)).bfloat16() for i in range(24)}
SHARD_OF = {name: i % SHARDS for i, name in enumerate(TENSORS)}


def write_shards(folder: Path, suffix: str) -> list[Path]:
    """The folder as published: 8 shards, an index, and inv_freq buffers in both."""
    stem = "pytorch_model" if suffix == ".bin" else "model"
    paths = [folder / f"{stem}-{i + 1:05}-of-{SHARDS:05}{suffix}" for i in range(SHARDS)]
    weight_map = {name: paths[i].name for name, i in SHARD_OF.items()}
    for i, path in enumerate(paths):
        shard = {name: TENSORS[name] for name in TENSORS if SHARD_OF[name] == i}
        shard[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        weight_map[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = path.name
        if suffix == ".bin":
            torch.save(shard, path)
        else:
            save_file(shard, path)
    write_index(folder, suffix, weight_map)
    return paths


def write_index(folder: Path, suffix: str, weight_map: object) -> None:
    stem = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.index.json").write_text(json.dumps(content))


def assert_is_whole(weights: Weights) -> None:
    infos = weights.infos()
    assert infos.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert equal_bits(weights.read(name, torch.bfloat16), value)
        assert equal_bits(weights.read(name, torch.float32), value.float())
        assert (infos[name].shape, infos[name].dtype, infos[name].nbytes) == (
            (4, 4),
            value.dtype,
            32,
        )


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_and_index(tmp_path: Path, suffix: str) -> None:
    paths = write_shards(tmp_path, suffix)
    weights = open_weights(tmp_path)
    assert_is_whole(weights)
    assert weights.infos()["model.layers.3.w"].file == paths[3].name


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_hub_cache_of_links(tmp_path: Path, suffix: str) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, suffix)
    for i, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064}")
    assert_is_whole(open_weights(snapshot))


def test_safetensors_come_first_and_never_give_way(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(open_weights(tmp_path).read("w", torch.float32), torch.zeros(2))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(open_weights(tmp_path).read("w", torch.float32), torch.ones(2))
    (tmp_path / "model.safetensors").write_bytes(b"damaged download")
    with pytest.raises(XverseError, match=r"model\.safetensors is not a complete"):
        open_weights(tmp_path)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, ".bin")
    paths[2].unlink()
    paths[5].unlink()
    with pytest.raises(XverseError, match="2 of 8 shards") as caught:
        open_weights(tmp_path)
    assert paths[2].name in caught.value.why
    assert paths[5].name in caught.value.why


def test_index_and_shards_must_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_shards(tmp_path, ".safetensors")
    good = {name: paths[i].name for name, i in SHARD_OF.items()}
    write_index(tmp_path, ".safetensors", {**good, "model.layers.99.w": paths[1].name})
    with pytest.raises(XverseError, match="no file does") as caught:
        open_weights(tmp_path)
    assert paths[1].name in caught.value.what
    write_index(tmp_path, ".safetensors", {**good, "model.layers.0.w": paths[1].name})
    with pytest.raises(XverseError, match=f"which is in {paths[0].name}"):
        open_weights(tmp_path)
    del good["model.layers.0.w"]
    write_index(tmp_path, ".safetensors", good)
    with caplog.at_level(logging.WARNING, "xverse"):
        assert_is_whole(open_weights(tmp_path))
    assert "1 tensors are in the shards and not in the index" in caplog.text
    save_file({"model.layers.0.w": torch.zeros(1)}, paths[7])
    write_index(tmp_path, ".safetensors", {"a": paths[0].name, "b": paths[7].name})
    with pytest.raises(XverseError, match="as well"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../model.bin", "/etc/passwd", "a/model.bin", "a\\model.bin", "..", "", "x\0.bin", ".",
     None, 3, ["a.bin"], {}, "model.safetensors", "model.pkl", "~/x/../y.bin"],
)  # fmt: skip
def test_hostile_index_entries_are_refused(tmp_path: Path, shard: object) -> None:
    torch.save({"w": BASE}, tmp_path / "pytorch_model-1.bin")
    write_index(tmp_path, ".bin", {"w": shard})
    with pytest.raises(XverseError, match=r"pytorch_model\.bin\.index\.json is malformed"):
        open_weights(tmp_path)


@pytest.mark.parametrize("table", [None, [], {}, "x", 3])
def test_an_index_without_a_table_is_refused(tmp_path: Path, table: object) -> None:
    write_index(tmp_path, ".bin", table)
    with pytest.raises(XverseError, match="no weight_map"):
        open_weights(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(XverseError, match=r"holds no weights[^$]*it holds config\.json"):
        open_weights(tmp_path)
    with pytest.raises(XverseError, match="not a model folder"):
        open_weights(tmp_path / "absent")
    with pytest.raises(XverseError, match="It is a file"):
        open_weights(tmp_path / "config.json")


def test_unknown_tensors_and_dropped_names(tmp_path: Path) -> None:
    save_file({"w": BASE}, tmp_path / "model.safetensors")
    weights = ShardedWeights([SafetensorsFile(tmp_path / "model.safetensors")])
    with pytest.raises(XverseError, match="no tensor 'v'"):
        weights.read("v", torch.float32)
    assert is_dropped("model.layers.31.self_attn.rotary_emb.inv_freq")
    assert not is_dropped("model.layers.31.self_attn.q_proj.weight")


def test_a_file_larger_than_memory_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> Tensor:
        raise RuntimeError("unable to mmap 9 bytes")

    file = saved(tmp_path, {"w": BASE})
    monkeypatch.setattr(torch, "from_file", out_of_memory)
    with pytest.raises(XverseError, match="cannot be mapped"):
        file.read("w")
