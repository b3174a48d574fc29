"""Hostile chat templates: no way to Python's insides, and a bounded waste of time and memory."""

import resource
import time
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_tokenizer
from xverse.errors import XverseError
from xverse.text import bounds
from xverse.text.template import TemplateFormat
from xverse.text.tokenizer import Tokenizer

GROW = "{% set ns = namespace(s=SEED) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}"


def grown(seed: str, step: str, use: str = "{{ ns.s }}") -> str:
    return GROW.replace("SEED", seed).replace("STEP", step) + use


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ namespace.__init__.__globals__.x }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ messages | map(attribute='__class__') | join }}{{ x.y }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % messages }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]
HUGE = [
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * 'a' }}",
    "{{ [1] * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
    grown("'aaaa'", "ns.s + ns.s"),
    grown("'aaaa'", "ns.s ~ ns.s"),
    grown("'aaaa'", "ns.s * 2"),
    grown("'aaaa'", "[ns.s, ns.s] | join"),
    grown("'aaaa'", "''.join([ns.s, ns.s])"),
    grown("'aaaa'", "ns.s.replace('a', 'aa')"),
    grown("'aaaa'", "ns.s | replace('a', 'aa')"),
    grown("[1]", "ns.s + ns.s"),
    grown("3", "ns.s * ns.s"),
    "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}"
    "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    # Small in memory, endless when written, compared or hashed.
    grown("[1]", "[ns.s, ns.s]"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s | tojson }}"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s | string | length }}"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s ~ '' }}"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s == [ns.s] }}"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s in [ns.s, 1] }}"),
    grown("[1]", "[ns.s, ns.s]", "{{ ns.s is eq(ns.s) }}"),
    grown("(1,)", "(ns.s, ns.s)", "{{ {ns.s: 1} }}"),
    grown("(1,)", "(ns.s, ns.s)", "{{ messages[0][ns.s] }}"),
    grown("(1,)", "(ns.s, ns.s)", "{{ messages[0].get(ns.s) }}"),
    grown("{}", "{'a': ns.s, 'b': ns.s}"),
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ [ns] }}",
    "{{ ('b' * 100000).join(range(100000) | map('string')) }}",
    "{{ range(100000) | join('b' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x' | indent(1000000000) }}",
    "{{ ('a\n' * 100000) | indent(10000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ [1] | batch(1000000000, 1) | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1.5 | round(1000000000, 'floor') }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{% set s = 'a' * 4000000 %}" + "".join(f"{{% set a{n} = s[1:] %}}" for n in range(400)),
]
ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 4000000 %}{% for c in s %}{% for d in s %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 3000000 %}{% for i in range(100000) %}{{ s.count('b') }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
]
BROKEN = [
    "{{",
    "{% if x %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 50000 + " }}",
    "{{ 1" + "+1" * 9000 + " }}",
    "{% if 1 %}" * 5000,
    "{% for i in x %}" * 300 + "{% endfor %}" * 300,
    "x" * 200_000,
    "{{ 1 / 0 }}",
    "{{ nothing.at.all }}",
    "\ud800",
    "{{ '\\ud800' }}",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("template", [*ESCAPES, *HUGE, *ENDLESS, *BROKEN])
def test_hostile_templates_are_refused(
    template: str, tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template is not ENDLESS[0]:  # one waits for the real limit
        monkeypatch.setattr(bounds, "MAX_SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises(XverseError):
        TemplateFormat(template).render([{"role": "user", "content": "hi"}], tiny)
    assert time.thread_time() - started < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_ordinary_means_are_left(tiny: Tokenizer) -> None:
    template = (
        "{{ 2 ** 10 }} {{ 7 % 3 }} {{ 'ab' * 2 }} {{ [1, 2] + [3] }} {{ 'a' ~ 1 }} {{ 'abc'[1:] }} "
        "{{ {'k': 'v'}.items() | list }} {{ dict(a=1) }} {{ 'a,b'.split(',') }} "
        "{{ messages[-1].content | upper | replace('H', 'J') }} {{ none is none }} "
        "{{ [3, 1] | sort | first }} {{ 'x' in 'xyz' }} {{ 'a\nb' | indent(2) }} {{ 1 < 2 <= 2 }}"
    )
    ids = TemplateFormat(template).render([{"role": "user", "content": "hi"}], tiny).ids
    assert tiny.decode(ids) == (
        "1024 1 abab [1, 2, 3] a1 bc [('k', 'v')] {'a': 1} ['a', 'b'] JI True 1 True a\n  b True"
    )
