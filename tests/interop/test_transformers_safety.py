"""Nothing in a model folder runs, whatever it names and whatever transformers is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_model import CANARY
from xverse.errors import XverseError

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from tests.interop.published import GREEDY, HISTORY  # noqa: E402
from xverse.interop.transformers import (  # noqa: E402
    XverseConfig,
    XverseForCausalLM,
    XverseTokenizerFast,
)

TRUST = ({"trust_remote_code": True}, {"trust_remote_code": False}, {})
NAMING_CODE = {
    "auto_map": {
        "AutoConfig": "configuration_xverse.XverseConfig",
        "AutoModel": "modeling_xverse.XverseModel",
        "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
        "AutoTokenizer": ["modeling_xverse.Tokenizer", "modeling_xverse.Tokenizer"],
    },
    "custom_pipelines": {"text-generation": {"impl": "modeling_xverse.Pipeline", "pt": []}},
    "attn_implementation": "attacker/kernel",
    "_attn_implementation": "attacker/kernel",
    "_attn_implementation_internal": "attacker/kernel",
    "experts_implementation": "attacker/kernel",
    "_experts_implementation": "attacker/kernel",
    "_experts_implementation_internal": "attacker/kernel",
    "_name_or_path": "attacker/model",
    "_auto_class": "AutoModel",
    "transformers_weights": "pytorch_model-00001-of-00008.bin",
}


@pytest.fixture
def hostile(folder: Path, tmp_path: Path) -> Path:
    """A published folder whose every config names code that is there to run."""
    copy = shutil.copytree(folder, tmp_path / "hostile")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((copy / name).read_text()) | NAMING_CODE
        (copy / name).write_text(json.dumps(content))
    (copy / "custom_generate").mkdir()
    shutil.copy(copy / "modeling_xverse.py", copy / "custom_generate" / "generate.py")
    return copy


def canaries(folder: Path) -> list[Path]:
    return list(folder.parent.rglob(CANARY))


@pytest.mark.parametrize("trust", TRUST, ids=["trusted", "untrusted", "unsaid"])
def test_the_canary_never_appears(hostile: Path, trust: dict[str, bool]) -> None:
    config = AutoConfig.from_pretrained(hostile, **trust)
    assert type(config) is XverseConfig
    assert not hasattr(config, "auto_map")
    assert not hasattr(config, "custom_pipelines")
    tokenizer = AutoTokenizer.from_pretrained(hostile, use_fast=False, **trust)
    assert type(tokenizer) is XverseTokenizerFast
    model = AutoModelForCausalLM.from_pretrained(hostile, **trust)
    assert type(model) is XverseForCausalLM
    assert model.config._attn_implementation == "sdpa"
    model.generation_config = GenerationConfig.from_pretrained(hostile, **trust)
    assert model.chat(tokenizer, HISTORY, generation_config=GREEDY)
    ids = tokenizer("今天", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 4)
    with pytest.raises(ValueError, match="AutoModel"):  # there is no code here for a bare model
        AutoModel.from_pretrained(hostile, **trust)
    assert canaries(hostile) == []
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]


def test_the_canary_would_appear_without_us(folders: dict[str, Path], tmp_path: Path) -> None:
    """The folder is what it says: transformers alone runs its code."""
    copy = shutil.copytree(folders["dense"], tmp_path / "copy")
    code = (
        "import sys; from transformers import AutoConfig\n"
        "try: AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "except Exception: pass"
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, copy], env=environment, check=True)
    assert canaries(copy) != []


def test_our_line_may_stand_first(folders: dict[str, Path]) -> None:
    code = (
        "import sys, xverse.interop.transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__module__, type(tokenizer).__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, folders["dense"]], capture_output=True, text=True, check=True
    )
    home = "xverse.interop.transformers"
    assert result.stdout.split() == [f"{home}.model", f"{home}.tokenizer"]
    assert canaries(folders["dense"]) == []


def test_weights_never_pass_through_torch_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert isinstance(model, XverseForCausalLM)


@pytest.mark.parametrize(
    "broken",
    [
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"vocab_size": 1e400},
        {"id2label": "label"},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"rope_type": "../x", "factor": 2}},
        {"quantization_config": {"quant_method": "attacker"}},
        {"quantization_config": {"quant_method": []}},
        {"hidden_act": "__import__"},
        {"vocab_size": 7},
    ],
    ids=str,
)
def test_impossible_configs_are_errors_of_ours(
    folders: dict[str, Path], tmp_path: Path, broken: dict[str, object]
) -> None:
    copy = shutil.copytree(folders["dense"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | broken
    (copy / "config.json").write_text(json.dumps(config))
    for loader in (AutoModelForCausalLM, XverseForCausalLM):
        with pytest.raises(XverseError):
            loader.from_pretrained(copy)
    assert canaries(copy) == []


@pytest.mark.parametrize(
    "broken", [{"auto_map": 7}, {"dtype": "load", "torch_dtype": None}], ids=str
)
def test_what_is_left_aside_does_no_harm(
    folders: dict[str, Path], tmp_path: Path, broken: dict[str, object]
) -> None:
    copy = shutil.copytree(folders["dense"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | broken
    (copy / "config.json").write_text(json.dumps(config))
    for loader in (AutoModelForCausalLM, XverseForCausalLM):
        assert isinstance(loader.from_pretrained(copy), XverseForCausalLM)
    assert canaries(copy) == []
