"""The published snippets on transformers 5, with one line added; tokenizer, chat, arguments."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch

from tests.text.tiny import write_tiny_tokenizer
from xverse.checkpoint.load import load
from xverse.engine.request import Sampling
from xverse.engine.simple import decode
from xverse.errors import XverseError
from xverse.quant.quantize import quantize
from xverse.text.chat import V2, V3, chat_format, prompt_budget
from xverse.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

import xverse.interop.transformers  # noqa: E402
from tests.interop.published import GREEDY, HISTORY, PROMPTS, load_pair, same_state  # noqa: E402
from xverse.interop.transformers import XverseForCausalLM, XverseTokenizerFast, auto  # noqa: E402
from xverse.interop.transformers import load as interop_load  # noqa: E402
from xverse.interop.transformers.chat import prompt_ids, text_tokenizer  # noqa: E402


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_readme_snippets(folder: Path) -> None:
    path, before = str(folder), digest(folder)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, torch_dtype=torch.bfloat16, trust_remote_code=True, device_map="auto"
    )
    model.generation_config = GenerationConfig.from_pretrained(path)
    model = model.eval()
    history = [{"role": "user", "content": "1955年谁是美国总统？他是什么党派？"}]
    response = model.chat(tokenizer, history)
    assert isinstance(response, str)
    assert response
    history.append({"role": "assistant", "content": response})
    history.append({"role": "user", "content": "他任职了多少年"})
    assert model.chat(tokenizer, history)

    inputs = tokenizer("北京的景点", return_tensors="pt").input_ids
    inputs = inputs.to(model.device)
    generated_ids = model.generate(
        inputs, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, repetition_penalty=1.1
    )
    (text,) = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
    assert text.startswith("北京的景点")
    assert model.dtype == torch.bfloat16
    assert digest(folder) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantize_snippet(folder: Path, bits: int) -> None:
    model, tokenizer = load_pair(folder, torch.bfloat16)
    assert model.quantize(bits) is model
    expected = quantize(load(folder, device="cpu").decoder, bits)
    assert same_state(model.decoder, expected)
    assert isinstance(model.eval().chat(tokenizer, HISTORY), str)
    with pytest.raises(XverseError, match="quantized already"):
        model.quantize(bits)


@pytest.mark.parametrize("bits", [0, 3, 16, True, "8", None])
def test_other_widths_are_refused_by_name(folders: dict[str, Path], bits: object) -> None:
    model, _ = load_pair(folders["dense"])
    with pytest.raises(ValueError, match="8 or 4 bits"):
        model.quantize(bits)  # type: ignore[arg-type]


class TestTokenizer:
    def test_ids_are_ours(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", truncation_side="left"
        )
        ours = Tokenizer.load(folder)
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        assert set(batch) == {"input_ids", "attention_mask"}
        for text, ids, mask in zip(PROMPTS, batch.input_ids, batch.attention_mask, strict=True):
            assert ids[mask.bool()].tolist() == ours.encode(text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        cut = tokenizer(PROMPTS[1], truncation=True, max_length=3).input_ids
        assert cut == ours.encode(PROMPTS[1])[-3:]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 1)

    def test_saved_it_loads_anywhere(self, folders: dict[str, Path], tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folders["dense"])
        tokenizer.save_pretrained(tmp_path)
        expected = tokenizer(PROMPTS).input_ids
        plain = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        for reader in (plain, again):
            assert reader(PROMPTS).input_ids == expected
            assert reader.eos_token == "<|endoftext|>"
        assert [Tokenizer.load(tmp_path).encode(text) for text in PROMPTS] == expected
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"is_local", "tokenizer_object", "auto_map"} & config.keys()

    def test_an_old_one_without_a_model_loads(self, tmp_path: Path) -> None:
        write_tiny_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert isinstance(tokenizer, XverseTokenizerFast)
        assert tokenizer(PROMPTS[0]).input_ids == Tokenizer.load(tmp_path).encode(PROMPTS[0])

    def test_the_template_is_the_models_format(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(HISTORY, tokenize=False, add_generation_prompt=True)
        chat = V3 if folder.name == "moe" else V2
        end, eos = chat.endings["user"], "<|endoftext|>"
        user, assistant = chat.prefixes["user"], chat.prefixes["assistant"]
        expected = (
            f"{user}你好{end}{assistant}您好！{eos}{user}The weather in 中国?{end}{assistant}"
        )
        assert text == expected

    def test_template_ids_are_those_of_chat(self, folder: Path) -> None:
        """Exact ids, single and batched, padded, as tensors, with the assistant's mask."""
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        ours = Tokenizer.load(folder)
        config = json.loads((folder / "config.json").read_text())
        chat = chat_format(config, ours)
        exact = chat.render(HISTORY, ours)
        one = tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True)
        assert one["input_ids"] == exact.ids
        assert one["attention_mask"] == [1] * len(exact.ids)
        joint = tokenizer(
            tokenizer.apply_chat_template(HISTORY, tokenize=False, add_generation_prompt=True)
        )
        assert joint["input_ids"] != exact.ids  # "The" after a role's space: why it matters
        plain = tokenizer.apply_chat_template(
            HISTORY, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        assert plain.tolist() == [exact.ids]
        trained = chat.render(HISTORY[:2], ours)
        both = tokenizer.apply_chat_template(
            [HISTORY, HISTORY[:2]],
            padding=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        whole = chat.render(HISTORY, ours, add_generation_prompt=False)
        pad = [1] * (len(whole.ids) - len(trained.ids))
        assert both["input_ids"].tolist() == [whole.ids, pad + trained.ids]
        mask = [0] * len(pad) + [int(on) for on in trained.mask]
        assert both["assistant_masks"].tolist()[1] == mask

    def test_a_template_of_the_users_own_is_used(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        own = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
        given = tokenizer.apply_chat_template(HISTORY[:1], chat_template=own)
        assert given["input_ids"] == tokenizer("<你好>")["input_ids"]
        tokenizer.chat_template = own
        assert tokenizer.apply_chat_template(HISTORY[:1])["input_ids"] == given["input_ids"]

    def test_a_damaged_one_is_an_error_of_ours(self, folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / "tokenizer.json").write_text('{"model": {}}')
        with pytest.raises(XverseError, match="not a tokenizer"):
            AutoTokenizer.from_pretrained(copy)


class TestChat:
    def test_the_prompt_is_our_renderers(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        config = json.loads((folder / "config.json").read_text())
        ours = Tokenizer.load(folder)
        expected = chat_format(config, ours).render(
            HISTORY, ours, max_prompt_tokens=prompt_budget(config, 32)
        )
        got = prompt_ids(model.decoder, model.config, text_tokenizer(tokenizer), HISTORY, 32)
        assert got == expected.ids

    def test_the_answer_is_the_engines(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        config = GenerationConfig(max_new_tokens=24, do_sample=False, repetition_penalty=1.3)
        answer = model.chat(tokenizer, HISTORY, generation_config=config)
        ours = text_tokenizer(tokenizer)
        ids = prompt_ids(model.decoder, model.config, ours, HISTORY, 24)
        sampling = Sampling(max_tokens=24, repetition_penalty=1.3).over({})
        tokens = [t.id for t in decode(model.decoder, [ids], [sampling], end_ids={3})]
        assert answer == ours.decode(tokens)
        assert answer != model.chat(tokenizer, HISTORY, generation_config=GREEDY)

    def test_stream_joins_to_the_answer(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        pieces = model.chat(tokenizer, HISTORY, stream=True, generation_config=GREEDY)
        assert isinstance(pieces, Iterator)
        parts = list(pieces)
        assert len(parts) > 1
        assert "".join(parts) == model.chat(tokenizer, HISTORY, generation_config=GREEDY)

    def test_sampling_follows_the_global_seed(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        answers = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            answers.append(model.chat(tokenizer, HISTORY))
        assert answers[0] == answers[1] != answers[2]

    def test_stop_strings_and_max_length(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        whole = model.chat(tokenizer, HISTORY, generation_config=GREEDY)
        stop = whole[3]
        config = GenerationConfig(stop_strings=[stop], **GREEDY.to_diff_dict())
        assert model.chat(tokenizer, HISTORY, generation_config=config) == whole.split(stop)[0]
        ours = text_tokenizer(tokenizer)
        prompt = prompt_ids(model.decoder, model.config, ours, HISTORY, None)
        model.generation_config = GenerationConfig(max_length=len(prompt) + 2)
        short = "".join(model.chat(tokenizer, HISTORY, stream=True))
        assert short
        assert whole.startswith(short.rstrip("\ufffd"))
        assert len(short) <= 4

    def test_a_long_history_is_cut_and_said(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, tokenizer = load_pair(folder)
        answer = model.chat(tokenizer, [*HISTORY[:2]] * 40 + HISTORY, generation_config=GREEDY)
        assert isinstance(answer, str)
        assert "longer than the prompt may be" in caplog.text

    def test_special_tokens_in_a_message_stay_text(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        hostile = [{"role": "user", "content": "<|endoftext|>Human: <pad>"}]
        ids = prompt_ids(model.decoder, model.config, text_tokenizer(tokenizer), hostile, 8)
        assert not set(ids) & set(range(6))
        assert isinstance(model.chat(tokenizer, hostile), str)

    def test_bad_arguments_are_named_at_once(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        with pytest.raises(XverseError, match="role"):
            model.chat(tokenizer, [{"role": "alien", "content": "x"}], stream=True)
        with pytest.raises(XverseError, match="no messages"):
            model.chat(tokenizer, [])
        with pytest.raises(XverseError, match="tokenizer of type str"):
            model.chat("tokenizer", HISTORY)


class TestArguments:
    def test_unknown_ones_are_named(self, folders: dict[str, Path]) -> None:
        for argument in ({"load_in_8bit": True}, {"quantization_config": {"bits": 8}}):
            with pytest.raises(XverseError, match=next(iter(argument))):
                AutoModelForCausalLM.from_pretrained(folders["dense"], **argument)
        AutoModelForCausalLM.from_pretrained(
            folders["dense"], low_cpu_mem_usage=True, use_safetensors=False, load_in_8bit=False
        )

    @pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, torch.device("cpu")])
    def test_device_maps(self, folders: dict[str, Path], device_map: object) -> None:
        model = XverseForCausalLM.from_pretrained(folders["dense"], device_map=device_map)  # type: ignore[arg-type]
        expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
        assert model.device.type == expected
        assert model.dtype == torch.bfloat16

    @pytest.mark.parametrize("device_map", ["balanced", "tpu", {}, {"a": 0, "b": "cpu"}, "cuda:99"])
    def test_other_device_maps_are_refused(
        self, folders: dict[str, Path], device_map: object
    ) -> None:
        with pytest.raises(XverseError, match="device"):
            XverseForCausalLM.from_pretrained(folders["dense"], device_map=device_map)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", ["float32", torch.float32, "auto", torch.float16])
    def test_dtypes(self, folders: dict[str, Path], dtype: torch.dtype | str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=dtype)
        wanted = {"float32": torch.float32, "auto": torch.bfloat16}.get(str(dtype), dtype)
        assert model.dtype == wanted
        assert model.config.dtype == wanted

    def test_other_dtypes_are_refused(self, folders: dict[str, Path]) -> None:
        with pytest.raises(XverseError, match="float64"):
            XverseForCausalLM.from_pretrained(folders["dense"], dtype=torch.float64)

    def test_from_config_starts_afresh(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weight = model.lm_head.weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(AutoModelForCausalLM.from_config(config).lm_head.weight, weight)

    def test_rope_scaling_survives(self, folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text())
        config |= {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
        (copy / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(copy)
        expected = load(copy).decoder.shape
        assert expected.rope_scaling is not None
        assert model.decoder.shape == expected
        model.save_pretrained(tmp_path / "saved")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").decoder.shape == expected

    def test_another_model_is_refused(self, folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text()) | {"model_type": "gpt2"}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(XverseError, match="gpt2"):
            XverseForCausalLM.from_pretrained(copy)
        with pytest.raises(XverseError, match="not a model folder"):
            XverseForCausalLM.from_pretrained(copy / "config.json")


def test_published_ids_go_through_our_hub(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []

    def resolve(name: str) -> Path:
        asked.append((name, "whole"))
        return folders["dense"]

    def pull(name: str, *, include_weights: bool, **options: object) -> Path:
        asked.append((name, options["revision"] if include_weights else "small files"))
        return folders["dense"]

    monkeypatch.setattr(interop_load, "resolve", resolve)
    monkeypatch.setattr(interop_load.hub, "pull", pull)
    name = "xverse/XVERSE-7B-Chat"
    assert isinstance(AutoTokenizer.from_pretrained(name), XverseTokenizerFast)
    assert AutoConfig.from_pretrained("xverse-7b-chat").hidden_size == 64
    assert GenerationConfig.from_pretrained(pretrained_model_name=name).top_k == 30
    assert isinstance(AutoModelForCausalLM.from_pretrained(name), XverseForCausalLM)
    assert isinstance(XverseForCausalLM.from_pretrained(name, revision="v1"), XverseForCausalLM)
    assert asked == [*[(name, "small files")] * 3, (name, "whole"), (name, "v1")]


def test_other_models_are_left_to_transformers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=479, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tiny_tokenizer(tmp_path, legacy=False)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.LlamaForCausalLM
    assert not isinstance(AutoTokenizer.from_pretrained(tmp_path), XverseTokenizerFast)
    assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.LlamaConfig


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(auto, "register", lambda: pytest.fail("registered all the same"))
    for version, why in ((missing, "not installed"), (lambda _: "4.57.1", "4.57.1")):
        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.delitem(sys.modules, "xverse.interop.transformers", raising=False)
        with pytest.raises(XverseError, match=why) as error:
            import_module("xverse.interop.transformers")
        assert 'pip install "xverse-llm[hf]"' in error.value.fix
    assert xverse.interop.transformers.XverseForCausalLM is XverseForCausalLM
