"""CHAT FORMAT -> MODELFILE. What Ollama wants to know beside a GGUF file: prompt, end, sampling.

The template is in Go's text/template. All that the prompt has stands in quotes, and the line
ends of the file itself are trimmed. A last message of the assistant's is continued.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from xverse.checkpoint.load import open_checkpoint, open_tokenizer
from xverse.log import logger
from xverse.text.chat import XverseFormat, chat_format
from xverse.text.message import ChatFormat

ROLES = {"system": "system", "user": "user", "exec": "tool"}  # ours -> Ollama's
# generation_config.json -> PARAMETER
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
CONTEXT = 8192  # of Ollama's own default of 4,096 a document would be cut; memory grows with it


def modelfile_of(model: Path, gguf: str) -> str:
    """The Modelfile of the model folder or GGUF file `model`, for its export `gguf` beside it."""
    checkpoint, tokenizer = open_checkpoint(model), open_tokenizer(model)
    has_chat = checkpoint.shape.model_type == "xverse" or tokenizer.chat_template is not None
    return modelfile(
        gguf,
        chat_format(checkpoint.config, tokenizer) if has_chat else None,
        checkpoint.generation_config,
        end=tokenizer.eos_token,
        context=checkpoint.shape.context_length,
    )


def modelfile(
    gguf: str,
    chat: ChatFormat | None,
    generation_config: Mapping[str, object],
    *,
    end: str | None,
    context: int,
) -> str:
    """The text of a Modelfile for the file `gguf` beside it.

    `end` is the text of the end-of-text token. XVERSE's formats get a template; for others Ollama
    derives one from the Jinja template inside the GGUF file, where it knows that.
    """
    lines = [f"FROM ./{gguf}"]
    if isinstance(chat, XverseFormat):
        lines.append(f'TEMPLATE """{go_template(chat, end or "")}"""')
    elif chat is not None:
        logger.info("the Modelfile has no TEMPLATE: Ollama takes the Jinja template's twin it has")
    lines.append(f"PARAMETER num_ctx {min(context, CONTEXT)}")
    sampled = generation_config.get("do_sample", True)
    for key, name in PARAMETERS.items():
        value = generation_config.get(key)
        if key == "temperature" and not sampled:
            value = 0
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {name} {value}")
    if end:
        lines.append(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def go_template(chat: XverseFormat, end: str) -> str:
    """One of XVERSE's formats as a Go template over Ollama's .Messages."""
    opening = _quoted(chat.prefixes["assistant"])
    actions = ["range $i, $message := .Messages", "$last := eq (len (slice $.Messages $i)) 1"]
    for role, theirs in ROLES.items():
        if role in chat.prefixes:
            actions += [f'if eq .Role "{theirs}"', _quoted(chat.prefixes[role]), ".Content"]
            actions += [_quoted(chat.endings[role]), "end"]
    actions += ['if eq .Role "assistant"', opening, ".Content"]
    actions += ["if not $last", _quoted(end + chat.between), "end", "end"]
    actions += ['if and $last (ne .Role "assistant")', opening, "end", "end"]
    return "\n".join(f"{{{{- {action} -}}}}" for action in actions)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
