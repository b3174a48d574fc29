"""`xverse export`: the three forms, what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.checkpoint.quantized_folders import write_folder
from tests.tiny_model import published_config, random_decoder
from xverse import LLM, Sampling, XverseError
from xverse.verbs import export


@pytest.fixture
def folder(tmp_path: Path) -> str:
    config = published_config() | {"num_hidden_layers": 1}
    return str(write_folder(tmp_path / "m", random_decoder(config), config))


def ran(capsys: pytest.CaptureFixture[str], **options: object) -> dict[str, object]:
    assert export.run(export.Config(json=True, **options)) == 0  # type: ignore[arg-type]
    facts: dict[str, object] = json.loads(capsys.readouterr().out)
    return facts


def test_a_gguf_file_answers(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "m.gguf"
    facts = ran(capsys, model=folder, out=str(out), to="gguf", type="q8_0")
    assert facts["file"] == str(out)
    assert facts["bytes"] == out.stat().st_size
    assert isinstance(checked := facts["tokenizer"], dict)
    assert checked["differing"] == 0
    answer = LLM(out, device="cpu").generate(["the"], Sampling(max_tokens=4, temperature=0))[0]
    assert answer.tokens


def test_a_folder_for_ollama_appears_whole(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ollama"
    facts = ran(capsys, model=folder, out=str(out), to="ollama")
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    assert facts["modelfile"] == str(out / "Modelfile")
    assert (out / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_safetensors_is_the_default(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(capsys, model=folder, out=str(tmp_path / "s")) == {"folder": str(tmp_path / "s")}


def test_options_without_meaning_are_refused(folder: str, tmp_path: Path) -> None:
    for words, options in {
        "no meaning": {"out": str(tmp_path / "s"), "type": "q4_0"},
        "no name of a GGUF file": {"out": str(tmp_path / "s"), "to": "gguf"},
    }.items():
        with pytest.raises(XverseError, match=words):
            export.run(export.Config(model=folder, **options))  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_a_failure_leaves_no_folder_for_ollama(folder: str, tmp_path: Path) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(XverseError, match="different models"):
        export.run(export.Config(model=folder, out=str(tmp_path / "o"), to="ollama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
