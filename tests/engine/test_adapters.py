"""Several adapters in one engine: each request gets what the merged weights say, in any company."""

import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.adapters import merge, random_adapter
from tests.engine.tiny import CONFIG, VOCAB, greedy, plain_choice, tiny_decoder
from tests.tiny_model import write_published_folder
from xverse.checkpoint.adapter import Adapter, write_adapter
from xverse.checkpoint.load import load
from xverse.cli import run
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.llm import LLM
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Sampling, Scores, Token
from xverse.errors import XverseError
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.quant.prepare import prepare
from xverse.quant.quantize import quantize

SHAPE = ModelShape.from_config(CONFIG)
KINDS: Mapping[str, Adapter] = {
    "a": random_adapter(SHAPE, seed=1),
    "b": random_adapter(SHAPE, seed=2, rank=2, targets=("v_proj", "down_proj")),
    "dora": random_adapter(SHAPE, seed=3, dora=True, targets=("q_proj", "o_proj", "up_proj")),
}
ROOM = 2**30


@cache
def merged(name: str | None) -> Decoder:
    return tiny_decoder() if name is None else merge(deepcopy(tiny_decoder()), KINDS[name])


def answer(name: str | None, ids: tuple[int, ...], count: int = 12) -> list[int]:
    """The greedy ids of the merged weights, by the plain decoder."""
    return list(plain_choice(ids, greedy(count), merged(name)))


def engine(decoder: Decoder | None = None, *, most: int = 4, **options: Any) -> Engine:
    decoder = fuse(deepcopy(tiny_decoder())) if decoder is None else decoder
    told = EngineOptions(kv_tokens=2000, page_size=4, max_adapters=most, **options)
    it = Engine(decoder, options=told)
    for name in list(KINDS)[:most]:
        it.load_adapter(name, KINDS[name])
    return it


def finish(it: Engine) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token)
            found.setdefault(output.request, []).append(output.id)
        it.scheduler.check()
    return found


def asked(seed: int, count: int = 14) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """Prompts that begin alike, and whose they are."""
    dice = random.Random(seed)
    stem = tuple(dice.randrange(VOCAB) for _ in range(13))
    for _ in range(count):
        ids = tuple(dice.randrange(VOCAB) for _ in range(dice.randint(1, 20)))
        yield dice.choice([None, *KINDS]), stem[: dice.choice([0, 13])] + ids


def check_mixture(it: Engine) -> None:
    """Requests that come while others are under way, of every adapter and of none."""
    prompts = {}
    found: dict[int, list[int]] = {}
    for name, ids in asked(5):
        number = it.add(Request(ids, greedy(12), adapter=name))
        prompts[number] = name, ids
        for output in it.step():
            assert isinstance(output, Token)
            found.setdefault(output.request, []).append(output.id)
    for number, rest in finish(it).items():
        found.setdefault(number, []).extend(rest)
    for number, (name, ids) in prompts.items():
        assert found[number] == answer(name, ids), (number, name)
    assert {name for name, _ in prompts.values()} == {None, *KINDS}
    assert len({tuple(answer(name, (1, 2, 3))) for name in (None, *KINDS)}) == 4


@pytest.mark.parametrize("fused", [True, False])
def test_a_mixture_gets_the_answers_of_merged_weights(fused: bool) -> None:
    check_mixture(engine(None if fused else deepcopy(tiny_decoder())))


def test_so_in_deterministic_mode() -> None:
    check_mixture(engine(deterministic=True))


def test_so_with_guesses() -> None:
    check_mixture(engine(speculate=4))


def test_so_where_steps_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
    it = engine()
    assert it.overlap
    check_mixture(it)


