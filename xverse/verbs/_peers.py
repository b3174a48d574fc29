"""NAME -> PEER. Other libraries behind the engine's face, to be timed beside it in the same run."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from xverse.errors import XverseError

if TYPE_CHECKING:
    import torch

    from xverse.engine.engine import Output
    from xverse.engine.request import Request
    from xverse.model.decoder import Decoder
    from xverse.model.shape import ModelShape

PeerName = Literal["transformers", "vllm", "llama.cpp"]
# What is imported, and how to get it.
LIBRARIES: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", 'pip install "xverse-llm[hf]"'),
    "vllm": ("vllm", "pip install vllm"),
    "llama.cpp": ("llama_cpp", 'pip install "llama-cpp-python>=0.3.16"'),
}


@dataclass(frozen=True)
class Subject:
    """What a peer is to answer with. `path` is a folder or GGUF file; None for a shape alone."""

    title: str
    path: Path | None
    shape: "ModelShape"
    device: "torch.device"
    random_weights: bool
    quantized: bool
    kv_dtype: str
    most_running: int
    longest: int  # tokens of prompt and answer together

    @property
    def is_gguf(self) -> bool:
        return self.path is not None and self.path.suffix == ".gguf"


class Peer(Protocol):
    """The face of `engine.measure.Steps`, with what the tables say of it."""

    computes: str  # dtype, and whatever else differs from what we do
    same_weights: bool  # as numbers, so that ids can be compared

    def add(self, request: "Request") -> int: ...
    def step(self) -> "Sequence[Output]": ...
    def close(self) -> None: ...


def check_peer(name: str, subject: Subject) -> None:
    """XverseError where the library is not here, or cannot answer with this model as we do."""
    library, install = LIBRARIES[name]
    if find_spec(library) is None:
        raise XverseError(
            f"The peer {name} is not installed.", f"There is no module {library!r}.", install
        )
    why = _cannot_read(name, subject)
    if why:
        raise XverseError(
            f"The peer {name} cannot be compared on this model.", why, f"Leave out --peer {name}."
        )


def open_peer(name: str, subject: Subject, decoder: "Decoder") -> Peer:
    """The peer, its model loaded. `decoder` is ours: peers in this process share its weights."""
    check_peer(name, subject)
    if name == "transformers":
        from xverse.verbs import _peer_transformers

        return _peer_transformers.open_peer(subject, decoder)
    if name == "vllm":
        from xverse.verbs import _peer_vllm

        return _peer_vllm.open_peer(subject, decoder)
    from xverse.verbs import _peer_llama_cpp

    return _peer_llama_cpp.open_peer(subject)


def _cannot_read(name: str, subject: Subject) -> str | None:
    if name == "llama.cpp":
        return None if subject.is_gguf else "It reads GGUF files only."
    if subject.shape.num_experts:
        return "It has no class that computes XVERSE's mixture of experts."
    if subject.quantized:
        return "It would compute with other weights: these are rounded by XVERSE's own scheme."
    if name == "transformers" and subject.kv_dtype != "auto":
        return "It keeps keys and values in the dtype of the weights."
    if name == "vllm" and not (subject.random_weights or _has_safetensors(subject.path)):
        return "Here it is given folders of safetensors only; `xverse export` writes them."
    return None


def _has_safetensors(path: Path | None) -> bool:
    return path is not None and path.is_dir() and any(path.glob("*.safetensors"))
