"""TRANSFORMERS' AUTO CLASSES -> US. Registration, and the doors that need a guard.

With trust_remote_code=True, transformers may prefer classes that a folder names to those that are
registered: always for tokenizers, for configs by version. And it asks one hub alone for
"xverse/..." ids, where we also know ModelScope and what `xverse pull` has brought.
"""

import os
from functools import update_wrapper
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from xverse.errors import XverseError
from xverse.files import read_json
from xverse.interop.transformers.config import XverseConfig
from xverse.interop.transformers.load import HUB_ARGUMENTS, find_folder, is_published
from xverse.interop.transformers.model import XverseForCausalLM
from xverse.interop.transformers.tokenizer import XverseTokenizerFast
from xverse.text.repair import modernize

Name = str | os.PathLike[str]
LOADER = "from_pretrained"
NAMES = ("pretrained_model_name_or_path", "pretrained_model_name")  # of its first argument
# Arguments of Auto classes that choose a class, which is chosen already.
CHOOSING = ("_from_auto", "code_revision", "config", "trust_remote_code", "use_fast")


def register() -> None:
    """Make transformers' Auto classes load XVERSE models with the classes here."""
    AutoConfig.register(XverseConfig.model_type, XverseConfig)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM)
    _guard(AutoConfig, XverseConfig)
    _guard(AutoTokenizer, XverseTokenizerFast)
    _guard(GenerationConfig, None)
    _guard(AutoModelForCausalLM, None)


def _guard(auto: type, ours: type | None) -> None:
    """Let `auto.from_pretrained` find published ids by our own search, and load what is XVERSE's
    with the class `ours`, whatever the folder names; the rest stays transformers' business."""
    original = getattr(auto, LOADER).__func__

    def from_pretrained(cls: type, /, *inputs: Any, **arguments: Any) -> object:
        named = [arguments.pop(key) for key in NAMES if key in arguments]
        name, *others = [*named, *inputs]
        if is_published(name):
            name = find_folder(name, arguments, include_weights=auto is AutoModelForCausalLM)
        if ours is None or not _is_ours(name, arguments):
            return original(cls, name, *others, **arguments)
        kept = {key: value for key, value in arguments.items() if key not in CHOOSING}
        return getattr(ours, LOADER)(name, *others, **kept)

    update_wrapper(from_pretrained, getattr(auto, LOADER))
    setattr(auto, LOADER, classmethod(from_pretrained))


def _is_ours(name: Name, arguments: dict[str, object]) -> bool:
    """Whether `name` holds an XVERSE model, or nothing but a tokenizer in the old form."""
    if arguments.get("tokenizer_type") is not None or arguments.get("gguf_file") is not None:
        return False
    if isinstance(arguments.get("config"), XverseConfig):
        return True
    folder = Path(name)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return _model_type(name, arguments) == XverseConfig.model_type
    try:
        return modernize(read_json(folder / "tokenizer.json"))
    except XverseError:
        return False


def _model_type(name: Name, arguments: dict[str, object]) -> object:
    """`model_type` in the config.json of a folder or hub id; None where there is none to read."""
    file = Path(name) / "config.json"
    try:
        if file.is_file():
            return read_json(file).get("model_type")
        own = {key: arguments[key] for key in HUB_ARGUMENTS & arguments.keys()}
        return PreTrainedConfig.get_config_dict(name, **own)[0].get("model_type")
    except (OSError, ValueError, XverseError):
        return None
