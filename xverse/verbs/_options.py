"""Options that several verbs share: which model on what, and how tokens are chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from xverse.engine.llm import LLM
    from xverse.engine.request import Sampling


ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """On what, and in what precision, a model runs."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes the GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the weights are computed in; auto is the folder's own."""
    quantize: Literal[4, 8] | None = None
    """Round the weights to 8 or 4 bits after loading (the published per-row scheme)."""
    speculate: int = 0
    """Guess up to so many tokens (8, say) from the text so far: faster where answers repeat it."""

    kv_dtype: Literal["auto", "fp8"] = "auto"
    """fp8 keeps keys and values in 8 bits: twice the conversations in the same memory."""
    tensor_parallel: int = 1
    """Spread the model over this many GPUs."""
    host_embedding: bool = False
    """Leave the table of token vectors in the computer's own memory: at 7B, 0.8 GiB of a GPU's."""

    def load(self, model: str, adapter: Path | None = None) -> "LLM":
        """The model, ready to answer; an adapter's folder is loaded under the name ADAPTER."""
        from xverse.engine.llm import LLM

        return LLM(
            model,
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            kv_dtype=self.kv_dtype,
            tensor_parallel=self.tensor_parallel,
            speculate=self.speculate,
            host_embedding=self.host_embedding,
            adapters=None if adapter is None else {ADAPTER: adapter},
        )


@dataclass(frozen=True, kw_only=True)
class AdapterOption:
    """What is added to a model."""

    adapter: Path | None = None
    """Folder of a LoRA adapter (PEFT's format) to answer with."""

    @property
    def adapter_name(self) -> str | None:
        """What requests call it, None where there is none."""
        return None if self.adapter is None else ADAPTER


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is left out is the model's generation_config.json's."""

    max_tokens: int | None = None
    """Longest answer, in tokens."""
    temperature: float | None = None
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among this many likeliest tokens; 0 is off."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float | None = None
    """Leave out tokens less than this times as likely as the likeliest; 0 is off."""
    repetition_penalty: float | None = None
    """Above 1, tokens seen before become less likely (Hugging Face's definition)."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends."""
    seed: int | None = None
    """The same seed gives the same answer."""

    def sampling(self) -> "Sampling":
        """The options as the engine takes them."""
        from xverse.engine.request import Sampling

        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            seed=self.seed,
        )
