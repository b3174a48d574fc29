"""verify-template: what is equal is found equal, and what is not is found, at the right token."""

import json
from pathlib import Path

import pytest

from tests.text.test_chat import END
from tests.text.tiny import write_tiny_tokenizer
from tests.tiny_model import published_config
from xverse.interop import same_ids
from xverse.interop.same_ids import Proof, compare
from xverse.text.chat import V2, XVERSE_FORMATS
from xverse.text.tokenizer import Tokenizer
from xverse.verbs.verify_template import Config, run


def folder_of(folder: Path, name: str) -> Path:
    """A model folder without weights, with the small tokenizer and the format `name`."""
    write_tiny_tokenizer(folder)
    template = XVERSE_FORMATS.get(name, V2).template
    Tokenizer.load(folder).save(folder, chat_template=template, chat_format=name)
    (folder / "config.json").write_text(json.dumps(published_config()))
    return folder


def verdicts(proof: Proof, conversation: str) -> dict[str, str]:
    return {f.route: f.verdict for f in proof.findings if f.conversation == conversation}


OURS = ("server", "transformers with xverse")
OTHERS = ("transformers alone", "GGUF", "Ollama")


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "default", "xverse"])
def test_what_is_trained_is_what_is_served(name: str, tmp_path: Path) -> None:
    proof = compare(folder_of(tmp_path / name, name))
    assert proof.holds(strict=False)
    for conversation in ("one round", "three rounds", "Chinese", "special tokens"):
        found = verdicts(proof, conversation)
        assert {found[route] for route in OURS} == {"equal"}
    chinese = verdicts(proof, "Chinese")
    assert {chinese[route] for route in OTHERS} == {"equal"}
    refused = [f.conversation for f in proof.findings if f.route == same_ids.TRAINING]
    assert ("system" in refused) == (name in ("v1", "xverse"))
    assert verdicts(proof, "tools")["server"] == "equal"


def test_joint_programs_cut_v2_and_v3_otherwise_and_v1_alike(tmp_path: Path) -> None:
    first = compare(folder_of(tmp_path / "v1", "v1"))
    assert set(verdicts(first, "three rounds").values()) == {"equal"}
    second = compare(folder_of(tmp_path / "v2", "v2"))
    assert not second.holds(strict=True)
    (alone,) = [
        f
        for f in second.findings
        if (f.conversation, f.route) == ("one round", "transformers alone")
    ]
    assert alone.verdict == "same text"
    ids = Tokenizer.load(tmp_path / "v2").backend.get_vocab()
    assert alone.position == len("Human:")
    assert alone.trained[:2] == (ids["▁"], ids["H"])
    assert alone.found[0] == ids["▁H"]


def test_a_special_token_in_a_message_becomes_one_elsewhere_only(tmp_path: Path) -> None:
    proof = compare(folder_of(tmp_path / "v1", "v1"))
    found = {f.route: f for f in proof.findings if f.conversation == "special tokens"}
    assert END in found["transformers alone"].found
    assert END in found["Ollama"].found
    assert found["server"].verdict == found["GGUF"].verdict == "equal"


def test_a_template_of_its_own_is_equal_everywhere(tmp_path: Path) -> None:
    proof = compare(folder_of(tmp_path / "own", "template"))
    for conversation in ("one round", "three rounds", "system"):
        found = verdicts(proof, conversation)
        assert {found[r] for r in ("server", "transformers alone", "GGUF")} == {"equal"}
        assert found["Ollama"] == "not checked"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder = tmp_path / "tiny"
    write_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(published_config()))
    assert run(Config(model=str(folder), json=True)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["chat_format"] == "v2"
    assert facts["holds"] is True
    assert {f["verdict"] for f in facts["findings"] if f["route"] == "server"} == {"equal"}
    assert run(Config(model=str(folder), strict=True)) == 1
    shown = capsys.readouterr()
    assert "same text" in shown.out
    assert "next: xverse" in shown.err

    monkeypatch.setattr(same_ids, "go_template", lambda chat, end: "{{- range $i, $m := .Messages "
                        "-}}{{- .Content -}}{{- end -}}")  # fmt: skip
    assert run(Config(model=str(folder))) == 1
    shown = capsys.readouterr()
    assert "one round, Ollama: differs from token 1 on" in shown.out
