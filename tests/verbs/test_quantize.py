"""xverse quantize: from the command line to a folder that answers, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse.cli import run
from xverse.config import parse
from xverse.quant.scheme import Scheme
from xverse.verbs import quantize
from xverse.verbs.quantize import Config, recipe_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_published_folder(tmp_path / "source")
    (tmp_path / "text.txt").write_text("The king saw the queen and the sea. " * 40)
    return tmp_path / "source"


def test_a_folder_is_written_measured_and_shown(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = source.with_name("small"), source.with_name("text.txt")
    words = [str(source), "--out", str(out), "--device", "cpu", "--samples", str(text)]
    assert run(["quantize", *words, "--sample-length", "16", "--embedding", "int8"]) == 0
    printed = capsys.readouterr()
    assert "| perplexity |" in printed.out
    assert "| tokens/s, one sequence |" in printed.out
    assert "one sample in 10, not calibrated with" in printed.out
    assert printed.err.splitlines()[-1] == f"next: xverse chat {out}"
    assert {"report.md", "report.png", "manifest.json"} <= {file.name for file in out.iterdir()}
    assert run(["show", str(out)]) == 0
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert run(["show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["quantization"]
    assert shown["recipe"] == ("int4 in groups of 32; head int8 per row; embedding int8 per row")
    assert shown["method"] == "gptq"
    greedy = ["--max-tokens", "4", "--temperature", "0", "--device", "cpu"]
    assert run(["generate", str(out), "The king", *greedy]) == 0


def test_the_table_compares_the_usual_ways(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--held-out", str(source.with_name("text.txt")), "--sample-length", "16"]
    assert run(["quantize", str(source), "--table", "--device", "cpu", *words]) == 0
    rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1].strip() for row in rows if row.startswith("| ")]
    assert names == ["", "bfloat16", "int8", "int4", "int8-row", "int4-row"]
    assert [path.name for path in source.parent.iterdir() if path.is_dir()] == ["source"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--out"),
        (["--table"], "--held-out"),
        (["--table", "--out", "x"], "--table"),
        (["--out", "x", "--to", "int4-row", "--group-size", "64"], "one scale for each row"),
        (["--out", "x", "--group-size", "7"], "Groups cannot have 7"),
        (["--out", "x", "--method", "gptq"], "samples"),
        (["--out", "x", "--method", "rtn", "--samples", "TEXT"], "does not look at samples"),
        (["--out", "x", "--samples", "absent"], "cannot be read"),
        (["--out", "x", "--samples", "TEXT", "--sample-length", "9999"], "one sample alone"),
        (["--out", "x", "--sample-count", "0"], "not a number of samples"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    words: list[str], named: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = source.with_name("text.txt")
    if "9999" in words:  # the model's context is 256
        text.write_text("The king.")
    given = [str(text) if word == "TEXT" else word for word in words]
    given = [str(source.with_name("x")) if word == "x" else word for word in given]
    assert run(["quantize", str(source), "--device", "cpu", *given]) == 1
    assert named in capsys.readouterr().err
    assert not source.with_name("x").exists()


def test_options_make_the_recipe() -> None:
    def recipe(*words: str) -> str:
        config = parse(Config, ["m", *words], prog="quantize", description=quantize.__doc__ or "")
        return str(recipe_of(config))

    assert recipe() == "int4 in groups of 128; head int8 per row"
    assert recipe("--to", "int8") == "int8 in groups of 128; head int8 per row"
    assert recipe("--to", "fp8") == "fp8"
    assert recipe("--head", "none", "--asymmetric") == "int4 in groups of 128, asymmetric"
    assert recipe("--group-size", "32", "--embedding", "int4", "--head", "none") == (
        f"{Scheme(4, 32)}; embedding {Scheme(4, 32)}"
    )
