"""Answers held to a grammar: they match it, whatever the options, the company and the path."""

import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.grammar_walk import END, TOKENS, allowed, compiler, start, walk
from tests.engine.tiny import greedy
from tests.tiny_model import write_published_folder
from xverse import LLM, Grammar, Sampling, XverseError
from xverse.engine.engine import Engine
from xverse.engine.grammar_state import Threads
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Token

NUMBERS = Grammar.regex(r"[0-9]{2,4}(-[a-f]{1,3}){0,2};")
YES = Grammar.ebnf('root ::= "yes" | "no" | "maybe " [a-c]+ "."')
PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
            "more": {"$ref": "#/$defs/flag"},
        },
        "required": ["name", "age"],
        "$defs": {"flag": {"type": ["boolean", "null"]}},
    }
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return LLM(path, dtype="float32")


def sampling(grammar: Grammar | None, **options: object) -> Sampling:
    neutral: dict[str, object] = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    return Sampling(**({"max_tokens": 90} | neutral | options), grammar=grammar)  # type: ignore[arg-type]


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        {"name", "age"} <= set(person) <= {"name", "age", "tags", "more"}
        and isinstance(person["name"], str)
        and 0 <= person["age"] <= 120
        and set(person.get("tags", [])) <= {"a", "b"}
        and person.get("more") in (True, False, None)
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.6])
def test_answers_match(llm: LLM, temperature: float) -> None:
    checks: list[tuple[Grammar, Callable[[str], object]]] = [
        (NUMBERS, re.compile(NUMBERS.text).fullmatch),
        (YES, re.compile(r"yes|no|maybe [abc]+\.").fullmatch),
        (PERSON, is_person),
        (Grammar.json(), lambda text: isinstance(json.loads(text), dict)),
    ]
    for grammar, check in checks:
        options = sampling(grammar, temperature=temperature, seed=5)
        answers = llm.choices("Hello", 1 if temperature == 0.0 else 6, options)
        whole = [answer for answer in answers if answer.finish == "stop"]
        assert whole or temperature == 0.0 or grammar.kind == "json"
        for answer in whole:
            assert check(answer.text), answer.text
        if temperature >= 1.0 and grammar is not PERSON:
            assert len({answer.text for answer in answers}) > 1


def test_no_option_goes_around_it(llm: LLM) -> None:
    letters = {llm.tokenizer.encode(letter)[0]: 100.0 for letter in "xqz"}
    for options in (
        {"logit_bias": letters},
        {"min_tokens": 100},
        {"ignore_eos": True, "min_tokens": 30},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.9},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0},
    ):
        answer = llm.generate("Hello", sampling(YES, temperature=1.0, seed=1, **options))
        assert re.fullmatch(r"yes|no|maybe [abc]+\.", answer.text), options
        assert answer.finish == "stop"


def test_company_seeds_streams_stops_and_logprobs(llm: LLM) -> None:
    free = sampling(None, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    options = sampling(NUMBERS, temperature=1.0, seed=3)
    alone = llm.generate("Hello", options)
    assert alone == llm.generate(["Hello", "a", "b"], options)[0]
    assert llm.choices("Hello", 3, options)[0] == alone
    assert "".join(piece.text for piece in llm.stream("Hello", options)) == alone.text
    scored = llm.generate("Hello", sampling(NUMBERS, temperature=1.0, seed=3, logprobs=2))
    assert [logprob.id for logprob in scored.logprobs] == list(alone.tokens)
    assert scored.logprobs[0].top[0].logprob > scored.logprobs[0].logprob  # the model's own
    stopped = llm.generate("Hello", sampling(NUMBERS, temperature=1.0, seed=3, stop=(";",)))
    assert stopped.text == alone.text.removesuffix(";")
    assert llm.generate("Hello", free) == llm.generate("Hello", free)
    message = [{"role": "user", "content": "Hello"}]
    assert re.fullmatch("yes", llm.chat(message, sampling(Grammar.regex("yes"))).text)


def new_engine(llm: LLM, **options: int) -> Engine:
    return Engine(
        llm.decoder,
        end_ids=llm.engine.end_ids,
        options=EngineOptions(**({"kv_tokens": 2048} | options)),
        tokenizer=llm.tokenizer,
    )


def run(it: Engine) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token), output
            found.setdefault(output.request, []).append(output.id)
        it.scheduler.check()
    return found


def test_preemption_keeps_the_state(llm: LLM) -> None:
    filled = sampling(Grammar.regex("([a-z]-){12};"), temperature=1.0, seed=2, max_tokens=30)
    filled = filled.over({})
    requests = [Request(tuple(llm.tokenizer.encode(text)), filled) for text in "abcdefgh"]
    it = new_engine(llm, kv_tokens=48, page_size=4)
    numbers = [it.add(request) for request in requests]
    found = run(it)
    assert it.scheduler.preempted
    for number, text in zip(numbers, "abcdefgh", strict=True):
        assert found[number] == list(llm.generate(text, filled).tokens)


