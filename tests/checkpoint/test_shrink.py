"""Quantized folders: what is written, what a stopped run leaves, and that it is the same model."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_model import write_published_folder
from xverse.checkpoint import walk
from xverse.checkpoint.folder import verify_manifest
from xverse.checkpoint.load import load
from xverse.checkpoint.shrink import Job, quantize_folder
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.report import Report, Speed

INT4 = Recipe.of("int4")


def rows(seed: int, count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 250, (count, 24), generator=generator).tolist()


def logits(decoder: Decoder) -> torch.Tensor:
    kv = Packed([12])
    return decoder(torch.arange(12) * 7 % 120, kv.positions(), kv)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", ["search", "gptq", "awq"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_folder_holds_the_model_that_quantize_makes(
    moe: bool, method: str, tmp_path: Path
) -> None:
    write_published_folder(tmp_path / "source", moe=moe)
    samples = rows(1) if method != "search" else []
    job = Job(INT4, method, samples)  # type: ignore[arg-type]
    quantize_folder(tmp_path / "source", tmp_path / "small", job, device="cpu")
    loaded = load(tmp_path / "small", device="cpu").decoder
    expected = load(tmp_path / "source", device="cpu").decoder
    quantize(expected, INT4, samples or None, method=method)  # type: ignore[arg-type]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert isinstance(loaded.lm_head, QuantizedLinear)
    assert torch.equal(logits(loaded), logits(expected))
    assert verify_manifest(tmp_path / "small") == []
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published_folder(tmp_path / "source")
    job = Job(INT4, "gptq", rows(1), rows(2), "other")
    quantize_folder(tmp_path / "source", tmp_path / "whole", job, device="cpu")

    class Stopped(Exception):
        pass

    real, blocks = walk.quantize_block, []

    def stops(*args: object) -> dict[str, float]:
        blocks.append(args)
        if len(blocks) == 3:
            raise Stopped
        return real(*args)  # type: ignore[arg-type]

    out = tmp_path / "small"
    monkeypatch.setattr(walk, "quantize_block", stops)
    with pytest.raises(Stopped):
        quantize_folder(tmp_path / "source", out, job, device="cpu")
    assert not out.exists()
    other = Job(INT4, "gptq", rows(3), rows(2), "other")
    with pytest.raises(XverseError, match="unfinished work of another"):
        quantize_folder(tmp_path / "source", out, other, device="cpu")
    assert len(blocks) == 3
    quantize_folder(tmp_path / "source", out, job, device="cpu")
    assert len(blocks) == 5  # four blocks, of which one was begun twice
    assert contents(out) == contents(tmp_path / "whole")


def test_the_report_says_what_it_cost(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "source")
    source = load(tmp_path / "source", device="cpu").decoder
    out, held_out = tmp_path / "small", rows(2)
    job = Job(Recipe.of("int4"), "rtn", (), held_out, "text.txt")
    speed = Speed(10.0, 20.0, "a machine")
    report = quantize_folder(
        tmp_path / "source", out, job, device="cpu", measure=lambda folder: speed
    )
    small = load(out, device="cpu").decoder
    assert report.bytes == sum(x.nbytes for x in small.state_dict().values())
    assert report.bytes < 0.6 * report.source_bytes
    assert report.source_bytes == sum(x.nbytes for x in source.state_dict().values())
    assert report.bytes_on_disk == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    quality = report.quality
    assert quality is not None
    assert quality.tokens == sum(len(row) - 1 for row in held_out)
    losses = []
    for decoder in (source, small):
        scores = [
            decoder(torch.tensor(r), torch.arange(len(r)), Packed([len(r)])) for r in held_out
        ]
        log_p = torch.stack(scores).float().log_softmax(-1)[:, :-1]
        wanted = torch.tensor(held_out)[:, 1:, None]
        losses.append(-log_p.gather(2, wanted).mean())
    expected = (losses[1] - losses[0]).exp() - 1
    assert quality.loss == pytest.approx(float(expected), abs=1e-4)
    assert len(report.layer_errors) == 4 * 7 + 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert Report.from_json(manifest["quantization"]) == report
    text = (out / "report.md").read_text()
    assert f"{100 * quality.loss:+.2f} %" in text
    assert "| 10.0 | 20.0 |" in text


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "source")
    report = quantize_folder(tmp_path / "source", None, Job(INT4), device="cpu")
    assert report.bytes_on_disk is None
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_done_is_said_before_anything_is_written(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "source")
    out = tmp_path / "small"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(XverseError, match="there already"):
        quantize_folder(tmp_path / "source", tmp_path / "full", Job(INT4), device="cpu")
    with pytest.raises(XverseError, match="samples"):
        quantize_folder(tmp_path / "source", out, Job(INT4, "gptq"), device="cpu")
    quantize_folder(tmp_path / "source", out, Job(INT4, "rtn"), device="cpu")
    with pytest.raises(XverseError, match="already"):
        quantize_folder(out, tmp_path / "again", Job(INT4), device="cpu")
    assert not list(tmp_path.glob(".*"))
