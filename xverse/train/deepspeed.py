"""DEEPSPEED'S JSON -> FSDP2. What each key becomes here; one that has no meaning is an error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from xverse.config import nearest
from xverse.errors import XverseError

AUTO = "auto"
NO_EFFECT = "nothing: FSDP2 chooses this itself, and results are equal"


@dataclass(frozen=True)
class Asked:
    """What the command line says, which "auto" stands for."""

    ranks: int
    rows_per_pass: int  # micro-batch of a device
    passes: int  # accumulated
    clip: float
    bf16: bool
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


class Row(NamedTuple):
    """A key of the file, its value, and what became of it."""

    key: str
    value: object
    became: str


@dataclass(frozen=True)
class Mapped:
    """How weights are spread, and the table that says what every key became."""

    data: int
    """Copies of the model; each is spread over ranks / data devices."""
    reshard: bool
    """Whether gathered weights are given back after each block's forward pass."""
    offload: Literal["none", "optimizer", "parameters"]
    pinned: bool
    """Whether what is offloaded is in memory that is locked."""
    rows: tuple[Row, ...]


def read_deepspeed(config: Mapping[str, object], asked: Asked) -> Mapped:
    """What this DeepSpeed configuration means here. Raises XverseError for keys that mean nothing,
    and for numbers that the command line contradicts."""
    rows = [row for key, value in config.items() for row in _read(key, value, asked)]
    zero = config.get("zero_optimization", {})
    assert isinstance(zero, Mapping), "it has been read"
    stage = zero.get("stage", 0)
    data = asked.ranks if stage == 0 else 1
    return Mapped(data, stage == 3, _offloaded(zero), _pinned(zero), tuple(rows))


def _read(key: str, value: object, asked: Asked) -> list[Row]:
    if key in SECTIONS:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "it is an object of options")
        return SECTIONS[key](value, asked)
    if key in NUMBERS:
        name, read = NUMBERS[key]
        return [_number(key, value, read(asked), name)]
    if key in STATED:
        return [Row(key, value, STATED[key])]
    raise _unknown(key, [*SECTIONS, *NUMBERS, *STATED])


def _number(key: str, value: object, asked: object, name: str) -> Row:
    """A number that the command line decides; another one in the file is a contradiction."""
    if value != AUTO and value != asked:
        raise XverseError(
            f"The DeepSpeed configuration has {key} = {value!r:.60}, and the command {asked!r}.",
            "Both say the same thing, and one must be wrong.",
            f'Set it to "auto", or correct {name}.',
        )
    return Row(key, value, f"{asked:g}" if isinstance(asked, float) else str(asked))


def _zero(options: Mapping[str, object], asked: Asked) -> list[Row]:
    stage = options.get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise _wrong("zero_optimization.stage", stage, "the stages are 0, 1, 2 and 3")
    assert isinstance(stage, int)
    found = [Row("zero_optimization.stage", stage, STAGES[stage])]
    for key, value in options.items():
        path = f"zero_optimization.{key}"
        if key == "stage":
            continue
        if key in OFFLOADS:
            found += _offload(path, value, options)
        elif key in ZERO or (key.startswith("stage3_") and stage == 3):
            found.append(Row(path, value, ZERO.get(key, NO_EFFECT)))
        else:
            raise _unknown(path, [*ZERO, "stage", *OFFLOADS])
    _pinned(options)
    return found


def _offload(path: str, value: object, zero: Mapping[str, object]) -> list[Row]:
    """One of OFFLOADS, and what became of what it says."""
    section = {} if value is None else value
    if not isinstance(section, Mapping):
        raise _wrong(path, value, "it is an object of options")
    device = section.get("device", "none")
    if device not in ("cpu", "none", None):
        raise XverseError(
            f"The DeepSpeed configuration has {path}.device = {device!r:.40}.",
            "What is offloaded stays in the host's memory; no disks are there for it.",
            'Set it to "cpu"; to need less of it, take bf16 moments or shard over more devices.',
        )
    _only(path, section, "device", *OFFLOAD_KEYS)
    if path.endswith("param") and device == "cpu" and zero.get("stage") != 3:
        raise _wrong(f"{path}.device", device, "it is for stage 3, whose weights are gathered")
    if section.get("ratio", 1.0) != 1:
        raise _wrong(f"{path}.ratio", section["ratio"], "all of it is offloaded, or nothing")
    became = BECAME[_offloaded(zero)] if device == "cpu" else "nothing is offloaded by it"
    told = {key: OFFLOAD_KEYS[key] for key in section if key != "device"}
    return [Row(f"{path}.device", device, became)] + [
        Row(f"{path}.{key}", section[key], what) for key, what in told.items()
    ]


def _pinned(zero: Mapping[str, object]) -> bool:
    """Whether what is offloaded is locked in memory, which it is unless the file says no."""
    sections = [section for key in OFFLOADS if isinstance(section := zero.get(key), Mapping)]
    found = [section["pin_memory"] for section in sections if "pin_memory" in section]
    if found not in ([], [True], [False], [True, True], [False, False]):
        raise _wrong("pin_memory", found, "it is true or false, and the same for all")
    return found[:1] != [False]


