"""TRANSFORMERS' AUTO CLASSES -> US. Registration, and the two doors that need a guard.

transformers prefers registered classes to code in a model folder, except for tokenizers: with
trust_remote_code=True an `auto_map` in tokenizer_config.json wins. And it asks one hub alone for
"xverse/..." ids, where we also know ModelScope and what `xverse pull` has brought.
"""

import os
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from xverse.errors import XverseError
from xverse.interop.transformers.config import XverseConfig
from xverse.interop.transformers.load import find_folder, is_published, model_type_of
from xverse.interop.transformers.model import XverseForCausalLM
from xverse.interop.transformers.tokenizer import XverseTokenizerFast
from xverse.text.repair import modernize, read_json

Name = str | os.PathLike[str]
# Arguments of AutoTokenizer that choose a class, which is chosen already.
CHOOSING = ("_from_auto", "code_revision", "config", "trust_remote_code", "use_fast")
LOADER = "from_pretrained"


def register() -> None:
    """Make transformers' Auto classes load XVERSE models with the classes here."""
    AutoConfig.register("xverse", XverseConfig)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM)
    _find_published(AutoConfig, include_weights=False)
    _find_published(GenerationConfig, include_weights=False)
    _find_published(AutoModelForCausalLM, include_weights=True)
    _guard_tokenizers()


def _find_published(auto: type, *, include_weights: bool) -> None:
    """Let `auto.from_pretrained` find published hub ids by our own search."""
    original = getattr(auto, LOADER).__func__

    def from_pretrained(cls: type, name: Name, *inputs: object, **arguments: object) -> object:
        if is_published(name):
            name = find_folder(name, arguments, include_weights=include_weights)
        return original(cls, name, *inputs, **arguments)

    _replace(auto, from_pretrained)


def _guard_tokenizers() -> None:
    """Let `AutoTokenizer.from_pretrained` load XVERSE's tokenizers with our class, whatever the
    folder names; all others are transformers' own business."""
    original = getattr(AutoTokenizer, LOADER).__func__

    def from_pretrained(cls: type, name: Name, *inputs: object, **arguments: object) -> object:
        if not _is_ours(name, arguments):
            return original(cls, name, *inputs, **arguments)
        kept = {key: value for key, value in arguments.items() if key not in CHOOSING}
        return XverseTokenizerFast.from_pretrained(name, *inputs, **kept)

    _replace(AutoTokenizer, from_pretrained)


def _replace(auto: type, loader: Callable[..., object]) -> None:
    update_wrapper(loader, getattr(auto, LOADER))
    setattr(auto, LOADER, classmethod(loader))


def _is_ours(name: Name, arguments: dict[str, object]) -> bool:
    if is_published(name) or isinstance(arguments.get("config"), XverseConfig):
        return True
    if arguments.get("tokenizer_type") is not None or arguments.get("gguf_file") is not None:
        return False
    kind = model_type_of(name, arguments)
    return kind == XverseConfig.model_type or (kind is None and _has_old_tokenizer(Path(name)))


def _has_old_tokenizer(folder: Path) -> bool:
    """Whether this is a tokenizer by itself in the old form, which transformers cannot load."""
    file = folder / "tokenizer.json"
    try:
        return file.is_file() and modernize(read_json(file))
    except XverseError:
        return False
