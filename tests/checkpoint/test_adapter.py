"""Adapters go to PEFT and come back; what we would read otherwise than PEFT is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.adapters import ATTENTION, SEVEN, folder_files, merge, random_adapter
from xverse.checkpoint.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    read_adapter,
    require_fit,
    write_adapter,
)
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SHAPE = ModelShape.from_config(LLAMA)
IDS_T = torch.arange(3, 15)
NAME = "model.layers.0.self_attn.q_proj"


def decoder() -> Decoder:
    return initialize(Decoder(SHAPE), std=0.2, seed=5).requires_grad_(False)


def logits_of(adapter: Adapter) -> torch.Tensor:
    """What our decoder says with the adapter merged into it, [T, V]."""
    merged = merge(decoder(), adapter)
    kv = Packed([len(IDS_T)])
    return merged(IDS_T, kv.positions(), kv)


def their_base() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(decoder().state_dict())
    return theirs


def same(one: Adapter, other: Adapter) -> bool:
    def parts(adapter: Adapter, name: str) -> list[torch.Tensor]:
        change = adapter.weights[name]
        return [p for p in (change.a_RD, change.b_NR, change.magnitude_N) if p is not None]

    return one.weights.keys() == other.weights.keys() and all(
        one.scale(name) == other.scale(name)
        and all(map(torch.equal, parts(one, name), parts(other, name)))
        for name in one.weights
    )


@pytest.mark.parametrize("dora", [False, True])
def test_ours_is_what_peft_reads(tmp_path: Path, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    ours = random_adapter(SHAPE, seed=1, dora=dora)
    write_adapter(tmp_path, ours)
    theirs = peft.PeftModel.from_pretrained(their_base(), tmp_path).eval()
    with torch.no_grad():
        expected_TV = theirs(IDS_T[None]).logits[0]
    torch.testing.assert_close(logits_of(ours), expected_TV, rtol=1e-4, atol=1e-4)
    assert same(read_adapter(tmp_path), ours)


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "patterns"])
def test_what_peft_writes_is_read(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    more: dict[str, Any] = {
        "plain": {"target_modules": "all-linear"},
        "rslora": {"use_rslora": True, "target_modules": ["q_proj", "mlp.up_proj"]},
        "dora": {"use_dora": True, "target_modules": list(SEVEN)},
        "patterns": {
            "target_modules": list(ATTENTION),
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"k_proj": 5, "^model.layers.0.self_attn.o_proj": 9},
        },
    }[kind]
    lora = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **more)
    theirs = peft.get_peft_model(their_base(), lora).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        expected_TV = theirs(IDS_T[None]).logits[0]
    theirs.save_pretrained(tmp_path)
    ours = read_adapter(tmp_path)
    torch.testing.assert_close(logits_of(ours), expected_TV, rtol=1e-4, atol=1e-4)
    write_adapter(tmp_path / "again", ours)
    assert same(read_adapter(tmp_path / "again"), ours)
    again = peft.PeftModel.from_pretrained(their_base(), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS_T[None]).logits[0], expected_TV)


def test_notes_come_back(tmp_path: Path) -> None:
    adapter = random_adapter(SHAPE, seed=1, targets=("up_proj",), chat_format="v2")
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert (read.chat_format, read.targets, read.base_model) == ("v2", ("up_proj",), "")
    assert folder_files(tmp_path) == {CONFIG, WEIGHTS, "prompt_format.json"}


def test_the_model_must_have_its_layers() -> None:
    adapter = random_adapter(SHAPE, seed=1)
    require_fit(adapter, SHAPE, "a")
    deeper = ModelShape.from_config({**LLAMA, "num_hidden_layers": 3})
    wider = ModelShape.from_config({**LLAMA, "intermediate_size": 64})
    require_fit(adapter, deeper, "a")
    with pytest.raises(XverseError, match=r"(?s)layers.2.*not in it"):
        require_fit(random_adapter(deeper, seed=1), SHAPE, "a")
    with pytest.raises(XverseError, match="48 x 32, which is 64 x 32 there"):
        require_fit(adapter, wider, "a")


def test_experts_are_layers_one_by_one(tmp_path: Path) -> None:
    mixed = ModelShape.from_config(
        {**LLAMA, "model_type": "xverse", "num_key_value_heads": 4, "num_experts": 3}
        | {"moe_top_k": 2, "num_shared_experts": 1}
    )
    adapter = random_adapter(mixed, seed=1, targets=("up_proj",))
    assert "model.layers.1.mlp.experts.2.up_proj" in adapter.weights
    write_adapter(tmp_path, adapter)
    assert same(read_adapter(tmp_path), adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.up"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("a_field_of_next_year", {"on": True}),
    ],
)
def test_what_changes_more_than_linear_layers_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, seed=1))
    change_config(tmp_path, **{field: value})
    with pytest.raises(XverseError, match=f"{field} = .*not supported"):
        read_adapter(tmp_path)


def test_fields_of_next_year_that_are_off_are_no_harm(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, seed=1))
    change_config(tmp_path, one=None, two=False, three={}, four=[], five="")
    read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 0}, "rank 'r' is 0"),
        ({"r": True}, "rank 'r' is True"),
        ({"r": 10**9}, "not 1 to 4096"),
        ({"r": 8}, "factors of .* the config says rank 8"),
        ({"lora_alpha": 0}, "no number above zero"),
        ({"lora_alpha": "16"}, "no number above zero"),
        ({"lora_dropout": 3}, "not between 0 and 1"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"use_rslora": 1}, "neither true nor false"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no table"),
        ({"target_modules": []}, "no list of names"),
        ({"target_modules": [*SEVEN, "lm_head"]}, "'lm_head', which has no weights"),
        ({"target_modules": ["q_proj"]}, "misses"),
    ],
)
def test_malformed_configs_are_refused(
    tmp_path: Path, fields: dict[str, object], says: str
) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, seed=1))
    change_config(tmp_path, **fields)
    with pytest.raises(XverseError, match=f"(?s){says}"):
        read_adapter(tmp_path)


Q = f"base_model.model.{NAME}"
HOSTILE: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({f"{Q}.lora_A.weight": None}, "lacks lora_A"),
    ({f"{Q}.lora_B.weight": None}, "lacks lora_B"),
    ({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, "NaN or infinity"),
    ({f"{Q}.lora_A.weight": torch.zeros(32, 4)}, "factors of"),
    ({f"{Q}.lora_A.weight": torch.zeros(4)}, "factors of"),
    ({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)}, "is of torch.int64"),
    ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, "without use_dora"),
    ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "no part of a linear layer"),
    ({f"{Q}.lora_embedding_A": torch.ones(2, 2)}, "no part of a linear layer"),
    ({"model.layers.0.weight": torch.ones(2, 2)}, "does not begin with"),
]


@pytest.mark.parametrize(("changes", "says"), HOSTILE)
def test_hostile_weights_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], says: str
) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, seed=1))
    tensors = {**load_file(tmp_path / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / WEIGHTS)
    with pytest.raises(XverseError, match=says):
        read_adapter(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, seed=1))
    (tmp_path / WEIGHTS).unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(XverseError, match="pickle"):
        read_adapter(tmp_path)


def test_a_folder_without_an_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
