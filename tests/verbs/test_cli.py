"""The command line as a person meets it: verbs, models, mistakes, exit codes, configuration."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse import cli
from xverse.checkpoint import hub
from xverse.verbs import pull as pull_verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return path


def xverse(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xverse", *args],
        input=stdin,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL if stdin is None else None,
        timeout=120,
    )


def in_process(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = cli.run(args)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_piped_chat_keeps_history_and_leaves_on_exit(folder: Path) -> None:
    lines = 'Hello\n/help\n/nothing\n"""two\nlines"""\n/system You are.\nexit\nnever answered\n'
    result = xverse("chat", str(folder), "--max-tokens", "8", "--seed", "1", stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("XVERSE-Tiny-Chat: ") == 2
    assert "/reset" in result.stdout
    assert "no command /nothing" in result.stdout
    assert "never" not in result.stdout


def test_second_turn_sees_the_first(folder: Path) -> None:
    ask = ["chat", "--model", str(folder), "--json", "--temperature", "0", "--max-tokens", "12"]
    both = [json.loads(line) for line in xverse(*ask, stdin="Hello\nAnd?\n").stdout.splitlines()]
    alone = [json.loads(line) for line in xverse(*ask, stdin="And?\n").stdout.splitlines()]
    assert len(both) == 2
    assert both[1] != alone[0]


def test_a_terminal_conversation(folder: Path) -> None:
    """A person at a terminal: greeting, an answer, Ctrl-D leaves with 0."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "xverse", str(folder), "--max-tokens", "5"],
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    seen = _read_until(parent, "you: ")
    assert "This is XVERSE-Tiny-Chat" in seen
    os.write(parent, b"Hello\n")
    seen = _read_until(parent, "you: ")
    assert "XVERSE-Tiny-Chat: " in seen
    os.write(parent, b"\x04")
    assert process.wait(30) == 0
    os.close(parent)


def _read_until(terminal: int, words: str) -> str:
    seen, end = "", time.monotonic() + 60
    while words not in seen and time.monotonic() < end:
        seen += os.read(terminal, 4096).decode("utf-8", "replace")
    assert words in seen, seen
    return seen


def test_generate_takes_an_argument_or_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "0", "--max-tokens", "9", "--json"]
    code, out, _ = in_process(capsys, "generate", str(folder), "Hello", *options)
    assert code == 0
    given = json.loads(out)
    piped = json.loads(xverse("generate", str(folder), *options, stdin="Hello\n").stdout)
    assert given == piped
    assert given["prompt_tokens"] == 4
    code, out, _ = in_process(capsys, "generate", str(folder), "Hello", *options[:-1])
    assert out == given["text"] + "\n"
    code, out, _ = in_process(capsys, "generate", str(folder), "Hello", "--chat", *options)
    assert json.loads(out)["prompt_tokens"] > 5
    code, _, err = in_process(capsys, "generate", str(folder), "Hello", "--system", "x")
    assert code == 1
    assert "--chat" in err


def test_guessing_reaches_the_engine_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", str(folder), "1 and 2 and 1 and", "--json", "--temperature", "0"]
    ask += ["--max-tokens", "20", "--repetition-penalty", "1"]
    assert in_process(capsys, *ask, "--speculate", "8") == in_process(capsys, *ask)
    code, _, err = in_process(capsys, *ask, "--speculate", "99")
    assert code == 1
    assert "speculate" in err


def test_options_come_from_flags_over_toml_over_defaults(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(f'model = "{folder}"\nprompt = "Hello"\nmax_tokens = 3\ntemperature = 0.0\n')
    toml.write_text(toml.read_text() + "json = true\n")
    code, out, err = in_process(capsys, "generate", "--config", str(toml))
    assert code == 0, err
    assert json.loads(out)["tokens"] <= 3
    code, out, _ = in_process(capsys, "generate", f"--config={toml}", "--max-tokens", "1")
    assert json.loads(out)["tokens"] == 1
    toml.write_text("max_token = 3\n")
    code, _, err = in_process(capsys, "generate", "--config", str(toml))
    assert code == 1
    assert "'max_token'" in err
    assert "Did you mean 'max_tokens'?" in err
    code, _, err = in_process(capsys, "generate", "--config", str(tmp_path / "absent.toml"))
    assert code == 1


def test_mistakes_have_words_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(capsys, "genrate", "x")
    assert code == 1
    assert "Did you mean 'generate'?" in err
    code, _, err = in_process(capsys, "chat", "--no-such-flag")
    assert code == 2
    code, _, err = in_process(capsys, "show", "./absent")
    assert code == 1
    assert "why:" in err
    assert "fix:" in err


def test_export_writes_a_folder_that_chats(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "safe"
    code, printed, _ = in_process(capsys, "export", str(folder), str(out))
    assert code == 0
    assert printed.strip() == str(out)
    options = ["Hello", "--temperature", "0", "--max-tokens", "9", "--json"]
    answers = [in_process(capsys, "generate", str(f), *options)[1] for f in (folder, out)]
    assert answers[0] == answers[1]
    code, _, err = in_process(capsys, "export", str(folder), str(out))
    assert code == 1
    assert "fix:" in err


def test_show_verifies_what_a_manifest_lists(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = in_process(capsys, "show", str(folder), "--verify")
    assert code == 1
    assert "has no manifest.json" in err
    out = tmp_path / "out"
    assert in_process(capsys, "export", str(folder), str(out))[0] == 0
    code, told, _ = in_process(capsys, "show", str(out), "--verify")
    assert code == 0
    assert told.endswith("Every file is as manifest.json has it.\n")
    weights = next(out.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = in_process(capsys, "show", str(out), "--verify")
    assert code == 1
    assert weights.name in err


def test_show_tells_shape_and_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "show", "xverse-7b", "--context", "2048", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == 7_299_846_144
    assert facts["memory_bytes"]["bf16"]["kv_cache"] == 2048 * 512 * 1024
    # Computed from the published table: 13.60, 7.57 and 4.55 GiB of weights.
    sizes = [facts["memory_bytes"][name]["weights"] / 2**30 for name in ("bf16", "int8", "int4")]
    assert sizes == pytest.approx([13.60, 7.57, 4.55], abs=0.01)
    code, out, _ = in_process(capsys, "show", str(folder))
    assert "num_hidden_layers" in out
    assert "KV cache" in out


def test_doctor_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["torch"].startswith("2.")
    assert any("smollm2" in line for line in facts["models"])
    code, out, _ = in_process(capsys, "doctor")
    assert "kernels" in out


def test_pull_hands_its_options_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def fake(model_id: str, **options: object) -> Path:
        asked.update(options, model_id=model_id)
        return tmp_path

    monkeypatch.setattr(hub, "pull", fake)
    flags = ["--source", "modelscope", "--cache-dir", "D", "--revision", "master"]
    code, out, _ = in_process(capsys, "pull", "xverse-7b-chat", *flags)
    assert code == 0
    assert asked == {
        "model_id": "xverse/XVERSE-7B-Chat",
        "source": "modelscope",
        "cache_dir": "D",
        "revision": "master",
    }
    assert out.strip() == str(tmp_path)
    assert pull_verb.Config(model="a/b").source == "auto"


def test_a_model_is_not_spread_over_what_does_not_divide_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", str(folder), "Hello", "--device", "cpu", "--tensor-parallel", "3"]
    code, _, err = in_process(capsys, *ask)
    assert code == 1
    assert "cannot be spread over 3 devices" in err
    assert "1, 2, 4" in err
