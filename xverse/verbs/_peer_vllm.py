"""VLLM AS A PEER. Its offline engine, step by step, on a folder that it takes for a Llama's."""

import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from xverse.device import free_memory, total_memory
from xverse.engine.request import Request, Token
from xverse.model.decoder import Decoder
from xverse.verbs._peers import Subject

SHARE = 0.9  # of the memory that is free once our engine has its own


def open_peer(subject: Subject, decoder: Decoder) -> "VllmPeer":
    """vLLM with its own copy of the weights; of a random model with random weights of its own."""
    dtype = str(decoder.dtype).removeprefix("torch.")
    return VllmPeer(subject, dtype)


class VllmPeer:
    """vLLM's engine. Prefix caching is off, as our requests share nothing either."""

    def __init__(self, subject: Subject, dtype: str) -> None:
        self._vllm: Any = import_module("vllm")
        self._folder = tempfile.TemporaryDirectory(prefix="xverse-vllm-")
        folder = Path(self._folder.name)
        _write_llama_folder(subject, dtype, folder)
        options: dict[str, Any] = {}
        if subject.device.type == "cuda":
            free = free_memory(subject.device) / total_memory(subject.device)
            options["gpu_memory_utilization"] = SHARE * free
        if subject.kv_dtype != "auto":
            options["kv_cache_dtype"] = subject.kv_dtype
        llm = self._vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=dtype,
            load_format="dummy" if subject.random_weights else "auto",
            max_model_len=subject.shape.context_length,
            max_num_seqs=subject.most_running,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        self._engine = llm.llm_engine
        own = ", weights of its own" if subject.random_weights else ""
        self.computes = f"{dtype}{own}"
        self.same_weights = not subject.random_weights
        self._next = 0

    def add(self, request: Request) -> int:
        """Queue it."""
        sampling = request.sampling
        assert sampling is not None, "it decodes"
        params = self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            ignore_eos=True,
            detokenize=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": list(request.ids)}
        self._engine.add_request(str(self._next), prompt, params)
        self._next += 1
        return self._next - 1

    def step(self) -> Sequence[Token]:
        """The tokens of one step of its engine."""
        tokens = []
        for output in self._engine.step():
            ids = list(output.outputs[0].token_ids)
            ends = [None] * (len(ids) - 1) + ["length" if output.finished else None]
            number = int(output.request_id.split("-")[0])  # newer ones append to it
            tokens += [Token(number, id, end) for id, end in zip(ids, ends, strict=False)]  # type: ignore[arg-type]
        return tokens

    def close(self) -> None:
        """End its process and remove the folder."""
        self._engine.engine_core.shutdown()
        self._folder.cleanup()


def _write_llama_folder(subject: Subject, dtype: str, folder: Path) -> None:
    """config.json of a Llama of this shape, and links to the weights: XVERSE's have its names."""
    config = subject.shape.to_config() | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if subject.random_weights:
        return
    assert subject.path is not None, "weights come from a folder"
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for file in subject.path.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