def test_who_waits_for_a_grammar_blocks_nobody_and_can_leave(llm: LLM) -> None:
    it = new_engine(llm)
    ids = tuple(llm.tokenizer.encode("Hello"))
    held = sampling(Grammar.regex("[a-z]{5}"), temperature=1.0, seed=1).over({})
    first, second = it.add(Request(ids, held)), it.add(Request(ids, held))
    free = it.add(Request(ids, greedy(4)))
    seen = [output for _ in range(4) for output in it.step()]
    assert [output.request for output in seen] == [free] * 4  # nothing can be compiled so soon
    assert it.busy
    it.abort(first)
    tokens = run(it)
    assert set(tokens) == {second}
    assert not it.busy
    assert it.step() == []
    assert it.pages.available == it.pages.count


def test_a_model_without_end_ids_stops_where_nothing_can_follow(llm: LLM) -> None:
    it = Engine(llm.decoder, options=EngineOptions(kv_tokens=512), tokenizer=llm.tokenizer)
    options = sampling(Grammar.regex("[a-d]{3}x?"), temperature=1.0, seed=1).over({})
    it.add(Request((5, 6), options))
    (ids,) = run(it).values()
    assert re.fullmatch("[a-d]{3}x", llm.tokenizer.decode(ids))


def test_a_request_that_cannot_fit_is_refused_at_once(llm: LLM) -> None:
    it = new_engine(llm, kv_tokens=32)
    with pytest.raises(XverseError, match="does not fit"):
        it.add(Request((5, 6), sampling(YES, max_tokens=100).over({})))
    assert not it.busy


def test_what_is_missing_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Engine(llm.decoder, options=EngineOptions(kv_tokens=512))
    with pytest.raises(XverseError, match="without a tokenizer"):
        bare.add(Request((5, 6), sampling(YES).over({})))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(XverseError, match=r"xverse-llm\[serve\]"):
        llm.generate("Hello", sampling(YES))


def test_a_bad_grammar_fails_its_own_request_alone(llm: LLM) -> None:
    it = new_engine(llm)
    good = it.add(Request((5, 6), sampling(YES, temperature=1.0).over({})))
    bad = it.add(Request((5, 6), sampling(Grammar.ebnf("root ::= gone")).over({})))
    outputs = []
    while it.busy:
        outputs += it.step()
    (failed,) = [output for output in outputs if isinstance(output, Failed)]
    assert failed.request == bad
    assert '"gone" is not defined' in str(failed.error)
    assert [output for output in outputs if output.request == good]  # and none of them failed


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("yaml", "a: 1", "of kind"),
        ("json", "{}", "takes no text"),
        ("regex", "", "empty"),
        ("regex", "a\0b", "NUL"),
        ("regex", "\udc00", "surrogate"),
        ("ebnf", "#" * 65537, "64 KiB"),
        ("regex", "é" * 33000, "64 KiB"),
        ("regex", "(?=a)", "lookahead"),
        ("regex", "x(?<!a)", "lookbehind"),
        ("regex", r"(a)\1", "backreference"),
        ("regex", r"\bx", "word boundary"),
        ("regex", "a^b", "anchor"),
        ("regex", "^a|b$", "alternatives"),
        ("regex", "a{5000}", "counted"),
        ("regex", "((a{1,9}){9}b){99}", "counted"),
        ("regex", "(" * 40 + "a" + ")" * 40, "nested"),
        ("regex", "a++", "possessive"),
        ("json_schema", "[]", "object"),
        ("json_schema", '{"a":' * 40 + "1" + "}" * 40, "nested"),
        ("json_schema", '{"not": {}}', "'not'"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"maxLength": 3}', "type 'string'"),
        ("json_schema", '{"type": "object", "required": ["x"]}', "required"),
        ("json_schema", '{"$ref": "http://x/y"}', "outside"),
        ("json_schema", '{"anyOf": [{}], "minimum": 1}', "minimum"),
        ("json_schema", '{"allOf": [{}, {}]}', "merged"),
        ("json_schema", '{"enum": [1], "type": "string"}', "not of the type"),
        ("json_schema", '{"type": "string", "pattern": "a", "maxLength": 2}', "beside"),
        ("json_schema", '{"type": "string", "pattern": "a\\\\n"}', "escaped"),
        ("json_schema", '{"type": "string", "format": "colour"}', "colour"),
        (
            "json_schema",
            '{"properties": {"a": {"items": {"not": {}}, "type": "array"}}}',
            "a/items",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused_by_name(kind: str, text: str, why: str) -> None:
    with pytest.raises(XverseError) as caught:
        Grammar(kind, text)  # type: ignore[arg-type]
    assert why in str(caught.value)


def test_sampling_wants_a_grammar() -> None:
    with pytest.raises(XverseError, match="grammar cannot be"):
        Sampling(grammar="[a-z]")  # type: ignore[arg-type]
    with pytest.raises(XverseError, match="written as JSON"):
        Grammar.json_schema({"const": {1, 2}})


def test_texts_of_a_schema_are_valid() -> None:
    """By random bytes, which find what a model would hardly write: control characters, quotes."""

    def between(least: float, most: float) -> Callable[[object], bool]:
        return lambda value: isinstance(value, int | float) and least <= value <= most

    checks: list[tuple[dict[str, object], Callable[..., object]]] = [
        ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: len(v) >= 2),
        ({"type": ["string", "null"], "maxLength": 3}, lambda v: v is None or isinstance(v, str)),
        ({"type": "string", "pattern": "^[^a]b+$"}, re.compile("[^a]+b+").fullmatch),
        ({"type": "string", "format": "date"}, re.compile(r"\d{4}-\d\d-\d\d").fullmatch),
        ({"type": "number", "minimum": -1.5, "maximum": 2}, between(-1.5, 2)),
        ({"type": "integer", "multipleOf": 7}, lambda v: v % 7 == 0),
        ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 3}, [1, 1].__le__),
        ({"enum": ['a"\\', None, {"x": ["\n"]}]}, ['a"\\', None, {"x": ["\n"]}].__contains__),
        (
            {"type": "object", "additionalProperties": {"type": "null"}},
            lambda v: not any(v.values()),
        ),
        (
            {"type": "object", "properties": {'q"\n': {}}, "required": ['q"\n']},
            lambda v: 'q"\n' in v,
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, lambda v: v is None or v % 1 == 0),
    ]
    threads = Threads()
    with compiler() as process:
        for schema, check in checks:
            grammar = Grammar.json_schema(schema)
            found = [walk(start(process, grammar, threads), seed) for seed in range(12)]
            whole = [text for text in found if text is not None]
            assert len(whole) > 6, schema
            for text in whole:
                assert check(json.loads(text)), (schema, text)
        with pytest.raises(XverseError, match="oneOf with overlapping"):
            process.compile(Grammar.json_schema({"oneOf": [{"type": "string"}, {"const": "a"}]}), 9)
    threads.close()


