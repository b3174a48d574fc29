"""What keeps the house true: floors, front door, start-up, the map, and the three READMEs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import xverse
from docs.write_map import PAGE, map_page

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


def test_floors_hold_and_no_import_cycle() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_front_door() -> None:
    """The public names are these; adding or removing one is a decision, and an entry in the log."""
    assert xverse.__all__ == [
        "LLM",
        "Decoder",
        "Grammar",
        "ModelShape",
        "Piece",
        "Sampling",
        "Tokenizer",
        "XverseError",
        "evaluate",
        "load",
        "pull",
        "quantize",
    ]
    for name in xverse.__all__:
        assert getattr(xverse, name) is not None
    with pytest.raises(AttributeError):
        xverse.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "benchmark",
        "chat",
        "doctor",
        "evaluate",
        "export",
        "finetune",
        "generate",
        "prepare",
        "pretrain",
        "pull",
        "quantize",
        "serve",
        "show",
        "tokenizer",
        "verify-template",
        "web",
    ],
)
def test_help_needs_no_torch(verb: str) -> None:
    code = (
        "import sys, xverse.cli\n"
        f"try: code = xverse.cli.run({[verb, '--help'] if verb else ['--help']})\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "usage: xverse" in result.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = run("-c", "import sys, xverse; print(sorted({'torch', 'numpy'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_map_is_current() -> None:
    assert PAGE.read_text("utf-8") == map_page(), "run `make docs`"


def test_every_verb_has_one_config_and_one_run() -> None:
    for file in (ROOT / "xverse" / "verbs").glob("[a-z]*.py"):
        text = file.read_text("utf-8")
        assert len(re.findall(r"^class Config\b", text, re.M)) == 1, file
        assert len(re.findall(r"^def run\(config: Config\) -> int:", text, re.M)) == 1, file


def skeleton(readme: Path) -> tuple[list[int], list[str]]:
    """Levels of the headings, and the code blocks, of a README."""
    text = readme.read_text("utf-8")
    blocks = re.findall(r"^```.*?^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)], blocks


@pytest.mark.parametrize("translation", ["README_zh.md", "README_ja.md"])
def test_translations_have_the_same_headings_and_code(translation: str) -> None:
    assert skeleton(ROOT / translation) == skeleton(ROOT / "README.md")


def test_no_text_is_garbled() -> None:
    """UTF-8 read as something else leaves these traces."""
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("xverse/**/*.py")]:
        text = file.read_text("utf-8")
        assert "\ufffd" not in text or file.suffix == ".py", file
        assert not re.search("Ã[©¨¤¶¼]|â€|ä½|å¥½|锟斤拷", text), file
