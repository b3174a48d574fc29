"""Quantized folders: back bit for bit, and read by everything with no extra flag."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.quantized_folders import RECIPES, logits, write_quantized
from xverse import LLM, Sampling, XverseError
from xverse.checkpoint.load import load, open_checkpoint
from xverse.checkpoint.plain import plain_weights
from xverse.checkpoint.weights import open_weights
from xverse.model.cache import Packed


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_comes_back_bit_for_bit(tmp_path: Path, name: str, moe: bool) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES[name], moe=moe)
    again = load(tmp_path / "m").decoder
    mine, theirs = decoder.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor.float(), theirs[key].float()), key
    assert torch.equal(logits(again), logits(decoder))


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in RECIPES if not RECIPES[name].embedding), ("int4", True)],
)
def test_transformers_computes_the_same(tmp_path: Path, name: str, tied: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {}}
    recipe = RECIPES[name]
    decoder = write_quantized(tmp_path / "m", recipe, tie_word_embeddings=tied, **llama)
    # transformers 5.23 makes no room for packed zeros where it leaves layers quantized.
    how = (
        {}
        if recipe.scheme.symmetric
        else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    )
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, **how)
    with torch.inference_mode():
        got = theirs(torch.arange(20)[None] * 5 % 200).logits[0]
    assert torch.allclose(got, logits(decoder), atol=2e-4)


def test_engine_and_llm_take_a_quantized_folder_as_it_is(tmp_path: Path) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES["int4-asymmetric"])
    llm = LLM(tmp_path / "m", device="cpu")
    greedy = Sampling(max_tokens=8, temperature=0, repetition_penalty=1.0)
    answer = llm.generate(["今天 the"], greedy)[0]
    ids = llm.tokenizer.encode("今天 the")
    kv = Packed([len(ids)])
    first = decoder(torch.tensor(ids), kv.positions(), kv)[-1].argmax()
    assert answer.tokens[0] == int(first)


@pytest.mark.parametrize("name", ["int4", "fp8", "int8-asymmetric"])
def test_plain_weights_are_what_the_layers_compute_with(tmp_path: Path, name: str) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES[name])
    plain = plain_weights(open_checkpoint(tmp_path / "m"))
    infos = plain.infos()
    assert "model.layers.0.mlp.up_proj.weight_packed" not in infos
    weight = plain.read("model.layers.1.mlp.down_proj.weight", torch.float32)
    layer = decoder.get_submodule("model.layers.1.mlp.down_proj")
    assert torch.equal(weight, layer.dequantized())  # type: ignore[operator]
    assert infos["model.layers.1.mlp.down_proj.weight"].shape == weight.shape
    norm = plain.read("model.norm.weight", torch.float32)
    assert torch.equal(norm, decoder.model.norm.weight)


def edited(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_config_at_odds_with_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_quantized(folder, RECIPES["int4"])
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    for change, words in (
        ({"num_bits": 8}, "the model needs"),
        ({"group_size": 16}, "the model needs"),
        ({"group_size": 24}, "no whole groups"),
        (
            {"type": "float", "num_bits": 8, "group_size": None, "strategy": "channel"},
            "the model needs",
        ),
        ({"symmetric": False}, "lack"),
    ):
        config["config_groups"]["group_0"]["weights"] = weights | change
        edited(folder, quantization_config=config)
        with pytest.raises(XverseError, match=words):
            load(folder)
    edited(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(XverseError, match="says that the model is quantized by gptq"):
        load(folder)
    edited(folder, quantization_config=None)
    with pytest.raises(XverseError, match="lack"):
        load(folder)


def test_loading_takes_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(tmp_path / "m", RECIPES["int4"])
    alive: list[int] = []
    read = type(open_weights(tmp_path / "m")).read

    def watched(self: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
        alive.append(1)
        return read(self, name, dtype)

    monkeypatch.setattr("xverse.checkpoint.weights.ShardedWeights.read", watched)
    order: list[tuple[str, int]] = []

    def keep(shape: object, name: str, module: torch.nn.Module) -> torch.nn.Module:
        order.append((name, len(alive)))
        return module

    load(tmp_path / "m", keep=keep)
    counts = [count for _, count in order]
    assert counts == sorted(counts)
    assert all(after - before <= 4 for before, after in itertools.pairwise(counts))
