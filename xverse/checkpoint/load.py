"""FOLDER -> MODEL. A folder, GGUF file, alias or hub id, into a decoder and its tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from xverse import device as devices
from xverse.checkpoint.folder import ModelFolder
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_config import config_of
from xverse.checkpoint.gguf_tokenizer import tokenizer_of
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.checkpoint.quantized import (
    LayerFiles,
    expect,
    is_zero_bias,
    put_parts,
    put_places,
    stored_names,
)
from xverse.checkpoint.resolve import resolve, title_of
from xverse.checkpoint.save import expert_name
from xverse.checkpoint.weights import TensorInfo, Weights, is_router, open_weights
from xverse.errors import XverseError
from xverse.log import logger, progress
from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.stored import layout_of
from xverse.quant.stored_layer import Layout
from xverse.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds, short of its weights."""

    title: str
    path: Path
    shape: ModelShape
    config: Mapping[str, object]
    generation_config: Mapping[str, object]

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer, as generation_config.json or else config.json lists them."""
        for config in (self.generation_config, self.config):
            ids = config.get("eos_token_id")
            ids = [ids] if isinstance(ids, int) else ids
            if isinstance(ids, list) and all(isinstance(id, int) for id in ids):
                return ids
        return []


@dataclass(frozen=True)
class Model:
    """A decoder with its weights, its tokenizer, and the folder they came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    checkpoint: Checkpoint

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer, by generation_config.json, config.json and tokenizer."""
        own = self.tokenizer.eos_id
        return frozenset(self.checkpoint.end_ids or ([] if own is None else [own]))


# What becomes of a module once it is filled: (whole model's shape, its name, it) -> its successor.
Keep = Callable[[ModelShape, str, nn.Module], nn.Module]


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | Path | None = None,
    keep: Keep | None = None,
) -> Model:
    """Load `model` (folder, GGUF file, alias, hub id) ready to run, its weights frozen.

    `tokenizer` names another folder to take the tokenizer from. dtype "auto" is the one the folder
    names, as far as the device computes in it. With `keep` every module is exchanged for what that
    gives as soon as it is filled, so that the device never holds more of the whole model than one
    module. Nothing in the folder is executed. Raises
    XverseError for anything missing, damaged or of another kind.
    """
    place = devices.pick_device(device)
    path, title = resolve(model), title_of(model)
    weights: Weights
    if _is_gguf(path):
        file = GgufFile.open(path)
        checkpoint, weights = _gguf_checkpoint(file, path, title), GgufWeights(file)
    else:
        checkpoint, weights = open_checkpoint(path, title), open_weights(path)
    reads = open_tokenizer(path if tokenizer is None else resolve(tokenizer))
    if tokenizer is not None and reads.vocab_size > checkpoint.shape.vocab_size:
        raise XverseError(
            f"The tokenizer {str(tokenizer)!r} belongs to another model.",
            f"It has {reads.vocab_size:,} ids, and {title} knows {checkpoint.shape.vocab_size:,}.",
            "Leave it out: the model's folder has its own.",
        )
    decoder = build(checkpoint, weights, dtype_of(dtype, checkpoint.config, place), place, keep)
    return Model(decoder, reads, checkpoint)


def open_checkpoint(path: Path, title: str | None = None) -> Checkpoint:
    """Read the configs of a folder or GGUF file; no weights, no tokenizer."""
    title = title or title_of(path)
    if _is_gguf(path):
        return _gguf_checkpoint(GgufFile.open(path), path, title)
    folder = ModelFolder.open(path)
    shape = ModelShape.from_config(folder.config)
    return Checkpoint(title, path, shape, folder.config, folder.generation_config)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder or GGUF file; no weights."""
    if _is_gguf(path):
        return tokenizer_of(GgufFile.open(path))
    return Tokenizer.load(path)


def _gguf_checkpoint(file: GgufFile, path: Path, title: str) -> Checkpoint:
    config = config_of(file)
    return Checkpoint(title, path, ModelShape.from_config(config), config, {})


def build(
    checkpoint: Checkpoint,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    keep: Keep | None = None,
) -> Decoder:
    """A decoder on `device` with these weights, one tensor at a time, so that no second copy of
    the model ever exists; on a CPU they stay in the files' memory maps where dtypes agree."""
    quantized = checkpoint.config.get("quantization_config")
    layout = layout_of(quantized) if isinstance(quantized, Mapping) else None
    with torch.device("meta"):
        decoder = Decoder(checkpoint.shape)
    if layout is not None:
        put_places(decoder, layout, weights.infos())
    reader = Reader(weights, decoder, layout, dtype, device)
    steps = reader.steps(keep)
    for fill in progress(steps, total=len(steps), label="loading"):
        fill()
    reader.refuse_leftovers()
    return decoder.eval().requires_grad_(False)


