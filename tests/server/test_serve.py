"""`xverse serve` as a person starts it: what cannot be served is said at once."""

import asyncio
import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.server.served import START_S
from xverse.errors import XverseError
from xverse.server.messages import Start
from xverse.server.supervisor import Supervisor
from xverse.verbs import serve
from xverse.verbs._options import ModelOptions


def test_every_option_of_a_model_reaches_the_engine() -> None:
    given = {
        "device": "cpu", "dtype": "float32", "quantize": 8, "speculate": 4, "kv_dtype": "fp8",
        "tensor_parallel": 2, "host_embedding": True,
    }  # fmt: skip
    assert given.keys() == {field.name for field in dataclasses.fields(ModelOptions)}
    start = serve.Config(model="m", **given).options().start  # type: ignore[arg-type]
    assert {name: getattr(start, name) for name in given} == given


def test_a_model_that_cannot_be_loaded_is_said_and_ends_it(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for file in broken.glob("pytorch_model-00003*"):
        file.unlink()
    supervisor = Supervisor(Start(str(broken)), lambda _: None)
    with pytest.raises(XverseError, match="pytorch_model-00003"):
        asyncio.run(asyncio.wait_for(supervisor.run(), START_S))
    assert supervisor.process is not None
    assert supervisor.process.returncode == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-keys-file", "/nonexistent"], "cannot be read"),
        (["--max-choices", "500"], "max_choices"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    folder: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from xverse.cli import run

    assert run(["serve", str(folder), *flags]) == 1
    assert words in capsys.readouterr().err
