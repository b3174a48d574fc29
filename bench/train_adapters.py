"""ADAPTERS AT 7B, AND PEFT'S. Speed and memory of LoRA and QLoRA, and of PEFT + transformers.

Both sides train the same shape, with random weights, on the same rows of text, with as many rows in
a pass, adapters of rank 8 on all seven linear layers, clipping and AdamW.
"""

import time
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.train_steps import NEVER, figures, forget, timed_run
from bench.train_text import Text
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.parallel.ranks import Ranks
from xverse.quant.quantize import quantize_module
from xverse.quant.recipe import Recipe
from xverse.train import fit
from xverse.train.build import fresh, prepared
from xverse.train.lora import add_lora
from xverse.train.options import Computing, Keeping, Training, Updating, Watching
from xverse.train.tuning import TARGETS, Lora

RATE = 2e-4
Method = Literal["lora", "qlora int4"]


def options_of(steps: int, row: int, rows: int, recompute: str, compile: str) -> Training:
    return Training(
        steps=steps,
        row_tokens=row,
        rows_per_step=rows,
        rows_per_pass=rows,
        update=Updating(learning_rate=RATE, warmup_steps=10, weight_decay=0.0, beta2=0.999),
        compute=Computing(dtype="bfloat16", recompute=recompute, compile=compile),  # type: ignore[arg-type]
        keep=Keeping(save_every=NEVER, evaluate_every=NEVER, log_every=NEVER),
        watch=Watching(spike=0.0),
    )


def ours(
    shape: ModelShape, method: Method, options: Training, text: Text, ranks: Ranks, warm: int
) -> dict[str, Any]:
    """Figures of a run of LoRA or QLoRA, with the memory that --dry-run predicts."""
    decoder = adapted(shape, method, options, ranks)
    timed = timed_run(decoder, options, text, ranks, warm=warm)
    found = figures(timed, decoder, options, ranks.device)
    for formula in ("mfu_strict", "mfu_palm"):  # which count gradients of all weights
        found.pop(formula, None)
    plan = fit.needs(shape, options, method, Lora(), dtype="bfloat16", ranks=1)
    found["predicted_GB"] = round(plan.total / 1e9, 3)
    if "peak_GB" in found:
        found["predicted_over_measured"] = round(found["predicted_GB"] / found["peak_GB"], 4)
    del decoder
    forget(ranks.device)
    return found


def adapted(shape: ModelShape, method: Method, options: Training, ranks: Ranks) -> Decoder:
    """As `train.build.adapted`, of random weights that are on the device already."""
    plain = options_of(1, options.row_tokens, 1, "none", "no")
    decoder = fresh(shape, plain, ranks)
    if method != "lora":
        recipe = Recipe(Recipe.of(method.removeprefix("qlora ")).fitting(shape).scheme)
        for name, layer in list(decoder.model.layers.named_modules(prefix="model.layers")):
            if isinstance(layer, Linear):
                decoder.set_submodule(name, quantize_module(name, layer, recipe))
    return prepared(add_lora(decoder, Lora()), options, ranks).train()


def theirs(
    shape: ModelShape, options: Training, text: Text, ranks: Ranks, warm: int
) -> dict[str, Any]:
    """The same by PEFT + transformers, with each kind of attention; the fastest counts."""
    found: dict[str, Any] = {}
    cuda = ranks.device.type == "cuda"
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    model = peft_model(shape, ranks.device)
    for name, backend in backends.items() if cuda else [("math", SDPBackend.MATH)]:
        try:
            with sdpa_kernel(backend):
                found[name] = peft_steps(model, options, text, ranks.device, warm)
            print(f"PEFT with {name} attention: {found[name]}", flush=True)
        except RuntimeError as error:  # a kind of attention that does not take its masks
            print(f"PEFT with {name} attention: {error}", flush=True)
    del model
    forget(ranks.device)
    best = max(found, key=lambda name: found[name]["tokens_per_s"])
    return {**found, "best": best, "tokens_per_s": found[best]["tokens_per_s"]}


def peft_model(shape: ModelShape, device: torch.device) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):  # its tables of angles too
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    adapters = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS))
    # Adapters in bf16, as ours compute: in fp32, PEFT's default, it is slower.
    made = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    made.train()
    return made


def peft_steps(
    model: torch.nn.Module, options: Training, text: Text, device: torch.device, warm: int
) -> dict[str, Any]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=device.type == "cuda"
    )
    rows, row = options.rows_per_pass, options.row_tokens
    ids = torch.from_numpy(text.ids[: options.steps * rows * row]).long()
    losses: list[float] = []
    began = 0.0
    for number, batch in enumerate(ids.view(options.steps, rows, row)):
        if number == warm:
            _wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        here = batch.to(device)
        loss = model(input_ids=here, labels=here).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    _wait(device)
    seconds = time.perf_counter() - began
    counted = options.steps - warm
    found: dict[str, Any] = {
        "tokens_per_s": round(counted * rows * row / seconds, 1),
        "last_loss": round(losses[-1], 4),
    }
    if device.type == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
