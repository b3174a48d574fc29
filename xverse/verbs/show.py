"""Tell what a model is, and what memory it needs."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from xverse.model.shape import ModelShape
    from xverse.quant.report import Report

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse show` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, GGUF file, alias or hub id, or the name of a published shape (xverse-13b-2)."""
    context: int | None = None
    """Tokens of context to reckon memory for; the model's own length where none is given."""
    device: str = "auto"
    """Where it would run; only its memory is looked at."""
    verify: bool = False
    """Read every file that the folder's manifest.json lists, and compare it with its SHA-256."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Print shape, parameters and the memory plan."""
    shape, title, path = _shape(config.model)
    if config.verify:
        _verify(path)
    context = config.context or shape.context_length
    facts: dict[str, object] = {
        "model": title,
        "path": path,
        "parameters": shape.num_parameters,
        "active_parameters": shape.num_active_parameters,
        "context_length": shape.context_length,
        "shape": shape.to_config(),
        "memory_context": context,
        "memory_bytes": memory(shape, context),
    }
    report = _report(path)
    if report is not None:
        facts["quantization"] = report.to_json()
    if config.verify:
        facts["verified"] = True
    if config.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    _print(shape, title, path, context, config.device)
    if report is not None:
        print(
            "\n" + "".join(c if c.isprintable() or c == "\n" else "?" for c in report.to_markdown())
        )
    if config.verify:
        print("\nEvery file is as manifest.json has it.")
    return 0


def memory(shape: "ModelShape", context: int) -> dict[str, dict[str, int]]:
    """Bytes of weights and of one sequence's keys and values, at bf16, int8 and int4.

    Quantized: the linear layers of the blocks, with a 2-byte scale a row; all else stays bf16.
    """
    kv = shape.kv_bytes_per_token() * context
    other = 2 * (shape.num_parameters - shape.num_linear_parameters)
    scales = 2 * shape.num_linear_rows
    linear = shape.num_linear_parameters
    weights = {
        "bf16": 2 * shape.num_parameters,
        "int8": other + scales + linear,
        "int4": other + scales + linear // 2,
    }
    return {
        name: {"weights": size, "kv_cache": kv, "total": size + kv}
        for name, size in weights.items()
    }


def _shape(model: str) -> tuple["ModelShape", str, str | None]:
    """Shape, title and place; a published shape's name needs no folder."""
    from xverse.checkpoint.load import open_checkpoint
    from xverse.checkpoint.resolve import resolve, title_of
    from xverse.model.catalog import CATALOG

    published = CATALOG.get(model.lower())
    if published is not None and not Path(model).exists():
        return published, f"{model} (published shape)", None
    path = resolve(model)
    return open_checkpoint(path).shape, title_of(model), str(path)


def _verify(path: str | None) -> None:
    """XverseError where a file is missing, or is another than the manifest says."""
    from xverse.checkpoint.folder import MANIFEST, verify_manifest
    from xverse.errors import XverseError
    from xverse.files import is_there

    if path is None or not is_there(Path(path) / MANIFEST):
        raise XverseError(
            f"{path or 'A published shape'} has no {MANIFEST}.",
            "It lists the SHA-256 of every file; what XVERSE writes has one.",
            "Leave --verify out, or make such a folder: xverse export MODEL OUT.",
        )
    if wrong := verify_manifest(Path(path)):
        names = ", ".join(repr(name) for name in wrong[:5]) + ", ..." * (len(wrong) > 5)
        raise XverseError(
            f"{len(wrong)} of the files in {path} are not those that were written: {names}.",
            f"Their size or SHA-256 differs from {MANIFEST}, or they are missing.",
            "Get or make the folder again; if the change was meant, the manifest is out of date.",
        )


def _report(path: str | None) -> "Report | None":
    """What the quantization of a folder has cost, if its manifest says so."""
    from xverse.checkpoint.folder import MANIFEST
    from xverse.files import is_there, read_json
    from xverse.quant.report import Report

    if path is None or not is_there(Path(path) / MANIFEST):
        return None
    facts = read_json(Path(path) / MANIFEST).get("quantization")
    return Report.from_json(facts) if isinstance(facts, dict) else None


def _print(shape: "ModelShape", title: str, path: str | None, context: int, device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from xverse.device import pick_device, total_memory

    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold]" + (f"  {path}" if path else ""))
    billions = f"{shape.num_parameters / 1e9:.3g} B"
    active = f", {shape.num_active_parameters / 1e9:.3g} B active" if shape.num_experts else ""
    console.print(f"{shape.num_parameters:,} parameters ({billions}{active})")
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if value not in (None, False, 0):
            console.print(f"  {field.name:<24} {value}")
    place = pick_device(device)
    here = total_memory(place)
    table = Table(title=f"GiB at a context of {context:,} tokens", title_justify="left")
    for column in ("", "weights", "KV cache", "together", f"fits {place} ({here / GIB:.0f} GiB)"):
        table.add_column(column, justify="right")
    for name, parts in memory(shape, context).items():
        sizes = [f"{parts[key] / GIB:.2f}" for key in ("weights", "kv_cache", "total")]
        table.add_row(name, *sizes, "yes" if parts["total"] < 0.92 * here else "no")
    console.print(table)
