"""TRAINED ADAPTERS -> PEFT FOLDER. What PEFT, `xverse serve` and `xverse export` can take."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from xverse.checkpoint.adapter import Adapter, LowRank, write_adapter
from xverse.checkpoint.save import expert_name
from xverse.parallel.ranks import Ranks
from xverse.train.tuning import Lora


def publish_adapter(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    options: Lora,
    ranks: Ranks,
    *,
    base_model: str,
    chat_format: str | None,
) -> None:
    """Write the adapter into `folder`, rank 0 alone; the others only give their parts of `weights`.

    `weights` are the parameters of `Adapted` layers by their names, in the optimizer's precision.
    """
    found = adapter_of(weights, options, base_model=base_model, chat_format=chat_format)
    if ranks.first:
        write_adapter(folder, found)


def adapter_of(
    weights: Iterable[tuple[str, Tensor]],
    options: Lora,
    *,
    base_model: str = "",
    chat_format: str | None = None,
) -> Adapter:
    """The adapter that these parameters are, experts one by one."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights:
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = weight.detach().cpu()
    changes = {
        published: LowRank(parts["a"], parts["b"], options.alpha, parts.get("magnitude"))
        for layer, stacked in layers.items()
        for published, parts in _one_by_one(layer, stacked)
    }
    return Adapter(
        changes,
        rank_stabilized=options.rslora,
        base_model=base_model,
        chat_format=chat_format,
        dropout=options.dropout,
        targets=options.targets,
    )


def _one_by_one(layer: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The published name of the layer, or of each of a stack, and its part of the parameters."""
    if parts["a"].dim() == 2:
        yield layer, parts
        return
    for number in range(len(parts["a"])):
        yield expert_name(layer, number), {name: part[number] for name, part in parts.items()}
