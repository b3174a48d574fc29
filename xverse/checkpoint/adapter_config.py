"""adapter_config.json -> FACTS. What PEFT says of an adapter; what we do not do is refused by name.

A field that this file does not know is refused unless it is off (null, false, empty): the answer
would be another one than the adapter's author had.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xverse.errors import XverseError
from xverse.files import read_json

# How the adapter came to be; the numbers in the file are what they are.
NOTES = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Ways to begin that leave the base model as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
MAX_RANK = 4096
PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, checked."""

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # of layers whose names end so, instead of `rank`
    alphas: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    targets: tuple[str, ...]  # empty where it is a regular expression, which is not run
    base_model: str
    dropout: float

    def rank_of(self, layer: str) -> int:
        """The rank of a layer by its whole name."""
        return next((rank for end, rank in self.ranks.items() if matches(end, layer)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """alpha of a layer by its whole name."""
        found = (alpha for end, alpha in self.alphas.items() if matches(end, layer))
        return next(found, self.alpha)

    def require_targets(self, layers: list[str]) -> None:
        """Raise XverseError unless target_modules are the layers that there are weights for."""
        if not self.targets:
            return
        for end in self.targets:
            if not any(matches(end, layer) for layer in layers):
                raise _bad(self.path, f"target_modules names {end[:80]!r}, which has no weights.")
        for layer in layers:
            if not any(matches(end, layer) for end in self.targets):
                raise _bad(self.path, f"target_modules misses {layer[:120]!r}, which has weights.")


def matches(end: str, layer: str) -> bool:
    """Whether a name of PEFT's lists means the layer: the whole name, or its last parts.

    PEFT takes the names in rank_pattern and alpha_pattern for regular expressions; of those we
    read plain names, with or without the "^" that makes one a whole name.
    """
    whole = end.removeprefix("^")
    return layer == whole or (end == whole and layer.endswith(f".{end}"))


def read_config(path: Path) -> AdapterConfig:
    """Read `path`; raises XverseError naming the field that is malformed or not supported."""
    config = read_json(path)
    _refuse_others(path, config)
    rank, alpha = _rank(path, "r", config.get("r")), config.get("lora_alpha")
    base, dropout = config.get("base_model_name_or_path"), config.get("lora_dropout") or 0.0
    return AdapterConfig(
        path=path,
        rank=rank,
        alpha=_positive(path, "lora_alpha", alpha),
        ranks={k: _rank(path, k, v) for k, v in _pattern(path, config, "rank_pattern").items()},
        alphas={
            k: _positive(path, k, v) for k, v in _pattern(path, config, "alpha_pattern").items()
        },
        rank_stabilized=_flag(path, config, "use_rslora"),
        dora=_flag(path, config, "use_dora"),
        targets=_targets(path, config.get("target_modules")),
        base_model=base if isinstance(base, str) else "",
        dropout=_fraction(path, dropout),
    )


def _refuse_others(path: Path, config: Mapping[str, object]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unsupported(path, "peft_type", config.get("peft_type"), "LORA")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise _unsupported(path, "task_type", config["task_type"], "CAUSAL_LM")
    if config.get("bias") not in ("none", None):
        raise _unsupported(path, "bias", config["bias"], "none")
    if config.get("init_lora_weights") not in BEGINNINGS:
        kinds = "true, false, gaussian, eva or orthogonal: others change the base model as well"
        raise _unsupported(path, "init_lora_weights", config["init_lora_weights"], kinds)
    for name, value in config.items():
        if name not in READ | NOTES and value not in (None, False, "", [], {}):
            raise _unsupported(path, name[:80], value, "null, false or empty")


def _pattern(path: Path, config: Mapping[str, object], name: str) -> dict[str, object]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise _bad(path, f"{name} is no table.")
    for key in value:
        if not PLAIN_NAME.fullmatch(key):
            raise _bad(
                path,
                f"{name} has the regular expression {key[:80]!r}.",
                "Write the names of the layers instead; foreign expressions are not run.",
            )
    return value


def _targets(path: Path, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return ()
    if isinstance(value, list) and value and all(isinstance(one, str) and one for one in value):
        return tuple(value)
    raise _bad(path, "target_modules is no list of names.")


def _rank(path: Path, name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _bad(path, f"The rank {name[:80]!r} is {str(value)[:40]}, not 1 to {MAX_RANK}.")
    return value


def _positive(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _bad(path, f"alpha {name[:80]!r} is {str(value)[:40]}, no number above zero.")
    return float(value)


def _flag(path: Path, config: Mapping[str, object], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise _bad(path, f"{name} is {str(value)[:40]!r}, neither true nor false.")
    return value


def _fraction(path: Path, value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _bad(path, f"lora_dropout is {str(value)[:40]!r}, not between 0 and 1.")
    return float(value)


def _unsupported(path: Path, name: str, value: object, reads: str) -> XverseError:
    return XverseError(
        f"{path} asks for {name} = {str(value)[:80]!r}, which is not supported.",
        f"Of {name} we read {reads}.",
        "Train a LoRA adapter of linear layers alone, or merge this one into its model with PEFT.",
    )


def _bad(path: Path, why: str, fix: str = "Correct it, or get the adapter again.") -> XverseError:
    return XverseError(f"{path} is malformed.", why, fix)