def _offloaded(zero: Mapping[str, object]) -> Literal["none", "optimizer", "parameters"]:
    """What the section as a whole moves to the host."""
    moved = {
        key
        for key in OFFLOADS
        if isinstance(section := zero.get(key), Mapping) and section.get("device") == "cpu"
    }
    if "offload_param" in moved:
        return "parameters"
    return "optimizer" if moved else "none"


def _bf16(options: Mapping[str, object], asked: Asked) -> list[Row]:
    _only("bf16", options, "enabled")
    return [_number("bf16.enabled", options.get("enabled", AUTO), asked.bf16, "--bf16")]


def _fp16(options: Mapping[str, object], asked: Asked) -> list[Row]:
    if options.get("enabled", AUTO) not in (False, AUTO):
        raise _wrong("fp16.enabled", options["enabled"], "training in fp16 is not built; use bf16")
    keys = ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis")
    _only("fp16", options, "enabled", "auto_cast", "min_loss_scale", *keys)
    return [Row("fp16", dict(options), "nothing: it is not enabled")]


def _optimizer(options: Mapping[str, object], asked: Asked) -> list[Row]:
    _only("optimizer", options, "type", "params")
    if options.get("type") not in ("AdamW", "Adam"):
        raise _wrong("optimizer.type", options.get("type"), "AdamW is there")
    parameters = options.get("params", {})
    if not isinstance(parameters, Mapping):
        raise _wrong("optimizer.params", parameters, "it is an object of options")
    known = {
        "lr": (asked.learning_rate, "--learning_rate"),
        "betas": (list(asked.betas), "--adam_beta1 and --adam_beta2"),
        "eps": (asked.epsilon, "--adam_epsilon"),
        "weight_decay": (asked.weight_decay, "--weight_decay"),
    }
    _only("optimizer.params", parameters, *known)
    rows = [_number(f"optimizer.params.{key}", v, *known[key]) for key, v in parameters.items()]
    return [Row("optimizer.type", options["type"], "AdamW"), *rows]


def _only(section: str, options: Mapping[str, object], *known: str) -> None:
    for key in options:
        if key not in known:
            raise _unknown(f"{section}.{key}", list(known))


def _unknown(key: str, known: list[str]) -> XverseError:
    return XverseError(
        f"The DeepSpeed key {key!r:.80} has no meaning here."
        f"{nearest(key.rpartition('.')[2], known)}",
        f"Known beside it are: {', '.join(known)}.",
        "Take it out of the file.",
    )


def _wrong(key: str, value: object, why: str) -> XverseError:
    return XverseError(
        f"The DeepSpeed configuration has {key} = {value!r:.60}.", f"But {why}.", "Correct it."
    )


STAGES = {
    0: "every device has a whole copy (FSDP2 replicates)",
    1: "gradients and moments are spread, gathered weights kept (FSDP2 without reshard)",
    2: "gradients and moments are spread, gathered weights kept (FSDP2 without reshard)",
    3: "weights too are spread, and gathered block by block (FSDP2 with reshard)",
}
SECTIONS: dict[str, Callable[[Mapping[str, object], Asked], list[Row]]] = {
    "zero_optimization": _zero,
    "bf16": _bf16,
    "fp16": _fp16,
    "optimizer": _optimizer,
}
NUMBERS: dict[str, tuple[str, Callable[[Asked], object]]] = {
    "train_micro_batch_size_per_gpu": (
        "--per_device_train_batch_size",
        lambda asked: asked.rows_per_pass,
    ),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps", lambda asked: asked.passes),
    "train_batch_size": (
        "--per_device_train_batch_size",
        lambda asked: asked.rows_per_pass * asked.passes * asked.ranks,
    ),
    "gradient_clipping": ("--max_grad_norm", lambda asked: asked.clip),
}
STATED = {
    "zero_allow_untested_optimizer": "nothing: the one optimizer is tested with sharding",
    "zero_force_ds_cpu_optimizer": "nothing: AdamW runs on the CPU where it is offloaded",
    "steps_per_print": "nothing: --logging_steps says how often is logged",
    "wall_clock_breakdown": "nothing: the report always says where the time went",
}
OFFLOADS = ("offload_optimizer", "offload_param")
BECAME = {
    "optimizer": "masters and moments stay on the host, and AdamW runs there (--compute.offload)",
    "parameters": "weights, gradients and all of AdamW stay on the host (FSDP2's CPUOffloadPolicy)",
}
BUFFERS = "nothing: pieces of one size travel, each way two at a time"
OFFLOAD_KEYS = {
    "pin_memory": "as it says (--compute.pin_memory)",
    "ratio": "all of it",
    "fast_init": "nothing: memory is taken once",
    "buffer_count": BUFFERS,
    "buffer_size": BUFFERS,
    "max_in_cpu": "nothing: all of it is on the host",
    "nvme_path": "nothing: no disk is used",
    "pipeline": "nothing: copies are always made beside the arithmetic",
    "pipeline_read": "nothing: no disk is used",
    "pipeline_write": "nothing: no disk is used",
}
ZERO = dict.fromkeys(
    (
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "contiguous_gradients",
        "round_robin_gradients",
        "sub_group_size",
    ),
    NO_EFFECT,
)
