"""LONG TEXTS -> ITEMS. Three tasks of LongBench with its own prompts; the needle in a haystack."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from xverse.evals.item import Grade, Item, Task
from xverse.evals.tasks.sentences import lines_of

LENGTHS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)  # words of hay
DEPTHS = (0, 25, 50, 75, 100)  # where the needle is, in percent
_HAY = (
    "The river was low that year, and the ferry crossed it twice a day.",
    "Nobody in the village could say when the old mill had been built.",
    "In the evening the lamps were lit along the harbour wall.",
    "She kept the accounts of the shop in a green book under the counter.",
    "The wind came from the north and brought the smell of snow.",
    "Two carts stood before the inn, and the horses were being fed.",
    "He had read the letter three times and did not understand it.",
    "Apples were cheap in autumn, and the cellars were full of them.",
)


def longbench(name: str, folder: Path, shots: int) -> Iterator[Item]:
    """`name`.jsonl has the texts, config/dataset2prompt.json the prompt."""
    if shots:
        raise ValueError(f"{shots} examples are asked for, and LongBench has none")
    prompts = json.loads((folder / "config" / "dataset2prompt.json").read_text("utf-8"))
    for row in lines_of(folder / f"{name}.jsonl"):
        text = prompts[name].format(context=row["context"], input=row["input"])
        yield Item(row["_id"], text, reference={"answers": row["answers"]})


def _best(score: Grade, item: Item, said: str) -> float:
    """The best score against any of the accepted answers."""
    answers = cast(Sequence[str], item.reference["answers"])
    references = [Item(item.name, "", reference={"answer": answer}) for answer in answers]
    return max((score(reference, said) for reference in references), default=0.0)


def overlap_f1(item: Item, said: str) -> float:
    """F1 of the characters that are no spaces or punctuation, for Chinese answers.

    LongBench cuts into words by a dictionary (jieba) first; characters need none.
    """
    ours, theirs = _characters(said), _characters(str(item.reference["answer"]))
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(item: Item, said: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), whole texts at once."""
    ours = re.findall(r"\w+", said.lower())
    theirs = re.findall(r"\w+", str(item.reference["answer"]).lower())
    best = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for place, other in enumerate(theirs, 1):
            above = best[place]
            best[place] = before + 1 if word == other else max(above, best[place - 1])
            before = above
    return 2 * best[-1] / (len(ours) + len(theirs)) if best[-1] else 0.0


def right_paragraph(item: Item, said: str) -> float:
    """The share of the numbers in the answer that are the right paragraph's."""
    wanted = re.findall(r"\d+", str(item.reference["answer"]))[0]
    numbers = re.findall(r"\d+", said)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def needle(folder: Path, shots: int) -> Iterator[Item]:
    """A number in much text that does not matter, at five depths of eight lengths. No data: the
    text is made of sentences in an order that a seed gives; what is too long for a model counts
    as not found, and the report tells how many."""
    for words in LENGTHS:
        chance = random.Random(words)
        hay = [chance.choice(_HAY) for _ in range(words // 13)]  # a sentence has 13 words or so
        for depth in DEPTHS:
            number = str(chance.randrange(100_000, 999_999))
            place = len(hay) * depth // 100
            secret = f"The number of the locker is {number}."
            text = " ".join([*hay[:place], secret, *hay[place:]])
            question = (
                f"{text}\n\nQuestion: What is the number of the locker?\nAnswer: The number is"
            )
            name, group = f"{words} words, {depth} %", f"{words} words"
            yield Item(name, question, group, reference={"number": number})


def finds_needle(item: Item, said: str) -> float:
    """Whether the first number of the answer is the hidden one."""
    found = re.search(r"\d+", said)
    return float(found is not None and found[0] == item.reference["number"])


def _characters(text: str) -> list[str]:
    return [character for character in text.lower() if character.isalnum()]


def _long(name: str, score: Grade, max_tokens: int, note: str = "") -> Task:
    title = f"LongBench {name}"
    return Task(
        f"longbench-{name.replace('_', '-')}",
        title,
        "writing",
        partial(longbench, name),
        "longbench",
        grade=partial(_best, score),
        max_tokens=max_tokens,
        cut="middle",
        note=note,
    )


TASKS = (
    _long("multifieldqa_zh", overlap_f1, 64, "F1 of characters; LongBench's is of words."),
    _long("passage_retrieval_zh", right_paragraph, 32),
    _long("multi_news", rouge_l, 512, "ROUGE-L of whole texts."),
    Task(
        "needle",
        "Needle in a haystack",
        "writing",
        needle,
        grade=finds_needle,
        max_tokens=16,
        by_group=True,
        note="Texts of 1,000 to 128,000 words; those that do not fit count as not found.",
    ),
)
