"""TRANSFORMERS AS A PEER. `generate` of its own Llama class, over the weights that ours has."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from xverse.engine.request import Request, Token
from xverse.model.decoder import Decoder
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.model.shape import ModelShape
from xverse.verbs._peers import Subject


def open_peer(subject: Subject, decoder: Decoder) -> "TransformersPeer":
    """The peer; its weights are views of the decoder's."""
    return TransformersPeer(llama_of(subject.shape, decoder))


class TransformersPeer:
    """One batch after another, padded on the left; who comes while a batch runs waits for its end.

    A batch runs as long as its longest answer; tokens past what a request asked for don't count.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.computes = f"{str(model.dtype).removeprefix('torch.')}, static batches"
        self.same_weights = True
        self._next = 0
        self._queue: deque[tuple[int, Request]] = deque()
        self._batch: list[tuple[int, Request]] = []
        self._done = 0  # tokens of every row so far
        self._rows: SimpleQueue[list[int] | Exception] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, request: Request) -> int:
        """Queue it for the next batch."""
        self._queue.append((self._next, request))
        self._next += 1
        return self._next - 1

    def step(self) -> Sequence[Token]:
        """The next token of every row that still wants one."""
        if not self._batch:
            self._begin()
        row = self._rows.get()
        if isinstance(row, Exception):
            raise row
        self._done += 1
        tokens = []
        for (number, request), id in zip(self._batch, row, strict=True):
            limit = _limit(request)
            if self._done <= limit:
                tokens.append(Token(number, id, "length" if self._done == limit else None))
        if self._done == max(_limit(request) for _, request in self._batch):
            assert self._thread is not None, "somebody computed this"
            self._thread.join()
            self._batch = []
        return tokens

    def close(self) -> None:
        """Nothing is held but views."""

    def _begin(self) -> None:
        assert self._queue, "there is something to do"
        self._batch, self._done = list(self._queue), 0
        self._queue.clear()
        self._thread = threading.Thread(target=self._generate, args=(self._batch,), daemon=True)
        self._thread.start()

    def _generate(self, batch: list[tuple[int, Request]]) -> None:
        try:
            requests = [request for _, request in batch]
            ids, mask = _padded_left([request.ids for request in requests], self.model.device)
            self.model.generate(  # type: ignore[misc]
                ids,
                attention_mask=mask,
                generation_config=_options(requests),
                streamer=_Rows(self._rows),
            )
        except Exception as error:  # raised again where it is waited for
            self._rows.put(error)


class _Rows(BaseStreamer):
    """Hands on the new tokens of every step; the prompt, which comes first, is left out."""

    def __init__(self, rows: "SimpleQueue[list[int] | Exception]") -> None:
        self.rows, self.prompt_seen = rows, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.rows.put(value.tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """The count of tokens tells the end."""


def llama_config(shape: ModelShape) -> LlamaConfig:
    """A dense shape in transformers' words, without special ids: else a 2 among random ones would
    end an answer."""
    fields: dict[str, Any] = {**shape.to_config(), "model_type": "llama"}
    return LlamaConfig(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def llama_of(shape: ModelShape, decoder: Decoder) -> LlamaForCausalLM:
    """transformers' Llama with the weights of a dense decoder of ours, fused or not; no copy."""
    config = llama_config(shape)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    parameters = {
        name: nn.Parameter(tensor, requires_grad=False) for name, tensor in _weights(decoder)
    }
    missing, unexpected = model.load_state_dict(parameters, strict=False, assign=True)
    assert not unexpected, unexpected
    assert missing in ([], ["lm_head.weight"]), missing
    model.tie_weights()  # assigned over
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(decoder.device)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    model.generation_config = GenerationConfig()
    llama: LlamaForCausalLM = model.eval()
    return llama


def _weights(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a dense decoder under its published name."""
    for prefix, module in decoder.named_modules():
        children = {"qkv_proj", "gate_up_proj"}
        if isinstance(module, FusedAttention):
            size = module.head_dim
            rows = [module.heads * size, module.kv_heads * size, module.kv_heads * size]
            yield from _split(prefix, module.qkv_proj, ("q_proj", "k_proj", "v_proj"), rows)
        elif isinstance(module, FusedFeedForward):
            half = module.gate_up_proj.weight.shape[0] // 2
            names = ("gate_proj", "up_proj")
            yield from _split(prefix, module.gate_up_proj, names, [half, half])
        elif prefix.rpartition(".")[2] not in children:
            for name, tensor in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", tensor.data


def _split(
    prefix: str, joined: nn.Module, names: Sequence[str], rows: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    for kind, tensor in joined.named_parameters(recurse=False):
        for name, part in zip(names, tensor.data.split(list(rows)), strict=True):
            yield f"{prefix}.{name}.{kind}", part


def _padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, each [B, longest]."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _options(requests: Sequence[Request]) -> GenerationConfig:
    longest = max(map(_limit, requests))
    sampling = requests[0].sampling
    assert sampling is not None, "it decodes"
    options: dict[str, Any] = {"max_new_tokens": longest, "pad_token_id": 0}
    if sampling.temperature:
        options |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(do_sample=bool(sampling.temperature), **options)


def _limit(request: Request) -> int:
    assert request.sampling is not None, "it decodes"
    assert request.sampling.max_tokens is not None, "filled"
    return request.sampling.max_tokens
