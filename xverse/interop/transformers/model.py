"""DECODER -> PreTrainedModel. An XVERSE model as transformers knows models."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from xverse.checkpoint.convert import MAX_SHARD_BYTES
from xverse.checkpoint.save import published_tensors
from xverse.errors import XverseError
from xverse.interop.transformers import chat, load, save
from xverse.interop.transformers.cache import HuggingFaceKV, positions_of
from xverse.interop.transformers.chat import AnyTokenizer
from xverse.interop.transformers.config import XverseConfig
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme
from xverse.quant.stored_compressed import to_config
from xverse.text.chat import Message


class XverseForCausalLM(PreTrainedModel, GenerationMixin):
    """An XVERSE model with everything the published class had: `chat`, `quantize`, `generate`.

    Its modules and weights are the decoder's own, under their published names.
    """

    config_class = XverseConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch
    _supports_sdpa = True
    config: XverseConfig

    def __init__(self, config: XverseConfig, decoder: Decoder | None = None) -> None:
        """Take `decoder` over, or start from fresh random weights."""
        super().__init__(config)
        decoder = decoder or _fresh(config.shape(), getattr(config, "initializer_range", 0.02))
        self.model = decoder.model
        self.lm_head = decoder.lm_head
        # Past nn.Module's bookkeeping: the same modules must not count under two names.
        self.__dict__["decoder"] = decoder
        self.decoder: Decoder
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: XverseConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: load.DeviceMap = None,
        **arguments: object,
    ) -> Self:
        """Load a folder or hub id through XVERSE's own loader, ready to run.

        Arguments of transformers that mean nothing here are accepted by name; XverseError for any
        other, and for whatever is wrong with the folder. No code in the folder is run.
        """
        load.check_arguments(arguments)
        folder = load.find_folder(pretrained_model_name_or_path, arguments)
        decoder, config, generation_config = load.load_decoder(
            folder, config, torch_dtype if dtype is None else dtype, device_map
        )
        config.name_or_path = str(pretrained_model_name_or_path)
        model = cls(config, decoder.requires_grad_(True))
        model.generation_config = generation_config
        model.train(False)
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, V] of ids [B, T] (of the last `logits_to_keep` only, if not 0).

        With `labels` [B, T] also their mean cross entropy; -100 is not counted.
        """
        if output_attentions or output_hidden_states:
            raise XverseError(
                "Attention weights and hidden states are not kept.",
                "Attention is computed by a kernel that never writes its weights out.",
                "Leave output_attentions and output_hidden_states out.",
            )
        if use_cache is None:
            use_cache = labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self._logits(
            input_ids, attention_mask, position_ids, past_key_values, logits_to_keep
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.decoder.shape.vocab_size, num_items_in_batch=num_items_in_batch
            )
        cache = past_key_values if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _logits(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        keep: int | Tensor,
    ) -> Tensor:
        if ids_BT.dim() != 2:
            raise XverseError(
                f"input_ids has the shape {list(ids_BT.shape)}.",
                "It is [sequences, tokens].",
                'Take it from tokenizer(text, return_tensors="pt").input_ids.',
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        positions_BT = positions_of(ids_BT, past, attention_mask, position_ids)
        kv = HuggingFaceKV(cache, positions_BT, attention_mask)
        x_TD = self.decoder.hidden(ids_BT.flatten(), positions_BT.flatten(), kv)
        x_BTD = x_TD.unflatten(0, ids_BT.shape)
        kept = x_BTD[:, -keep:] if isinstance(keep, int) else x_BTD[:, keep]
        return self.decoder.logits(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *inputs: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, less what early 5.x versions add and `forward` has no need of.

        It looks for a parameter named `kwargs`, to check the arguments of `generate` by.
        """
        prepared = super().prepare_inputs_for_generation(input_ids, *inputs, **kwargs)  # type: ignore[misc]
        dropped = ("cache_position", "inputs_embeds")
        return {key: value for key, value in prepared.items() if key not in dropped}

    @overload
    def chat(
        self,
        tokenizer: AnyTokenizer,
        messages: Sequence[Message],
        stream: Literal[False] = False,
        generation_config: GenerationConfig | None = None,
    ) -> str: ...
    @overload
    def chat(
        self,
        tokenizer: AnyTokenizer,
        messages: Sequence[Message],
        stream: bool,
        generation_config: GenerationConfig | None = None,
    ) -> str | Iterator[str]: ...
    def chat(
        self,
        tokenizer: AnyTokenizer,
        messages: Sequence[Message],
        stream: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> str | Iterator[str]:
        """The model's next turn: whole, or with `stream` piece by piece as it comes.

        Prompt by the model's own chat format; sampling by `generation_config`, and what that leaves
        open by the model's own, as in `generate`. `torch.manual_seed` makes it repeatable.
        XverseError for messages that don't fit the format.
        """
        options: dict[str, object] = {}
        for given in (self.generation_config, generation_config):
            options |= given.to_diff_dict() if given is not None else {}
        pieces = chat.answer(self.decoder, self.config, tokenizer, messages, options)
        return pieces if stream else "".join(pieces)

    def quantize(self, bits: int) -> Self:
        """Round the blocks' linear layers to 8 or 4 bits in place, by the published scheme.

        Works on any device. ValueError for other widths, XverseError for a quantized model.
        """
        if isinstance(bits, bool) or bits not in (4, 8):
            raise ValueError(f"quantize takes 8 or 4 bits, not {bits!r}")
        quantize(self.decoder, bits)
        self.config.quantization_config = to_config(Recipe(Scheme(bits)))
        return self

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = MAX_SHARD_BYTES,
        safe_serialization: bool = True,
    ) -> None:
        """Write safetensors under the published names, config.json and generation_config.json.

        A quantized model is written in the compressed-tensors layout, which loads bit for bit.
        """
        if not safe_serialization:
            raise XverseError(
                "safe_serialization=False is not done.",
                "Pickled weights can hold code; XVERSE reads old ones and writes none.",
                "Leave the argument out.",
            )
        if is_main_process:
            tensors = published_tensors(self.decoder, state_dict or self.state_dict())
            save.save(tensors, self.config, self.generation_config, save_directory, max_shard_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; of a model with a tied head, the embedding."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def resize_token_embeddings(self, *_: object, **__: object) -> nn.Embedding:
        """Refused: XverseError."""
        raise XverseError(
            "The vocabulary of an XVERSE model is not resized here.",
            "Embedding and head belong to the published tokenizer, which has tokens to spare.",
            "Use its special tokens, such as <|endofprompt|>, instead of new ones.",
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder comes with its weights."""


def _fresh(shape: ModelShape, std: float) -> Decoder:
    decoder = Decoder(shape)
    if decoder.model.norm.weight.is_meta:
        return decoder
    seed = int(torch.randint(2**31, ()))
    return initialize(decoder, std=std, seed=seed)