def test_regexes_that_are_taken_mean_what_they_say() -> None:
    threads = Threads()
    with compiler() as process:
        for pattern in [r"^\d{2}-[a-c]{1,3}$", "(?:ab|c)*?d", r"[^\W\d]\.x?", "a|bc|", "é{2}|北京"]:
            for seed in range(8):
                text = walk(start(process, Grammar.regex(pattern), threads), seed)
                assert text is None or re.fullmatch(pattern, text, re.ASCII), (pattern, text)
    threads.close()


def test_where_a_text_loses_its_first_space_the_answer_begins_with_one() -> None:
    threads = Threads()
    with compiler(leading_space=True) as process:
        state = start(process, Grammar.regex("ab"), threads)
        assert [TOKENS[id] for id in allowed(state)] == [b" "]
        state.accept(TOKENS.index(b" "))
        assert [TOKENS[id] for id in allowed(state)] == [b"a", b"ab"]
        state.accept(TOKENS.index(b"ab"))
        assert allowed(state) == [END]
        assert state.only_end
        assert not state.terminated
        state.accept(END)
        assert state.terminated
    threads.close()


def test_special_tokens_are_never_text(llm: LLM) -> None:
    """Their names can be asked for, and are then spelled letter by letter."""
    (special, *_) = sorted(llm.tokenizer.special_ids - llm.engine.end_ids)
    name = llm.tokenizer.token_bytes(special).decode()
    answer = llm.generate("Hello", sampling(Grammar.regex(re.escape(name))))
    assert answer.text == name
    assert special not in answer.tokens


def test_the_second_asker_waits_for_nothing(llm: LLM) -> None:
    grammars = llm.engine.grammars
    llm.generate("Hello", sampling(YES))
    assert grammars.answer(grammars.ask(YES)) is not None
    fresh = Grammar.regex(f"[a-z]{{3}}{time.time_ns()}")
    assert grammars.ask(fresh) is grammars.ask(fresh)  # in the making: compiled once


def test_a_folder_of_its_own_is_not_needed(tmp_path: Path) -> None:
    """The compiling process imports nothing of ours, nor of the folder it is started in."""
    (tmp_path / "xgrammar.py").write_text("raise SystemExit(7)")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with compiler() as process:
            assert process.compile(Grammar.regex("a"), 9)
