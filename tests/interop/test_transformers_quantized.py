"""Quantized folders by AutoModel and our classes: the same model, and saved again the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.quantized_folders import RECIPES, write_quantized
from tests.interop.published import same_state
from xverse.interop.transformers import XverseForCausalLM


@pytest.mark.parametrize("name", ["int4", "fp8", "embedding-int8"])
def test_a_quantized_folder_loads_and_is_saved_again(tmp_path: Path, name: str) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES[name], num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(model) is XverseForCausalLM
    assert same_state(model.decoder, decoder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert same_state(again.decoder, decoder)
    ids = torch.arange(5)[None] + 60
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 8)