class Reader:
    """Puts the tensors of a source of weights in their places; knows which were not asked for."""

    def __init__(
        self,
        weights: Weights,
        decoder: Decoder,
        layout: Layout | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weights, self.decoder, self.layout = weights, decoder, layout
        self.dtype, self.device = dtype, device
        self.infos: dict[str, TensorInfo] = weights.infos()
        self.asked: set[str] = set()

    def steps(self, keep: Keep | None) -> list[Callable[[], None]]:
        """One call for every module that has tensors of its own; each fills its module.

        The calls know names, not modules: what `keep` puts out of the decoder is to be let go.
        """
        filled = [
            prefix
            for prefix, module in self.decoder.named_modules()
            if isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(False))
        ]
        return [partial(self._step, prefix, keep) for prefix in filled]

    def fill(self, name: str) -> nn.Module:
        """Read the weights of one module of the decoder, with all that is inside; gives it.

        What has been filled may be put out of the decoder again; the reader keeps nothing of it.
        """
        top = self.decoder.get_submodule(name)
        for prefix, module in top.named_modules(prefix=name):
            if isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(False)):
                self._step(prefix, None)
        return top.eval().requires_grad_(False)

    def _step(self, prefix: str, keep: Keep | None) -> None:
        module = self.decoder.get_submodule(prefix)
        if isinstance(module, QuantizedLinear):
            self._quantized(module, prefix)
        elif isinstance(module, StackedLinear):
            self._stacked(module, prefix)
        else:
            self._plain(module, prefix)
        kept = module if keep is None else keep(self.decoder.shape, prefix, module)
        if kept is not module:
            self.decoder.set_submodule(prefix, kept)

    def refuse_leftovers(self) -> None:
        """Raise XverseError where the files hold tensors that this model has no place for."""
        left = sorted(set(self.infos) - self.asked)
        if left == ["lm_head.weight"] and self.decoder.shape.tie_word_embeddings:
            logger.info("lm_head.weight is tied to the embedding; the stored copy is left aside")
        elif left:
            raise XverseError(
                f"{self.infos[left[0]].file} holds tensors that this model has no place for: "
                f"{', '.join(left[:4])}{' ...' if len(left) > 4 else ''}.",
                "config.json describes another model than the one stored.",
                "Fetch the folder again, or correct its config.json.",
            )

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        expect(self.infos, name, tuple(shape))
        self.asked.add(name)
        wanted = torch.float32 if is_router(name) else self.dtype
        return self.weights.read(name, wanted).to(self.device)

    def _plain(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = self._read(f"{prefix}.{name}", parameter.shape)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))

    def _stacked(self, module: StackedLinear, prefix: str) -> None:
        stacked = torch.empty(module.weight.shape, dtype=self.dtype, device=self.device)
        for number, place in enumerate(stacked):
            place.copy_(self._read(f"{expert_name(prefix, number)}.weight", place.shape))
        module.weight = nn.Parameter(stacked, requires_grad=False)

    def _quantized(self, module: QuantizedLinear, prefix: str) -> None:
        assert self.layout is not None, "who put the layer there"
        parts = []
        for name in stored_names(prefix, module):
            files = LayerFiles(self.weights, self.infos, name)
            parts.append(files.parts(self.layout, module, self.dtype))
            self.asked |= files.asked
        put_parts(module, parts, self.device)
        bias = f"{prefix}.bias"
        if module.bias is not None:
            tensor = self._read(bias, module.bias.shape)
            module.bias = nn.Parameter(tensor, requires_grad=False)
        elif is_zero_bias(self.weights, self.infos, bias):
            self.asked.add(bias)


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def dtype_of(name: str, config: Mapping[str, object], device: torch.device) -> torch.dtype:
    """What a model with this config.json computes in on `device`; "auto" is its own dtype."""
    if name != "auto":
        return devices.pick_dtype(name, device)
    own = str(config.get("torch_dtype") or config.get("dtype") or "auto").removeprefix("torch.")
    if own not in devices.DTYPES:
        own = "auto"
    if own == "float16" and device.type == "cpu":
        logger.info("float16 weights run in bfloat16 on a CPU, where float16 is slow")
        own = "bfloat16"
    return devices.pick_dtype(own, device)
