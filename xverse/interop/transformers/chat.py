"""MESSAGES -> ANSWER. `model.chat` by our renderer, engine and text stream."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from xverse.engine.request import Sampling
from xverse.engine.simple import decode
from xverse.errors import XverseError
from xverse.interop.transformers.config import XverseConfig
from xverse.model.decoder import Decoder
from xverse.text.chat import Message, encode_prompt
from xverse.text.stream import TextStream
from xverse.text.tokenizer import Tokenizer

AnyTokenizer = PreTrainedTokenizerFast | Tokenizer


def answer(
    decoder: Decoder,
    config: XverseConfig,
    tokenizer: AnyTokenizer,
    messages: Sequence[Message],
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Pieces of the answer, which join to the whole; errors in the messages come at once.

    `options` are those of a generation_config.json.
    """
    text = text_tokenizer(tokenizer)
    sampling = _sampling(options)
    ids = prompt_ids(decoder, config, text, messages, sampling.max_tokens)
    room = decoder.shape.context_length - len(ids)
    assert room > 0, "the budget leaves room for an answer"
    total = options.get("max_length")  # of prompt and answer
    if total is not None and sampling.max_tokens is None:
        room = max(1, min(room, total - len(ids)))
    sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens or room, room))
    return _pieces(decoder, text, ids, sampling, _end_ids(options, config, text))


def prompt_ids(
    decoder: Decoder,
    config: XverseConfig,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_new_tokens: int | None,
) -> list[int]:
    """The prompt of a conversation by the model's chat format."""
    return encode_prompt(
        messages,
        tokenizer,
        config.to_published(),
        context=decoder.shape.context_length,
        max_new_tokens=max_new_tokens,
    ).ids


def text_tokenizer(tokenizer: AnyTokenizer) -> Tokenizer:
    """Our tokenizer over the same vocabulary, which keeps special tokens out of messages."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise XverseError(
            f"chat cannot use a tokenizer of type {type(tokenizer).__name__}.",
            "It takes the one that AutoTokenizer loads from the model's folder.",
            "Call model.chat(tokenizer, messages).",
        )
    template = tokenizer.chat_template
    return _text_tokenizer(
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        template if isinstance(template, str) else None,
        tokenizer.init_kwargs.get("xverse_chat_format"),
    )


@lru_cache(maxsize=4)
def _text_tokenizer(
    backend: str,
    bos_token: str | None,
    eos_token: str | None,
    pad_token: str | None,
    chat_template: str | None,
    format_name: str | None,
) -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer.from_str(backend),
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        chat_template=chat_template,
        config={"xverse_chat_format": format_name},
    )


def _sampling(options: Mapping[str, Any]) -> Sampling:
    stop = options.get("stop_strings") or ()
    seed = int(torch.randint(2**62, ()))  # so that torch.manual_seed decides the answer
    others = {key: value for key, value in options.items() if key != "stop_strings"}
    return Sampling(stop=stop, seed=seed).over(others)


def _end_ids(
    options: Mapping[str, Any], config: XverseConfig, tokenizer: Tokenizer
) -> frozenset[int]:
    own = getattr(config, "eos_token_id", None)
    for ids in (options.get("eos_token_id"), own, tokenizer.eos_id):
        if isinstance(ids, int):
            return frozenset({ids})
        if ids is not None:
            return frozenset(ids)
    return frozenset()


def _pieces(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    end_ids: frozenset[int],
) -> Iterator[str]:
    stream = TextStream(tokenizer, sampling.stop)
    ended: set[int] = set()
    for token in decode(decoder, [ids], [sampling], end_ids=end_ids, ended=ended):
        if text := stream.push(token.id):
            yield text
        if stream.stopped:
            ended.add(0)
    if text := stream.finish():
        yield text
