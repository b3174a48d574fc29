from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    HEAD_DIM,
    LAYERS,
    STRING,
    U32,
    Draft,
    add,
    llama,
    llama_weights,
    smollm2,
)
from xverse.checkpoint import gguf
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_config import config_of
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.errors import XverseError
from xverse.model.rope import inverse_frequencies
from xverse.model.shape import ModelShape


def opened(draft: Draft, folder: Path) -> GgufFile:
    return GgufFile.open(draft.write(folder / "model.gguf"))


def test_metadata_of_every_kind_comes_back(tmp_path: Path) -> None:
    draft = Draft()
    values = {
        0: 200,
        1: -100,
        2: 60000,
        3: -30000,
        4: 2**32 - 1,
        5: -(2**31),
        6: 0.5,
        10: 2**64 - 1,
    }
    for kind, value in values.items():
        draft.put(f"kind.{kind}", kind, value)
    draft.put("flag", BOOL, 1).put("text", STRING, "你好").put("list", ARRAY, (STRING, ["a", "é"]))
    draft.put("nested", ARRAY, (ARRAY, [(U32, [1, 2]), (U32, [])])).put("double", 12, 0.1)
    metadata = dict(opened(draft, tmp_path).metadata)
    assert metadata.pop("nested") == [[1, 2], []]
    assert metadata.pop("list") == ["a", "é"]
    assert metadata.pop("flag") is True
    assert (metadata.pop("text"), metadata.pop("double")) == ("你好", 0.1)
    assert metadata == {f"kind.{kind}": value for kind, value in values.items()}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_are_found_at_their_alignment(tmp_path: Path, alignment: int, version: int) -> None:
    draft = Draft(alignment=alignment, version=version).put("general.alignment", U32, alignment)
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 3, 4, 5)}
    for name, weight in weights.items():
        add(draft, name, weight)
    file = opened(draft, tmp_path)
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    for name, weight in weights.items():
        assert torch.equal(file.read(name, torch.float32), weight)
        assert torch.equal(file.read(name, torch.bfloat16), weight.bfloat16())


def test_reading_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 11)
    draft = Draft()
    add(draft, "w", weight)
    monkeypatch.setattr(gguf, "ELEMENTS_AT_ONCE", 100)
    assert torch.equal(opened(draft, tmp_path).read("w", torch.float32), weight)


def test_what_is_read_is_memory_of_its_own(tmp_path: Path) -> None:
    file = opened(llama(), tmp_path)
    before = (tmp_path / "model.gguf").read_bytes()
    file.read("token_embd.weight", torch.float32).zero_()
    assert file.read("token_embd.weight", torch.float32).abs().sum() > 0
    assert (tmp_path / "model.gguf").read_bytes() == before


@pytest.mark.parametrize("arch", ["llama", "xverse"])
def test_weights_have_hugging_face_names_and_order(tmp_path: Path, arch: str) -> None:
    weights = llama_weights()
    source = GgufWeights(opened(llama(weights, arch), tmp_path))
    infos = source.infos()
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    assert {(info.dtype, info.file) for info in infos.values()} == {(torch.float32, "model.gguf")}
    for name, weight in weights.items():
        assert torch.equal(source.read(name, torch.float32), weight), name
    with pytest.raises(XverseError, match="holds nothing for"):
        source.read("model.layers.9.mlp.up_proj.weight", torch.float32)


@pytest.mark.parametrize("arch", ["llama", "xverse"])
def test_config_is_the_one_that_the_metadata_means(tmp_path: Path, arch: str) -> None:
    draft = llama(arch=arch).put("tokenizer.ggml.bos_token_id", U32, 2)
    draft.put("tokenizer.ggml.eos_token_id", U32, 3).put("tokenizer.ggml.padding_token_id", U32, 1)
    config = config_of(opened(draft, tmp_path))
    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "XverseForCausalLM"],
        "model_type": arch,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    assert ModelShape.from_config(config).num_key_value_heads == 2


def test_config_of_a_tied_model_that_leaves_much_unsaid(tmp_path: Path) -> None:
    draft = llama().drop("llama.rope.freq_base", "llama.rope.dimension_count")
    draft.entries = [entry for entry in draft.entries if entry.name != "output.weight"]
    draft.put("llama.rope.scaling.type", STRING, "linear").put("llama.rope.scaling.factor", F32, 4)
    draft.put("tokenizer.ggml.eos_token_id", U32, 3).put("tokenizer.ggml.eot_token_id", U32, 5)
    config = config_of(opened(draft, tmp_path))
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (10000.0, True)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["eos_token_id"] == [3, 5]


