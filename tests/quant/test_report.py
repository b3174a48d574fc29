"""Reports: what they say, with and without measurements, and that a folder cannot misuse them."""

import json
import logging
import sys
from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse.cli import run
from xverse.errors import XverseError
from xverse.files import write_json
from xverse.quant.compare import Quality
from xverse.quant.report import Report, Speed, write_report

REPORT = Report(
    model="tiny",
    recipe="int4 in groups of 32",
    method="gptq",
    calibration_tokens=1000,
    source_dtype="bfloat16",
    source_bytes=4 * 2**20,
    bytes=2**20,
    quality=Quality(500, 10.0, 10.1, 0.01, 0.97),
    text="text.txt",
    layer_errors={"model.layers.0.mlp.up_proj": 0.05, "lm_head": 0.01},
    bytes_on_disk=2**20 + 2**19,
    speed=Speed(10.0, 25.5, "a machine"),
)


def test_figures_stand_where_they_are_looked_for(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for line in (
        "| weights in memory | 4.0 MiB | 1.0 MiB |",
        "| weights on disk |  | 1.5 MiB |",
        "| perplexity | 10 | 10.1 (+1.00 %) |",
        "| same likeliest token | 100 % | 97.00 % |",
        "| tokens/s, one sequence | 10.0 | 25.5 |",
        "| model.layers.0.mlp.up_proj | 5.00 % |",
        "Calibrated on 1,000 tokens. Quality on 500 tokens of text.txt. Speed on a machine.",
    ):
        assert line in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_without_matplotlib_the_picture_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(logging.getLogger("xverse"), "propagate", True)
    write_report(REPORT, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert "xverse-llm[eval]" in caplog.text


def test_a_hostile_report_neither_breaks_nor_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_published_folder(tmp_path)
    facts = REPORT.to_json() | {"model": "\x1b[2Jgone"}
    write_json(tmp_path / "manifest.json", {"quantization": facts})
    assert run(["show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "?[2Jgone" in printed
    assert "\x1b[2J" not in printed
    for bad in ({"quality": {"tokens": 1}}, {"layer_errors": [1]}, {"bytes": "x"}, {"more": 1}):
        with pytest.raises(XverseError, match="malformed"):
            Report.from_json(REPORT.to_json() | bad)
