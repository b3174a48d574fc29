"""Loading: published folders as they are, equal weights from every source, clear refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny_model import (
    CANARY,
    published_config,
    published_state,
    random_decoder,
    write_published_folder,
)
from xverse import XverseError
from xverse.checkpoint.convert import convert_to_safetensors, save_weights
from xverse.checkpoint.load import load
from xverse.checkpoint.save import published_tensors
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.stored_compressed import to_config


def logits(decoder: Decoder) -> torch.Tensor:
    kv = Packed([20])
    return decoder(torch.arange(20) * 5 % 200, kv.positions(), kv)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_published_folder_loads_converts_and_runs_no_code(tmp_path: Path, moe: bool) -> None:
    source, converted = tmp_path / "published", tmp_path / "converted"
    original = write_published_folder(source, moe=moe)
    loaded = load(source)
    assert torch.equal(logits(loaded.decoder), logits(original))
    assert loaded.end_ids == {3}
    convert_to_safetensors(source, converted)
    again = load(converted)
    assert torch.equal(logits(again.decoder), logits(original))
    assert again.tokenizer.encode("The end 12") == loaded.tokenizer.encode("The end 12")
    assert not list(tmp_path.rglob(CANARY))
    assert not list(converted.glob("*.py"))
    assert not list(converted.glob("*.bin"))


def test_the_router_stays_in_fp32(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "moe", moe=True)
    decoder = load(tmp_path / "moe").decoder
    kinds = {name: p.dtype for name, p in decoder.named_parameters()}
    for name, dtype in kinds.items():
        assert dtype == (torch.float32 if "router" in name else torch.bfloat16), name


def test_dtype_is_the_folders_or_the_one_asked_for(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "m")
    assert load(tmp_path / "m").decoder.model.norm.weight.dtype == torch.bfloat16
    assert load(tmp_path / "m", dtype="float32").decoder.model.norm.weight.dtype == torch.float32
    with pytest.raises(XverseError, match="float8"):
        load(tmp_path / "m", dtype="float8")


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_comes_back_bit_for_bit(tmp_path: Path, bits: int, moe: bool) -> None:
    config = published_config(moe=moe)
    decoder = quantize(random_decoder(config), bits)
    folder = tmp_path / "small"
    write_published_folder(folder, shards=1)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    save_weights(published_tensors(decoder), folder)
    scheme = next(m.scheme for m in decoder.modules() if isinstance(m, QuantizedLinear))
    config["quantization_config"] = to_config(Recipe(scheme))
    (folder / "config.json").write_text(json.dumps(config))
    again = load(folder).decoder
    assert torch.equal(logits(again), logits(decoder))
    mine, theirs = dict(decoder.named_buffers()), dict(again.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_tied_model_leaves_a_stored_head_aside(tmp_path: Path) -> None:
    config = published_config() | {"tie_word_embeddings": True}
    decoder = random_decoder(config)
    state = published_state(decoder) | {"lm_head.weight": torch.zeros(3, 3)}
    write_published_folder(tmp_path / "m", shards=1)
    for file in (tmp_path / "m").glob("pytorch_model*"):
        file.unlink()
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path / "m").decoder), logits(decoder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 5}, r"lack 'model\.layers\.4\."),
        ({"num_hidden_layers": 3}, "no place for"),
        ({"intermediate_size": 97}, "needs"),
        ({"vocab_size": 7}, "needs"),
        ({"model_type": "bert"}, "bert"),
        ({"tie_word_embeddings": None, "hidden_size": "64"}, "number is wanted"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_words(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    write_published_folder(tmp_path / "m", shards=2)
    (tmp_path / "m" / "config.json").write_text(json.dumps(published_config() | change))
    with pytest.raises(XverseError, match=words):
        load(tmp_path / "m")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "m", shards=3)
    for name in ("pytorch_model-00002-of-00003.bin", "tokenizer.json", "config.json"):
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(tmp_path / "m", copy)
        (copy / name).unlink()
        with pytest.raises(XverseError, match=name):
            load(copy)


def test_a_word_that_is_no_model_is_refused_with_the_choices() -> None:
    for name in ("nonsense", "a/b/c", "./absent", "/no/such/folder"):
        with pytest.raises(XverseError, match="smollm2"):
            load(name)
