"""MESSAGES -> IDS. The one renderer of chats: XVERSE's formats v1, v2, v3, or a Jinja template.

The published models differ in their role names and line ends, and in how text is cut into ids:

    v1       XVERSE-13B-Chat of 2023-08   role and content encoded together; user, assistant only
    v2       7B, 13B-2, 65B, 13B-256K     role and content encoded separately
    v3       MoE-A4.2B                    as v2; lower-case roles, one line end
    default  models made by the published fine-tuning command (docs/decisions/0027)
    xverse   models made by the same trainer with the template of that name

The end-of-text id follows each assistant message; nothing comes before the first message.
A Jinja template is one joint text, so that the templates here give exactly v1's ids, but differ
from v2 and v3 where a content's first letters merge with the space before them: "Human: Hello"
is [..., ":", "▁H", ...] jointly and [..., ":", "▁", "H", ...] separately.
"""

from collections.abc import Mapping, Sequence

from xverse.errors import XverseError
from xverse.log import logger
from xverse.text.formats import DEFAULT, V1, V2, V3, XVERSE, XVERSE_FORMATS, XverseFormat
from xverse.text.message import ChatFormat, Cut, Encoded, Message
from xverse.text.template import TemplateFormat
from xverse.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT",
    "V1",
    "V2",
    "V3",
    "XVERSE",
    "XVERSE_FORMATS",
    "ChatFormat",
    "Cut",
    "Encoded",
    "Message",
    "TemplateFormat",
    "XverseFormat",
    "chat_format",
    "encode_prompt",
    "format_named",
    "prompt_budget",
]

DEFAULT_ANSWER_TOKENS = 2048  # max_new_tokens of the published generation_config.json


def chat_format(
    config: Mapping[str, object], tokenizer: Tokenizer, named: object = None
) -> ChatFormat:
    """The chat format of the model with this config.json.

    What is `named` decides (an adapter's format), then `xverse_chat_format` in
    tokenizer_config.json; else XVERSE models by their shape, and others by the tokenizer's Jinja
    template. Raises XverseError where there is none.
    """
    named = named or tokenizer.config.get("xverse_chat_format")
    if named is not None and named != TemplateFormat.name:
        return format_named(named, tokenizer)
    if named is None and config.get("model_type") == "xverse":
        if config.get("num_experts") is not None:
            return V3
        return V1 if config.get("vocab_size") == 100278 else V2  # 13B-Chat of 2023-08 alone
    if tokenizer.chat_template is None:
        raise XverseError(
            "This model has no chat template.",
            f"Its model_type is {config.get('model_type')!r:.40}, and its folder says nothing of "
            "how a conversation is written.",
            "Put a chat_template.jinja into the folder, or use the model with plain prompts.",
        )
    return TemplateFormat(tokenizer.chat_template)


def format_named(name: object, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of this name; "template" is the tokenizer's Jinja template. XverseError where
    there is none."""
    if name == TemplateFormat.name and tokenizer.chat_template is not None:
        return TemplateFormat(tokenizer.chat_template)
    if not isinstance(name, str) or name not in XVERSE_FORMATS:
        raise XverseError(
            f"There is no chat format {name!r:.40}.",
            "It was asked for, or tokenizer_config.json names it as xverse_chat_format; and "
            f"{TemplateFormat.name} needs a chat template in the folder.",
            f"Use one of {', '.join(XVERSE_FORMATS)} or {TemplateFormat.name}.",
        )
    return XVERSE_FORMATS[name]


def prompt_budget(config: Mapping[str, object], max_new_tokens: int) -> int:
    """How many tokens a prompt may have, by the published rule: what the answer leaves, at least
    half of the context, at most `max_tokenizer_truncation`."""
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or isinstance(context, bool) or context < 2:
        raise XverseError(
            "The model's context length is not known.",
            f"config.json has max_position_embeddings = {context!r:.40}.",
            "Correct config.json.",
        )
    budget = max(context // 2, context - max_new_tokens)
    limit = config.get("max_tokenizer_truncation")
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        budget = min(budget, limit)
    return budget


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    config: Mapping[str, object],
    *,
    context: int,
    max_new_tokens: int | None,
    tools: Sequence[Mapping[str, object]] | None = None,
    named: str | None = None,
) -> Encoded:
    """The prompt of a conversation within the history budget; what that takes away is logged.

    `config` is the model's config.json, `context` the tokens that prompt and answer share, `named`
    the format of an adapter that has its own.
    """
    fields = {"max_position_embeddings": context, **config}
    answer = min(max_new_tokens or DEFAULT_ANSWER_TOKENS, context // 2)
    encoded = chat_format(config, tokenizer, named).render(
        messages, tokenizer, max_prompt_tokens=prompt_budget(fields, answer), tools=tools
    )
    if encoded.cut is not None:
        logger.warning("the conversation is longer than the prompt may be: %s", encoded.cut)
    return encoded
