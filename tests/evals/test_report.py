"""Figures, tables and files: what is best is bold, what is odd is said, nothing is injected."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from tests.evals.fake import FakeDoor, own_questions
from xverse.errors import XverseError
from xverse.evals.compare import bootstrap, compare, mcnemar
from xverse.evals.curve import as_markdown, rows_of
from xverse.evals.evaluate import evaluate
from xverse.evals.figures import Mean, mean, mean_of_means
from xverse.evals.plots import draw_quantization
from xverse.evals.report import as_csv, as_html
from xverse.evals.report import as_markdown as report_markdown
from xverse.evals.tables import tables_of


def figure(task: str, value: float, **more: object) -> dict[str, object]:
    facts: dict[str, object] = {
        "task": task,
        "title": task.upper(),
        "metric": "accuracy",
        "value": value,
        "stderr": 0.4,
        "n": 100,
        "shots": 5,
        "seed": 0,
        "chat": False,
        "reads": "scores",
        "task_hash": "t" * 16,
        "prompt_hash": "p" * 16,
        "groups": {},
        "categories": {},
        "fewer_shots": 0,
        "cut": 0,
        "too_long": 0,
        "details": None,
        "note": "",
    }
    return facts | more


def report(*figures: dict[str, object], name: str = "My|<b>model") -> dict[str, object]:
    return {"model": {"model": name, "weights": "w" * 16}, "figures": list(figures)}


def test_means_have_the_error_of_a_sample() -> None:
    assert mean([1.0, 0.0, 1.0, 1.0]) == Mean(75.0, pytest.approx(25.0), 4)
    assert mean([1.0]) == Mean(100.0, 0.0, 1)
    both = mean_of_means([Mean(80.0, 3.0, 10), Mean(60.0, 4.0, 1000)])
    assert both == Mean(70.0, pytest.approx(2.5), 1010)


def test_the_best_of_a_column_is_bold_and_hashes_stand_beside_figures() -> None:
    some = report(figure("mmlu", 57.04), figure("ceval", 40.0))
    text = report_markdown(some, tables_of(some), [])
    assert "| 57.0 ± 0.4 | 40.0 ± 0.4 |" in text  # better than XVERSE-7B, and than none
    assert "| XVERSE-7B-Chat | **63.7** |" in text
    better = report(figure("mmlu", 90.0))
    assert "**90.0 ± 0.4**" in report_markdown(better, tables_of(better), [])
    assert f"{'t' * 16} | {'p' * 16} | {'w' * 16}" in text


def test_names_cannot_break_out_of_their_cells() -> None:
    some = report(figure("mmlu", 1.0))
    assert "<b>model" not in as_html(some, tables_of(some), [])
    assert "My\\|&lt;b>model" in report_markdown(some, tables_of(some), [])


def test_what_was_asked_otherwise_is_said() -> None:
    odd = figure("mmlu", 1.0, reads="letters", fewer_shots=3, too_long=2, cut=1)
    text = report_markdown(report(odd), [], [])
    for words in ("letter read", "3 of 100", "2 of 100", "1 of 100"):
        assert words in text


def test_csv_has_categories_and_groups() -> None:
    part = {"value": 50.0, "stderr": 5.0, "n": 10}
    some = report(figure("mmlu", 1.0, categories={"STEM": part}, groups={"anatomy": part}))
    rows = list(csv.DictReader(io.StringIO(as_csv(some))))
    assert [row["part"] for row in rows] == ["all", "STEM", "anatomy"]
    assert {row["weights_hash"] for row in rows} == {"w" * 16}


def test_mcnemar_is_exact() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(3, 7) == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    assert 0 < mcnemar(4000, 4500) < 1e-6


def test_the_bootstrap_covers_the_mean() -> None:
    low, high = bootstrap([1.0] * 30 + [0.0] * 70, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.03), pytest.approx(0.3 + half, abs=0.03))
    assert bootstrap([0.0] * 9, seed=0) == (0.0, 0.0)


def test_two_models_are_compared_on_the_same_items_only(tmp_path: Path) -> None:
    own = str(own_questions(tmp_path, 90))
    for name in ("a", "b"):
        evaluate(FakeDoor(name), own, out=tmp_path / name, data=tmp_path, plots=False)
    (found,) = compare(tmp_path / "a", tmp_path / "b")
    assert found.n == 90
    assert found.b - found.a == pytest.approx(100 * (found.only_b - found.only_a) / 90)
    assert found.p == mcnemar(found.only_a, found.only_b)
    assert found.low <= found.b - found.a <= found.high
    evaluate(FakeDoor("c"), own, out=tmp_path / "c", data=tmp_path, limit=9, plots=False)
    with pytest.raises(XverseError, match="alike"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(XverseError, match="no report"):
        compare(tmp_path / "a", tmp_path)


def test_a_curve_of_precisions(tmp_path: Path) -> None:
    for bits, value in ((None, 60.0), (8, 59.5), (4, 51.0)):
        model = {"model": "M", "dtype": "bfloat16", "weights_bytes": 10**9 * (bits or 16)}
        facts = {"model": model | ({"quantize": bits} if bits else {})}
        folder = tmp_path / str(bits)
        folder.mkdir()
        content = facts | {"figures": [figure("mmlu", value)]}
        (folder / "report.json").write_text(json.dumps(content))
    rows = rows_of([tmp_path / name for name in ("None", "8", "4")])
    assert [row["precision"] for row in rows[:3]] == ["bfloat16", "int8", "int4"]
    assert "| M (measured) | int4 | 4.00 | 51.0 | 0.4 |" in as_markdown(rows)
    draw_quantization(tmp_path / "curve.png", rows)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    (tmp_path / "4" / "report.json").write_text(json.dumps(facts | {"figures": []}))
    with pytest.raises(XverseError, match="no point"):
        rows_of([tmp_path / "4"])
