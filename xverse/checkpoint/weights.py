"""FILES -> TENSORS. Every source of weights: names first, then one tensor at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from xverse.checkpoint.archive import Malformed, Member, read_members
from xverse.checkpoint.folder import require_folder
from xverse.checkpoint.pickles import StoredTensor, read_pickle
from xverse.errors import XverseError
from xverse.files import DOWNLOAD_AGAIN, is_there, parse_json, read_json, require_file
from xverse.log import logger

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_PICKLE_BYTES = 64 * 2**20  # that of 9,600 tensors takes 2 MB
MAX_RANK = 16
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What stands at the start of files that PyTorch wrote before version 1.6 (2020), and before 0.1.
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored; for block-quantized kinds the dtype they are computed in
    nbytes: int  # as stored
    file: str


class Weights(Protocol):
    """A source of weights under Hugging Face tensor names."""

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by name; cheap, reads headers only."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` in `dtype`; shares the file's memory map where nothing changed."""
        ...


class TensorFile(Protocol):
    """One file of tensors: its headers read and checked, its data mapped when asked for."""

    path: Path
    infos: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, contiguous; writing to it leaves the file as it is."""
        ...


def is_dropped(name: str) -> bool:
    """Whether `name` is a buffer that old checkpoints carry and every model computes: inv_freq."""
    return name.endswith(".rotary_emb.inv_freq")


def is_router(name: str) -> bool:
    """Whether `name` is what a router decides by: in fp32, so it keeps what the file has of it."""
    return name.endswith("mlp.router.weight")


def open_weights(folder: Path) -> Weights:
    """The weights in `folder`: safetensors before PyTorch pickles, one file before shards.

    Raises XverseError naming the file that is missing, cut short, malformed or at odds with the
    index. A file that fails is never passed over for another format.
    """
    require_folder(folder)
    kinds: dict[str, Callable[[Path], TensorFile]] = {
        "model.safetensors": SafetensorsFile,
        "pytorch_model.bin": PickleFile,
    }
    for name, kind in kinds.items():
        if is_there(folder / name):
            return ShardedWeights([kind(folder / name)])
        index = folder / f"{name}.index.json"
        if is_there(index):
            shard_of = _read_index(index, Path(name).suffix)
            paths = [folder / shard for shard in sorted(set(shard_of.values()))]
            _require_shards(paths, index)
            return ShardedWeights([kind(path) for path in paths], shard_of)
    here = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise XverseError(
        f"{folder} holds no weights.",
        f"Neither {' nor '.join(kinds)} nor an index of shards is in it; it holds {here}.",
        "Download the model again; name a .gguf file itself, not its folder.",
    )


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> shard file name; every name a plain one that stays in the folder."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise XverseError(f"{path} is malformed.", "It has no weight_map.", DOWNLOAD_AGAIN)
    for shard in set(map(str, table.values())):
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or ".." in shard:
            why = f"It names the shard {shard[:80]!r}, which leads out of the folder."
            raise XverseError(f"{path} is malformed.", why, "Do not use this model folder.")
        if not shard.endswith(suffix):
            why = f"It names the shard {shard[:80]!r}, which does not end in {suffix}."
            raise XverseError(f"{path} is malformed.", why, DOWNLOAD_AGAIN)
    return {name: str(shard) for name, shard in table.items()}


def _require_shards(paths: Sequence[Path], index: Path) -> None:
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise XverseError(
            f"{len(absent)} of {len(paths)} shards are missing in {index.parent}.",
            f"{index.name} names {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}.",
            "Download the model again; files that are complete are not fetched twice.",
        )


class ShardedWeights:
    """The tensors of one or more files of a kind, and of the index that says which is where."""

    def __init__(
        self, files: Sequence[TensorFile], shard_of: Mapping[str, str] | None = None
    ) -> None:
        """Join `files`; `shard_of` is the index, tensor name -> file name, where there is one."""
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            for name in file.infos:
                if name in self._file_of:
                    other = self._file_of[name].path.name
                    raise _mismatch(file.path, f"{name!r} is in {other} as well.")
                self._file_of[name] = file
        if shard_of is not None:
            self._check_index(files, shard_of)
        self._infos = {
            name: file.infos[name] for name, file in self._file_of.items() if not is_dropped(name)
        }
        if not self._infos:
            raise _mismatch(files[0].path, "It holds no tensors.")

    def _check_index(self, files: Sequence[TensorFile], shard_of: Mapping[str, str]) -> None:
        paths = {file.path.name: file.path for file in files}
        for name, shard in shard_of.items():
            file = self._file_of.get(name)
            if file is None:
                raise _mismatch(paths[shard], f"The index says it holds {name!r}; no file does.")
            if file.path.name != shard:
                why = f"The index says it holds {name!r}, which is in {file.path.name}."
                raise _mismatch(paths[shard], why)
        extra = [name for name in self._file_of if name not in shard_of and not is_dropped(name)]
        if extra:
            logger.warning(
                "%d tensors are in the shards and not in the index; they are kept: %s",
                len(extra),
                extra[:5],
            )

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by name, less the dropped buffers."""
        return dict(self._infos)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` in `dtype`: the file's memory map itself where it is so stored."""
        if name not in self._infos:
            raise XverseError(
                f"The weights have no tensor {name!r}.",
                f"They hold {len(self._infos)} tensors, such as {list(self._infos)[:2]}.",
                "Check that config.json belongs to these weights.",
            )
        return self._file_of[name].read(name).to(dtype)


def _mismatch(path: Path, why: str) -> XverseError:
    return XverseError(f"{path} does not fit the model's other files.", why, DOWNLOAD_AGAIN)


def _unmappable(path: Path, size: int, error: Exception) -> XverseError:
    # Linux by default refuses a private map larger than the machine's memory and swap together.
    return XverseError(
        f"{path} of {size / 1e9:.1f} GB cannot be mapped into memory.",
        str(error).splitlines()[0],
        "Use a machine with more memory, or get the model in smaller shards.",
    )


class SafetensorsFile:
    """One .safetensors file; format: huggingface.co/docs/safetensors, section "Format"."""

    def __init__(self, path: Path) -> None:
        """Read and check the header of `path`; raises XverseError naming what is wrong."""
        self.path = path
        size = require_file(path)
        try:
            self.infos = _read_header(path, size)
            self._handle = safe_open(path, framework="pt")
        except (ValueError, SafetensorError) as error:
            raise XverseError(
                f"{path} is not a complete safetensors file.", str(error), DOWNLOAD_AGAIN
            ) from error
        except (RuntimeError, OSError) as error:
            raise _unmappable(path, size, error) from error

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, on the file's memory map."""
        tensor: torch.Tensor = self._handle.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


def _read_header(path: Path, size: int) -> dict[str, TensorInfo]:
    """Raises ValueError unless header and file agree to the byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header needs {8 + length} bytes; the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length} bytes is over {MAX_HEADER_BYTES}")
        header = parse_json(file.read(length))
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _read_entry(name, entry)
        infos[name] = TensorInfo(shape, dtype, end - begin, path.name)
        ranges.append((begin, end))
    expected = 0
    for begin, end in sorted(ranges):
        if begin != expected:
            raise ValueError(f"its tensors overlap or leave a hole at byte {begin} of the data")
        expected = end
    if size != 8 + length + expected:
        raise ValueError(f"it should have {8 + length + expected} bytes, and has {size}")
    return infos


def _read_entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]} if len(
            shape
        ) <= MAX_RANK and all(
            type(number) is int and number >= 0 for number in [*shape, begin, end]
        ):
            if kind not in SAFETENSORS_DTYPES:
                raise ValueError(f"the dtype {kind[:20]!r} of {name[:80]!r} is not supported")
            dtype = SAFETENSORS_DTYPES[kind]
            if math.prod(shape) * dtype.itemsize != end - begin:
                raise ValueError(f"{name[:80]!r} of shape {shape} is not of {end - begin} bytes")
            return dtype, tuple(shape), begin, end
    raise ValueError(f"the entry of {name[:80]!r} is malformed")


class PickleFile:
    """One file of `torch.save`: the pickle read as data, the tensors mapped where they lie."""

    def __init__(self, path: Path) -> None:
        """Read the pickle in `path`; raises XverseError for anything that is not plain tensors."""
        self.path = path
        self._size = require_file(path)
        self._map: torch.Tensor | None = None
        try:
            _refuse_legacy(path)
            self._members = read_members(path)
            self._root = _find_root(self._members)
            self._tensors = _keep_tensors(path, read_pickle(self._read_pickle_bytes()))
            for tensor in self._tensors.values():
                self._locate(tensor)
        except Malformed as error:
            raise XverseError(
                f"{path} is not a PyTorch checkpoint that we read.",
                f"{error}.",
                "Download it again; if it stays so, get the model's safetensors instead.",
            ) from error
        self.infos = {
            name: TensorInfo(tensor.shape, tensor.dtype, tensor.nbytes, path.name)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the file's memory map unless it is strided or lies unaligned."""
        stored = self._tensors[name]
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        member = self._locate(stored)
        whole = member.nbytes - member.nbytes % stored.dtype.itemsize
        raw = self._mapped()[member.offset : member.offset + whole]
        if member.offset % stored.dtype.itemsize:
            raw = raw.clone()
        flat = raw.view(stored.dtype)
        return flat.as_strided(
            stored.shape, stored.stride, flat.storage_offset() + stored.offset
        ).contiguous()

    def _mapped(self) -> torch.Tensor:
        """The file's bytes; private, so that writing to a tensor leaves the file as it is."""
        if self._map is None:
            try:
                self._map = torch.from_file(
                    str(self.path), shared=False, size=self._size, dtype=torch.uint8
                )
            except RuntimeError as error:
                raise _unmappable(self.path, self._size, error) from error
        return self._map

    def _locate(self, tensor: StoredTensor) -> Member:
        storage = tensor.storage
        member = self._members.get(f"{self._root}/data/{storage.key}")
        if member is None:
            raise Malformed(f"the storage {storage.key[:80]!r} is not in the archive")
        if member.nbytes != storage.nbytes:
            raise Malformed(
                f"the storage {storage.key[:80]!r} should have {storage.nbytes} bytes, "
                f"and has {member.nbytes}"
            )
        return member

    def _read_pickle_bytes(self) -> bytes:
        member = self._members[f"{self._root}/data.pkl"]
        order = self._members.get(f"{self._root}/byteorder")
        with self.path.open("rb") as file:
            if order is not None:
                file.seek(order.offset)
                if file.read(min(order.nbytes, 16)) != b"little":
                    raise Malformed("its numbers are stored with the big end first")
            if member.nbytes > MAX_PICKLE_BYTES:
                raise Malformed(f"its pickle has {member.nbytes} bytes; weights stand beside it")
            file.seek(member.offset)
            return file.read(member.nbytes)


def _refuse_legacy(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(_LEGACY_MAGIC) or head[257:262] == b"ustar":
        raise Malformed(
            "it is in the format from before PyTorch 1.6 (2020); load it there and save it again"
        )
    if not head.startswith(b"PK\3\4"):
        raise Malformed(f"it starts with {head[:16]!r}, and a torch.save archive with b'PK'")


def _find_root(members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise Malformed(f"it holds {len(roots)} pickles named data.pkl instead of one")
    return roots[0]


def _keep_tensors(path: Path, content: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict, or of the one under "state_dict"; the rest is logged."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise Malformed(f"its pickle holds one {type(content).__name__}, not a dict of tensors")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if not tensors:
        raise Malformed("it holds no tensor")
    others = [str(name)[:80] for name in content if name not in tensors]
    if others:
        logger.warning(
            "%s: ignored %d entries that are not tensors: %s", path, len(others), others[:5]
        )
    return tensors
