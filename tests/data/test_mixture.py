"""Ratios become documents: exactly, again and again the same, and with nothing taken silently."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xverse.data.mixture import Mixture, draw, plan_draw
from xverse.data.presets import CODE, KINDS, LANGUAGES, PRESETS
from xverse.data.shards import Group
from xverse.data.source import Reading
from xverse.errors import XverseError


def group(language: str, kind: str, tokens: int) -> Group:
    return Group(language, kind, tokens // 10, tokens, 4 * tokens)


def shares(mixture: Mixture, *groups: Group) -> dict[str, float]:
    draws = plan_draw(mixture, groups)
    total = sum(item.tokens for item in draws)
    return {f"{d.group.language}/{d.group.kind}": round(d.tokens / total, 4) for d in draws}


def test_presets_are_the_published_tables() -> None:
    assert (len(KINDS), len(LANGUAGES), len(CODE)) == (7, 41, 44)
    assert sum(KINDS.values()) == pytest.approx(100, abs=0.01)
    assert sum(LANGUAGES.values()) == pytest.approx(100, abs=0.5)
    assert sum(CODE.values()) == pytest.approx(100, abs=0.5)
    assert (LANGUAGES["zh"], KINDS["web"], CODE["python"]) == (31.09, 72.91, 14.64)


def test_languages_and_kinds_hold_both_at_once() -> None:
    mixture = Mixture(languages={"en": 3, "zh": 1}, kinds={"web": 1, "books": 1}, max_epochs=99)
    groups = [group("en", "web", 500), group("en", "books", 100), group("zh", "web", 900)]
    groups.append(group("zh", "books", 10))
    found = shares(mixture, *groups)
    assert found["en/web"] + found["en/books"] == pytest.approx(0.75, abs=1e-3)
    assert found["en/web"] + found["zh/web"] == pytest.approx(0.5, abs=1e-3)


def test_code_has_its_own_languages() -> None:
    mixture = Mixture(
        languages={"en": 1, "zh": 1}, kinds={"code": 1, "web": 3}, code={"python": 4, "c": 1}
    )
    found = shares(
        mixture,
        group("en", "web", 1000),
        group("zh", "web", 1000),
        group("Python", "code", 1000),
        group("c", "code", 1000),
    )
    assert found == {"en/web": 0.375, "zh/web": 0.375, "Python/code": 0.2, "c/code": 0.05}


def test_what_has_no_share_is_left_out_unless_the_rest_has_one() -> None:
    groups = [group("en", "web", 100), group("xx", "web", 100), group("yy", "web", 300)]
    assert shares(Mixture(languages={"en": 1}), *groups)["xx/web"] == 0
    found = shares(Mixture(languages={"en": 1, "*": 1}, max_epochs=99), *groups)
    assert found == {"en/web": 0.5, "xx/web": 0.125, "yy/web": 0.375}
    with pytest.raises(XverseError, match="leaves nothing"):
        plan_draw(Mixture(languages={"de": 1}), groups)


def test_no_group_is_taken_more_often_than_allowed() -> None:
    mixture = Mixture(languages={"en": 1, "zh": 1, "ja": 2}, max_epochs=4)
    draws = plan_draw(
        mixture, [group("en", "web", 900), group("zh", "web", 100), group("ja", "web", 5000)]
    )
    assert [round(item.epochs, 3) for item in draws] == [2.074, 4.0, 0.747]
    assert sum(item.tokens for item in draws) == pytest.approx(6000)


def test_more_than_there_is_gives_what_there_is() -> None:
    mixture = Mixture(languages={"en": 1, "zh": 1}, tokens=10**9, max_epochs=2)
    draws = plan_draw(mixture, [group("en", "web", 1000), group("zh", "web", 10)])
    assert [item.epochs for item in draws] == [2.0, 2.0]


def test_no_table_draws_as_the_corpus_is() -> None:
    groups = [group("en", "web", 600), group("zh", "code", 400)]
    assert [d.epochs for d in plan_draw(Mixture(tokens=500), groups)] == [0.5, 0.5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 50)), min_size=1
    ),
    st.floats(0.1, 3.5),
    st.integers(0, 5),
)
def test_tokens_drawn_are_those_asked_for_within_a_document(
    documents: list[tuple[str, str, int]], times: float, seed: int
) -> None:
    names = sorted({document[:2] for document in documents})
    codes = np.array([names.index(document[:2]) for document in documents], np.uint16)
    lengths = np.array([document[2] for document in documents])
    groups = [
        Group(*name, int((codes == i).sum()), int(lengths[codes == i].sum()), 1)
        for i, name in enumerate(names)
    ]
    mixture = Mixture(tokens=int(times * lengths.sum()) + 1, seed=seed)
    draws = plan_draw(mixture, groups)
    chosen = draw(draws, codes, lengths, seed)
    assert chosen.tolist() == draw(draws, codes, lengths, seed).tolist() == sorted(chosen.tolist())
    for code, item in enumerate(draws):
        own = chosen[codes[chosen] == code]
        longest = lengths[codes == code].max()
        assert abs(lengths[own].sum() - item.tokens) <= longest
        often = np.bincount(own.astype(int), minlength=len(codes))[codes == code]
        assert often.max() - often.min() <= 1
        assert often.max() <= np.ceil(item.epochs - 1e-9) + (item.epochs % 1 < 1e-9)


def test_another_seed_chooses_others() -> None:
    codes, lengths = np.zeros(1000, np.uint16), np.full(1000, 10)
    draws = plan_draw(Mixture(tokens=5000), [Group("en", "web", 1000, 10_000, 1)])
    first, second = (draw(draws, codes, lengths, seed) for seed in (0, 1))
    assert len(first) == len(second) == 500
    assert first.tolist() != second.tolist()


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mixture.toml"
    file.write_text(text, "utf-8")
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    text = """
    preset = "xverse-65b"
    tokens = 1_000
    [languages]
    en = 1
    [[sources]]
    files = "zh-*.jsonl"
    language = "zh"
    kind = "books"
    text_field = "content"
    [[sources]]
    files = "*/notes/*.txt"
    txt = "paragraph"
    """
    mixture = Mixture.read(write(tmp_path, text))
    assert mixture.kinds == PRESETS["xverse-65b"]["kinds"]
    assert mixture.languages == {"en": 1}
    zh = mixture.reading_of(Path("a/zh-1.jsonl"), Reading(kind="web"))
    assert (zh.language, zh.kind, zh.text_field, zh.fixed) == ("zh", "books", "content", True)
    notes = mixture.reading_of(Path("a/notes/b.txt"), Reading(kind="web"))
    assert (notes.txt, notes.kind, notes.fixed) == ("paragraph", "web", False)
    assert mixture.reading_of(Path("other.txt"), Reading(kind="web")) == Reading(kind="web")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('preset = "xverse-65"', "Did you mean 'xverse-65b'"),
        ("language = {}", "Did you mean 'languages'"),
        ("languages = 3", "no table of shares"),
        ("[kinds]\nweb = -1", "no table of shares"),
        ("[kinds]\nweb = nan", "no table of shares"),
        ("[kinds]\nweb = true", "no table of shares"),
        ("[kinds]\nweb = 0", "gives nothing"),
        ("tokens = 1.5", "no such number"),
        ("max_epochs = -1", "no such number"),
        ('[[sources]]\nlanguage = "zh"', "needs files"),
        ('[[sources]]\nfiles = "a"\nlang = "zh"', "Did you mean 'language'"),
        ('[[sources]]\nfiles = "a"\ntxt = "words"', "txt is one of"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(XverseError) as refused:
        Mixture.read(write(tmp_path, text))
    assert why in str(refused.value)


def test_the_example_of_the_page_is_a_mixture(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "prepare.md"
    [example] = re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    mixture = Mixture.read(write(tmp_path, example))
    assert mixture.has_shares
    assert mixture.sources
