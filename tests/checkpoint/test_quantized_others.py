"""GPTQ and AWQ folders of others: the variants that are read, the names of those that are not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.others_packers import awq, gptq, numbers
from tests.checkpoint.quantized_folders import logits, write_folder
from tests.tiny_model import published_config, random_decoder
from xverse import XverseError
from xverse.checkpoint.convert import save_weights
from xverse.checkpoint.load import load, open_checkpoint
from xverse.checkpoint.plain import plain_weights
from xverse.checkpoint.save import expert_name, published_tensors
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear, StackedLinear
from xverse.quant.stored import layout_of

GROUP = 32
CONFIG = published_config() | {"torch_dtype": "float32", "num_hidden_layers": 2}
MIXTURE = published_config(moe=True) | {"torch_dtype": "float32", "num_hidden_layers": 2}


def gptq_config(**changes: object) -> dict[str, object]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
        "damp_percent": 0.01, "true_sequential": True, "lm_head": False,
    } | changes  # fmt: skip


def awq_config(**changes: object) -> dict[str, object]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    } | changes  # fmt: skip


def random_layer(
    rows: int, columns: int, bits: int, config: dict[str, object], number: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps, zeros, scales and the group of each column, at random; others for each `number`."""
    dice = torch.Generator().manual_seed(rows * columns + number)
    size = config["group_size"]
    assert isinstance(size, int)
    groups = 1 if size == -1 else columns // size
    steps = torch.randint(0, 2**bits, (rows, columns), generator=dice)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=dice)
    if config.get("sym"):
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = torch.rand(rows, groups, generator=dice) * 0.3 / 2**bits
    group_of = torch.arange(columns) // (columns // groups)
    if config.get("desc_act") and number != 1:  # which of the experts is sorted as it is
        group_of = group_of[torch.randperm(columns, generator=dice)]
    return steps, zeros, scales, group_of


def write(folder: Path, config: dict[str, object], shape: dict[str, object] = CONFIG) -> Decoder:
    """A folder quantized so, and the model that its numbers are."""
    decoder = random_decoder(shape, dtype=torch.float32)
    state = dict(published_tensors(decoder))
    bits = config["bits"]
    assert isinstance(bits, int)
    for name, number, weight in matrices(decoder):
        layer = random_layer(*weight.shape, bits, config, number)
        weight.copy_(numbers(*layer))
        del state[f"{name}.weight"]
        if config["quant_method"] == "awq":
            tensors = awq(*layer[:3])
        else:
            version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
            tensors = gptq(*layer, bits, version)
        state |= {f"{name}.{what}": tensor for what, tensor in tensors.items()}
    write_folder(folder, random_decoder(shape), shape | {"quantization_config": config})
    for file in folder.glob("model*"):
        file.unlink()
    save_weights(state.items(), folder)
    return decoder


def matrices(decoder: Decoder) -> Iterator[tuple[str, int, Tensor]]:
    """What is quantized: published name, number (of an expert), and the weight itself."""
    for name, module in decoder.named_modules():
        if isinstance(module, StackedLinear):
            for number, weight in enumerate(module.weight.detach()):
                yield expert_name(name, number), number, weight
        elif isinstance(module, Linear) and name != "lm_head":
            yield name, 0, module.weight.detach()


READ = {
    "gptq": gptq_config(),
    "gptq symmetric": gptq_config(sym=True),
    "gptq 8 bits": gptq_config(bits=8),
    "gptq 8 bits symmetric": gptq_config(bits=8, sym=True),
    "gptq version 2": gptq_config(checkpoint_format="gptq_v2"),
    "gptq sorted columns": gptq_config(desc_act=True),
    "gptq 8 bits sorted, symmetric, version 2": gptq_config(
        bits=8, sym=True, desc_act=True, checkpoint_format="gptq_v2"
    ),
    "gptq per row": gptq_config(group_size=-1),
    "awq": awq_config(),
    "awq per row": awq_config(group_size=-1),
    "awq, loudly": awq_config(version="GEMM"),
}


@pytest.mark.parametrize("case", READ)
def test_a_folder_is_the_model_that_its_numbers_are(tmp_path: Path, case: str) -> None:
    expected = write(tmp_path / "m", READ[case])
    loaded = load(tmp_path / "m").decoder
    assert torch.allclose(logits(loaded), logits(expected), atol=1e-3)
    plain = plain_weights(open_checkpoint(tmp_path / "m"))
    assert plain.infos().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.allclose(plain.read(name, torch.float32), weight, atol=1e-6), name


