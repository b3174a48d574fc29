"""Log-probabilities of answers, prompts and labels are transformers' on the same weights."""

from pathlib import Path

import pytest
import torch

from tests.engine.exact import check_answer, check_labels
from tests.tiny_model import published_config, write_published_folder
from xverse import LLM, load

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> torch.nn.Module:
    """The folder's weights in transformers' Llama, whose mathematics a dense XVERSE shares."""
    config = {**published_config(), "model_type": "llama"}
    for key in ("architectures", "auto_map", "torch_dtype"):
        del config[key]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    model.load_state_dict(load(folder, dtype="float32").decoder.state_dict())
    return model.requires_grad_(False)


@pytest.mark.parametrize("deterministic", [False, True])
def test_llm_gives_the_numbers_of_transformers(
    folder: Path, theirs: torch.nn.Module, deterministic: bool
) -> None:
    llm = LLM(folder, dtype="float32", deterministic=deterministic)
    for prompt in ("Hello", "Tell me (now), please: is it so? 北京的天气 " * 3):
        check_answer(llm, theirs, prompt)
    check_labels(llm, theirs, "Is it so?", ["yes", "no, never", "北京的天气", "1 and 2"])