def test_not_a_bit_depends_on_the_company() -> None:
    """In bfloat16, whose decode steps are the same bits alone and together."""
    decoder = fuse(deepcopy(tiny_decoder()).to(torch.bfloat16))
    sampling = replace(greedy(8), logprobs=2)

    def run(requests: list[Request]) -> dict[int, list[Token]]:
        it = Engine(
            decoder, options=EngineOptions(kv_tokens=2000, max_adapters=3, share_prefixes=False)
        )
        for name, adapter in KINDS.items():
            it.load_adapter(name, adapter)
        found: dict[int, list[Token]] = {it.add(request): [] for request in requests}
        while it.busy:
            for output in it.step():
                assert isinstance(output, Token)
                found[output.request].append(output)
        return found

    requests = [Request(ids, sampling, adapter=name) for name, ids in asked(6, 9)]
    together = run(requests)
    for number, request in enumerate(requests):
        (alone,) = run([request]).values()
        assert [(t.id, t.logprob, t.top) for t in alone] == [
            (t.id, t.logprob, t.top) for t in together[number]
        ]


def test_shared_beginnings_are_of_one_adapter() -> None:
    """Keys and values differ, also of two adapters that had the same name one after another."""
    it, ids = engine(), tuple(range(2, 30))
    for name in (None, "a", None, "b", "a"):
        it.add(Request(ids, greedy(6), adapter=name))
        assert [*finish(it).values()] == [answer(name, ids, 6)]
    assert it.scheduler.reused_tokens  # the base's and a's second time
    it.load_adapter("a", KINDS["b"], replace=True)
    it.add(Request(ids, greedy(6), adapter="a"))
    assert [*finish(it).values()] == [answer("b", ids, 6)]


def test_a_swap_is_for_those_who_come_after() -> None:
    it, ids = engine(most=3), (5, 6, 7, 8)
    alone = it.adapters.nbytes
    before = it.add(Request(ids, greedy(12), adapter="a"))
    it.step()
    it.load_adapter("a", KINDS["b"], replace=True)
    after = it.add(Request(ids, greedy(12), adapter="a"))
    in_use = it.adapters.nbytes
    it.step()
    it.unload_adapter("a")
    with pytest.raises(XverseError, match="no adapter 'a'"):
        it.add(Request(ids, greedy(12), adapter="a"))
    old = it._generations[before]
    new = it._generations[after]
    finish(it)
    assert old.ids[4:] == answer("a", ids)
    assert new.ids[4:] == answer("b", ids)
    assert it.adapters.names == ["b", "dora"]
    assert it.adapters.nbytes < alone < in_use  # what left is gone, and was not while in use


def test_an_abort_lets_go() -> None:
    it = engine(most=3)
    number = it.add(Request((1, 2, 3), greedy(12), adapter="a"))
    it.step()
    it.unload_adapter("a")
    held = it.adapters.nbytes
    it.abort(number)
    assert it.adapters.nbytes < held


def test_scores_and_labels_are_the_adapters() -> None:
    it, ids = engine(), tuple(range(3, 20))
    found = []
    for name in (None, "a"):
        it.add(Request(ids, None, score_from=1, adapter=name))
        found += [output for output in it.step() if isinstance(output, Scores)]
    expected = engine(fuse(deepcopy(merged("a"))), most=1)
    expected.add(Request(ids, None, score_from=1))
    (scores,) = expected.step()
    assert isinstance(scores, Scores)
    assert found[1].logprobs == pytest.approx(scores.logprobs, abs=1e-4)
    assert found[0].logprobs != pytest.approx(scores.logprobs, abs=1e-1)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantized_weights(bits: int) -> None:
    """The rounded weights, and what the adapter adds to them unrounded."""
    rounded = deepcopy(tiny_decoder())
    quantize(rounded, bits)
    plain = deepcopy(rounded)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "dequantized"):
            layer = Linear.of(module.dequantized(), None)
            if name.endswith("embed_tokens"):
                plain.model.embed_tokens.weight = layer.weight
            else:
                plain.set_submodule(name, layer)
    ids = tuple(range(3, 20))
    logprobs = {}
    for what, decoder in (("rounded", fuse(rounded)), ("merged", fuse(merge(plain, KINDS["a"])))):
        it = engine(decoder)
        it.add(Request(ids, None, score_from=1, adapter="a" if what == "rounded" else None))
        (scores,) = it.step()
        assert isinstance(scores, Scores)
        logprobs[what] = scores.logprobs
    assert logprobs["rounded"] == pytest.approx(logprobs["merged"], abs=2e-3)
    # And repacked for this CPU, layer by layer, with inputs rounded too.
    repacked = prepare(fuse(rounded), blocks=False)
    it = engine(repacked, most=2)
    it.add(Request(ids, None, score_from=1, adapter="a"))
    (scores,) = it.step()
    assert isinstance(scores, Scores)
    assert scores.logprobs == pytest.approx(logprobs["merged"], abs=1.0)


