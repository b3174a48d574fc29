"""ANY FOLDER -> SAFETENSORS. Converts a model folder; writes the shards of every model saved."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from xverse.checkpoint.folder import MANIFEST, ModelFolder, write_manifest
from xverse.checkpoint.weights import SAFETENSORS_DTYPES, TensorInfo, Weights, open_weights
from xverse.checkpoint.whole import disk_errors, require_space, whole_folder
from xverse.errors import XverseError
from xverse.files import is_there, require_file, write_json
from xverse.log import logger, progress
from xverse.text.chat import chat_format
from xverse.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's own default size of a shard
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_WEIGHTS = (".bin", ".safetensors", ".index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


def convert_to_safetensors(
    source: Path, target: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the model folder `source` to the new folder `target` as safetensors, values unchanged.

    Code stays behind; the tokenizer is saved in its modern form; manifest.json lists every file.
    Memory: the tensors stay on the file's map. `target` appears whole or not at all; raises
    XverseError where it already holds something, or where `source` can't be read to its end.
    """
    target = target.expanduser().absolute()
    folder = ModelFolder.open(source)
    weights = open_weights(folder.path)
    infos = weights.infos()
    with whole_folder(target) as aside:
        require_space(aside.parent, sum(info.nbytes for info in infos.values()))
        save_weights(_stream(weights, infos), aside, max_shard_bytes=max_shard_bytes)
        copy_rest(folder, aside)
        write_manifest(aside, source=folder.path.name, converted_to="safetensors")


def save_tokenizer(tokenizer: Tokenizer, config: Mapping[str, object], target: Path) -> None:
    """The tokenizer in its modern form, with the chat format written down where there is one."""
    if config.get("model_type") == "xverse" or tokenizer.chat_template:
        chat = chat_format(config, tokenizer)
        tokenizer.save(target, chat_template=chat.template, chat_format=chat.name)
    else:
        tokenizer.save(target)


def save_weights(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `tensors` to `folder` as model-0000x-of-0000y.safetensors and their index.

    They are taken one by one, and written when a shard is full: at most one shard of them is alive
    at a time. Raises XverseError for a name given twice or a dtype the format does not have.
    """
    assert max_shard_bytes > 0
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(tensors, folder, max_shard_bytes)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    index: dict[str, int] = {}
    total_bytes = num_shards = 0
    for shard in _cut(tensors, max_shard_bytes):
        for name, tensor in shard.items():
            if name in index:
                raise XverseError(
                    f"The tensor {name!r} occurs twice.",
                    "A model folder has one tensor of a name.",
                    "Give every tensor a name of its own.",
                )
            index[name] = num_shards
            total_bytes += tensor.nbytes
        _write_shard(shard, folder / _unfinished(num_shards))
        num_shards += 1
        shard.clear()  # else it would live on beside the next one
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    for i, name in enumerate(names):
        (folder / _unfinished(i)).rename(folder / name)
    weight_map: dict[str, object] = {name: names[i] for name, i in sorted(index.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _unfinished(shard: int) -> str:
    return f"shard-{shard + 1:05}.partial"  # how many there will be is known at the end


def _cut(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Groups of at most `max_shard_bytes`, in order; a larger tensor is a group of its own."""
    shard: dict[str, Tensor] = {}
    nbytes = 0
    for name, tensor in tensors:
        if shard and (nbytes + tensor.nbytes > max_shard_bytes or name in shard):
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    if shard:
        yield shard


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, written tensor by tensor.

    The library's `save_file` refuses tensors of one storage, which all of a mapped file are, and
    its older versions copy the whole shard into memory.
    """
    # Wide elements first keeps every tensor aligned to its own element size.
    tensors = sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _dtype_name(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype in _DTYPE_NAMES:
        return _DTYPE_NAMES[dtype]
    raise XverseError(
        f"The tensor {name!r} can't be saved.",
        f"safetensors has no dtype for {dtype}.",
        f"Convert it first to one of {', '.join(sorted(map(str, _DTYPE_NAMES)))}.",
    )


def _stream(weights: Weights, infos: dict[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    for name, info in progress(infos.items(), total=len(infos), label="converting"):
        yield name, weights.read(name, info.dtype)


def copy_rest(folder: ModelFolder, target: Path) -> None:
    """Copy all but the weights: configs, tokenizer, licence. What stays behind is in the log."""
    if is_there(folder.path / "tokenizer.json"):
        save_tokenizer(Tokenizer.load(folder.path), folder.config, target)
    left: list[str] = []
    for path in sorted(folder.path.iterdir()):
        if path.name.endswith(_WEIGHTS) or path.name == MANIFEST or path == target:
            continue
        if (target / path.name).exists():
            continue  # the tokenizer has just written its own
        if not _is_copied(path):
            left.append(path.name)
        elif path.name == "config.json":
            config = {key: folder.config[key] for key in folder.config if key != "auto_map"}
            write_json(target / path.name, config)
            left += [f"{path.name}: auto_map"] if "auto_map" in folder.config else []
        else:
            require_file(path)
            shutil.copyfile(path, target / path.name)
    if left:
        logger.info("%s: left behind: %s", folder.path, ", ".join(left))


def _is_copied(path: Path) -> bool:
    is_text = path.suffix in {".json", ".jinja"} or "LICENSE" in path.name.upper()
    if not path.is_file() or path.suffix == ".py" or not (is_text or path.name == "README.md"):
        return False
    # A link may lead to the hub cache's blobs and nowhere else: a copy must not gather other files.
    homes = (path.parent, path.parent.parent.parent / "blobs")
    return path.resolve().parent in {home.resolve() for home in homes}
