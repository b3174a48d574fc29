"""tokenizer.json -> PreTrainedTokenizerFast. Old files mended in memory, never on disk."""

import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from xverse.files import is_there, read_json, write_json
from xverse.interop.transformers.chat import text_tokenizer
from xverse.interop.transformers.load import find_folder
from xverse.log import warn_once
from xverse.text.chat import XVERSE_FORMATS, Encoded, Message, chat_format
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
    and transformers 5 itself leaves it aside for such tokenizers. `apply_chat_template` gives the
    ids of `model.chat`; its text, and the template that is saved, are the format as one joint text,
    whose ids differ where xverse.text.chat says.
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

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: list[Any] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **others: Any,
    ) -> object:
        """transformers' own, with the exact ids of the model's format where it has one of ours."""
        own = XVERSE_FORMATS.get(str(self.init_kwargs.get("xverse_chat_format")))
        changed = chat_template is not None or (own and self.chat_template != own.template)
        set_others = sorted(key for key, value in others.items() if value not in (None, False, {}))
        if own is None or changed or not tokenize or set_others:
            if own is not None and "assistant" not in own.joint and tokenize and not changed:
                warn_once(f"with {', '.join(set_others)} the prompt is encoded as one joint text")
            return super().apply_chat_template(
                conversation,  # type: ignore[arg-type]
                tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                padding=padding,
                return_tensors=return_tensors,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **others,
            )
        single = isinstance(conversation[0], Mapping) if conversation else True
        conversations: list[Any] = [conversation] if single else list(conversation)
        encoded = [
            own.render(
                messages,
                text_tokenizer(self),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
            for messages in conversations
        ]
        flat = single and return_tensors is None
        ids: list[Any] = [one.ids for one in encoded]
        batch = self.pad(
            {"input_ids": ids[0] if flat else ids}, padding, return_tensors=return_tensors
        )
        if not return_dict:
            return batch["input_ids"]
        if return_assistant_tokens_mask:
            masks = [self._padded_mask(one, batch["input_ids"], flat) for one in encoded]
            batch["assistant_masks"] = masks[0] if flat else masks
            batch.convert_to_tensors(return_tensors)
        return batch

    def _padded_mask(self, encoded: Encoded, ids: Sized, flat: bool) -> list[int]:
        """1 where a token is the assistant's, as long as the padded row that the ids became."""
        width = len(ids) if flat else len(ids[0])  # type: ignore[index]
        mask, padding = [int(on) for on in encoded.mask], [0] * (width - len(encoded.mask))
        return padding + mask if self.padding_side == "left" else mask + padding

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
