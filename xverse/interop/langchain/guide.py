"""PROMPT -> TEXT. `XVERSE_LLM`, the class of the published LangChain guide."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.llms import LLM as BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import AliasChoices, ConfigDict, Field, PrivateAttr

from xverse.engine.llm import LLM
from xverse.engine.request import Sampling
from xverse.errors import XverseError
from xverse.interop.langchain.local import shared_llm

MOST_TOGETHER = 64  # prompts of a batch that are in the engine at a time


class XVERSE_LLM(BaseLLM):
    """A chat model in this process that takes a prompt as the user's message and gives the answer.

    `mode_name_or_path` (the guide's spelling; model_name_or_path is taken, too) is a folder, an
    alias or a hub id. `sampling` says how tokens are chosen; words of a call go over it, as in
    `llm.invoke(prompt, max_tokens=20)`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    mode_name_or_path: str = Field(
        validation_alias=AliasChoices("mode_name_or_path", "model_name_or_path")
    )
    sampling: Sampling = Field(default_factory=Sampling)

    _model: LLM = PrivateAttr()

    def __init__(self, mode_name_or_path: str | None = None, **fields: Any) -> None:
        if mode_name_or_path is not None:
            fields["mode_name_or_path"] = mode_name_or_path
        super().__init__(**fields)
        print("正在从本地加载模型...")
        self._model = shared_llm(self.mode_name_or_path)
        print("完成本地模型的加载")

    def __call__(self, prompt: str, stop: list[str] | None = None, **options: Any) -> str:
        """The answer to a prompt, as the guide asks for it."""
        return self.invoke(prompt, stop=stop, **options)

    @property
    def _llm_type(self) -> str:
        return "XVERSE_LLM"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"mode_name_or_path": self.mode_name_or_path, "sampling": self.sampling}

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return self._model.chat(_said(prompt), self._sampling(stop, kwargs)).text

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """All prompts side by side: the threads' requests meet in the engine."""
        with ThreadPoolExecutor(min(len(prompts), MOST_TOGETHER)) as pool:
            texts = list(pool.map(lambda prompt: self._call(prompt, stop, **kwargs), prompts))
        return LLMResult(generations=[[Generation(text=text)] for text in texts])

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        pieces = self._model.chat_stream(_said(prompt), self._sampling(stop, kwargs))
        with closing(pieces):
            for piece in pieces:
                chunk = GenerationChunk(text=piece.text)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _sampling(self, stop: list[str] | None, options: dict[str, Any]) -> Sampling:
        known = {field.name for field in fields(Sampling)}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise XverseError(
                f"XVERSE_LLM takes no option {unknown[0]!r:.60}.",
                f"Its options are those of Sampling: {', '.join(sorted(known))}.",
                "Leave it out.",
            )
        if stop is not None:
            options = {**options, "stop": tuple(stop)}
        return replace(self.sampling, **options)


def _said(prompt: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": prompt}]
