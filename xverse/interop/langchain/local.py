"""QUESTION -> ANSWER, IN THIS PROCESS. An `LLM` that answers what LangChain asks."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import closing
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from xverse.engine.form import Form, form_of
from xverse.engine.llm import LLM
from xverse.engine.request import Sampling
from xverse.errors import XverseError
from xverse.interop.langchain.question import CallPart, Delta, Question, Usage
from xverse.text.tools import ToolCall, ToolStream

_loaded: WeakValueDictionary[tuple[object, ...], LLM] = WeakValueDictionary()
_loading = Lock()


def shared_llm(model: str, **options: Any) -> LLM:
    """The LLM of this model and these options; who asks for the same gets the same one."""
    key = (model, *sorted(options.items()))
    with _loading:
        llm = _loaded.get(key)
        if llm is None:
            llm = _loaded[key] = LLM(model, **options)
        return llm


class InProcess:
    """Answers by models in this process. `options` are those of `LLM`.

    Questions may name other models than `model`; each is loaded once and kept.
    """

    def __init__(
        self, model: str, llm: LLM | None, timeout_s: float | None, options: dict[str, Any]
    ) -> None:
        self._llms = {model: llm or shared_llm(model, **options)}
        self._timeout_s, self._options = timeout_s, options

    def llm(self, model: str) -> LLM:
        """The LLM by this name."""
        if model not in self._llms:
            self._llms[model] = shared_llm(model, **self._options)
        return self._llms[model]

    def answer(self, question: Question) -> list[Delta]:
        """The whole answer."""
        return list(self.stream(question))

    def stream(self, question: Question) -> Generator[Delta, None, None]:
        """The answer as it becomes final. XverseError where it takes longer than the timeout."""
        llm = self.llm(question.model)
        form = form_of(question.tools, question.tool_choice, question.response_format)
        sampling = Sampling(**question.options, stop=tuple(question.stop), grammar=form.grammar)
        tools = question.tools if question.tool_choice != "none" else ()
        prompt = llm.encode_chat(question.messages, sampling, tools=tools).ids
        if form.opening:
            prompt = [*prompt, *llm.tokenizer.encode(form.opening, add_special=False)]
        reply = _Reply(form, bool(tools), question.parallel_tool_calls is not False)
        end = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        tokens = 0
        with closing(llm.stream(prompt, sampling)) as pieces:
            for piece in pieces:
                tokens += len(piece.tokens)
                delta = reply.hear(piece.text, piece.finish, Usage(len(prompt), tokens))
                if delta is not None:
                    yield delta
                if reply.done:
                    return
                if end is not None and time.monotonic() > end:
                    raise _too_slow(self._timeout_s)

    async def aanswer(self, question: Question) -> list[Delta]:
        """The whole answer, computed in a thread."""
        return [delta async for delta in self.astream(question)]

    async def astream(self, question: Question) -> AsyncGenerator[Delta, None]:
        """The answer as it becomes final, computed in threads."""
        deltas = self.stream(question)
        step: asyncio.Future[Delta | None] | None = None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, deltas, None))
                delta = await asyncio.shield(step)
                if delta is None:
                    return
                yield delta
        finally:
            if step is not None and not step.done():  # cancelled: the thread is in the generator
                step.add_done_callback(lambda _: deltas.close())
            else:
                deltas.close()


class _Reply:
    """One answer on its way: function calls are taken out of its text."""

    def __init__(self, form: Form, tools: bool, parallel: bool) -> None:
        self.done = False
        self._stream = ToolStream() if tools else None
        self._parallel = parallel
        self._calls = 0
        if self._stream is not None:
            early = self._stream.feed(form.opening)
            assert not early, "the opening is the beginning of a call"

    def hear(self, text: str, finish: str | None, usage: Usage) -> Delta | None:
        """What a piece of text makes final, None where nothing is."""
        content, calls = self._apart(text, last=finish is not None)
        if calls and not self._parallel:
            calls, finish = calls[:1], "stop"
        self.done = finish is not None
        if self._calls and finish == "stop":
            finish = "tool_calls"
        if not (content or calls or finish):
            return None
        return Delta(content, tuple(calls), finish, usage if finish else None)

    def _apart(self, text: str, *, last: bool) -> tuple[str, list[CallPart]]:
        if self._stream is None:
            return text, []
        found = self._stream.feed(text)
        if last:
            found += self._stream.finish()
        content = "".join(each for each in found if isinstance(each, str))
        calls = [self._call(each) for each in found if isinstance(each, ToolCall)]
        return content, calls

    def _call(self, call: ToolCall) -> CallPart:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self._calls += 1
        return CallPart(self._calls - 1, f"call_{uuid.uuid4().hex[:24]}", call.name, arguments)


def _too_slow(timeout_s: float | None) -> XverseError:
    return XverseError(
        "The answer took too long.",
        f"It was not complete after {timeout_s:g} seconds, and the timeout is that.",
        "Raise timeout, or lower max_tokens.",
    )
