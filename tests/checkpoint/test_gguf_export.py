"""GGUF export: what is written is what was there, for our reader, another one, and llama.cpp."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.quantized_folders import RECIPES, logits, write_folder, write_quantized
from tests.text.tiny import tiny_tokenizer_json
from tests.tiny_model import published_config, random_decoder
from xverse import XverseError
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_export import TYPES, export_gguf
from xverse.checkpoint.gguf_write import Outgoing, write_gguf
from xverse.checkpoint.load import load
from xverse.model.decoder import Decoder
from xverse.text.tokenizer import Tokenizer

FP32 = {"torch_dtype": "float32"}
TEXTS = ["Human: 你好 the 123 in  house.\n\n", "", " ", "  the", "ünïcödé 😀\t\r\n",
         "<|endoftext|>", "the▁the", "héllo, thé!?", "0x1F 3.14159"]  # fmt: skip


def model(folder: Path, **changes: object) -> Decoder:
    config = published_config() | FP32 | changes
    decoder = random_decoder(config, dtype=torch.float32)
    write_folder(folder, decoder, config)
    return decoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"model_type": "llama", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}, "rope_theta": 500000.0},
    ],
    ids=["xverse", "base", "grouped", "tied", "wide", "biased", "linear", "llama3"],
)  # fmt: skip
def test_the_same_model_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    decoder = model(tmp_path / "m", **changes)
    exported = export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    assert exported.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert exported.texts_checked > 0
    assert exported.texts_differing == 0
    again = load(tmp_path / "m.gguf", dtype="float32")
    assert torch.allclose(logits(again.decoder), logits(decoder), atol=0.05)
    assert again.decoder.shape.rope_theta == decoder.shape.rope_theta
    assert again.decoder.shape.rope_scaling == decoder.shape.rope_scaling
    assert again.end_ids == {3}


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    model(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    ours, again = Tokenizer.load(tmp_path / "m"), load(tmp_path / "m.gguf").tokenizer
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text), text
    assert (again.bos_id, again.eos_id, again.pad_id) == (2, 3, 1)
    assert again.special_ids == ours.special_ids
    assert again.encode("<|endoftext|>", parse_special=True) == [3]


def test_llama_cpp_reads_tokens_and_continues_alike(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the package llama-cpp-python")
    decoder = model(tmp_path / "m", rope_theta=50000.0, num_key_value_heads=2)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    theirs: Any = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    ours = Tokenizer.load(tmp_path / "m")
    for text in TEXTS:
        if "\0" not in text:
            got = theirs.tokenize(text.encode(), add_bos=False, special=False)
            assert got == ours.encode(text), text
    assert theirs.token_bos() == 2
    assert theirs.token_eos() == 3
    theirs.eval((torch.arange(20) * 5 % 200).tolist())
    got = torch.from_numpy(theirs.scores[:20].copy())
    assert torch.allclose(got, logits(decoder), atol=0.1)


@pytest.mark.parametrize("type", [type for type in TYPES if type != "f16"])
def test_every_type_holds_the_weights_as_near_as_its_kinds_do(tmp_path: Path, type: str) -> None:
    decoder = model(tmp_path / "m", hidden_size=256, intermediate_size=512)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", type)
    again = load(tmp_path / "m.gguf", dtype="float32").decoder
    near = {"bf16": 0.003, "q8_0": 0.01, "q6_k": 0.02, "q4_k": 0.08, "q4_0": 0.1}[type]
    for name, weight in decoder.state_dict().items():
        error = (again.state_dict()[name] - weight).norm() / weight.norm()
        assert error < near, name
    file = GgufFile.open(tmp_path / "m.gguf")
    assert file.tensors["blk.0.ffn_norm.weight"].kind == "F32"
    head = {"q4_k": "Q6_K", "q4_0": "Q6_K"}.get(type, TYPES[type][0])
    assert file.tensors["output.weight"].kind == head
    assert file.tensors["blk.1.attn_q.weight"].kind == TYPES[type][0]
    assert file.get("general.file_type", int) == TYPES[type][1]


def test_rows_that_are_no_whole_blocks_have_smaller_ones(tmp_path: Path) -> None:
    model(tmp_path / "m", intermediate_size=512)  # 64 columns and 512
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "q4_k")
    tensors = GgufFile.open(tmp_path / "m.gguf").tensors
    assert tensors["blk.1.attn_q.weight"].kind == "Q5_0"
    assert tensors["output.weight"].kind == "Q8_0"
    assert {tensors[f"blk.{layer}.ffn_down.weight"].kind for layer in range(4)} == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("name", ["int4", "int8-asymmetric", "fp8"])
def test_a_quantized_folder_is_computed_back(tmp_path: Path, name: str) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES[name])
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    again = load(tmp_path / "m.gguf", dtype="float32").decoder
    assert torch.allclose(logits(again), logits(decoder), atol=0.05)


def test_a_gguf_file_is_exported_to_the_same_numbers(tmp_path: Path) -> None:
    model(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "a.gguf", "bf16")
    export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "bf16")
    a, b = load(tmp_path / "a.gguf").decoder, load(tmp_path / "b.gguf").decoder
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_another_reader_finds_what_was_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf")
    decoder = model(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    names = {tensor.name: tensor for tensor in reader.tensors}
    up = names["blk.2.ffn_up.weight"]
    got = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    assert torch.allclose(got, decoder.state_dict()["model.layers.2.mlp.up_proj.weight"], atol=0.01)
    fields = reader.fields
    assert fields["xverse.rope.freq_base"].contents() == 10000.0
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert "Human: " in fields["tokenizer.chat_template"].contents()


def test_a_text_of_1024_bytes_gets_a_line_end(tmp_path: Path) -> None:
    model(tmp_path / "m", model_type="llama")
    config = tmp_path / "m" / "tokenizer_config.json"
    template = "{{ messages[0]['content'] }}"
    template += "x" * (1024 - len(template))
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    file = GgufFile.open(tmp_path / "m.gguf")
    assert file.get("tokenizer.chat_template", str) == template + "\n"


def test_what_llama_cpp_has_no_form_for_is_refused_by_name(tmp_path: Path) -> None:
    model(tmp_path / "ntk", rope_scaling={"type": "dynamic", "factor": 2.0})
    model(tmp_path / "moe", **published_config(moe=True) | FP32 | {"tie_word_embeddings": True})
    for name, words in (("ntk", "NTK"), ("moe", "experts")):
        with pytest.raises(XverseError, match=words):
            export_gguf(tmp_path / name, tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    model(tmp_path / "m")
    (tmp_path / "m.gguf").write_text("precious")
    with pytest.raises(XverseError, match="there already"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "precious"


@pytest.mark.parametrize(
    ("value", "kind", "fine"),
    [(7e4, "F16", False), (65504.0, "F16", True), (7e4, "BF16", True), (1e6, "Q8_0", False),
     (float("nan"), "BF16", False), (float("inf"), "F32", False)],
)  # fmt: skip
def test_numbers_that_a_kind_cannot_hold_leave_no_file(
    tmp_path: Path, value: float, kind: str, fine: bool
) -> None:
    numbers = torch.zeros(2, 32)
    numbers[1, 3] = value
    path = tmp_path / "m.gguf"
    tensors = [Outgoing("a", (2, 32), kind, [lambda: numbers])]
    if fine:
        write_gguf(path, {"general.architecture": "llama"}, tensors)
        assert torch.equal(
            GgufFile.open(path).read("a", torch.float32), numbers.to(kind_dtype(kind))
        )
        return
    with pytest.raises(XverseError, match="no such number"):
        write_gguf(path, {"general.architecture": "llama"}, tensors)
    assert list(tmp_path.iterdir()) == []


def kind_dtype(kind: str) -> torch.dtype:
    return kind_named(kind).dtype


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(XverseError, match="different models"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")


def broken(**changes: object) -> dict[str, object]:
    return tiny_tokenizer_json(legacy=False) | changes


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed",
                           "invert": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<sep>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ], "pair": [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
            "special_tokens": {"<sep>": {"id": "<sep>", "ids": [0], "tokens": ["<sep>"]}}}},
    ],
    ids=["lower case", "removes", "frames"],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_has_not_are_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(broken(**change)))
    with pytest.raises(XverseError, match="can't be written into a GGUF file"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_merges_over_a_cut_are_refused(tmp_path: Path) -> None:
    content = broken()
    model_part = content["model"]
    assert isinstance(model_part, dict)
    vocab = model_part["vocab"] | {"1.": len(model_part["vocab"])}
    content["model"] = model_part | {"vocab": vocab, "merges": [*model_part["merges"], "1 ."]}
    model(tmp_path / "m", vocab_size=len(vocab))
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(XverseError, match="reach over its cuts"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
