"""OPTIONS -> ENGINE. What `xverse benchmark` measures: a model, or a shape with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from xverse.config import nearest
from xverse.errors import XverseError
from xverse.verbs._options import ModelOptions

if TYPE_CHECKING:
    from xverse.engine.agree import Agreement
    from xverse.engine.engine import Engine
    from xverse.engine.spread import SpreadEngine
    from xverse.model.decoder import Decoder
    from xverse.model.shape import ModelShape
    from xverse.verbs._peers import Subject

CHECKED_TOKENS = 16  # of the prompt, and of the answer, that the check of correctness looks at


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(ModelOptions):
    """What is measured, and how the engine holds it."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; without one the built-in one."""
    shape: str | None = None
    """A published shape instead of a model, such as xverse-7b; with --random-weights."""
    random_weights: bool = False
    """Fresh weights, made on the device; of MODEL, a folder, only config.json is then read."""
    kv_tokens: int | None = None
    """Room for this many tokens of keys and values; by default the machine decides."""


def find_shape(config: "SubjectOptions") -> tuple[str, Path | None, "ModelShape"]:
    """Title, place and shape of what is asked for; a published shape has no place."""
    from xverse.checkpoint.load import open_checkpoint
    from xverse.checkpoint.resolve import DEFAULT_MODEL, resolve, title_of
    from xverse.model.catalog import CATALOG

    if config.shape is None:
        model = config.model or DEFAULT_MODEL
        path = resolve(model)
        return title_of(model), path, open_checkpoint(path).shape
    shape = CATALOG.get(config.shape.lower())
    if shape is None:
        raise XverseError(
            f"There is no published shape {config.shape!r:.60}.{nearest(config.shape, CATALOG)}",
            f"Known are: {', '.join(CATALOG)}.",
            "Name one of these, or give a folder with a config.json as MODEL.",
        )
    if config.model is not None or not config.random_weights:
        what = "has no weights" if config.model is None else "and a MODEL are two things"
        raise XverseError(
            f"--shape {config.shape} {what}.",
            "A shape says how large a model is, and nothing else.",
            "Give --shape with --random-weights and no MODEL, or MODEL alone.",
        )
    return f"{config.shape.lower()} shape", None, shape


def is_quantized(path: Path | None, random_weights: bool) -> bool:
    """Whether the weights of a folder are stored rounded by a scheme of XVERSE's own."""
    from xverse.checkpoint.load import open_checkpoint

    if path is None or random_weights:
        return False
    return open_checkpoint(path).config.get("quantization_config") is not None


def open_engine(config: "SubjectOptions", subject: "Subject") -> "Engine | SpreadEngine":
    """The engine as `LLM` has it, with room for as many at once as are asked for."""
    from xverse.engine.engine import Engine
    from xverse.engine.options import EngineOptions

    if config.tensor_parallel != 1:
        return _open_parallel(config)
    options = _engine_options(config, subject)
    decoder = _decoder(config, subject)
    return Engine(decoder, options=EngineOptions(**options))


def check(engine: "Engine | SpreadEngine", config: "SubjectOptions") -> "Agreement | None":
    """The engine's greedy ids beside the plain decoder's; None where the model is on several GPUs,
    on which the plain decoder does not run."""
    from xverse.engine.agree import ROUNDING_STEPS, compare
    from xverse.engine.engine import Engine
    from xverse.engine.workload import make_requests

    if not isinstance(engine, Engine):
        return None
    shape = engine.decoder.shape
    tokens = min(CHECKED_TOKENS, shape.context_length // 2)
    (request,) = make_requests(1, (tokens, tokens), (tokens, tokens), vocabulary=shape.vocab_size)
    # Keys and values in 8 bits are rounded, too, which the plain decoder's are not.
    steps = ROUNDING_STEPS * (1 if config.kv_dtype == "auto" else 2)
    return compare(engine, request, rounding_steps=steps)


def _decoder(config: "SubjectOptions", subject: "Subject") -> "Decoder":
    from xverse.checkpoint.load import load
    from xverse.device import pick_dtype
    from xverse.engine.host_table import keep_on_host
    from xverse.model.fresh import random_decoder
    from xverse.model.fuse import fuse
    from xverse.quant.prepare import prepare
    from xverse.quant.quantize import quantize

    if config.random_weights:
        dtype = pick_dtype(config.dtype, subject.device)
        decoder = random_decoder(subject.shape, dtype=dtype, device=subject.device)
    else:
        assert subject.path is not None, "what has weights has a place"
        decoder = load(subject.path, dtype=config.dtype, device=config.device).decoder
    if config.quantize is not None:
        quantize(decoder, config.quantize)
    if config.host_embedding:
        keep_on_host(decoder)
    return prepare(fuse(decoder))


def _engine_options(config: "SubjectOptions", subject: "Subject") -> dict[str, Any]:
    from xverse.engine.options import EngineOptions

    usual = EngineOptions().on(subject.device)
    assert usual.max_running is not None, "`on` leaves nothing open"
    assert usual.step_tokens is not None, "`on` leaves nothing open"
    options: dict[str, Any] = {
        "kv_tokens": config.kv_tokens,
        # As `LLM` has it: shared prefixes would change last bits on a CPU.
        "share_prefixes": subject.device.type == "cuda",
        "kv_dtype": config.kv_dtype,
        "speculate": config.speculate,
    }
    if subject.most_running > usual.max_running:
        options["max_running"] = subject.most_running
        options["step_tokens"] = max(usual.step_tokens, subject.most_running)
    return options


def _open_parallel(config: "SubjectOptions") -> "Engine | SpreadEngine":
    from xverse.engine.llm import LLM

    if config.random_weights:
        raise XverseError(
            "--random-weights and --tensor-parallel do not go together.",
            "Each GPU loads its part of the weights from a folder.",
            "Leave one of them out.",
        )
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "quantize": config.quantize,
        "kv_tokens": config.kv_tokens,
        "kv_dtype": config.kv_dtype,
        "tensor_parallel": config.tensor_parallel,
        "speculate": config.speculate,
        "host_embedding": config.host_embedding,
    }
    return LLM(*([config.model] if config.model else []), **options).engine