@pytest.mark.parametrize("case", ["gptq", "gptq sorted columns", "awq"])
def test_experts_are_read_and_each_has_an_order_of_its_own(tmp_path: Path, case: str) -> None:
    expected = write(tmp_path / "m", READ[case], MIXTURE)
    loaded = load(tmp_path / "m").decoder
    assert torch.allclose(logits(loaded), logits(expected), atol=1e-3)
    plain = plain_weights(open_checkpoint(tmp_path / "m"))
    for name, weight in published_tensors(expected):
        assert torch.allclose(plain.read(name, torch.float32), weight, atol=1e-6), name


def test_biases_of_zeros_and_layers_left_as_they_were_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    expected = write(folder, gptq_config())
    kept = "model.layers.1.mlp.gate_proj"
    tensors = stored(folder)
    for what in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{kept}.{what}"]
    tensors[f"{kept}.weight"] = expected.state_dict()[f"{kept}.weight"]
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    rewrite(folder, tensors)
    assert torch.allclose(logits(load(folder).decoder), logits(expected), atol=1e-3)
    plain = plain_weights(open_checkpoint(folder))
    assert plain.infos().keys() == expected.state_dict().keys()
    rewrite(folder, tensors | {"model.layers.0.mlp.up_proj.bias": torch.ones(96)})
    with pytest.raises(XverseError, match=r"no place for: model\.layers\.0\.mlp\.up_proj\.bias"):
        load(folder)


def stored(folder: Path) -> dict[str, Tensor]:
    from xverse.checkpoint.weights import open_weights

    weights = open_weights(folder)
    return {name: weights.read(name, info.dtype).clone() for name, info in weights.infos().items()}


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    save_weights(tensors.items(), folder)


BROKEN: dict[str, Any] = {
    "columns in one group": ("g_idx", lambda t: torch.zeros_like(t), "g_idx"),
    "columns in no group": ("g_idx", lambda t: t - 1, "g_idx"),
    "words of floats": ("qweight", lambda t: t.float(), "float32"),
    "cut words": ("qweight", lambda t: t[1:].clone(), "the model needs"),
    "zeros of another layer": ("qzeros", lambda t: t[:, 1:].clone(), "the model needs"),
    "scales of integers": ("scales", lambda t: t.int(), "int32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_layer_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    what, change, words = BROKEN[case]
    write(tmp_path / "m", gptq_config())
    tensors = stored(tmp_path / "m")
    name = f"model.layers.1.self_attn.k_proj.{what}"
    rewrite(tmp_path / "m", tensors | {name: change(tensors[name])})
    with pytest.raises(XverseError, match=words):
        load(tmp_path / "m")


def test_zeros_beside_the_middle_are_not_called_symmetric(tmp_path: Path) -> None:
    write(tmp_path / "m", gptq_config())
    config = CONFIG | {"quantization_config": gptq_config(sym=True)}
    from xverse.files import write_json

    write_json(tmp_path / "m" / "config.json", config)
    with pytest.raises(XverseError, match="symmetric"):
        load(tmp_path / "m")


REFUSED = {
    "gptq of 3 bits": (gptq_config(bits=3), "bits = 3"),
    "gptq of 2 bits": (gptq_config(bits=2), "bits = 2"),
    "gptq of text bits": (gptq_config(bits="4"), "bits"),
    "gptq for marlin": (gptq_config(checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
    "gptq by layers": (gptq_config(dynamic={"+:x": {"bits": 8}}), "dynamic"),
    "gptq in bytes": (gptq_config(pack_dtype="int8"), "pack_dtype"),
    "gptq in groups of 5": (gptq_config(group_size=5), "group_size = 5"),
    "awq for vectors": (awq_config(version="gemv"), "version = 'gemv'"),
    "awq of 8 bits": (awq_config(bits=8), "bits = 8"),
    "awq without zeros": (awq_config(zero_point=False), "zero_point = False"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_variants_are_refused_by_name(case: str) -> None:
    config, words = REFUSED[case]
    with pytest.raises(XverseError, match=words):
        layout_of(config)
