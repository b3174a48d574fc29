"""ANSWER -> JUDGEMENT. Words that have to be in an answer, numbers, and the one name of several."""

import re
import unicodedata
from collections.abc import Sequence

from xverse.evals.item import Judgement

# Scripts without spaces, in which a word begins and ends wherever it stands.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_LETTER = rf"[^\W_{UNSPACED}]"
_NUMERAL = "[〇一二三四五六七八九十百千万]"
# 1 540, 1,540 and 1540; 0,540 and 0.54; a minus only where no number stands before it.
_NUMBER = re.compile(r"(?<![\d.,])[-−]?(?:[1-9]\d{0,2}(?:[, ]\d{3})+(?!\d)|\d+)(?:[.,]\d+)?")
_SENTENCE = re.compile(r"[。！？!?\n]|[.](?=\s|$)")
_BEFORE = r"(?:\bnot|n't|\bне|\bpas|\bnon|不是|并非|不等于)[\W_]{0,4}(?:exactly |simply )?"
_AFTER = r"[^。.\n\d]{0,8}(?:ではな|ではあり|じゃな|じゃあり)"
# How an answer marks what it has come to, in the five languages.
_MARK = re.compile(r"(?:\banswer|答案|\bответ|\bréponse|答え)\s*(?:is|est|是|は|：|:)", re.I)


def says(answer: str, words: Sequence[Sequence[str]], never: Sequence[str] = ()) -> Judgement:
    """One of each alternatives stands there as a word of its own, and none of `never` does."""
    text = fold(answer)
    found = []
    for alternatives in words:
        here = next((word for word in alternatives if stands_in(text, word)), None)
        if here is None:
            return Judgement(False, f"has none of: {', '.join(alternatives)}")
        found.append(here)
    if wrong := [word for word in never if stands_in(text, word)]:
        return Judgement(False, f"has: {', '.join(wrong)}")
    return Judgement(True, f"has: {', '.join(found)}")


def number(answer: str, value: float, steps: Sequence[float] = ()) -> Judgement:
    """The number is what the answer comes to: the last sentence that has any number besides those
    on the way (`steps`) has it, has no other one, and doesn't deny it."""
    for sentence in reversed(_SENTENCE.split(fold(answer))):
        numbers = [_value(text) for text in _NUMBER.findall(sentence)]
        if not set(numbers) <= set(steps):
            break
    else:
        return Judgement(False, f"does not come to {value:g}")
    others = [each for each in numbers if each != value and each not in steps]
    if others or value not in numbers:
        return Judgement(False, f"comes to {others[0]:g} instead of {value:g}")
    if re.search(rf"{_BEFORE}{value:g}|{value:g}{_AFTER}", sentence):
        return Judgement(False, f"says that it is not {value:g}")
    return Judgement(True, f"comes to {value:g}")


def picks(answer: str, right: str, wrong: Sequence[str]) -> Judgement:
    """The line after the last "Answer:", or else the last one, has the right name and no other."""
    text = fold(answer)
    marks = [*_MARK.finditer(text)]
    end = text[marks[-1].end() :].strip().partition("\n")[0] if marks else text.rpartition("\n")[2]
    named = [name for name in (right, *wrong) if stands_in(end, name)]
    if named == [right]:
        return Judgement(True, f"ends with {right}")
    return Judgement(False, f"ends with {', '.join(named) or 'no name'} instead of {right} alone")


def varied(answer: str, least: int) -> Judgement:
    """It has so many different words, or characters where no spaces part the words."""
    words = re.findall(rf"[{UNSPACED}]|{_LETTER}+", fold(answer))
    count = len(set(words))
    return Judgement(count >= least, f"has {count} different words, of {least} at least")


def fold(text: str) -> str:
    """Small letters, half-width forms, straight apostrophes, no empty lines."""
    # NFKC makes a comma of ，and of "108，108" one number.
    spaced = text.replace("，", ", ").replace("’", "'")
    plain = unicodedata.normalize("NFKC", spaced).casefold()
    return "\n".join(line.strip() for line in plain.splitlines() if line.strip())


def stands_in(folded: str, word: str) -> bool:
    """Whether a folded text has the word, with no letter of its alphabet on either side and, of a
    number, no decimals; after a word that ends with * more may follow."""
    wanted = fold(word.removesuffix("*"))
    start, end = rf"(?<!{_LETTER})(?<!\d[.,])", rf"(?!{_LETTER}|[.,]\d)"
    if re.match(rf"[{UNSPACED}]", wanted):
        start = rf"(?<!{_NUMERAL})" if re.match(_NUMERAL, wanted) else ""
    if re.search(rf"[{UNSPACED}]$", wanted):
        end = rf"(?!{_NUMERAL})" if re.search(rf"{_NUMERAL}$", wanted) else ""
    if word.endswith("*"):
        end = ""
    return re.search(start + re.escape(wanted) + end, folded) is not None


def _value(text: str) -> float:
    plain = text.replace("−", "-")
    if not plain.startswith("0"):
        plain = re.sub(r"[, ](?=\d{3}(?!\d))", "", plain)
    return float(plain.replace(",", "."))
