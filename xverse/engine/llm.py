"""WORDS -> WORDS. `LLM`: a model in this process, asked with text or with messages."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import overload

from xverse.checkpoint.load import load
from xverse.checkpoint.resolve import DEFAULT_MODEL
from xverse.engine.engine import Engine, EngineOptions
from xverse.engine.loop import Loop
from xverse.engine.request import Answer, Finish, Piece, Request, Sampling, Token
from xverse.errors import XverseError
from xverse.log import logger
from xverse.model.fuse import fuse
from xverse.quant.quantize import quantize as quantize_decoder
from xverse.text.chat import Cut, Encoded, chat_format, prompt_budget
from xverse.text.stream import TextStream
from xverse.text.tools import ParsedReply, parse_tool_calls


class LLM:
    """A language model ready to answer.

    `model` is a folder, a GGUF file, an alias or a hub id; dtype "auto" is the folder's own.
    `quantize` 8 or 4 rounds the weights by the published scheme after loading. `kv_tokens` is how
    many tokens the KV memory holds, of all conversations at once; None sizes it by the machine.
    Threads may share an LLM: what they ask for is computed together.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: int | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        self.model = load(model, dtype=dtype, device=device)
        if quantize is not None:
            quantize_decoder(self.model.decoder, quantize)
        self.decoder = fuse(self.model.decoder)
        self.tokenizer = self.model.tokenizer
        self.title = self.model.checkpoint.title
        options = EngineOptions(kv_tokens=kv_tokens)
        self.engine = Engine(self.decoder, end_ids=self.model.end_ids, options=options)
        self._loop = Loop(self.engine)

    @overload
    def generate(self, prompts: str, sampling: Sampling | None = None) -> Answer: ...

    @overload
    def generate(self, prompts: list[str], sampling: Sampling | None = None) -> list[Answer]: ...

    def generate(
        self, prompts: str | list[str], sampling: Sampling | None = None
    ) -> Answer | list[Answer]:
        """Continue a text, or each of several side by side; each gets the answer it gets alone."""
        if isinstance(prompts, str):
            return self.generate([prompts], sampling)[0]
        return self._answer([self.tokenizer.encode(text) for text in prompts], sampling)

    def stream(self, prompt: str, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Continue a text, piece by piece; the pieces' texts join to what `generate` gives."""
        yield from self._pieces(self.tokenizer.encode(prompt), sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Answer:
        """The model's next turn in a conversation. With `tools` (OpenAI's form) its function calls
        come parsed in `tool_calls`, and the text is what stands around them."""
        encoded = self.encode_chat(messages, sampling, tools=tools)
        answer = replace(self._answer([encoded.ids], sampling)[0], cut=encoded.cut)
        if not tools:
            return answer
        reply: ParsedReply = parse_tool_calls(answer.text)
        return replace(answer, text=reply.content, tool_calls=reply.tool_calls)

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, object]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Iterator[Piece]:
        """`chat`, piece by piece; function calls stay in the text (`ToolStream` parses them)."""
        yield from self._pieces(self.encode_chat(messages, sampling, tools=tools).ids, sampling)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Encoded:
        """The exact prompt of a conversation; what the history budget took away is logged."""
        checkpoint = self.model.checkpoint
        wanted = self._filled(sampling).max_tokens
        answer_tokens = min(wanted or 2048, self.context // 2)
        config = {"max_position_embeddings": self.context, **checkpoint.config}
        encoded = chat_format(checkpoint.config, self.tokenizer).render(
            messages,
            self.tokenizer,
            max_prompt_tokens=prompt_budget(config, answer_tokens),
            tools=tools,
        )
        if encoded.cut is not None:
            logger.warning(_in_words(encoded.cut))
        return encoded

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self.decoder.shape.context_length

    def _filled(self, sampling: Sampling | None) -> Sampling:
        return (sampling or Sampling()).over(self.model.checkpoint.generation_config)

    def _fitted(self, ids: Sequence[int], sampling: Sampling | None) -> Sampling:
        """The sampling with every option set, max_tokens within what the context leaves."""
        if not ids:
            raise XverseError(
                "The prompt is empty.",
                "This model's tokenizer adds nothing to a text, so there is nothing to continue.",
                "Give at least one character.",
            )
        room = self.context - len(ids)
        filled = self._filled(sampling)
        asked = sampling.max_tokens if sampling else None
        if room < 1 or (asked or 0) > room:
            raise XverseError(
                f"The prompt has {len(ids)} tokens and the answer may have {asked or 1}.",
                f"The model's context holds {self.context} tokens for both.",
                "Shorten the prompt or lower max_tokens.",
            )
        if not asked:  # then the answer ends where memory does
            room = min(room, max(1, self.engine.capacity - len(ids)))
        return replace(filled, max_tokens=min(filled.max_tokens or room, room))

    def _answer(self, prompts: Sequence[list[int]], sampling: Sampling | None) -> list[Answer]:
        outputs = self._outputs(len(prompts), sampling)
        for _ in self._run(prompts, sampling, outputs):
            pass
        return [out.answer(len(ids)) for out, ids in zip(outputs, prompts, strict=True)]

    def _pieces(self, ids: list[int], sampling: Sampling | None) -> Iterator[Piece]:
        outputs = self._outputs(1, sampling)
        pending: list[int] = []
        with closing(self._run([ids], sampling, outputs)) as run:
            for token, text in run:
                pending.append(token.id)
                if text or outputs[0].finish:
                    yield Piece(text, tuple(pending), outputs[0].finish)
                    pending = []

    def _outputs(self, count: int, sampling: Sampling | None) -> list["_Output"]:
        stop = self._filled(sampling).stop
        return [_Output(TextStream(self.tokenizer, stop)) for _ in range(count)]

    def _run(
        self, prompts: Sequence[list[int]], sampling: Sampling | None, outputs: list["_Output"]
    ) -> Generator[tuple[Token, str], None, None]:
        """Decode, each token with the text that it made final; a stop string ends its prompt."""
        ended: set[int] = set()
        requests = [Request(tuple(ids), self._fitted(ids, sampling)) for ids in prompts]
        with closing(self._loop.run(requests, ended)) as tokens:
            for token in tokens:
                output = outputs[token.request]
                text = output.take(token)
                if output.finish:
                    ended.add(token.request)
                yield token, text


class _Output:
    """What has come of one prompt so far."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.finish: Finish | None = None

    def take(self, token: Token) -> str:
        """Add a token; returns the text that is final now."""
        self.tokens.append(token.id)
        text = self.stream.push(token.id)
        self.finish = "stop" if self.stream.stopped else token.finish
        if self.finish:
            text += self.stream.finish()
            # What was held back may complete a stop string only now.
            self.finish = "stop" if self.stream.stopped else token.finish
        self.texts.append(text)
        return text

    def answer(self, prompt_tokens: int) -> Answer:
        assert self.finish is not None, "every prompt ends"
        return Answer("".join(self.texts), tuple(self.tokens), self.finish, prompt_tokens)


def _in_words(cut: Cut) -> str:
    parts = [f"{cut.messages} earlier messages left out"] if cut.messages else []
    parts += ["the system message among them"] if cut.system else []
    parts += [f"the last message cut by {cut.tokens} tokens"] if cut.tokens else []
    return f"the conversation is longer than the prompt may be: {', '.join(parts)}"
