"""config.json -> NUMBERS. The shape of a model, under Hugging Face's field names."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from xverse.errors import XverseError
from xverse.log import warn_once

Number = TypeVar("Number", int, float)

MODEL_TYPES = ("xverse", "llama")

# Keys of published configs that change nothing here: book-keeping of other libraries, tokenizer
# and generation matters read elsewhere, and training options.
WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "is_llama_config",
        "max_tokenizer_truncation",
        "model_type",
        "name_or_path",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "rope_interleaved",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "transformers.js_config",
        "use_cache",
        "xverse_chat_format",
    }
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; the fields are config.json's own."""

    rope_type: str  # "linear" | "dynamic" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """What a decoder is made of. `num_experts` 0 is a dense model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    moe_top_k: int = 0
    num_shared_experts: int = 0

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise _bad(
                "num_key_value_heads",
                f"{heads} attention heads cannot share {kv_heads} key/value heads evenly",
            )
        if self.head_dim % 2:
            raise _bad("head_dim", f"rotary embedding pairs elements, and {self.head_dim} is odd")
        if self.num_experts and not 0 < self.moe_top_k <= self.num_experts:
            raise _bad("moe_top_k", f"{self.moe_top_k} of {self.num_experts} experts are chosen")

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelShape":
        """The shape that a config.json describes.

        Raises XverseError for a model that this decoder does not compute, or impossible numbers;
        keys that are not known are named in one warning.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise XverseError(
                f"This is a model of type {model_type!r}, which XVERSE does not run.",
                f"The decoder computes {' and '.join(MODEL_TYPES)} models.",
                "Give a folder whose config.json has one of these as its model_type.",
            )
        _refuse_what_changes_the_arithmetic(config)
        _name_unknown_keys(config)
        theta, scaling = _rope(config)
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        experts = _positive(config, "num_experts", 0)
        return cls(
            model_type=str(model_type),
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_hidden_layers=_positive(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_positive(config, "num_key_value_heads", heads),
            head_dim=_positive(config, "head_dim", max(hidden // heads, 1)),
            max_position_embeddings=_positive(config, "max_position_embeddings", 2048),
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            num_experts=experts,
            # The published MoE class defaults, for configs that leave them to it.
            moe_top_k=_positive(config, "moe_top_k", 6) if experts else 0,
            num_shared_experts=_positive(config, "num_shared_experts", 2) if experts else 0,
        )

    def to_config(self) -> dict[str, object]:
        """The config.json fields of this shape; `from_config` of it gives the shape again."""
        config = dataclasses.asdict(self)
        architecture = "XverseForCausalLM" if self.model_type == "xverse" else "LlamaForCausalLM"
        config |= {"architectures": [architecture], "hidden_act": "silu"}
        if not self.num_experts:
            for key in ("num_experts", "moe_top_k", "num_shared_experts"):
                del config[key]
        return config

    @property
    def norm_weight_in_fp32(self) -> bool:
        """Whether RMSNorm rounds after its weight, as the dense XVERSE code does."""
        return self.model_type == "xverse" and not self.num_experts

    @property
    def context_length(self) -> int:
        """How many tokens a sequence may have: what was trained, times linear or NTK scaling."""
        scaling = self.rope_scaling
        stretch = scaling.factor if scaling and scaling.rope_type != "llama3" else 1.0
        return int(self.max_position_embeddings * stretch)

    @property
    def num_parameters(self) -> int:
        """All weights, counted once where the head is tied to the embedding."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        expert = 3 * self.hidden_size * self.intermediate_size
        return (
            embeddings
            + self._outside_experts()
            + self.num_hidden_layers * (self.num_experts * expert)
        )

    @property
    def num_active_parameters(self) -> int:
        """Weights that take part in one token: only the chosen experts count."""
        idle = (self.num_experts - self.moe_top_k) if self.num_experts else 0
        expert = 3 * self.hidden_size * self.intermediate_size
        return self.num_parameters - self.num_hidden_layers * idle * expert

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks: what quantization makes smaller."""
        hidden, width = self.hidden_size, self.intermediate_size
        ffn = 3 * hidden * width * ((self.num_experts + self.num_shared_experts) or 1)
        return self.num_hidden_layers * (self._attention() + ffn)

    @property
    def num_linear_rows(self) -> int:
        """Output rows of those layers: how many scales a scheme with one a row needs."""
        heads = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        routed = self.num_experts * (2 * self.intermediate_size + self.hidden_size)
        width = self.intermediate_size * (self.num_shared_experts if self.num_experts else 1)
        always = 2 * width + self.hidden_size if width else 0
        return self.num_hidden_layers * (heads + self.hidden_size + routed + always)

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values that one token leaves behind in all layers."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim
        return self.num_hidden_layers * per_layer * bytes_per_element

    def _attention(self) -> int:
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        return heads * self.head_dim * self.hidden_size

    def _outside_experts(self) -> int:
        hidden, width = self.hidden_size, self.intermediate_size
        per_layer = self._attention() + 2 * hidden
        if self.num_experts:
            per_layer += self.num_experts * hidden  # router
            per_layer += 3 * hidden * width * self.num_shared_experts
        else:
            per_layer += 3 * hidden * width
        if self.attention_bias:
            heads = self.num_attention_heads + 2 * self.num_key_value_heads
            per_layer += heads * self.head_dim + hidden
        if self.mlp_bias:
            per_layer += 2 * width + hidden
        return self.num_hidden_layers * per_layer + hidden


def _bad(key: str, why: str) -> XverseError:
    return XverseError(
        f"config.json has an impossible {key!r}.", why, "Correct the value, or fetch it again."
    )


def _positive(config: Mapping[str, object], key: str, default: Number | None = None) -> Number:
    """The number under `key`; above zero unless it is the default."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise _bad(key, "it is missing, and nothing else says how large the model is")
        return default
    wanted = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise _bad(key, f"a number is wanted here, not {value!r:.80}")
    if value == default == 0:
        return default
    if not 0 < value < 2**40 or not math.isfinite(value):
        raise _bad(key, f"{value!r:.80} is not a possible size")
    return float(value) if isinstance(default, float) else int(value)


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _bad(key, f"true or false is wanted here, not {value!r:.80}")


