"""GENERATORS <-> JSON. The random generators of a process, so that a run goes on as it was."""

import base64
import random

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Generators of Python, numpy and PyTorch, others on every rank."""
    numbers = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1]))
    torch.manual_seed(int(numbers[2]))


def generators(device: torch.device) -> dict[str, object]:
    """Where the generators of Python, numpy, PyTorch and of the device stand."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    found: dict[str, object] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        found["cuda"] = _text(torch.cuda.get_rng_state(device))
    return found


def restore(found: object, device: torch.device) -> None:
    """Put the generators back where `generators` found them."""
    assert isinstance(found, dict)
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(found["torch"]))
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(_tensor(found["cuda"]), device)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
