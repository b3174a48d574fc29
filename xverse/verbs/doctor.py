"""Look at this machine: devices, versions, which kernels are chosen and why."""

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPTIONAL = {
    "transformers": "hf",
    "fastapi": "serve",
    "gradio": "web",
    "langchain-core": "langchain",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse doctor` takes."""

    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Print what there is, and for what is missing how to get it."""
    facts = examine()
    if config.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines:
            print(f"{name:<12} {line}")
    return 0


def examine() -> dict[str, object]:
    """Everything `doctor` tells, by topic."""
    import torch

    from xverse import __version__
    from xverse.checkpoint.resolve import ALIASES, InPackage, resolve
    from xverse.device import pick_device, total_memory
    from xverse.errors import XverseError

    device = pick_device()
    models = []
    for alias, place in ALIASES.items():
        if isinstance(place, InPackage):
            try:
                models.append(f"{alias}: {place.title}, {resolve(alias)}")
            except XverseError as missing:
                models.append(f"{alias}: {place.title}, not here. {missing.fix}")
    gpus = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, "
        f"{total_memory(torch.device('cuda', i)) / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "xverse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, "
        f"{total_memory(torch.device('cpu')) / 2**30:.0f} GiB",
        "gpu": gpus or ["none that this PyTorch sees"],
        "device": f"{device}, in {'bfloat16' if device.type == 'cpu' else 'the folder dtype'}",
        "kernels": _kernels(device),
        "libraries": [_version(name, extra) for name, extra in OPTIONAL.items()],
        "models": models,
    }


def _kernels(device: "torch.device") -> list[str]:
    import torch

    from xverse.kernels import dispatch, native

    attention = "scaled_dot_product_attention, the backend PyTorch picks"
    product = "cuBLAS"
    if device.type == "cpu":
        product = "oneDNN; few rows of bf16 as weight @ x.T"
        if not native.bf16_in_hardware():
            missing = native.why_not()
            product = "compiled for bf16, which this CPU does not compute with; many rows in fp32"
            if missing:
                product = f"oneDNN, slow in bf16, which this CPU does not compute with: {missing}"
    return [
        f"attention: {attention}",
        f"products: {product}",
        "norm, rope, SwiGLU, routing: plain PyTorch (the reference)",
        *map(str, dispatch.table(device, torch.bfloat16)),
    ]


def _version(name: str, extra: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f'{name}: not here; pip install "xverse-llm[{extra}]" brings it'
