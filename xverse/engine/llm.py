"""WORDS -> WORDS. `LLM`: a model in this process, asked with text or with messages."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, overload

from torch import nn

from xverse.checkpoint.adapter import read_adapter
from xverse.checkpoint.load import Model, load
from xverse.checkpoint.resolve import DEFAULT_MODEL
from xverse.device import pick_device
from xverse.engine.engine import Engine
from xverse.engine.host_table import keep_on_host
from xverse.engine.loop import Loop
from xverse.engine.options import EngineOptions
from xverse.engine.output import Output
from xverse.engine.request import Answer, Logprob, Piece, Request, Sampling, Scores
from xverse.engine.spread import SpreadEngine, spread
from xverse.errors import XverseError
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.quant.prepare import prepare
from xverse.quant.quantize import quantize as quantize_decoder
from xverse.quant.quantize import quantize_module
from xverse.quant.recipe import Recipe
from xverse.text.chat import Encoded, chat_format, encode_prompt
from xverse.text.tools import ParsedReply, parse_tool_calls


class LLM:
    """A language model ready to answer.

    `model` is a folder, a GGUF file, an alias or a hub id; dtype "auto" is the folder's own. It may
    be a `Model` that is loaded, or made, already: it is taken as it is, and `LLM` joins its layers.
    `quantize` 8 or 4 rounds the weights by the published scheme, each as soon as it is read.
    `kv_tokens` is how many tokens the KV memory holds, of all conversations at once; None sizes it
    by the machine.
    `kv_dtype` "fp8" keeps them in 8 bits: twice as many in the same memory, slightly rounded.
    `tensor_parallel` spreads the model over that many GPUs of this machine (or processes, on a
    CPU), each of which computes a part of every layer. `tokenizer` names another folder to take the
    tokenizer from. `speculate` 8 guesses up to 8 tokens at a time from what a text holds already,
    which is faster where answers repeat their prompts, and changes no answer. Threads may share an
    LLM: what they ask for is computed together. On a CPU that changes no bit of an answer; with
    `deterministic` it never does. `share_prefixes`: common beginnings are computed once; by default
    with `deterministic`, which keeps the last bits equal, and on a GPU. `adapters` are folders of
    LoRA adapters by the names that requests ask for; of names there may be `max_adapters`, by
    default as many, in `adapter_bytes` of memory together; `adapter_slots` and `adapter_rank` are
    those of `EngineOptions`. `host_embedding` leaves the table of token vectors, of which a token
    needs one row, out of the GPU's memory: 0.8 GiB of a 7B model.
    """

    def __init__(
        self,
        model: str | Path | Model = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: int | None = None,
        kv_tokens: int | None = None,
        kv_dtype: Literal["auto", "fp8"] = "auto",
        deterministic: bool = False,
        tensor_parallel: int = 1,
        tokenizer: str | Path | None = None,
        speculate: int = 0,
        share_prefixes: bool | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        max_adapters: int | None = None,
        adapter_bytes: int = 2**30,
        adapter_slots: int | None = None,
        adapter_rank: int = 32,
        host_embedding: bool = False,
    ) -> None:
        most = len(adapters or ()) if max_adapters is None else max_adapters
        if isinstance(model, Model):
            _require_open((dtype, device, tokenizer, tensor_parallel))
            device = model.decoder.device.type
        options = EngineOptions(
            kv_tokens=kv_tokens,
            kv_dtype=kv_dtype,
            deterministic=deterministic,
            speculate=speculate,
            # On a CPU answers are the same in any company as they come; shared prefixes would
            # change their last bits.
            share_prefixes=deterministic or pick_device(device).type == "cuda"
            if share_prefixes is None
            else share_prefixes,
            max_adapters=most,
            adapter_bytes=adapter_bytes,
            adapter_slots=adapter_slots,
            adapter_rank=adapter_rank,
        )
        self.model: Model
        self.engine: Engine | SpreadEngine
        if tensor_parallel == 1:
            if isinstance(model, Model):
                self.model = model
                if quantize is not None:
                    quantize_decoder(model.decoder, quantize)
            else:
                keep = None if quantize is None else partial(_rounded, Recipe.of(quantize))
                self.model = load(model, dtype=dtype, device=device, tokenizer=tokenizer, keep=keep)
            if host_embedding:
                keep_on_host(self.model.decoder)
            prepare(fuse(self.model.decoder), blocks=not most)
            self.engine = Engine(
                self.model.decoder,
                end_ids=self.model.end_ids,
                options=options,
                tokenizer=self.model.tokenizer,
            )
        elif most:
            raise XverseError(
                "A model over several devices takes no adapters.",
                "Each device has a part of every layer, and adapters come whole.",
                "Leave tensor_parallel out, or merge the adapter: xverse export --to merged.",
            )
        elif host_embedding:
            raise XverseError(
                "A model over several devices keeps its embedding on them.",
                "Only one device reads it from the host's memory.",
                "Leave host_embedding or tensor_parallel out.",
            )
        elif tokenizer is not None:
            raise XverseError(
                "A model over several devices cannot take another folder's tokenizer.",
                "Each of its processes reads the one of the model's folder.",
                "Leave tokenizer or tensor_parallel out.",
            )
        else:
            assert not isinstance(model, Model), "`_require_open` has looked"
            self.model, self.engine = spread(
                model,
                tensor_parallel,
                dtype=dtype,
                device=device,
                quantize=quantize,
                options=options,
            )
        self.decoder = self.model.decoder
        self.tokenizer = self.model.tokenizer
        self.title = self.model.checkpoint.title
        self._loop = Loop(self.engine)
        self._formats: dict[str, str | None] = {}  # of adapters
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)

    def load_adapter(self, name: str, folder: str | Path, *, replace: bool = False) -> None:
        """Load a LoRA adapter (PEFT's folder format) between two steps; requests name it from then
        on. With `replace` the name may be another's: who asked before keeps that one.

        XverseError where it does not fit the model or the bounds, or where the name is taken.
        """
        engine, adapter = self.engine, read_adapter(folder)
        assert isinstance(engine, Engine), "of others `max_adapters` is 0"
        if adapter.chat_format is not None:
            chat_format(self.model.checkpoint.config, self.tokenizer, adapter.chat_format)
        with self._loop.between_steps():
            engine.load_adapter(name, adapter, replace=replace)
            self._formats[name] = adapter.chat_format

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that have it go on with it, and its memory is free then."""
        assert isinstance(self.engine, Engine), "of others `max_adapters` is 0"
        with self._loop.between_steps():
            self.engine.unload_adapter(name)
            del self._formats[name]

    def close(self) -> None:
        """End the processes of a model that is spread over devices; what they held is free then.

        It happens by itself when the model is collected or the interpreter ends. A model on one
        device has no such processes.
        """
        if isinstance(self.engine, SpreadEngine):
            self.engine.close()

    @overload
    def generate(
        self, prompts: str, sampling: Sampling | None = None, *, adapter: str | None = None
    ) -> Answer: ...

    @overload
    def generate(
        self, prompts: list[str], sampling: Sampling | None = None, *, adapter: str | None = None
    ) -> list[Answer]: ...

    def generate(
        self,
        prompts: str | list[str],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
    ) -> Answer | list[Answer]:
        """Continue a text, or each of several side by side; each gets the answer it gets alone."""
        if isinstance(prompts, str):
            return self.generate([prompts], sampling, adapter=adapter)[0]
        encoded = [self.tokenizer.encode(text) for text in prompts]
        return self._answer(encoded, [sampling] * len(encoded), adapter=adapter)

    def choices(
        self,
        prompt: str | Sequence[int],
        n: int,
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Answer]:
        """`n` answers to one prompt (a text, or ids as `encode_chat` gives them), side by side;
        with a seed, each uses the one after the one before it."""
        if type(n) is not int or not 1 <= n <= 1024:
            raise XverseError(
                f"There cannot be {n!r:.60} answers.",
                "That is no whole number from 1 to 1024.",
                "Give such a number.",
            )
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        chosen = sampling or Sampling()
        seeds = [None if chosen.seed is None else chosen.seed + i for i in range(n)]
        samplings = [replace(chosen, seed=seed) for seed in seeds]
        if chosen.prompt_logprobs is None or chosen.max_tokens == 0:
            return self._answer([ids] * n, samplings, adapter=adapter)
        # What is scored is computed: one does it for all, who share its pages.
        others = [replace(sampling, prompt_logprobs=None) for sampling in samplings[1:]]
        answers = self._answer([ids] * n, [samplings[0], *others], adapter=adapter)
        return [replace(answer, prompt_logprobs=answers[0].prompt_logprobs) for answer in answers]

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Log-probability of each continuation after the prompt, the sum over its tokens.

        Both are encoded as one text; where that changes the prompt's last tokens, they count too.
        """
        alone = self.tokenizer.encode(prompt)
        requests = []
        for text in continuations:
            ids = self.tokenizer.encode(prompt + text)
            same = (i for i, pair in enumerate(zip(alone, ids, strict=False)) if len({*pair}) > 1)
            start = next(same, min(len(alone), len(ids)))
            requests.append(self._scored(ids, start))
        return [sum(scores.logprobs) for scores in self.read(requests)]

    def logprobs(self, text: str) -> list[Logprob]:
        """Log-probability of each token of a text after those before it, from the second on."""
        ids = self.tokenizer.encode(text)
        (scores,) = self.read([self._scored(ids, 1)])
        return [
            Logprob(id, self.tokenizer.token_bytes(id), logprob)
            for id, logprob in zip(ids[1:], scores.logprobs, strict=True)
        ]

    def read(self, requests: Sequence[Request]) -> list[Scores]:
        """What is asked about given prompts, in their order; nothing is added to any of them."""
        found: dict[int, Scores] = {}
        for output in self._loop.run(requests):
            assert isinstance(output, Scores), "nothing is decoded"
            found[output.request] = output
        return [found[place] for place in range(len(requests))]

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        namespace: str = "",
        adapter: str | None = None,
    ) -> list[Answer]:
        """`generate` for prompts that are ids already, as `encode_chat` gives them; they share
        beginnings only within the `namespace`."""
        some = [list(ids) for ids in prompts]
        return self._answer(some, [sampling] * len(some), namespace, adapter)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
    ) -> Generator[Piece, None, None]:
        """Continue a text, or ids as `encode_chat` gives them, piece by piece; the pieces' texts
        join to what `generate` gives."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        yield from self._pieces(ids, sampling, adapter)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """The model's next turn in a conversation. With `tools` (OpenAI's form) its function calls
        come parsed in `tool_calls`, and the text is what stands around them."""
        _refuse_echo(sampling)
        encoded = self.encode_chat(messages, sampling, tools=tools, adapter=adapter)
        found = self._answer([encoded.ids], [sampling], adapter=adapter)
        answer = replace(found[0], cut=encoded.cut)
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
        adapter: str | None = None,
    ) -> Generator[Piece, None, None]:
        """`chat`, piece by piece; function calls stay in the text (`ToolStream` parses them)."""
        _refuse_echo(sampling)
        encoded = self.encode_chat(messages, sampling, tools=tools, adapter=adapter)
        yield from self._pieces(encoded.ids, sampling, adapter)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        adapter: str | None = None,
    ) -> Encoded:
        """The exact prompt of a conversation, in the format of the adapter where it has its own;
        what the history budget took away is logged."""
        return encode_prompt(
            messages,
            self.tokenizer,
            self.model.checkpoint.config,
            context=self.context,
            max_new_tokens=self._filled(sampling).max_tokens,
            tools=tools,
            named=None if adapter is None else self._formats.get(adapter),
        )

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
        least = 1 if asked is None else asked
        if least > room:
            raise XverseError(
                f"The prompt has {len(ids)} tokens and the answer may have {least}.",
                f"The model's context holds {self.context} tokens for both.",
                "Shorten the prompt or lower max_tokens.",
            )
        if asked is None:  # then the answer ends where memory does
            room = min(room, max(1, self.engine.capacity - len(ids)))
        most = room if filled.max_tokens is None else min(filled.max_tokens, room)
        return replace(filled, max_tokens=most)

    def _scored(self, ids: Sequence[int], start: int) -> Request:
        if not ids or start < 1 or len(ids) > self.context:
            raise XverseError(
                f"A text of {len(ids)} tokens cannot be scored from token {start} on.",
                f"The first token has nothing before it, and the context holds {self.context}.",
                "Give a prompt that is not empty, and texts that are shorter.",
            )
        return Request(tuple(ids), None, score_from=start)

    def _answer(
        self,
        prompts: Sequence[list[int]],
        samplings: Sequence[Sampling | None],
        namespace: str = "",
        adapter: str | None = None,
    ) -> list[Answer]:
        outputs = [self._output(*pair) for pair in zip(prompts, samplings, strict=True)]
        for _ in self._run(prompts, samplings, outputs, namespace, adapter):
            pass
        return [output.answer() for output in outputs]

    def _pieces(
        self, ids: list[int], sampling: Sampling | None, adapter: str | None
    ) -> Generator[Piece, None, None]:
        outputs = [self._output(ids, sampling)]
        with closing(self._run([ids], [sampling], outputs, adapter=adapter)) as pieces:
            yield from pieces

    def _output(self, ids: list[int], sampling: Sampling | None) -> Output:
        return Output(self.tokenizer, self._filled(sampling), ids)

    def _run(
        self,
        prompts: Sequence[list[int]],
        samplings: Sequence[Sampling | None],
        outputs: list[Output],
        namespace: str = "",
        adapter: str | None = None,
    ) -> Generator[Piece, None, None]:
        """Decode; what is final as soon as it is. A stop string ends its prompt."""
        ended: set[int] = set()
        requests = [
            Request(tuple(ids), self._fitted(ids, sampling), namespace, adapter=adapter)
            for ids, sampling in zip(prompts, samplings, strict=True)
        ]
        with closing(self._loop.run(requests, ended)) as found:
            for each in found:
                output = outputs[each.request]
                piece = output.take(each)
                if output.finish:
                    ended.add(each.request)
                if piece is not None:
                    yield piece


def _refuse_echo(sampling: Sampling | None) -> None:
    if sampling is not None and sampling.echo:
        raise XverseError(
            "A conversation cannot be echoed.",
            "Its answer is the next message, and not a text with a beginning.",
            "Leave echo out, or give what encode_chat returns to choices.",
        )


def _rounded(recipe: Recipe, shape: ModelShape, name: str, module: nn.Module) -> nn.Module:
    """What a layer that has just been read becomes, so that few are ever in memory unrounded."""
    return quantize_module(name, module, recipe.fitting(shape))


def _require_open(asked: tuple[str, str, str | Path | None, int]) -> None:
    """XverseError where something is asked of a loaded model that was settled by its loading."""
    if asked != ("auto", "auto", None, 1):
        raise XverseError(
            "dtype, device, tokenizer and tensor_parallel cannot be given with a loaded model.",
            "They were settled when it was loaded.",
            "Leave them out, or name the model's folder.",
        )
