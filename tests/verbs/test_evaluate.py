"""`xverse evaluate`: what it prints, and what it refuses before a model is loaded."""

import json
from pathlib import Path

import pytest

from tests.evals.fake import own_questions
from tests.tiny_model import write_published_folder
from xverse import cli


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(["evaluate", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_evaluate_then_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, own = tmp_path / "model", str(own_questions(tmp_path, 8))
    write_published_folder(model, shards=1)
    out = tmp_path / "out"
    words = [str(model), "--tasks", own, "--data", str(tmp_path), "--no-plots"]
    code, text, hint = run(capsys, *words, "--out", str(out))
    assert code == 0
    assert "own" in text
    assert "report.md" in text
    assert "next: xverse evaluate --compare" in hint
    code, text, _ = run(capsys, *words, "--out", str(out), "--json")
    facts = json.loads(text)
    assert facts["figures"][0]["n"] == 8
    assert len(facts["model"]["weights"]) == 16
    eight = tmp_path / "eight"
    assert run(capsys, *words, "--out", str(eight), "--quantize", "8")[0] == 0
    code, text, _ = run(capsys, "--compare", str(out), str(eight), "--out", str(tmp_path / "both"))
    assert code == 0
    assert "McNemar" in text
    assert (tmp_path / "both" / "compare.json").exists()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("Nothing of the kind.")
    code, text, _ = run(
        capsys, "--contamination", str(corpus), "--tasks", own, "--data", str(tmp_path), "--json"
    )
    assert json.loads(text)["tasks"][0]["seen"] == 0


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "--list", "--json")
    assert code == 0
    assert json.loads(text)["commonsenseqa"]["shots"] == 7


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["smollm2", "--tasks", "mmllu"], "Did you mean 'mmlu'"),
        (["--tasks", "mmlu"], "No model is named"),
        (["--list", "--compare", "a", "b"], "Several things"),
        (["--compare", "nowhere", "nowhere"], "no report"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--quantize", "8"], "of no use with --endpoint"),
    ],
)
def test_what_cannot_be_is_told(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, *words)
    assert code == 1
    assert why in error
