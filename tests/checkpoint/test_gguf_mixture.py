"""Mixtures of experts as GGUF: llama.cpp computes what we do, and the same weights come back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.quantized_folders import RECIPES, logits, write_folder, write_quantized
from tests.checkpoint.test_gguf_header import everything, outcomes
from tests.checkpoint.tiny_gguf import EXPERTS, F32, FEED, HIDDEN, STRING, U32, Draft, add, mixture
from tests.tiny_model import published_config, random_decoder
from xverse import LLM, Sampling, XverseError
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_config import config_of
from xverse.checkpoint.gguf_export import export_gguf
from xverse.checkpoint.gguf_unpack import unpack_gguf
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.checkpoint.go_template import render_go
from xverse.checkpoint.load import load
from xverse.checkpoint.ollama import modelfile_of
from xverse.checkpoint.weights import open_weights
from xverse.model.decoder import Decoder
from xverse.text.chat import V3, chat_format

PROMPTS = ["Human: 你好 the 123 in  house.\n\n", "the", "héllo, thé!?"]
NEW_TOKENS = 12


def model(folder: Path, **changes: object) -> Decoder:
    """A mixture with weights that F16 holds exactly, but for the routers, which need fp32."""
    config = published_config(moe=True) | {"torch_dtype": "float32", "num_hidden_layers": 2}
    config |= changes
    decoder = random_decoder(config, dtype=torch.float32)
    for name, weight in decoder.state_dict().items():
        if not name.endswith("router.weight"):
            weight.copy_(weight.half())
    write_folder(folder, decoder, config)
    return decoder


def in_llama_cpp(path: Path, **options: object) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the package llama-cpp-python")
    return llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False, **options)


def test_the_same_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    decoder = model(tmp_path / "m", num_key_value_heads=2)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    again = load(tmp_path / "m.gguf", dtype="float32")
    rounded = again.decoder.shape.rms_norm_eps  # in fp32, as the file has it
    assert again.decoder.shape == replace(decoder.shape, rms_norm_eps=rounded)
    assert rounded == pytest.approx(decoder.shape.rms_norm_eps)
    expected = decoder.state_dict()
    found = again.decoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert chat_format(again.checkpoint.config, again.tokenizer) is V3

    unpack_gguf(tmp_path / "m.gguf", tmp_path / "again")
    before, after = open_weights(tmp_path / "m"), open_weights(tmp_path / "again")
    assert after.infos().keys() == before.infos().keys()
    for name in before.infos():
        same = torch.equal(after.read(name, torch.float32), before.read(name, torch.float32))
        assert same, name
    router = after.infos()["model.layers.0.mlp.router.weight"]
    assert router.dtype == torch.float32
    assert after.infos()["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float16


def test_llama_cpp_reads_and_continues_alike(tmp_path: Path) -> None:
    decoder = model(tmp_path / "m", num_key_value_heads=2)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    theirs = in_llama_cpp(tmp_path / "m.gguf", logits_all=True)
    theirs.eval((torch.arange(20) * 5 % 200).tolist())
    got = torch.from_numpy(theirs.scores[:20].copy())
    # 0.007 off; 0.03 with experts' weights scaled by 1.01, 0.8 with weights not normalized.
    assert torch.allclose(got, logits(decoder), atol=0.02)

    ours = LLM(tmp_path / "m.gguf", dtype="float32", device="cpu")
    greedy = Sampling(max_tokens=NEW_TOKENS, temperature=0, repetition_penalty=1.0)
    for prompt, answer in zip(PROMPTS, ours.generate(PROMPTS, greedy), strict=True):
        ids = ours.tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        tokens = theirs.generate(ids, temp=0, repeat_penalty=1.0)
        assert [token for _, token in zip(answer.tokens, tokens, strict=False)] == list(
            answer.tokens
        )


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_k"])
def test_llama_cpp_runs_every_kind(tmp_path: Path, type: str) -> None:
    model(tmp_path / "m", hidden_size=256, num_hidden_layers=3)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", type)
    theirs = in_llama_cpp(tmp_path / "m.gguf", logits_all=True)
    theirs.eval((torch.arange(20) * 5 % 200).tolist())
    got = torch.from_numpy(theirs.scores[:20].copy())
    ours = logits(load(tmp_path / "m.gguf", dtype="float32").decoder)
    # llama.cpp rounds activations to 8 bits, which now and then turns a router's choice.
    assert (got - ours).norm() < 0.2 * ours.norm()


def test_routers_stay_wide_and_rows_of_no_whole_blocks_get_smaller_ones(tmp_path: Path) -> None:
    model(tmp_path / "m", hidden_size=256)  # experts of 96, which 256 does not divide
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "q4_k")
    tensors = GgufFile.open(tmp_path / "m.gguf").tensors
    assert tensors["blk.1.ffn_gate_inp.weight"].kind == "F32"
    assert tensors["blk.1.ffn_gate_exps.weight"].kind == "Q4_K"
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 96, 256)
    assert tensors["blk.1.ffn_up_shexp.weight"].shape == (192, 256)
    assert {tensors[f"blk.{i}.ffn_down_exps.weight"].kind for i in (0, 1)} <= {"Q5_0", "Q8_0"}


def test_the_file_says_what_the_mixture_is(tmp_path: Path) -> None:
    model(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    metadata = GgufFile.open(tmp_path / "m.gguf").metadata
    for key, value in {
        "general.architecture": "bailingmoe", "bailingmoe.expert_count": 8,
        "bailingmoe.expert_used_count": 3, "bailingmoe.expert_shared_count": 2,
        "bailingmoe.expert_feed_forward_length": 96, "bailingmoe.expert_weights_norm": True,
        "bailingmoe.expert_weights_scale": 1.0, "bailingmoe.leading_dense_block_count": 0,
        "bailingmoe.rope.freq_base": 5e5, "xverse.model_type": "xverse", "xverse.chat_format": "v3",
    }.items():  # fmt: skip
        assert metadata[key] == value, key


def test_a_quantized_mixture_is_computed_back(tmp_path: Path) -> None:
    decoder = write_quantized(tmp_path / "m", RECIPES["int4"], moe=True)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    again = load(tmp_path / "m.gguf", dtype="float32").decoder
    assert torch.allclose(logits(again), logits(decoder), atol=0.05)


def test_the_modelfile_has_the_prompt_of_the_mixtures(tmp_path: Path) -> None:
    model(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for source in ("m", "m.gguf"):
        template = modelfile_of(tmp_path / source, "model.gguf").split('"""')[1]
        assert render_go(template, messages) == "system: Be brief.\nuser: Hi\nassistant: "


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"attention_bias": True},
     {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}],
    ids=["tied", "biased", "llama3"],
)  # fmt: skip
def test_mixtures_that_llama_cpp_has_no_form_for_are_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    model(tmp_path / "m", **changes)
    with pytest.raises(XverseError, match="experts"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_chat_format_that_is_not_the_models_own_comes_back(tmp_path: Path) -> None:
    model(tmp_path / "m")
    config = tmp_path / "m" / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "xverse_chat_format": "xverse"})
    )
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    again = load(tmp_path / "m.gguf")
    assert chat_format(again.checkpoint.config, again.tokenizer).name == "xverse"


