"""Answers held to a grammar where the device chooses: the same as where the host does.

By the plain references on the CPU. Steps overlap, and tokens are masked where the logits are.
"""

import re
from copy import deepcopy

import pytest
import torch

from tests.engine.test_grammar import NUMBERS, YES, sampling
from tests.engine.tiny import greedy
from tests.tiny_model import write_published_folder
from xverse import LLM, Grammar, XverseError
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.grammar_compile import Grammars
from xverse.engine.grammar_state import GrammarState
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Token
from xverse.model.fuse import fuse


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return LLM(path, dtype="float32")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")


def engine(llm: LLM, **options: int) -> Engine:
    it = Engine(
        fuse(deepcopy(llm.decoder)),
        end_ids=llm.engine.end_ids,
        options=EngineOptions(**({"kv_tokens": 2048} | options)),  # type: ignore[arg-type]
        tokenizer=llm.tokenizer,
    )
    it.grammars = llm.engine.grammars  # one process compiles for all of these engines
    assert isinstance(it.runner, DeviceRunner)
    return it


def run(it: Engine) -> dict[int, list[int | str]]:
    """Ids of each request, and the error that ended it."""
    found: dict[int, list[int | str]] = {}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token | Failed)
            said = str(output.error) if isinstance(output, Failed) else output.id
            found.setdefault(output.request, []).append(said)
        it.scheduler.check()
    assert it.pages.available == it.pages.count
    return found


@pytest.mark.parametrize("kv_tokens", [2048, 80], ids=["roomy", "preempting"])
def test_answers_are_those_of_the_host(llm: LLM, kv_tokens: int) -> None:
    """Grammars, options and free answers side by side."""
    it = engine(llm, kv_tokens=kv_tokens, page_size=4)
    asked = {}
    long = Grammar.regex("([a-z]-){12};")
    for seed, (grammar, options) in enumerate(
        [
            (long, {"temperature": 1.0}),
            (None, {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}),
            (NUMBERS, {"temperature": 1.5, "top_k": 5}),
            (YES, {"temperature": 1.0, "min_tokens": 60}),
            (NUMBERS, {"temperature": 0.0, "repetition_penalty": 1.4}),
            (None, {"temperature": 0.0, "max_tokens": 12}),
            (YES, {"temperature": 0.8, "logit_bias": {7: 100.0}, "ignore_eos": True}),
            (long, {"temperature": 0.7, "presence_penalty": 1.0, "min_p": 0.01}),
        ]
    ):
        text = "abcdefgh"[seed]
        chosen = sampling(grammar, seed=seed, **({"max_tokens": 40} | options))
        filled = chosen.over(llm.model.checkpoint.generation_config)
        asked[it.add(Request(tuple(llm.tokenizer.encode(text)), filled))] = text, filled
    found = run(it)
    assert (it.scheduler.preempted > 0) == (kv_tokens == 80)
    for number, (text, filled) in asked.items():
        assert found[number] == list(llm.generate(text, filled).tokens), filled


def test_free_answers_go_on_while_a_grammar_is_compiled(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = engine(llm)
    answer, late = Grammars.answer, []
    monkeypatch.setattr(Grammars, "answer", lambda self, ask: answer(self, ask) if late else None)
    held = it.add(Request((5, 6), sampling(NUMBERS, temperature=1.0).over({})))
    free = it.add(Request((5, 6), greedy(4)))
    seen = [output.request for _ in range(9) for output in it.step()]
    assert seen == [free] * 4
    assert it.busy
    late.append(True)
    assert set(run(it)) == {held}


def test_who_fails_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that is too slow for a mask, and one whose text cannot go on."""
    it = engine(llm)
    fill, slow = GrammarState.fill, []

    def limited(state: GrammarState, mask_W: torch.Tensor) -> None:
        if slow and state is slow[0]:
            raise XverseError("too slow for a test", "why", "fix")
        fill(state, mask_W)

    monkeypatch.setattr(GrammarState, "fill", limited)
    options = sampling(NUMBERS, temperature=1.0, seed=1).over({})
    bad, good = (it.add(Request((5, 6), options)) for _ in range(2))
    undefined = it.add(Request((5, 6), sampling(Grammar.ebnf("root ::= gone")).over({})))
    free = it.add(Request((7, 8), greedy(30)))
    found: dict[int, list[object]] = {n: [] for n in (bad, good, undefined, free)}
    while it.busy:
        for output in it.step():
            found[output.request].append(output)
            if output.request == bad and not slow:
                sampler = it._generations[bad].sampler
                assert sampler is not None
                slow.append(sampler.grammar)
    # Of the step under way by then the mask was filled already.
    assert [type(output) for output in found[bad]] == [Token, Token, Failed]
    assert "too slow for a test" in str(found[bad][-1].error)  # type: ignore[attr-defined]
    assert '"gone" is not defined' in str(found[undefined][-1].error)  # type: ignore[attr-defined]
    said = llm.tokenizer.decode([token.id for token in found[good]])  # type: ignore[attr-defined]
    assert re.fullmatch(NUMBERS.text, said)
    assert len(found[free]) == 30


def test_one_row_that_is_no_number_fails_alone(llm: LLM) -> None:
    it = engine(llm)
    it.decoder.model.embed_tokens.weight[50] = float("nan")
    options = sampling(NUMBERS, temperature=1.0, seed=1).over({})
    bad, good = (it.add(Request(ids, options)) for ids in ((50, 2), (1, 2)))
    found = run(it)
    assert "NaN" in str(found[bad])
    assert len(found[good]) > 1
