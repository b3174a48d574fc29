"""LLM: batches answer as solo, streams join, stops and limits hold, greedy as transformers."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import xverse.engine.llm as llm_module
from tests.tiny_model import CANARY, write_published_folder
from xverse import LLM, Sampling, XverseError
from xverse.checkpoint.load import load
from xverse.engine.simple import decode
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape
from xverse.quant.quantize import quantize_module
from xverse.quant.recipe import Recipe

PROMPTS = ["Hello", "The 1 and 2", "北京的天气", "a", "Tell me (now), please: is it so?", "x" * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32")


GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=24, ignore_eos=True)
RANDOM = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "seeded"])
def test_a_batch_gives_each_prompt_its_solo_answer(llm: LLM, sampling: Sampling) -> None:
    together = llm.generate(PROMPTS * 4, sampling)  # more than are decoded side by side
    alone = [llm.generate(prompt, sampling) for prompt in PROMPTS]
    assert together == alone * 4
    assert len({answer.tokens for answer in alone}) == len(PROMPTS)


def test_a_loaded_model_is_taken_as_it_is(folder: Path, llm: LLM) -> None:
    model = load(folder, dtype="float32")
    it = LLM(model)
    assert it.model is model
    assert it.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)
    for settled in ({"dtype": "bfloat16"}, {"device": "cpu"}, {"tensor_parallel": 2}):
        with pytest.raises(XverseError, match="settled when it was loaded"):
            LLM(model, **settled)  # type: ignore[arg-type]


def test_in_bf16_too(folder: Path) -> None:
    """Where rounding is coarse, one bit of difference would show within a few tokens."""
    small = LLM(folder)
    many = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=100, ignore_eos=True)
    prompts = [*PROMPTS, "a b " * 40, "The 1 " * 20]
    together = small.generate(prompts * 3, many)
    assert together == [small.generate(prompt, many) for prompt in prompts] * 3


def test_32_threads_get_their_solo_answers(llm: LLM) -> None:
    """Each asks for another text, half of them piece by piece."""
    prompts = [f"{PROMPTS[number % 6]} {number}" for number in range(32)]
    alone = [llm.generate(prompt, GREEDY).text for prompt in prompts]

    def ask(number: int) -> str:
        if number % 2:
            return llm.generate(prompts[number], GREEDY).text
        return "".join(piece.text for piece in llm.stream(prompts[number], GREEDY))

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(32))) == alone
    assert len(set(alone)) > 16
    assert llm.engine.pages.available == llm.engine.pages.count


def test_streams_join_to_the_answer(llm: LLM) -> None:
    for prompt in PROMPTS:
        whole = llm.generate(prompt, RANDOM)
        pieces = list(llm.stream(prompt, RANDOM))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert sum((piece.tokens for piece in pieces), ()) == whole.tokens
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish == whole.finish == "length"


def test_stop_strings_end_the_answer_before_them(llm: LLM) -> None:
    whole = llm.generate("Hello", GREEDY)
    for start in range(0, len(whole.text) - 3, 3):
        stop = whole.text[start : start + 3]
        answer = llm.generate("Hello", Sampling(stop=(stop, "never"), **_greedy()))
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.finish == "stop"
        assert len(answer.tokens) <= len(whole.tokens)


def test_one_prompt_stopping_leaves_the_others(llm: LLM) -> None:
    whole = llm.generate(PROMPTS, GREEDY)
    stop = (whole[0].text[3:6],)
    stopped = llm.generate(PROMPTS, Sampling(stop=stop, **_greedy()))
    assert stopped[0].finish == "stop"
    for before, after in zip(whole, stopped, strict=True):
        assert before.text.startswith(after.text)
        assert (stop[0] in before.text) == (after.finish == "stop")


def _greedy() -> dict[str, object]:
    return {
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 24,
        "ignore_eos": True,
    }


def test_end_of_text_ends_and_is_not_in_the_text() -> None:
    shape = ModelShape.from_config(
        {
            "model_type": "llama",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    decoder = initialize(Decoder(shape), std=0.3).requires_grad_(False)
    free = Sampling(max_tokens=30).over({})
    tokens = [t.id for t in decode(decoder, [[1, 2, 3]], [free])]
    end = tokens[5]
    ended = list(decode(decoder, [[1, 2, 3]], [free], end_ids={end}))
    assert [t.id for t in ended] == tokens[: tokens.index(end) + 1]
    assert ended[-1].finish == "stop"
    ignoring = Sampling(max_tokens=30, ignore_eos=True).over({})
    again = decode(decoder, [[1, 2, 3]], [ignoring], end_ids={end})
    assert [t.id for t in again] == tokens


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_equal_transformers_generate(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    ours = Decoder(ModelShape.from_config(config | {"model_type": "llama"}))
    ours.load_state_dict(theirs.state_dict())
    sampling = Sampling(max_tokens=40, repetition_penalty=penalty).over({})
    prompts = [[5, 9, 100], [7], list(range(20, 40))]
    found: list[list[int]] = [[] for _ in prompts]
    for token in decode(ours, prompts, [sampling] * 3):
        found[token.request].append(token.id)
    for prompt, ids in zip(prompts, found, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert ids == expected[0, len(prompt) :].tolist()


def test_context_is_a_limit_and_not_a_surprise(llm: LLM) -> None:
    long = "a" * 250
    answer = llm.generate(long, Sampling(temperature=0.0, ignore_eos=True))
    assert answer.prompt_tokens + len(answer.tokens) == 256
    assert answer.finish == "length"
    with pytest.raises(XverseError, match="context holds 256"):
        llm.generate(long, Sampling(max_tokens=7))
    with pytest.raises(XverseError, match="context holds 256"):
        llm.generate("a" * 256)
    with pytest.raises(XverseError, match="empty"):
        llm.generate("")


def test_chat_is_the_rendered_prompt_continued(llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "You are here."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "你好吗"},
    ]
    encoded = llm.encode_chat(messages, GREEDY)
    answer = llm.chat(messages, GREEDY)
    expected = [token.id for token in decode(llm.decoder, [encoded.ids], [GREEDY.over({})])]
    assert list(answer.tokens) == expected
    assert answer.prompt_tokens == len(encoded.ids)
    assert "".join(piece.text for piece in llm.chat_stream(messages, GREEDY)) == answer.text


def test_a_history_that_does_not_fit_is_cut_and_said(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [
        {"role": role, "content": f"{number} {'word ' * 6}"}
        for number in range(8)
        for role in ("user", "assistant")
    ]
    messages = [*turns, {"role": "user", "content": "last"}]
    answer = llm.chat(messages, Sampling(max_tokens=16, temperature=0.0))
    assert answer.cut is not None
    assert answer.cut.messages > 0
    assert "left out" in caplog.text


def test_generation_config_is_the_default(llm: LLM) -> None:
    """The published chat settings sample: two seeds differ, one seed does not."""
    runs = [llm.generate("Hello", Sampling(seed=seed)).tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) <= 32  # its max_new_tokens


def test_quantized_llm_answers(folder: Path) -> None:
    for bits in (8, 4):
        small = LLM(folder, dtype="float32", quantize=bits)
        assert len(small.generate("Hello", GREEDY).tokens) == 24
    with pytest.raises(XverseError):
        LLM(folder, quantize=3)


def test_a_layer_is_rounded_before_the_next_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a device need not hold the model as it was."""
    read: list[weakref.ref[object]] = []

    def watched(name: str, module: nn.Module, recipe: Recipe) -> nn.Module:
        assert [ref() for ref in read if ref() is not None] == []
        made = quantize_module(name, module, recipe)
        if made is not module:
            read.append(weakref.ref(module.weight))
        return made

    monkeypatch.setattr(llm_module, "quantize_module", watched)
    small = LLM(folder, dtype="float32", quantize=8)
    assert len(read) == 7 * small.decoder.shape.num_hidden_layers


def test_nothing_in_the_folder_was_run(llm: LLM, folder: Path) -> None:
    llm.chat([{"role": "user", "content": "Hello"}], GREEDY)
    assert not (folder / CANARY).exists()
