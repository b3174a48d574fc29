"""FOLDER -> SMALLER FOLDER. A model quantized block by block, larger than memory or not.

Finished blocks are written aside, in the folder's own format; the same job continues where one was
stopped, and gives the same bytes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from xverse import device as devices
from xverse.checkpoint.convert import copy_rest, save_tokenizer, save_weights
from xverse.checkpoint.folder import ModelFolder, write_manifest
from xverse.checkpoint.load import Checkpoint, dtype_of, open_checkpoint, open_tokenizer
from xverse.checkpoint.plain import plain_weights
from xverse.checkpoint.resolve import resolve, title_of
from xverse.checkpoint.walk import Parts, Walk
from xverse.checkpoint.weights import Weights
from xverse.checkpoint.whole import disk_errors, require_new, require_space, whole_folder
from xverse.errors import XverseError
from xverse.files import is_there, read_json, write_json
from xverse.log import logger
from xverse.quant.calibrate import CALIBRATED, Method, choose_method
from xverse.quant.quantize import quantized_already
from xverse.quant.recipe import Recipe
from xverse.quant.report import Report, Speed, write_report
from xverse.quant.stored_compressed import to_config


@dataclass(frozen=True)
class Job:
    """What shall become of a model: how its weights are rounded, the rows of ids to calibrate
    with, and other ones, of the file `text`, to measure the loss on."""

    recipe: Recipe
    method: Method = "auto"
    samples: Sequence[Sequence[int]] = ()
    held_out: Sequence[Sequence[int]] = ()
    text: str | None = None


@torch.no_grad()
def quantize_folder(
    model: str | Path,
    out: Path | None,
    job: Job,
    *,
    device: str = "auto",
    dtype: str = "auto",
    measure: Callable[[Path], Speed | str] | None = None,
) -> Report:
    """Write `model` (folder, GGUF file, alias, hub id), quantized, to the new folder `out`.

    Without `out` nothing is written, and only the report comes of it. `measure` gives the speed of
    the finished folder, or says why not. Raises XverseError for a
    model that is quantized already, for a folder that is there, and for what loading refuses.
    """
    path = resolve(model)
    checkpoint = open_checkpoint(path, title_of(model))
    if checkpoint.config.get("quantization_config") is not None:
        raise quantized_already()
    recipe = job.recipe.fitting(checkpoint.shape)
    if recipe.scheme != job.recipe.scheme:
        logger.warning(
            "groups of %s columns do not divide the inputs of all layers; instead %s",
            job.recipe.scheme.group_size,
            recipe.scheme,
        )
    method = choose_method(job.method, recipe.scheme, samples=bool(job.samples))
    job = replace(job, recipe=recipe, method=method)
    place = devices.pick_device(device)
    computes_in = dtype_of(dtype, checkpoint.config, place)
    weights = plain_weights(checkpoint)
    walk = Walk(checkpoint.shape, weights, recipe, method, dtype=computes_in, device=place)
    if out is None:
        return _report(job, walk, checkpoint, Parts(None))
    out = out.expanduser().absolute()
    require_new(out)
    aside = _reserve(out, _identity(job, checkpoint, weights, computes_in))
    parts = Parts(aside)
    report = _report(job, walk, checkpoint, parts)
    with whole_folder(out) as folder:
        require_space(folder, report.bytes)
        save_weights(walk.tensors(parts), folder)
        _save_rest(checkpoint, folder, recipe, computes_in)
        disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report = replace(report, bytes_on_disk=disk)
        if measure is not None:
            report = replace(report, speed=measure(folder))
        write_report(report, folder)
        write_manifest(folder, source=checkpoint.title, quantization=report.to_json())
    shutil.rmtree(aside)
    return report


def _report(job: Job, walk: Walk, checkpoint: Checkpoint, parts: Parts) -> Report:
    outcome = walk.run(parts, job.samples, job.held_out)
    calibrated = job.method in CALIBRATED
    return Report(
        model=checkpoint.title,
        recipe=str(job.recipe),
        method=job.method,
        calibration_tokens=sum(map(len, job.samples)) if calibrated else 0,
        source_dtype=str(walk.dtype).removeprefix("torch."),
        source_bytes=checkpoint.shape.num_parameters * walk.dtype.itemsize,
        bytes=outcome.nbytes,
        quality=outcome.quality,
        text=job.text if outcome.quality else None,
        layer_errors=outcome.errors,
    )


def _save_rest(checkpoint: Checkpoint, target: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """All but the weights: the source's own files, and a config.json that says how to read them."""
    if checkpoint.path.is_dir():
        copy_rest(ModelFolder.open(checkpoint.path), target)
    else:
        save_tokenizer(open_tokenizer(checkpoint.path), checkpoint.config, target)
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config | {"quantization_config": to_config(recipe)})


def _reserve(out: Path, identity: dict[str, object]) -> Path:
    """The folder for finished blocks: a new one, or that of the same job, stopped before."""
    aside = out.with_name(f".{out.name}.quantizing")
    job = aside / "job.json"
    if is_there(job):
        if read_json(job) != identity:
            raise XverseError(
                f"{aside} holds the unfinished work of another quantization to {out.name}.",
                "Its model, scheme, method or samples were others.",
                f"Remove it (rm -r {aside}), or give another name to write to.",
            )
        logger.warning("continuing what was stopped: finished blocks are taken from %s", aside)
        return aside
    with disk_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
        write_json(job, identity)
    return aside


def _identity(
    job: Job, checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype
) -> dict[str, object]:
    """What must be the same for finished blocks to be worth something."""
    tensors = {
        name: [info.shape, str(info.dtype), info.file] for name, info in weights.infos().items()
    }
    files = {info.file for info in weights.infos().values()}
    samples = job.samples if job.method in CALIBRATED else ()
    return {
        "model": str(checkpoint.path.absolute()),
        "tensors": _digest(tensors),
        "files": _digest({file: _stamp(checkpoint.path, file) for file in sorted(files)}),
        "recipe": asdict(job.recipe),
        "method": job.method,
        "samples": _digest([list(row) for row in samples]),
        "dtype": str(dtype),
    }


def _stamp(model: Path, file: str) -> list[int]:
    """Size and time of a file; reading all weights would take as long as quantizing them."""
    stat = (model / file if model.is_dir() else model).stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
