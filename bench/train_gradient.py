"""OUR GRADIENT AGAINST FP32. A small decoder of the same modules, every parameter compared.

bf16 and FP8, compiled as a run is, against the same weights in fp32: rows that one document fills
(cuDNN), and rows of several (flash attention over offsets), two passes each.
"""

from typing import Any

import torch
from torch import Tensor

from bench.train_steps import forget, training
from bench.train_text import Text
from xverse.data.loader import Loader, Position, Step
from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape
from xverse.parallel.grid import grid_of
from xverse.parallel.ranks import Ranks
from xverse.train.build import fresh
from xverse.train.objective import pretrain
from xverse.train.options import Training
from xverse.train.passes import passes_of

VOCABULARY = 1006  # as little round as 100,534
ROW = 512
LIMITS = {"bf16": 0.03, "fp8": 0.3}  # of |gradient - fp32's| / |fp32's|, for every parameter


def small_shape() -> ModelShape:
    return ModelShape(
        model_type="xverse",
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=ROW,
    )


def check(ranks: Ranks, compile: str) -> dict[str, Any]:
    """The relative errors; an AssertionError where one is above its limit."""
    found: dict[str, Any] = {}
    documents = {
        "whole rows": Text.random(VOCABULARY, [ROW + 1] * 8),
        "packed": Text.random(VOCABULARY, [200, 90, 333, 17, 501, 44, 260, 129, 380, 71]),
    }
    for rows, text in documents.items():
        step = _step(text)
        plain = training(1, ROW, 2, 2, dtype="float32", compile="no", master="float32")
        for name, fp8 in (("bf16", False), ("fp8", True)):
            options = training(1, ROW, 2, 2, fp8=fp8, compile=compile)
            ours = fresh(small_shape(), options, ranks)
            truth = fresh(small_shape(), plain, ranks)
            _copy(ours, truth)
            errors = _errors(_gradients(ours, step, options, ranks), truth, step, plain, ranks)
            worst = max(errors, key=lambda parameter: errors[parameter])
            middle = sorted(errors.values())[len(errors) // 2]
            found[f"{name}, {rows}"] = {
                "parameters": len(errors),
                "worst": round(errors[worst], 5),
                "of": worst,
                "median": round(middle, 5),
            }
            print(f"gradient of {name}, {rows}: {found[f'{name}, {rows}']}", flush=True)
            forget(ranks.device)
    for what, facts in found.items():
        assert facts["worst"] < LIMITS[what.split(",")[0]], f"{what}: {facts}"
    return found


def _step(text: Text) -> Step:
    loader = Loader(text, row_tokens=ROW, rows_per_step=4, rows_per_pass=2)
    return next(loader.steps(Position()))


def _gradients(decoder: Decoder, step: Step, options: Training, ranks: Ranks) -> dict[str, Tensor]:
    passes = passes_of(decoder, pretrain, grid_of(ranks, options.mesh), options)
    passes(step, learn=True)
    return {
        name: parameter.grad.double().cpu()
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }


def _errors(
    ours: dict[str, Tensor], truth: Decoder, step: Step, options: Training, ranks: Ranks
) -> dict[str, float]:
    exact = _gradients(truth, step, options, ranks)
    assert ours.keys() == exact.keys() == dict(truth.named_parameters()).keys()
    return {name: float((ours[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@torch.no_grad()
def _copy(decoder: Decoder, to: Decoder) -> None:
    """Give the fp32 decoder the very weights, as bf16 rounded them."""
    own = dict(to.named_parameters())
    for name, parameter in decoder.named_parameters():
        own[name].copy_(parameter)
