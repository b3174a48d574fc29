"""TEXT -> LANGUAGE. One of five, by its script and the commonest short words."""

import re

from xverse.evals.checks.words import fold
from xverse.evals.item import Judgement

# The commonest short words. Neighbours of French are known so that they are not taken for it.
_COMMON = {
    "en": "the of and to in is it that was for are as with be this have has had on at by not a an "
    "from you there what which your his her they we i will can",
    "fr": "le la les de des du un une et est que qui dans en pour pas sur au aux il elle ce cette "
    "avec sont a y ne plus ou par se nous vous je sa son ses",
    "es": "el la los las de del un una y es que en por para no con se su al lo como más pero son "
    "hay tiene",
    "it": "il la le gli di del della un una e è che in per non con si sono ha nel al lo i",
    "pt": "o a os as de do da um uma e é que em para não com se por são no na tem mais",
    "de": "der die das und ist ein eine nicht zu den von mit sich des auf für im dem hat sind es",
}
COMMON = {name: frozenset(words.split()) for name, words in _COMMON.items()}
NAMES = {"en": "English", "ru": "Russian", "fr": "French", "ja": "Japanese", "zh": "Chinese"}
KANA = 0.1  # of all characters: a Japanese sentence has far more, a Chinese one none or a stray の
MAJORITY, COMMON_SHARE = 0.6, 0.1
_CODE = re.compile(r"```.*?(?:```|$)|https?://\S+", re.S)


def language(answer: str, name: str) -> Judgement:
    """The answer is in the language `name`, one of `NAMES`."""
    found = language_of(answer)
    spoken = "no language that can be told" if found is None else NAMES.get(found, found)
    if found == name:
        return Judgement(True, f"is in {spoken}")
    return Judgement(False, f"is in {spoken} instead of {NAMES[name]}")


def language_of(text: str) -> str | None:
    """What most words of a text are in, code and addresses aside; None where that cannot be told.

    A character of a script without spaces counts as much as a word of another. Cyrillic with
    letters that Russian has not, and a ъ where Russian has none, is nobody's here.
    """
    plain = _CODE.sub(" ", fold(text))
    kana = len(re.findall("[\u3041-\u3096\u30a1-\u30fa]", plain))
    asian = kana + len(re.findall("[\u3400-\u9fff々]", plain))
    words = re.findall(r"[^\W\d_\u3005\u3040-\u30ff\u3400-\u9fff]+", plain)
    cyrillic = [word for word in words if re.search("[\u0400-\u04ff]", word)]
    latin = [word for word in words if re.search("[a-z\u00df-\u024f]", word)]
    most = MAJORITY * (asian + len(words))
    if asian and asian >= most:
        return "ja" if kana >= KANA * asian else "zh"
    if cyrillic and len(cyrillic) >= most:
        foreign = re.search("[іїєґўјљњћђџ]|ъ(?![еёюя])", " ".join(cyrillic))
        return None if foreign else "ru"
    return _latin(latin) if latin and len(latin) >= most else None


def _latin(words: list[str]) -> str | None:
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    best, second = sorted(counts.values(), reverse=True)[:2]
    if best == second or best < COMMON_SHARE * len(words):
        return None
    return max(counts, key=counts.__getitem__)
