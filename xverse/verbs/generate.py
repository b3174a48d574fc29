"""Give one answer: a text continued, or with --chat a message answered."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from xverse.errors import XverseError
from xverse.verbs._options import AdapterOption, ModelOptions, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, AdapterOption, SamplingOptions):
    """What `xverse generate` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, GGUF file, alias or hub id."""
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The text to continue; "-" or nothing reads it from standard input."""
    chat: bool = False
    """Take the prompt as a message, in the model's own chat format."""
    system: str | None = None
    """System message, with --chat."""
    json: bool = False
    """Print one JSON object when the answer is whole."""


def run(config: Config) -> int:
    """Print the answer as it comes, or as JSON at the end."""
    prompt = _prompt(config.prompt)
    if config.system is not None and not config.chat:
        raise XverseError(
            "--system is of no use here.",
            "A text that is merely continued has no system message.",
            "Add --chat, or put the words into the prompt.",
        )
    llm, sampling = config.load(config.model, config.adapter), config.sampling()
    adapter = config.adapter_name
    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    if config.json:
        if config.chat:
            answer = llm.chat(messages, sampling, adapter=adapter)
        else:
            answer = llm.generate(prompt, sampling, adapter=adapter)
        facts = {
            "text": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.tokens),
        }
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    if config.chat:
        pieces = llm.chat_stream(messages, sampling, adapter=adapter)
    else:
        pieces = llm.stream(prompt, sampling, adapter=adapter)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()
    return 0


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise XverseError(
            "There is no prompt.",
            "It was neither written after the model nor piped in.",
            'Write it in quotes, as in: xverse generate MODEL "The capital of France is"',
        )
    return sys.stdin.read().removesuffix("\n")
