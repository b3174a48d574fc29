"""MESSAGES -> MESSAGE. `ChatXverse`, an XVERSE model as LangChain's chat model."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from xverse.checkpoint.resolve import DEFAULT_MODEL
from xverse.device import env
from xverse.engine.llm import LLM
from xverse.engine.request import Sampling
from xverse.errors import XverseError
from xverse.interop.langchain.local import InProcess
from xverse.interop.langchain.messages import chunk_of, message_of, to_openai
from xverse.interop.langchain.question import Delta, Question, Source
from xverse.interop.langchain.remote import OverHttp
from xverse.interop.langchain.structured import Method, structured

# Fields that say how tokens are chosen: Sampling's, under its names.
_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
)
# What a call may say beside these (`bind` and `invoke` hand such words on).
_ASKED = ("model", "tools", "tool_choice", "response_format", "parallel_tool_calls")
# Words for LangChain's own use.
_NOT_OURS = ("stream", "ls_structured_output_format")


class ChatXverse(BaseChatModel):
    """An XVERSE model that LangChain can talk with.

    Without `base_url` the model is loaded into this process: `model` is a folder, a GGUF file, an
    alias or a hub id, and models of the same name and options are loaded once. `llm` is an LLM that
    is already there. With `base_url` (".../v1") a server is asked, `model` is its name for the
    model, and `api_key` (or XVERSE_API_KEY) opens it.

    Options that are None are the model's own. `timeout` is in seconds, of a whole answer in this
    process, of silence over HTTP, where `max_retries` counts what is tried again.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", populate_by_name=True)

    model: str = Field(default="", alias="model_name")
    base_url: str | None = None
    api_key: SecretStr | None = None
    llm: LLM | None = Field(default=None, exclude=True, repr=False)
    device: str = "auto"
    dtype: str = "auto"
    quantize: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    timeout: float | None = None
    max_retries: int = Field(default=2, ge=0, le=100)
    streaming: bool = False

    _source: Source = PrivateAttr()

    @model_validator(mode="after")
    def _find_source(self) -> "ChatXverse":
        Sampling(**self._options({}), stop=tuple(self.stop or ()))  # refuses what cannot be
        local = {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}
        if self.base_url is None:
            if self.llm is not None:
                self.model = self.model or self.llm.title
            self.model = self.model or DEFAULT_MODEL
            self._source = InProcess(self.model, self.llm, self.timeout, local)
            return self
        if self.llm is not None or local != {"device": "auto", "dtype": "auto", "quantize": None}:
            raise XverseError(
                "llm, device, dtype and quantize have no effect here.",
                "With base_url the model is not in this process.",
                "Leave them out, or leave base_url out.",
            )
        if not self.model:
            raise XverseError(
                "Which model the server is to use is not said.",
                "A server knows its models by names; GET /v1/models lists them.",
                "Give model.",
            )
        if self.api_key is None and (found := env("XVERSE_API_KEY")):
            self.api_key = SecretStr(found)
        key = self.api_key.get_secret_value() if self.api_key else None
        self._source = OverHttp(self.base_url, key, self.timeout, self.max_retries)
        return self

    @property
    def _llm_type(self) -> str:
        return "xverse-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "base_url": self.base_url, **self._options({})}

    def _resolve_model_profile(self) -> Any:
        """What the model can do, for LangChain's agents (langchain-core 1)."""
        profile: dict[str, object] = {
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "tool_calling": True,
            "tool_choice": True,
            "structured_output": True,
        }
        if isinstance(self._source, InProcess):
            profile["max_input_tokens"] = self._source.llm(self.model).context
        return profile

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        options = self._options(kwargs)
        params = LangSmithParams(
            ls_provider="xverse",
            ls_model_name=str(kwargs.get("model") or self.model),
            ls_model_type="chat",
        )
        if options.get("temperature") is not None:
            params["ls_temperature"] = options["temperature"]
        if options.get("max_tokens") is not None:
            params["ls_max_tokens"] = options["max_tokens"]
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question = self._question(messages, stop, kwargs)
        return _result(self._source.answer(question), question)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question = self._question(messages, stop, kwargs)
        return _result(await self._source.aanswer(question), question)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        question = self._question(messages, stop, kwargs)
        deltas: Generator[Delta, None, None] = self._source.stream(question)
        with closing(deltas):
            for delta in deltas:
                chunk = ChatGenerationChunk(message=chunk_of(delta, question.model))
                if run_manager is not None:
                    run_manager.on_llm_new_token(delta.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        question = self._question(messages, stop, kwargs)
        deltas: AsyncGenerator[Delta, None] = self._source.astream(question)
        async with aclosing(deltas):
            async for delta in deltas:
                chunk = ChatGenerationChunk(message=chunk_of(delta, question.model))
                if run_manager is not None:
                    await run_manager.on_llm_new_token(delta.text, chunk=chunk)
                yield chunk

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with these tools at hand. `tool_choice` is "auto", "none", "any" (or "required"
        or True), the name of a tool, or OpenAI's dict; a demanded call keeps to its schema."""
        listed = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choice = _choice(tool_choice, [tool["function"]["name"] for tool in listed])
        if choice in (None, "auto", "none") and strict:
            raise XverseError(
                "strict holds for demanded calls only.",
                "Where the model is free to call or not, its answer is held to no schema.",
                'Give tool_choice "any" or a tool\'s name, or leave strict out.',
            )
        for tool in listed:  # that a demanded call is strict goes without saying
            tool["function"].pop("strict", None)
        return self.bind(tools=listed, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Method = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model answering with objects of a schema: a Pydantic class, a TypedDict or a JSON
        schema. Every method holds the answer to the schema, so `strict` changes nothing but
        whether further properties are allowed; it is not for json_mode."""
        return structured(self, schema, method, include_raw=include_raw, strict=strict, more=kwargs)

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The sampling options that are set, here or for this call."""
        options = {name: asked.get(name, getattr(self, name)) for name in _SAMPLING}
        return {name: value for name, value in options.items() if value is not None}

    def _question(
        self, messages: list[BaseMessage], stop: list[str] | None, asked: dict[str, Any]
    ) -> Question:
        unknown = [name for name in asked if name not in (*_SAMPLING, *_ASKED, *_NOT_OURS)]
        if unknown:
            raise XverseError(
                f"A chat model of XVERSE's takes no option {unknown[0]!r:.60}.",
                f"It takes {', '.join((*_ASKED, *_SAMPLING))} and stop.",
                "Leave it out.",
            )
        model: str = asked.get("model") or self.model
        return Question(
            model,
            to_openai(messages),
            self._options(asked),
            tuple(self.stop or () if stop is None else stop),
            tuple(asked.get("tools") or ()),
            asked.get("tool_choice"),
            asked.get("response_format"),
            asked.get("parallel_tool_calls"),
        )


def _result(deltas: list[Delta], question: Question) -> ChatResult:
    message = message_of(deltas, question.model)
    return ChatResult(generations=[ChatGeneration(message=message)])


def _choice(choice: dict[str, Any] | str | bool | None, names: list[str]) -> Any:
    """A tool_choice in OpenAI's words."""
    if choice is True or choice == "any":
        return "required"
    if choice is False:
        return "none"
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        if choice not in names:
            raise XverseError(
                f"There is no tool {choice!r:.60}.",
                f"The tools are {', '.join(names) or 'none'}.",
                'Give the name of one, or "any", "auto" or "none".',
            )
        return {"type": "function", "function": {"name": choice}}
    return choice