def _refuse_what_changes_the_arithmetic(config: Mapping[str, object]) -> None:
    required: dict[str, tuple[object, ...]] = {
        "hidden_act": (None, "silu"),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1, 1.0),
    }
    for key, allowed in required.items():
        if config.get(key) not in allowed:
            raise XverseError(
                f"This model wants {key} = {config[key]!r:.80}, which XVERSE does not compute.",
                f"Of {key} the decoder knows {' or '.join(str(one) for one in allowed)}.",
                "Use a plain XVERSE or Llama checkpoint.",
            )


def _name_unknown_keys(config: Mapping[str, object]) -> None:
    known = {field.name for field in dataclasses.fields(ModelShape)} | WITHOUT_EFFECT
    known |= {"hidden_act", "sliding_window", "partial_rotary_factor", "rope_parameters"}
    known |= {"quantization_config"}  # answered by whoever loads the weights
    unknown = sorted(key for key in config if key not in known)
    if unknown:
        names = ", ".join(repr(key)[:60] for key in unknown[:20])
        warn_once(f"config.json has keys that XVERSE does not know and leaves aside: {names}")


def _rope(config: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from newer `rope_parameters`."""
    newer = config.get("rope_parameters")
    scaling = newer if newer is not None else config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise _bad("rope_scaling", f"an object is wanted here, not {scaling!r:.80}")
    fields = dict(scaling or {})
    theta = fields.get("rope_theta") or config.get("rope_theta")
    base = _positive({"rope_theta": theta}, "rope_theta", 10000.0)
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in ("linear", "dynamic", "llama3"):
        raise XverseError(
            f"This model scales its rotary embedding by {kind!r:.40}, which XVERSE does not know.",
            "Known are: default, linear, dynamic (NTK) and llama3.",
            "Use a checkpoint with one of these in rope_scaling.",
        )
    return base, RopeScaling(
        rope_type=str(kind),
        factor=_positive(fields, "factor", 1.0),
        low_freq_factor=_positive(fields, "low_freq_factor", 1.0),
        high_freq_factor=_positive(fields, "high_freq_factor", 4.0),
        original_max_position_embeddings=_positive(
            fields,
            "original_max_position_embeddings",
            _positive(config, "max_position_embeddings", 2048),
        ),
    )
