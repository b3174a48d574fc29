"""Merges are those that a plain trainer finds, which counts all pairs anew after every merge."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xverse.text.bpe import WALL, learn_merges
from xverse.text.word_count import WordCounts


def plain_merges(words: Counter[str], alphabet: str, wanted: int) -> list[tuple[str, str]]:
    """The definition: the pair with most occurrences, the older symbols first, again and again."""
    tokens = list(alphabet)
    lines = [([tokens.index(c) if c in tokens else -1 for c in w], n) for w, n in words.items()]
    refused: set[tuple[int, int]] = set()
    merges: list[tuple[str, str]] = []
    while len(merges) < wanted:
        pairs: Counter[tuple[int, int]] = Counter()
        for line, weight in lines:
            places = range(len(line) - 1)
            last: tuple[int, int, int] | None = None
            for place in places:
                pair = line[place], line[place + 1]
                if min(pair) < 0 or pair in refused:
                    last = None
                elif last != (place - 1, *pair):  # "aaa" holds (a, a) once
                    pairs[pair] += weight
                    last = place, *pair
                else:
                    last = None
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            return merges
        spelled = tokens[best[0]] + tokens[best[1]]
        if spelled in tokens:
            refused.add(best)
            continue
        merges.append((tokens[best[0]], tokens[best[1]]))
        lines = [(merged(line, best, len(tokens)), weight) for line, weight in lines]
        tokens.append(spelled)
    return merges


def merged(line: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    place = 0
    while place < len(line):
        if tuple(line[place : place + 2]) == pair:
            out.append(new)
            place += 2
        else:
            out.append(line[place])
            place += 1
    return out


def learn(words: Counter[str], alphabet: str, wanted: int) -> list[tuple[str, str]]:
    """The merges that the package learns from `words`, each of which begins with a space."""
    counts = WordCounts("xverse")
    counts.add(["".join(words.elements()).replace("▁", " ")], threads=1)
    symbol_of = np.full(len(counts.characters), WALL, np.int32)
    symbol_of[[ord(c) for c in alphabet]] = range(len(alphabet))
    return learn_merges(counts.table(), symbol_of, list(alphabet), wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abcdx", min_size=2, max_size=9), st.integers(1, 5), min_size=1),
    st.integers(1, 40),
)
def test_merges_are_those_of_the_definition(words: dict[str, int], wanted: int) -> None:
    spaced = Counter({f"▁{word}": count for word, count in words.items()})
    alphabet = "abcd▁"  # "x" has no token: it is a wall
    assert learn(spaced, alphabet, wanted) == plain_merges(spaced, alphabet, wanted)


@pytest.mark.parametrize("word", ["aaaaaaaaa", "abababab", "aabaabaab", "abcabcabc"])
def test_overlapping_pairs(word: str) -> None:
    words = Counter({f"▁{word}": 3, f"▁b{word}": 2})
    assert learn(words, "abc▁", 20) == plain_merges(words, "abc▁", 20)


def test_a_larger_text_with_many_rare_pairs() -> None:
    chance = random.Random(5)
    spelled = ("".join(chance.choices("etaoin", [6, 5, 4, 3, 2, 1], k=5)) for _ in range(3000))
    words = Counter(f"▁{word}" for word in spelled)
    assert learn(words, "aeinot▁", 120) == plain_merges(words, "aeinot▁", 120)


def test_nothing_to_merge() -> None:
    assert learn(Counter(), "a", 5) == []
