"""THE SAME TRAINING, BY TRANSFORMERS AND PLAIN PYTORCH. Same weights, rows, order and schedule.

Ours first, through the real loop, then LlamaForCausalLM under bf16 autocast with fused AdamW and
torch.compile: once with a mask that keeps documents apart, as ours does, for the losses; once
plainly causal, which is faster and lets documents see each other, for the speed.
"""

import statistics
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.real_train import Scale
from bench.train_steps import Unsaved, forget
from xverse.data.loader import Batch, Position, Prefetch, Step
from xverse.data.shards import Shards
from xverse.device import pick_device
from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape
from xverse.parallel.ranks import Ranks
from xverse.train import build
from xverse.train.evaluate import loader_of
from xverse.train.journal import Journal
from xverse.train.loop import Run
from xverse.train.objective import pretrain
from xverse.train.options import Keeping, Training, Watching
from xverse.train.schedule import learning_rate
from xverse.train.stop import Stop
from xverse.verbs._pretrain_run import shape_of
from xverse.verbs.pretrain import Config

NEVER = 10**9
WARM = 10  # steps at least whose time is not counted


def compare(folder: Path, size: Scale, *, steps: int, small: bool) -> dict[str, Any]:
    """Losses of both at every step, and tokens a second."""
    ranks = Ranks(0, 1, pick_device("cpu" if small else "cuda"))
    options = replace(
        size.training,
        steps=steps,
        update=replace(
            size.training.update, warmup_steps=min(size.training.update.warmup_steps, steps // 4)
        ),
        keep=Keeping(save_every=NEVER, evaluate_every=NEVER, log_every=NEVER),
        watch=Watching(spike=0.0),
    )
    shards = Shards.open(folder)
    config = Config(shards=str(folder), out="", shape=size.shape, row_tokens=options.row_tokens)
    shape = shape_of(config, shards.vocab_size)
    found: dict[str, Any] = {"parameters": shape.num_parameters, "steps": steps}
    decoder = build.fresh(shape, options, ranks)
    weights = {  # copies: on a CPU the run would learn in them
        name: weight.detach().float().cpu().clone() for name, weight in decoder.named_parameters()
    }
    found["ours"] = ours(decoder, shards, options, ranks)
    print(f"ours: {_short(found['ours'])}", flush=True)
    del decoder
    for name, apart in (("same_attention", True), ("causal", False)):
        forget(ranks.device)
        try:
            found[name] = theirs(shape, weights, shards, options, ranks, apart=apart)
            print(f"{name}: {_short(found[name])}", flush=True)
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
    return found | differences(found)


def differences(found: dict[str, Any]) -> dict[str, Any]:
    """How near the losses are where documents are kept apart, and whose steps are faster."""
    told: dict[str, Any] = {}
    mine = found["ours"]
    if "same_attention" in found:
        pairs = list(zip(mine["losses"], found["same_attention"]["losses"], strict=True))
        gaps = [one - other for one, other in pairs]
        told["loss_difference_mean"] = round(statistics.mean(gaps), 5)
        told["loss_difference_largest"] = round(max(map(abs, gaps)), 5)
        told["loss_difference_last_50"] = round(statistics.mean(gaps[-50:]), 5)
    for name in ("same_attention", "causal"):
        if name in found:
            ratio = mine["tokens_per_s"] / found[name]["tokens_per_s"]
            told[f"ours_over_{name}"] = round(ratio, 3)
    return told


def ours(decoder: Decoder, shards: Shards, options: Training, ranks: Ranks) -> dict[str, Any]:
    """The loop of `xverse pretrain`, without checkpoints."""
    heard: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, Stop() as stop:
        journal = Journal(Path(place), listener=heard.append)
        run = Run(
            decoder,
            pretrain,
            loader_of(shards, options, ranks),
            options,
            ranks=ranks,
            checkpoints=Unsaved(Path(place), ranks, keep=1),
            journal=journal,
        )
        assert run.run(stop) == "done"
        journal.close()
    steps = [event for event in heard if event["event"] == "step"]
    return _figures([s["loss"] for s in steps], [s["time"] for s in steps], run.tokens)


def theirs(
    shape: ModelShape,
    weights: dict[str, Tensor],
    shards: Shards,
    options: Training,
    ranks: Ranks,
    *,
    apart: bool,
) -> dict[str, Any]:
    """A loop as a careful user writes it; `apart`: documents do not see each other."""
    from transformers import LlamaForCausalLM

    from xverse.verbs._peer_transformers import llama_config

    device = ranks.device
    model = LlamaForCausalLM(llama_config(shape)).float()
    model.config.use_cache = False
    model.load_state_dict(weights)
    model.to(device).train()
    optimizer = _optimizer(model, options, device)

    def loss_of(ids: Tensor, targets: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        flat = logits.float().view(-1, logits.shape[-1])
        return functional.cross_entropy(flat, targets.view(-1), reduction="sum")

    computed = torch.compile(loss_of) if device.type == "cuda" else loss_of
    losses, times, tokens = [], [], 0
    update = options.update
    data: Prefetch[Step] = Prefetch(loader_of(shards, options, ranks).steps(Position()))
    for number in range(options.steps):
        step = next(data)
        total = torch.zeros((), device=device)
        for batch in step.passes:
            given = _inputs(batch.to(device), options.row_tokens, apart)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = computed(*given) / step.units
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), update.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, options.steps, update)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        times.append(time.perf_counter())
        tokens += step.tokens
    data.close()
    return _figures(losses, times, tokens)


def _optimizer(model: nn.Module, options: Training, device: torch.device) -> torch.optim.Optimizer:
    """AdamW that decays what ours does: matrices and the head, neither norms nor the embedding."""
    update = options.update
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[parameter.dim() > 1 and "embed_tokens" not in name].append(parameter)
    groups = [
        {"params": decays[True], "weight_decay": update.weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]
    betas = (update.beta1, update.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=update.epsilon, fused=device.type == "cuda")


def _inputs(
    batch: Batch, row_tokens: int, apart: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A pass as rows: ids, targets (-100 where none counts), positions, and a mask, [B, T]."""
    ids_BT, targets_BT, mask_BT, positions_BT = (
        part.view(-1, row_tokens)
        for part in (batch.ids, batch.targets, batch.mask, batch.positions)
    )
    targets_BT = targets_BT.masked_fill(~mask_BT, -100)
    if not apart:
        return ids_BT, targets_BT, torch.arange(row_tokens, device=ids_BT.device)[None], None
    document_BT = (positions_BT == 0).cumsum(1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return ids_BT, targets_BT, positions_BT, same_BTT.tril()[:, None]


def _figures(losses: list[float], times: list[float], tokens: int) -> dict[str, Any]:
    """Of a run whose steps ended at `times`: the usual step, waiting for data included."""
    seconds = [later - one for one, later in pairwise(times)]
    counted = seconds[min(WARM, len(seconds) // 2) :]
    usual = statistics.median(counted)
    return {
        "tokens_per_s": round(tokens / len(losses) / usual, 1),
        "s_per_step": round(usual, 5),
        "timed_steps": len(counted),
        "losses": [round(loss, 5) for loss in losses],
    }


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if k != "losses"} | {"last": figures["losses"][-1]}