def test_dora_needs_the_weights() -> None:
    rounded = deepcopy(tiny_decoder())
    quantize(rounded, 4)
    repacked = prepare(fuse(rounded), blocks=False)
    it = Engine(repacked, options=EngineOptions(kv_tokens=200, max_adapters=1))
    if "PackedLinear" in str(repacked):  # where a compiler was found
        with pytest.raises(XverseError, match="DoRA"):
            it.load_adapter("dora", KINDS["dora"])
        assert it.adapters.names == []


def test_what_is_loaded_is_bounded() -> None:
    it = engine(most=2)
    with pytest.raises(XverseError, match="2 are loaded, and there may be 2"):
        it.load_adapter("c", KINDS["dora"])
    with pytest.raises(XverseError, match="an adapter 'a' already"):
        it.load_adapter("a", KINDS["b"])
    with pytest.raises(XverseError, match="no adapter 'c'"):
        it.unload_adapter("c")
    small = engine(most=0)
    with pytest.raises(XverseError, match="no adapters here"):
        small.load_adapter("a", KINDS["a"])
    with pytest.raises(XverseError, match="no adapters here"):
        small.add(Request((1, 2), greedy(2), adapter="a"))
    told = EngineOptions(kv_tokens=200, max_adapters=9, adapter_bytes=it.adapters.nbytes // 2)
    tight = Engine(fuse(deepcopy(tiny_decoder())), options=told)
    tight.load_adapter("b", KINDS["b"])
    with pytest.raises(XverseError, match=r"no memory for the adapter 'a'"):
        tight.load_adapter("a", KINDS["a"])
    assert tight.adapters.names == ["b"]


def test_a_refused_request_holds_nothing() -> None:
    it = engine(most=2)
    held = it.adapters.nbytes
    for ids in ((VOCAB,), tuple([1] * 3000)):
        with pytest.raises(XverseError):
            it.add(Request(ids, greedy(2), adapter="a"))
    it.unload_adapter("a")
    assert it.adapters.nbytes < held


def test_of_a_mixture_only_what_is_dense_can_be_added_to() -> None:
    config = CONFIG | {"model_type": "xverse", "num_key_value_heads": 4, "num_experts": 4}
    shape = ModelShape.from_config(config | {"moe_top_k": 2, "num_shared_experts": 1})
    decoder = initialize(Decoder(shape), std=0.3).requires_grad_(False)
    attention = random_adapter(shape, seed=7, targets=("q_proj", "v_proj"))
    expected = plain_choice((1, 2, 3), greedy(8), merge(deepcopy(decoder), attention))
    it = Engine(fuse(decoder), options=EngineOptions(kv_tokens=200, max_adapters=2))
    it.load_adapter("attention", attention)
    with pytest.raises(XverseError, match=r"(?s)experts.*behind attention"):
        it.load_adapter("all", random_adapter(shape, seed=7))
    with pytest.raises(XverseError, match=r"(?s)lm_head.*behind attention"):
        it.load_adapter("head", random_adapter(shape, seed=7, targets=("lm_head",)))
    it.add(Request((1, 2, 3), greedy(8), adapter="attention"))
    assert [*finish(it).values()] == [list(expected)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter of it that was trained in another chat format."""
    path = tmp_path_factory.mktemp("model")
    shape = write_published_folder(path / "XVERSE-Tiny-Chat").shape
    adapter = random_adapter(shape, seed=9, size=0.15, chat_format="v3")
    write_adapter(path / "adapter", adapter)
    return path / "XVERSE-Tiny-Chat", path / "adapter"


WORDS = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_is_written_as_the_adapter_was_trained(folders: tuple[Path, Path]) -> None:
    llm = LLM(folders[0], dtype="float32", adapters={"a": folders[1]})
    own, trained = (llm.encode_chat(HELLO, adapter=name).ids for name in (None, "a"))
    assert llm.tokenizer.decode(own).startswith("Human: ")
    assert llm.tokenizer.decode(trained).startswith("user: ")
    answer = llm.chat(HELLO, WORDS, adapter="a")
    model = load(folders[0], dtype="float32")
    shape = model.decoder.shape
    same = merge(model.decoder, random_adapter(shape, seed=9, size=0.15))
    filled = WORDS.over(model.checkpoint.generation_config)
    assert list(answer.tokens) == list(plain_choice(tuple(trained), filled, same))
    assert answer.tokens != llm.chat(HELLO, WORDS).tokens
    pieces = list(llm.chat_stream(HELLO, WORDS, adapter="a"))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert (
        llm.generate("Hello", WORDS, adapter="a") == llm.choices("Hello", 1, WORDS, adapter="a")[0]
    )
    llm.load_adapter("a", folders[1], replace=True)
    llm.unload_adapter("a")
    with pytest.raises(XverseError, match="no adapter 'a'"):
        llm.generate("Hello", WORDS, adapter="a")


def test_a_model_in_parts_takes_none(folders: tuple[Path, Path]) -> None:
    with pytest.raises(XverseError, match="takes no adapters"):
        LLM(folders[0], tensor_parallel=2, adapters={"a": folders[1]})


def test_generate_with_an_adapter(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = map(str, folders)
    words = ["--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "--chat"]
    said = []
    for more in ([], ["--adapter", adapter]):
        assert run(["generate", model, "Hello", *words, *more]) == 0
        said.append(capsys.readouterr().out)
    llm = LLM(folders[0], dtype="float32", adapters={"a": folders[1]})
    greedily = Sampling(temperature=0.0, max_tokens=8)
    assert said == [llm.chat(HELLO, greedily, adapter=a).text + "\n" for a in (None, "a")]
    assert said[0] != said[1]
    assert run(["generate", model, "Hello", "--adapter", model]) == 1
    assert "holds no adapter" in capsys.readouterr().err


def overlapping(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    """An engine that runs as on a GPU, by the plain twins of its kernels."""
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
    return engine(**options)


def test_captured_steps_serve_whoever_lies_in_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    it = overlapping(monkeypatch)
    assert isinstance(it.runner, DeviceRunner)
    inputs: list[int] = []
    steps = it.runner.steps

    def counted(inputs_IB: torch.Tensor, rows: int) -> torch.Tensor:
        inputs.append(len(inputs_IB))
        return type(steps).__call__(steps, inputs_IB, rows)

    monkeypatch.setattr(it.runner, "steps", counted)
    for name in (None, *KINDS):
        it.add(Request((1, 2, 3, 4), greedy(9), adapter=name))
    answers = list(finish(it).values())
    assert answers == [answer(name, (1, 2, 3, 4), 9) for name in (None, *KINDS)]
    assert inputs.count(4) >= 8  # of all four at once
    inputs.clear()
    it.add(Request((1, 2, 3, 4), greedy(9)))
    finish(it)
    assert set(inputs) == {3}  # without an adapter, the step that knows of none


@pytest.mark.parametrize("options", [{"adapter_slots": 1}, {"adapter_slots": 0}])
def test_more_adapters_than_slots(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """Slots change hands between steps, and who finds none is computed all the same."""
    it = overlapping(monkeypatch, **options)
    check_mixture(it)
    for name in ("a", "b", "dora", "a"):
        it.add(Request((5, 6, 7), greedy(5), adapter=name))
        assert [*finish(it).values()] == [answer(name, (5, 6, 7), 5)]
        slots, loaded = it.adapters.slots, it.adapters.hold(name)
        assert (slots is None) == (options["adapter_slots"] == 0)
        assert slots is None or slots.of(loaded) == 0
        it.adapters.release(loaded)


def test_a_rank_above_that_of_slots(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = overlapping(monkeypatch, adapter_rank=1)  # which is rounded up to 16
    wide = random_adapter(SHAPE, seed=11, rank=20, size=0.1)
    it.load_adapter("wide", wide)
    expected = plain_choice((1, 2, 3), greedy(6), merge(deepcopy(tiny_decoder()), wide))
    for name in ("wide", "b"):
        it.add(Request((1, 2, 3), greedy(6), adapter=name))
    assert [*finish(it).values()] == [list(expected), answer("b", (1, 2, 3), 6)]
    assert "'wide' are computed without CUDA graphs" in caplog.text
    assert "its rank is 20, and slots are for 16" in caplog.text


def test_the_longest_unused_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    it = overlapping(monkeypatch, adapter_slots=2)
    slots = it.adapters.slots
    assert slots is not None
    a, b, dora = (it.adapters.hold(name) for name in KINDS)
    slots.seat([a, None, a])
    slots.seat([b])
    slots.seat([a])
    slots.seat([dora])
    assert [slots.of(one) for one in (None, a, b, dora)] == [-1, 0, None, 1]
    slots.seat([b, dora])
    assert [slots.of(one) for one in (a, b, dora)] == [None, 0, 1]
    slots.seat([a, b, dora])  # nobody who is needed gives way
    assert [slots.of(one) for one in (a, b, dora)] == [None, 0, 1]
    assert 0 < slots.nbytes < 2**20


def test_slots_that_no_memory_is_left_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("xverse.engine.adapters.AdapterSlots", none_left)
    with pytest.raises(XverseError, match=r"(?s)2 adapters of rank 32.*Lower adapter_slots"):
        overlapping(monkeypatch, adapter_slots=2)


def test_of_a_mixture_captured_steps_have_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is beside the experts is a part of their kernel: who changes it goes another way."""
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
    config = CONFIG | {"model_type": "xverse", "num_key_value_heads": 4, "num_experts": 4}
    shape = ModelShape.from_config(config | {"moe_top_k": 2, "num_shared_experts": 1})
    decoder = initialize(Decoder(shape), std=0.3).requires_grad_(False)
    everything = random_adapter(shape, seed=7).weights
    kinds = {
        kind: Adapter({name: change for name, change in everything.items() if kind in name})
        for kind in ("self_attn", "shared_experts")
    }
    expected = [
        list(plain_choice((1, 2, 3), greedy(6), merge(deepcopy(decoder), adapter)))
        for adapter in kinds.values()
    ]
    it = Engine(fuse(decoder), options=EngineOptions(kv_tokens=200, max_adapters=2))
    for name, adapter in kinds.items():
        it.load_adapter(name, adapter)
        it.add(Request((1, 2, 3), greedy(6), adapter=name))
    assert [*finish(it).values()] == expected
    slots = it.adapters.slots
    assert slots is not None
    assert [slots.of(it.adapters.hold(name)) for name in kinds] == [0, None]
    assert "shared_experts.down_proj, which is a part of a larger kernel" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_captured_steps_over_quantized_weights(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_config(CONFIG | {"intermediate_size": 64})  # as their kernels want it
    decoder = initialize(Decoder(shape), std=0.3).requires_grad_(False)
    decoder = fuse(quantize(decoder, bits))
    found = []
    for how in ("plain", "captured"):
        if how == "captured":
            monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
        it = Engine(decoder, options=EngineOptions(kv_tokens=400, max_adapters=2))
        it.load_adapter("a", random_adapter(shape, seed=1))
        it.load_adapter("dora", random_adapter(shape, seed=3, dora=True))
        for name in (None, "a", "dora"):
            it.add(Request((1, 2, 3, 4), greedy(8), adapter=name))
        found.append(list(finish(it).values()))
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0]}) == 3