def with_llama3_divisors(stretch: float) -> Draft:
    """A Llama 3.1 file: the divisors come from the rule, the last of them times `stretch`."""
    draft = llama().put("llama.rope.freq_base", F32, 500000.0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 32 // HEAD_DIM}
    shape |= {"vocab_size": 9, "intermediate_size": 9, "num_hidden_layers": 1, "rope_theta": 5e5}
    plain = inverse_frequencies(ModelShape.from_config(shape))
    scaled = inverse_frequencies(ModelShape.from_config({**shape, "rope_scaling": scaling}))
    divisors = plain / scaled
    divisors[-1] *= stretch
    add(draft, "rope_freqs.weight", divisors)
    return draft


def test_llama3_scaling_is_found_again_from_its_divisors(tmp_path: Path) -> None:
    file = opened(with_llama3_divisors(1.0), tmp_path)
    scaling = config_of(file)["rope_scaling"]
    assert isinstance(scaling, dict)
    assert scaling.pop("factor") == pytest.approx(8.0)
    assert scaling == {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in GgufWeights(file).infos()


@pytest.mark.parametrize("stretch", [0.5, float("nan"), float("inf"), -1.0])
def test_divisors_of_an_unknown_rule_are_refused(tmp_path: Path, stretch: float) -> None:
    with pytest.raises(XverseError):
        config_of(opened(with_llama3_divisors(stretch), tmp_path))


@pytest.mark.slow
def test_every_tensor_of_a_real_file_equals_the_reference() -> None:
    reference = pytest.importorskip("gguf")
    path = smollm2()
    file = GgufFile.open(path)
    kinds = set()
    for tensor in reference.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith(("blk.0.", "blk.29.")):
            continue
        kinds.add(tensor.tensor_type.name)
        rows = slice(0, 512)  # the embedding alone has 28 million elements
        expected = reference.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        own = file.read(tensor.name, torch.float32)
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        assert torch.equal(own[rows], torch.from_numpy(expected.copy()))
    assert kinds == {"F32", "Q4_1", "Q8_0"}


def test_config_and_names_of_a_real_file() -> None:
    source = GgufWeights(GgufFile.open(smollm2()))
    config = config_of(GgufFile.open(smollm2()))
    shape = ModelShape.from_config(config)
    assert (shape.vocab_size, shape.hidden_size, shape.head_dim) == (49152, 576, 64)
    assert (shape.num_hidden_layers, shape.rope_theta, shape.tie_word_embeddings) == (30, 1e5, True)
    sizes = [torch.Size(info.shape).numel() for info in source.infos().values()]
    assert sum(sizes) == shape.num_parameters == 134_515_008


@pytest.mark.slow
def test_a_real_file_gives_the_weights_that_transformers_reads() -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    source = GgufWeights(GgufFile.open(path))
    assert set(source.infos()) == set(expected) - {"lm_head.weight"}
    for name in source.infos():
        assert torch.equal(source.read(name, torch.float32), expected[name]), name


def changed(key: str, kind: int, value: object) -> Draft:
    return llama().put(key, kind, value)


WRONG_MODELS = {
    "another architecture": changed("general.architecture", STRING, "qwen2"),
    "no architecture": llama().drop("general.architecture"),
    "architecture of a wrong type": changed("general.architecture", U32, 7),
    "no layer count": llama().drop("llama.block_count"),
    "more layers than tensors": changed("llama.block_count", U32, 2**32 - 1),
    "fewer layers than tensors": changed("llama.block_count", U32, LAYERS - 1),
    "layer count as text": changed("llama.block_count", STRING, "2"),
    "layer count as float": changed("llama.block_count", F32, float("nan")),
    "no heads": changed("llama.attention.head_count", U32, 0),
    "heads per layer": changed("llama.attention.head_count", ARRAY, (U32, [4, 4])),
    "epsilon not finite": changed("llama.attention.layer_norm_rms_epsilon", F32, float("inf")),
    "rope base not finite": changed("llama.rope.freq_base", F32, float("nan")),
    "part of the head rotated": changed("llama.rope.dimension_count", U32, 4),
    "yarn": changed("llama.rope.scaling.type", STRING, "yarn"),
    "experts": changed("llama.expert_count", U32, 8),
    "one part of several": changed("split.count", U32, 3),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_file_that_is_no_whole_plain_llama_is_refused(tmp_path: Path, case: str) -> None:
    file = opened(WRONG_MODELS[case], tmp_path)
    with pytest.raises(XverseError) as raised:
        config_of(file)
    assert raised.value.fix


def test_tensors_that_are_out_of_place_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.attn_qkv.weight", "blk.00.attn_q.weight", "output", "../x.weight"):
        draft = llama()
        add(draft, name, torch.zeros(4))
        with pytest.raises(XverseError, match="no tensor"):
            GgufWeights(opened(draft, tmp_path))
    without = llama()
    without.entries = [entry for entry in without.entries if entry.name != "token_embd.weight"]
    with pytest.raises(XverseError, match="adapter"):
        GgufWeights(opened(without, tmp_path))
    uneven = llama()
    next(entry for entry in uneven.entries if "attn_q" in entry.name).dims = (32, 20)
    source = GgufWeights(opened(uneven, tmp_path))
    with pytest.raises(XverseError, match="20 rows for 4 heads"):
        source.read("model.layers.0.self_attn.q_proj.weight", torch.float32)
