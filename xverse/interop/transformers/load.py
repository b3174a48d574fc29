"""FOLDER OR HUB ID -> DECODER. What `from_pretrained` is given, in our own terms."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

from xverse import device as devices
from xverse.checkpoint import hub
from xverse.checkpoint.folder import ModelFolder
from xverse.checkpoint.load import Checkpoint, build
from xverse.checkpoint.resolve import ALIASES, resolve, title_of
from xverse.checkpoint.weights import open_weights
from xverse.errors import XverseError
from xverse.interop.transformers.config import XverseConfig, name_attention
from xverse.log import warn_once
from xverse.model.decoder import Decoder

PUBLISHED = "xverse/"  # the owner of the published models, on both hubs
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None

# Arguments of transformers' `from_pretrained` that are about its own way of loading.
WITHOUT_EFFECT = frozenset(
    {
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "adapter_kwargs",
        "code_revision",
        "low_cpu_mem_usage",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    }
)
# Arguments about the hub, which mean something where a hub id is given only.
HUB_ARGUMENTS = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
)


def is_published(name: object) -> bool:
    """Whether `name` is a published XVERSE model's hub id or alias, and no folder here."""
    if not isinstance(name, str) or Path(name).exists():
        return False
    return str(ALIASES.get(name.lower(), name)).lower().startswith(PUBLISHED)


def find_folder(
    name: str | os.PathLike[str], arguments: Mapping[str, object], *, include_weights: bool = True
) -> Path:
    """The folder that `name` means; a hub id is downloaded where it is not here yet."""
    if Path(name).exists():
        return Path(name)
    for key in ("force_download", "proxies", "token"):
        if arguments.get(key) not in (None, False):
            warn_once(f"{key} is left aside: XVERSE's own download takes the hub's settings")
    revision, cache_dir = arguments.get("revision"), arguments.get("cache_dir")
    offline = True if arguments.get("local_files_only") else None
    model_id = str(ALIASES.get(str(name).lower(), name))
    if include_weights and not (cache_dir or offline or revision not in (None, "main")):
        return resolve(str(name))
    return hub.pull(
        model_id,
        revision=None if revision in (None, "main") else str(revision),
        cache_dir=None if cache_dir is None else str(cache_dir),
        offline=offline,
        include_weights=include_weights,
    )


def load_decoder(
    folder: Path, config: XverseConfig | None, dtype: object, device_map: DeviceMap
) -> tuple[Decoder, XverseConfig, GenerationConfig]:
    """The decoder of `folder` with its weights, and both configs; no code in it is run.

    `config` stands in the place of config.json. dtype None or "auto" is the config's own.
    """
    files = ModelFolder.open(folder)
    if config is None:
        config = XverseConfig(**files.config)
    if files.config.get("model_type") != XverseConfig.model_type:
        raise XverseError(
            f"{folder} holds a model of type {files.config.get('model_type')!r:.40}.",
            "This class computes XVERSE models.",
            "Load it with transformers.AutoModelForCausalLM, or with xverse.load.",
        )
    place = _device(device_map)
    published = config.to_published()
    checkpoint = Checkpoint(
        title_of(folder), folder, config.shape(), published, files.generation_config
    )
    chosen = _dtype(dtype, config, place)
    decoder = build(checkpoint, open_weights(folder), chosen, place)
    config.dtype = chosen
    return decoder, config, _generation_config(files.generation_config, config)


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Raise XverseError for arguments of `from_pretrained` that we have no meaning for."""
    name_attention(arguments.get("attn_implementation"))
    known = WITHOUT_EFFECT | HUB_ARGUMENTS | {"attn_implementation"}
    unknown = {key for key, value in arguments.items() if value not in (None, False, "")} - known
    if unknown:
        raise XverseError(
            f"from_pretrained was given {', '.join(map(repr, sorted(unknown)))}.",
            "XVERSE models have no such option, and leaving it aside would change what you get.",
            "Leave it out; to quantize, load the model and call model.quantize(8) or (4).",
        )


def _generation_config(found: Mapping[str, object], config: XverseConfig) -> GenerationConfig:
    try:
        if found:
            return GenerationConfig.from_dict(dict(found))
        return GenerationConfig.from_model_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise XverseError(
            "generation_config.json is not one that transformers takes.",
            str(error),
            "Correct the file, or remove it.",
        ) from error


def _device(device_map: DeviceMap) -> torch.device:
    """The one device that a `device_map` means; without one the CPU, as in transformers."""
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    names = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places}
    if len(names) != 1 or names & {"balanced", "balanced_low_0", "sequential", "disk"}:
        raise XverseError(
            f"device_map cannot be {device_map!r:.80}.",
            "A model is put on one device as a whole.",
            'Use "auto", "cpu", "cuda" or "cuda:N".',
        )
    name = names.pop()
    return devices.pick_device("cpu" if name == "None" else name)


def _dtype(wanted: object, config: XverseConfig, place: torch.device) -> torch.dtype:
    if wanted is None or wanted == "auto":
        wanted = config.dtype or "auto"
    return devices.pick_dtype(str(wanted).removeprefix("torch."), place)
