"""QUANTIZATION -> REPORT. What it saved and what it cost, as JSON, Markdown and a picture."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xverse.errors import XverseError
from xverse.log import logger
from xverse.quant.compare import Quality

MIB = 2**20


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one sequence, before and after."""

    source: float
    quantized: float
    device: str


@dataclass(frozen=True)
class Report:
    """What became of a model. `bytes` are those of the weights in memory, and the source's those
    it would take in the dtype it computes in. Layer errors are relative (root mean square): of
    outputs for the samples where it was calibrated on any, else of weights."""

    model: str
    recipe: str
    method: str
    calibration_tokens: int
    source_dtype: str
    source_bytes: int
    bytes: int
    quality: Quality | None
    text: str | None  # the file that quality was measured on
    layer_errors: Mapping[str, float]
    bytes_on_disk: int | None = None  # None where nothing was written
    speed: Speed | str | None = None  # or why it was not measured

    def to_json(self) -> dict[str, object]:
        """For manifest.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, object]) -> Self:
        """What `to_json` gave; XverseError for anything else."""
        kinds = {"quality": Quality, "speed": Speed}
        try:
            made = {
                name: kinds[name](**value) if name in kinds and isinstance(value, dict) else value
                for name, value in facts.items()
            }
            report = cls(**made)  # type: ignore[arg-type]
            report.to_markdown()
        except (TypeError, ValueError, AttributeError) as error:
            raise XverseError(
                "The folder's report of its quantization is malformed.",
                f"{error}.",
                "Quantize the source again, or remove the entry from manifest.json.",
            ) from error
        return report

    def to_markdown(self) -> str:
        """For people, and for `xverse show`."""
        rows = [("weights in memory", _size(self.source_bytes), _size(self.bytes))]
        if self.bytes_on_disk is not None:
            rows.append(("weights on disk", "", _size(self.bytes_on_disk)))
        rows += [*self._quality_rows(), *self._speed_rows()]
        lines = [f"# {self.model}, quantized", "", f"{self.recipe}; method {self.method}", ""]
        lines += [f"| | {self.source_dtype} | quantized |", "|---|---:|---:|"]
        lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
        lines += ["", *self._notes(), "", *self._layers()]
        return "\n".join(lines).rstrip() + "\n"

    def _quality_rows(self) -> list[tuple[str, str, str]]:
        q = self.quality
        if q is None:
            return []
        after = f"{q.perplexity:.4g} ({100 * q.loss:+.2f} %)"
        return [
            ("perplexity", f"{q.perplexity_source:.4g}", after),
            ("KL divergence, nats a token", "0", f"{q.kl_divergence:.4g}"),
            ("same likeliest token", "100 %", f"{100 * q.top1_agreement:.2f} %"),
        ]

    def _speed_rows(self) -> list[tuple[str, str, str]]:
        speed = self.speed
        if not isinstance(speed, Speed):
            return []
        return [("tokens/s, one sequence", f"{speed.source:.1f}", f"{speed.quantized:.1f}")]

    def _notes(self) -> list[str]:
        notes = []
        if self.calibration_tokens:
            notes.append(f"Calibrated on {self.calibration_tokens:,} tokens.")
        if self.quality is None:
            notes.append("Quality was not measured: no text was given for it (`--held-out FILE`).")
        else:
            notes.append(f"Quality on {self.quality.tokens:,} tokens of {self.text}.")
        if isinstance(self.speed, Speed):
            notes.append(f"Speed on {self.speed.device}.")
        elif self.speed is not None:
            notes.append(f"Speed was not measured: {self.speed}")
        return [" ".join(notes)]

    def _layers(self) -> list[str]:
        if not self.layer_errors:
            return []
        kind = "outputs" if self.calibration_tokens else "weights"
        worst = sorted(self.layer_errors.items(), key=lambda item: -item[1])[:10]
        lines = [f"Relative error of {kind}, the ten largest:", "", "| layer | error |"]
        lines += ["|---|---:|", *(f"| {name} | {100 * value:.2f} % |" for name, value in worst)]
        return lines


def write_report(report: Report, folder: Path) -> None:
    """report.md and, where matplotlib is installed, report.png in `folder`."""
    (folder / "report.md").write_text(report.to_markdown(), "utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "report.png is left out: matplotlib is not installed (pip install 'xverse-llm[eval]')"
        )
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    sizes, layers = figure.subplots(1, 2, width_ratios=(1, 2.5))
    values = [report.source_bytes / MIB, report.bytes / MIB]
    bars = sizes.bar([report.source_dtype, "quantized"], values, color=("#8a94a6", "#2f6fdd"))
    sizes.bar_label(bars, fmt="%.0f")
    sizes.set_title("weights, MiB")
    for kind, points in _by_kind(report.layer_errors).items():
        layers.plot(*zip(*points, strict=True), marker=".", label=kind)
    layers.set_title("relative error of " + ("outputs" if report.calibration_tokens else "weights"))
    layers.set_xlabel("block")
    layers.set_ylim(bottom=0)
    layers.legend(fontsize="small", ncols=2)
    figure.suptitle(f"{report.model}: {report.recipe}, {report.method}", fontsize="medium")
    figure.savefig(folder / "report.png", dpi=120)


def _by_kind(errors: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Layers of the blocks by their last names: (block, error) of each."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, error in errors.items():
        words = name.split(".")
        if words[:2] == ["model", "layers"]:
            kinds.setdefault(words[-1], []).append((int(words[2]), error))
    return kinds


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f} MiB"
