"""FOLDER <-> ADAPTER. LoRA adapters as the PEFT library keeps them: a config, and pairs of factors.

A linear layer y = x W^T + bias becomes x (W + s B A)^T + bias (arXiv:2106.09685); with a magnitude
m it is x (m (W + s B A) / |W + s B A|)^T + bias, norms by row (DoRA, arXiv:2402.09353). The scale s
is alpha / rank, or alpha / sqrt(rank) where rank-stabilized (rsLoRA, arXiv:2312.03732).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from xverse.checkpoint.adapter_config import AdapterConfig, matches, read_config
from xverse.checkpoint.folder import require_folder
from xverse.checkpoint.save import expert_name
from xverse.checkpoint.weights import SafetensorsFile
from xverse.errors import XverseError
from xverse.files import DOWNLOAD_AGAIN, is_there, read_json, write_json
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear, StackedLinear
from xverse.model.shape import ModelShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PROMPT = "prompt_format.json"  # ours: in which chat format the adapter was trained
PREFIX = "base_model.model."  # what PEFT puts before the name of every layer
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to one linear layer of D inputs and N outputs."""

    a_RD: Tensor
    b_NR: Tensor
    alpha: float
    magnitude_N: Tensor | None = None  # of DoRA

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a_RD)

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        parts = (self.a_RD, self.b_NR, self.magnitude_N)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a model: low-rank changes by the name of the linear layer they are for.

    Names are those of the published checkpoints less ".weight", experts one by one:
    `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.experts.3.up_proj`.
    """

    weights: Mapping[str, LowRank]
    rank_stabilized: bool = False
    base_model: str = ""  # folder or hub id; a note, nothing is loaded from there
    chat_format: str | None = None  # name of the format it was trained in, where known
    dropout: float = 0.0  # of the training; a note
    targets: tuple[str, ...] = field(default=())  # ends of names, () = as the weights have them

    def scale(self, name: str) -> float:
        """s of the layer `name`."""
        change = self.weights[name]
        return change.alpha / (math.sqrt(change.rank) if self.rank_stabilized else change.rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return sum(change.nbytes for change in self.weights.values())


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder, its numbers on the CPU in the dtype that they are stored in.

    Nothing in the folder is executed. Raises XverseError naming what is missing, damaged, at odds
    with adapter_config.json, or of a kind that changes more than linear layers.
    """
    path = Path(folder).expanduser()
    require_folder(path)
    if not is_there(path / CONFIG):
        raise XverseError(
            f"{path} holds no adapter.",
            f"There is no {CONFIG} in it.",
            "Name the folder that `xverse finetune` or PEFT's save_pretrained wrote.",
        )
    config = read_config(path / CONFIG)
    tensors = _read_tensors(path)
    weights = {name: _pair(path / WEIGHTS, name, tensors, config) for name in _layers(tensors)}
    left = sorted(set(tensors) - {n + end for n in weights for end in (A, B, MAGNITUDE)})
    if left:
        raise _bad(
            path / WEIGHTS,
            f"It holds {left[0][:120]!r}, which is no part of a linear layer's adapter.",
            "Train the adapter on linear layers alone: no embeddings, biases or saved modules.",
        )
    config.require_targets(list(weights))
    ends = config.targets or tuple(sorted({name.rpartition(".")[2] for name in weights}))
    return Adapter(
        weights, config.rank_stabilized, config.base_model, _read_prompt(path), config.dropout, ends
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in the folder by its name less PEFT's prefix; copies, so the file may go."""
    if not is_there(path / WEIGHTS) and is_there(path / PICKLE):
        raise _bad(
            path / PICKLE,
            "It is a pickle, which can hold code.",
            f"Load it with PEFT and save it again: that writes {WEIGHTS}.",
        )
    file = SafetensorsFile(path / WEIGHTS)
    if not file.infos:
        raise _bad(path / WEIGHTS, "It holds no tensors.", DOWNLOAD_AGAIN)
    tensors = {}
    for name, info in file.infos.items():
        if not name.startswith(PREFIX):
            raise _bad(file.path, f"The name {name[:120]!r} does not begin with {PREFIX!r}.")
        if info.dtype not in DTYPES:
            raise _bad(file.path, f"{name[:120]!r} is of {info.dtype}, not fp32, bf16 or fp16.")
        tensor = file.read(name).clone()
        if not bool(torch.isfinite(tensor).all()):
            raise _bad(file.path, f"{name[:120]!r} holds NaN or infinity.", "Train it again.")
        tensors[name.removeprefix(PREFIX)] = tensor
    return tensors


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that any of the three parts is there for, in the file's order."""
    names = dict.fromkeys(
        name.removesuffix(end)
        for name in tensors
        for end in (A, B, MAGNITUDE)
        if name.endswith(end)
    )
    return list(names)


def _pair(path: Path, name: str, tensors: Mapping[str, Tensor], config: AdapterConfig) -> LowRank:
    parts = {end: tensors.get(name + end) for end in (A, B, MAGNITUDE)}
    wanted = {A, B} | ({MAGNITUDE} if config.dora else set())
    for end, part in parts.items():
        if (part is None) is (end in wanted):
            why = "lacks" if part is None else "has, without use_dora in the config,"
            raise _bad(path, f"{name[:120]} {why} {end[1:]}.")
    a_RD, b_NR, magnitude_N = parts[A], parts[B], parts[MAGNITUDE]
    assert a_RD is not None, "wanted"
    assert b_NR is not None, "wanted"
    rank = config.rank_of(name)
    if a_RD.dim() != 2 or b_NR.dim() != 2 or not len(a_RD) == b_NR.shape[1] == rank:
        shapes = f"{list(a_RD.shape)} and {list(b_NR.shape)}"
        raise _bad(path, f"{name[:120]} has factors of {shapes}; the config says rank {rank}.")
    if magnitude_N is not None and magnitude_N.shape != (len(b_NR),):
        raise _bad(path, f"{name[:120]} has a magnitude of {list(magnitude_N.shape)}.")
    return LowRank(a_RD, b_NR, config.alpha_of(name), magnitude_N)


def _read_prompt(path: Path) -> str | None:
    """The chat format that the folder notes, if any."""
    if not is_there(path / PROMPT):
        return None
    named = read_json(path / PROMPT).get("xverse_chat_format")
    if not isinstance(named, str) or not named:
        raise _bad(path / PROMPT, "xverse_chat_format is no name of a chat format.")
    return named


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write the adapter as PEFT's `save_pretrained` does, each number in the dtype that it has.

    The weights come first and the config last: a folder with a config is whole.
    """
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).unlink(missing_ok=True)
    (path / PROMPT).unlink(missing_ok=True)
    tensors = {}
    for name, change in adapter.weights.items():
        parts = {A: change.a_RD, B: change.b_NR, MAGNITUDE: change.magnitude_N}
        for end, part in parts.items():
            if part is not None:
                tensors[f"{PREFIX}{name}{end}"] = part.detach().cpu().contiguous()
    aside = path / f"{WEIGHTS}.partial"
    try:
        save_file(tensors, aside, metadata={"format": "pt"})
        aside.replace(path / WEIGHTS)
    except OSError as error:
        raise XverseError(
            f"{path / WEIGHTS} cannot be written.", str(error), "Check the disk's space."
        ) from error
    if adapter.chat_format is not None:
        write_json(path / PROMPT, {"xverse_chat_format": adapter.chat_format})
    write_json(path / CONFIG, _config_of(adapter))


def _config_of(adapter: Adapter) -> dict[str, object]:
    """adapter_config.json: what most layers have in common, and by name what others have."""
    changes = adapter.weights
    assert changes, "an adapter of nothing"
    rank = Counter(change.rank for change in changes.values()).most_common(1)[0][0]
    alpha = Counter(change.alpha for change in changes.values()).most_common(1)[0][0]
    with_magnitude = {change.magnitude_N is not None for change in changes.values()}
    assert len(with_magnitude) == 1, "DoRA on some layers only"
    ends = adapter.targets or tuple(sorted({name.rpartition(".")[2] for name in changes}))
    assert all(any(matches(end, name) for end in ends) for name in changes), "targets miss a layer"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model or None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": list(ends),
        "rank_pattern": {n: c.rank for n, c in changes.items() if c.rank != rank},
        "alpha_pattern": {n: _number(c.alpha) for n, c in changes.items() if c.alpha != alpha},
        "use_rslora": adapter.rank_stabilized,
        "use_dora": with_magnitude == {True},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _number(value: float) -> float:
    """As an integer where it is one; some readers of the format want that of alpha."""
    return int(value) if value == int(value) else value


def linear_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer of a model, by its published name."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            sizes[name] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, StackedLinear):
            experts, outputs, inputs = module.weight.shape
            sizes |= {expert_name(name, i): (outputs, inputs) for i in range(experts)}
    return sizes


def require_fit(adapter: Adapter, shape: ModelShape, called: str) -> None:
    """Raise XverseError unless every layer that the adapter changes is in the model, in its size.

    `called` is what the error calls the adapter.
    """
    sizes = linear_sizes(shape)
    for name, change in adapter.weights.items():
        size = (len(change.b_NR), change.a_RD.shape[1])
        if sizes.get(name) == size:
            continue
        of = f"{sizes[name][0]} x {sizes[name][1]} there" if name in sizes else "not in it"
        raise XverseError(
            f"The adapter {called} is not one of this model.",
            f"It changes {name[:120]} of {size[0]} x {size[1]}, which is {of}.",
            f"Use it with {adapter.base_model or 'the model that it was trained on'}.",
        )


def _bad(path: Path, why: str, fix: str = DOWNLOAD_AGAIN) -> XverseError:
    return XverseError(f"{path} is not an adapter that we read.", why, fix)
