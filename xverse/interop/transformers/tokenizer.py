"""tokenizer.json -> PreTrainedTokenizerFast. Old files mended in memory, never on disk."""

import os
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerFast

from xverse.checkpoint.folder import is_there, read_json, write_json
from xverse.interop.transformers.load import find_folder
from xverse.text.chat import chat_format
from xverse.text.tokenizer import Tokenizer

# What is taken from tokenizer_config.json; other keys could name files and classes to load.
TAKEN = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "unk_token",
    "xverse_chat_format",
)


class XverseTokenizerFast(PreTrainedTokenizerFast):
    """transformers' tokenizer over XVERSE's tokenizer.json, the published (old) form included.

    `clean_up_tokenization_spaces`, which the published config turns on, is off: it loses spaces,
    and transformers 5 itself leaves it aside for such tokenizers. The chat template is the model's
    format as one joint text: xverse.text.chat says where its ids differ from `model.chat`'s.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: object
    ) -> Self:
        """The tokenizer of a folder or hub id; `arguments` override what the folder says.

        Raises XverseError where there is none, or it cannot be used. The folder stays as it is.
        """
        hub_keys = ("cache_dir", "force_download", "local_files_only", "proxies", "revision")
        hub_arguments = {key: arguments.pop(key, None) for key in (*hub_keys, "token")}
        folder = find_folder(pretrained_model_name_or_path, hub_arguments, include_weights=False)
        loaded = Tokenizer.load(folder)
        options = {key: loaded.config[key] for key in TAKEN if key in loaded.config}
        options |= {"bos_token": loaded.bos_token, "eos_token": loaded.eos_token}
        options |= {"pad_token": loaded.pad_token, "name_or_path": str(folder)}
        options |= {"clean_up_tokenization_spaces": False, **_chat(folder, loaded)}
        # The name is a path: transformers is not to look a local tokenizer up on the hub.
        return cls(tokenizer_object=loaded.backend, is_local=True, **(options | arguments))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **arguments: object
    ) -> tuple[str, ...]:
        """Write tokenizer.json in its modern form, and its config, for any reader."""
        files: tuple[str, ...] = super().save_pretrained(save_directory, **arguments)  # type: ignore[arg-type]
        path = Path(save_directory) / "tokenizer_config.json"
        # A class that every version of transformers has, this module loaded or not.
        config = read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(path, {key: config[key] for key in config if key not in ("backend", "is_local")})
        return files


def _chat(folder: Path, tokenizer: Tokenizer) -> dict[str, object]:
    """The chat template, and the name of the format that it writes down."""
    if tokenizer.chat_template is not None:
        return {"chat_template": tokenizer.chat_template}
    if not folder.is_dir() or not is_there(folder / "config.json"):
        return {}
    found = chat_format(read_json(folder / "config.json"), tokenizer)
    return {"chat_template": found.template, "xverse_chat_format": found.name}
