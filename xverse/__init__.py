"""The front door: the public names, each loaded when it is first asked for.

from xverse import LLM, Sampling
llm = LLM("xverse/XVERSE-7B-Chat")
for piece in llm.chat_stream([{"role": "user", "content": "你好"}]):
    print(piece.text, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xverse.checkpoint.hub import pull
    from xverse.checkpoint.load import load
    from xverse.engine.grammar import Grammar
    from xverse.engine.llm import LLM
    from xverse.engine.request import Piece, Sampling
    from xverse.errors import XverseError
    from xverse.evals.evaluate import evaluate
    from xverse.model.decoder import Decoder
    from xverse.model.shape import ModelShape
    from xverse.quant.quantize import quantize
    from xverse.text.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Decoder",
    "Grammar",
    "ModelShape",
    "Piece",
    "Sampling",
    "Tokenizer",
    "XverseError",
    "evaluate",
    "load",
    "pull",
    "quantize",
]

_HOMES = {
    "Grammar": "xverse.engine.grammar",
    "LLM": "xverse.engine.llm",
    "Decoder": "xverse.model.decoder",
    "ModelShape": "xverse.model.shape",
    "Piece": "xverse.engine.request",
    "Sampling": "xverse.engine.request",
    "Tokenizer": "xverse.text.tokenizer",
    "XverseError": "xverse.errors",
    "evaluate": "xverse.evals.evaluate",
    "load": "xverse.checkpoint.load",
    "pull": "xverse.checkpoint.hub",
    "quantize": "xverse.quant.quantize",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'xverse' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