def test_a_file_of_another_writer_is_read(tmp_path: Path) -> None:
    draft = mixture()
    file = GgufFile.open(draft.write(tmp_path / "m.gguf"))
    assert config_of(file)["num_experts"] == EXPERTS
    weights = GgufWeights(file)
    entry = next(one for one in draft.entries if one.name == "blk.1.ffn_up_exps.weight")
    stack = torch.frombuffer(bytearray(entry.data), dtype=torch.float32).view(-1, FEED, HIDDEN)
    for number in range(EXPERTS):
        name = f"model.layers.1.mlp.experts.{number}.up_proj.weight"
        assert torch.equal(weights.read(name, torch.float32), stack[number])
        assert weights.infos()[name].nbytes == 4 * FEED * HIDDEN


def changed(key: str, kind: int, value: object) -> Draft:
    return mixture().put(f"bailingmoe.{key}", kind, value)


def without(*names: str) -> Draft:
    draft = mixture()
    draft.entries = [entry for entry in draft.entries if entry.name not in names]
    return draft


WRONG = {
    "no mark of ours": mixture().drop("xverse.model_type"),
    "a mark of no model": mixture().put("xverse.model_type", STRING, "ling"),
    "weights not normalized": mixture().drop("bailingmoe.expert_weights_norm"),
    "weights scaled": changed("expert_weights_scale", F32, 2.5),
    "more experts than stacked": changed("expert_count", U32, 2**31 - 1),
    "wider than stacked": changed("expert_feed_forward_length", U32, 2**31 - 1),
    "more shared than stacked": changed("expert_shared_count", U32, 2**31 - 1),
    "no number of shared experts": mixture().drop("bailingmoe.expert_shared_count"),
    "no stack": without("blk.0.ffn_gate_exps.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mixture_that_is_not_ours_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(XverseError) as raised:
        config_of(GgufFile.open(WRONG[case].write(tmp_path / "m.gguf")))
    assert raised.value.fix


def test_a_stack_of_other_experts_is_refused(tmp_path: Path) -> None:
    draft = without("blk.1.ffn_up_exps.weight")
    add(draft, "blk.1.ffn_up_exps.weight", torch.zeros(EXPERTS - 1, FEED, HIDDEN))
    with pytest.raises(XverseError, match="there are 4"):
        GgufWeights(GgufFile.open(draft.write(tmp_path / "m.gguf")))


def test_mutations_are_read_or_refused(tmp_path: Path) -> None:
    draft = mixture()
    data = draft.bytes()
    header = len(data) - sum(len(entry.data) for entry in draft.entries)
    counts = outcomes(data, header, tmp_path / "mutated.gguf", 300, everything)
    assert counts["read"] > 0
    assert counts["refused"] > 100
