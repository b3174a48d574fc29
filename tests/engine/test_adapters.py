"""Several adapters in one engine: each request gets what the merged weights say, in any company."""

import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.checkpoint.adapters import merge, random_adapter
from tests.engine.tiny import CONFIG, VOCAB, greedy, plain_choice, tiny_decoder
from xverse.checkpoint.adapter import Adapter
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Scores, Token
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


def engine(decoder: Decoder | None = None, *, most: int = 4, **options: int) -> Engine:
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
                plain.model.embed_tokens.weight = layer.weight  # type: ignore[union-attr]
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
