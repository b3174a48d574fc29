"""SLIDERS -> SAMPLING. The controls that say how tokens are chosen."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from xverse.engine.request import Sampling
from xverse.web.words import Words


def chat_sliders(words: Words, defaults: Sampling, context: int) -> list[gr.Slider]:
    """In the order of `chat_sampling`, set to what the model itself asks for."""
    # The engine keeps at least half of the context for an answer, whatever the history is.
    longest = max(1, min(4096, context // 2))
    usual = min(defaults.max_tokens or 1024, longest)
    temperature, top_k, top_p = defaults.temperature, defaults.top_k, defaults.top_p
    penalty = defaults.repetition_penalty
    wide: dict[str, Any] = {"min_width": 240}  # three in a row, then two
    return [
        gr.Slider(1, longest, usual, step=1, label=words.max_new_tokens, **wide),
        gr.Slider(0, 2, temperature, step=0.05, label=words.temperature, info=words.colder, **wide),
        gr.Slider(0, 100, top_k, step=1, label=words.top_k, info=words.fewer, **wide),
        gr.Slider(0, 1, top_p, step=0.01, label=words.top_p, info=words.likelier, **wide),
        gr.Slider(1, 2, penalty, step=0.01, label=words.penalty, info=words.rarer, **wide),
    ]


def generation_sliders(words: Words) -> list[gr.Slider]:
    """In the order of `generation_sampling`, with the published ranges and first values."""
    return [
        gr.Slider(1, 512, 100, step=1, label=words.max_new_tokens),
        gr.Slider(0, 1, 1.0, step=0.01, label=words.temperature, info=words.colder),
        gr.Slider(0, 50, 50, step=1, label=words.top_k, info=words.fewer),
        gr.Slider(0, 1, 0.92, step=0.01, label=words.top_p, info=words.likelier),
    ]


def chat_sampling(values: Sequence[float]) -> Sampling:
    """What the sliders of the chat page say. Raises XverseError for what no slider can say."""
    *four, repetition_penalty = values
    return generation_sampling(four, repetition_penalty=float(repetition_penalty))


def generation_sampling(
    values: Sequence[float], *, repetition_penalty: float | None = None
) -> Sampling:
    """What the sliders of the text generation page say, in the same way."""
    max_tokens, temperature, top_k, top_p = values
    return Sampling(
        max_tokens=int(max_tokens),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        repetition_penalty=repetition_penalty,
    )
