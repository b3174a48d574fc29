"""FOLDER -> MODEL. A folder, GGUF file, alias or hub id, into a decoder and its tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from xverse import device as devices
from xverse.checkpoint import gguf, gguf_tokenizer
from xverse.checkpoint.folder import ModelFolder
from xverse.checkpoint.resolve import resolve, title_of
from xverse.checkpoint.save import expert_name
from xverse.checkpoint.weights import TensorInfo, Weights, open_weights
from xverse.errors import XverseError
from xverse.log import logger, progress
from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear, integers_from_disk
from xverse.quant.quantize import replace_layers, rounded_layer
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme
from xverse.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds, short of its weights."""

    title: str
    path: Path
    shape: ModelShape
    config: Mapping[str, object]
    generation_config: Mapping[str, object]


@dataclass(frozen=True)
class Model:
    """A decoder with its weights, its tokenizer, and the folder they came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    checkpoint: Checkpoint

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer, by generation_config.json, config.json and tokenizer."""
        for config in (self.checkpoint.generation_config, self.checkpoint.config):
            ids = config.get("eos_token_id")
            if isinstance(ids, int):
                return frozenset({ids})
            if isinstance(ids, list) and all(isinstance(id, int) for id in ids):
                return frozenset(ids)
        own = self.tokenizer.eos_id
        return frozenset() if own is None else frozenset({own})


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
        file = gguf.GgufFile.open(path)
        checkpoint, weights = _gguf_checkpoint(file, path, title), gguf.GgufWeights(file)
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
        return _gguf_checkpoint(gguf.GgufFile.open(path), path, title)
    folder = ModelFolder.open(path)
    shape = ModelShape.from_config(folder.config)
    return Checkpoint(title, path, shape, folder.config, folder.generation_config)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder or GGUF file; no weights."""
    if _is_gguf(path):
        return gguf_tokenizer.tokenizer_of(gguf.GgufFile.open(path))
    return Tokenizer.load(path)


def _gguf_checkpoint(file: gguf.GgufFile, path: Path, title: str) -> Checkpoint:
    config = gguf.config_of(file)
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
    with torch.device("meta"):
        decoder = Decoder(checkpoint.shape)
        if isinstance(quantized, Mapping):
            scheme = Scheme.from_config(quantized)
            replace_layers(decoder, Recipe(scheme), rounded_layer)
    reader = Reader(weights, decoder, dtype, device)
    steps = reader.steps(keep)
    for fill in progress(steps, total=len(steps), label="loading"):
        fill()
    reader.refuse_leftovers()
    return decoder.eval().requires_grad_(False)


class Reader:
    """Puts the tensors of a source of weights in their places; knows which were not asked for."""

    def __init__(
        self, weights: Weights, decoder: Decoder, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weights, self.decoder = weights, decoder
        self.dtype, self.device = dtype, device
        self.infos: dict[str, TensorInfo] = weights.infos()
        self.asked: set[str] = set()

    def steps(self, keep: Keep | None) -> list[Callable[[], None]]:
        """One call for every module that has tensors of its own; each fills its module."""
        filled = [
            (prefix, module)
            for prefix, module in self.decoder.named_modules()
            if isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(False))
        ]
        return [partial(self._step, module, prefix, keep) for prefix, module in filled]

    def fill(self, name: str) -> nn.Module:
        """Read the weights of one module of the decoder, with all that is inside; gives it.

        What has been filled may be put out of the decoder again; the reader keeps nothing of it.
        """
        top = self.decoder.get_submodule(name)
        for prefix, module in top.named_modules(prefix=name):
            if isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(False)):
                self._step(module, prefix, None)
        return top.eval().requires_grad_(False)

    def _step(self, module: nn.Module, prefix: str, keep: Keep | None) -> None:
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

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        self._expect(name, tuple(shape))
        # The router decides in fp32, so its weight keeps what the file has of it.
        wanted = dtype or (torch.float32 if name.endswith("mlp.router.weight") else self.dtype)
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
        *experts, rows, _ = module.weight.shape
        columns = module.weight.shape[-1] * (2 if module.scheme.bits == 4 else 1)
        words = torch.Size((rows, columns * module.scheme.bits // 32))
        weights, scales = [], []
        names = (
            [expert_name(prefix, number) for number in range(experts[0])] if experts else [prefix]
        )
        for name in names:
            packed = self._read(f"{name}.weight_packed", words, torch.int32)
            weights.append(integers_from_disk(packed.cpu(), module.scheme).to(self.device))
            scales.append(self._read(f"{name}.weight_scale", torch.Size((rows, 1)))[:, 0])
            self._expect(f"{name}.weight_shape", (2,))
        module.weight = torch.stack(weights) if experts else weights[0]
        module.scale = torch.stack(scales) if experts else scales[0]
        if module.bias is not None:
            bias = self._read(f"{prefix}.bias", module.bias.shape)
            module.bias = nn.Parameter(bias, requires_grad=False)

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.infos.get(name)
        if info is None:
            raise XverseError(
                f"The weights lack {name!r}.",
                f"The model described by config.json needs it, and the {len(self.infos)} tensors "
                "found do not have it.",
                "Fetch the folder again; a download may have stopped half way.",
            )
        if info.shape != shape:
            raise XverseError(
                f"{info.file}: {name} is {list(info.shape)}, and the model needs {list(shape)}.",
                "config.json and the weights belong to different models.",
                "Fetch both from the same place again.",
            )
        self.asked.add(name)


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
