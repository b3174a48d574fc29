"""CONVERSATIONS -> LESSONS. Ids of each row, what of them is learned, and what is too long."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from xverse.data.conversations import (
    Conversation,
    Unfit,
    read_choice,
    read_conversation,
    read_text,
)
from xverse.data.layout import Layout
from xverse.data.sample_options import SampleOptions
from xverse.data.samples import BoolArray, Sample
from xverse.errors import XverseError
from xverse.text.message import ChatFormat, Encoded, Message
from xverse.text.tokenizer import Tokenizer


class Outcome(NamedTuple):
    """What became of a row: samples (of a pair, two in turn), perhaps cut; or why it is refused.
    `detail` says more of either."""

    samples: tuple[Sample, ...] = ()
    cut: str = ""
    refused: str = ""
    detail: str = ""


class Teacher:
    """Makes samples of rows, by one chat format and one set of options."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, options: SampleOptions) -> None:
        if options.cutoff < 2:
            raise XverseError(
                f"A sample of {options.cutoff} tokens teaches nothing.",
                "There is one to read and one to say at least.",
                "Take a larger --cutoff.",
            )
        self.tokenizer, self.chat, self.options = tokenizer, chat, options
        self.now = datetime.fromisoformat(options.tools_time)

    def teach(self, row: dict[str, Any], layout: Layout) -> Outcome:
        """What is learned from a row."""
        try:
            if layout.kind == "text":
                return self._text(read_text(row, layout))
            if layout.ranking:
                choice = read_choice(row, layout)
                return self._pair(choice.chosen, choice.rejected)
            return self._conversation(read_conversation(row, layout))
        except Unfit as unfit:
            return Outcome(refused=unfit.reason, detail=unfit.detail)
        except XverseError as error:
            return Outcome(refused="can't be rendered", detail=f"{error.what} {error.why}"[:200])

    def _text(self, text: str) -> Outcome:
        """Plain text: all of it is learned, and its end; pieces of a long one share one token, so
        that each token but the first is learned."""
        end = self.tokenizer.eos_id
        ids = self.tokenizer.encode(text, add_special=False) + ([] if end is None else [end])
        step = self.options.cutoff - 1
        pieces = [ids[at : at + step + 1] for at in range(0, max(1, len(ids) - 1), step)]
        samples = [_sample(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]
        return Outcome(tuple(samples)) if samples else Outcome(refused="too short")

    def _conversation(self, said: Conversation) -> Outcome:
        lessons = self._lessons(said)
        answers = _answers(lessons)
        if said.unlearned and len(answers) != sum(m["role"] == "assistant" for m in said.messages):
            raise Unfit("weights can't be kept", "the template does not tell answers apart")
        silent = {answers[at] for at in said.unlearned}
        if self.options.mask_history:
            silent = set(answers[:-1])
        samples: list[Sample] = []
        notes: list[str] = []
        for number, lesson in enumerate(lessons):
            mask = np.array(lesson.mask)
            for at, (start, end) in enumerate(_runs(mask)):
                if (number, at) in silent:
                    mask[start:end] = False
            sample, note = self._fitting(lesson, mask)
            if sample is not None and sample.learned[1:].any():
                samples.append(sample)
            notes += [note] if note else []
        detail = self._length(*(len(lesson.ids) for lesson in lessons)) if notes else ""
        if not samples:
            return Outcome(refused=notes[0] if notes else "nothing to learn", detail=detail)
        return Outcome(tuple(samples), cut="; ".join(dict.fromkeys(notes)), detail=detail)

    def _length(self, *lengths: int) -> str:
        return f"{max(lengths):,} tokens, and {self.options.cutoff:,} are allowed"

    def _fitting(self, lesson: Encoded, mask: BoolArray) -> tuple[Sample | None, str]:
        """The sample within the cutoff (or none), and what was done for that."""
        cutoff = self.options.cutoff
        length = len(lesson.ids)
        if length <= cutoff:
            return self._finished(lesson.ids, mask), ""
        ends = [end for _, end in _runs(np.array(lesson.mask)) if end <= cutoff]
        if self.options.too_long == "refuse":
            return None, "too long"
        if ends:
            end, note = ends[-1], "later rounds left out"
        else:
            end, note = cutoff, "the answer's end left out"
        if not mask[1:end].any():
            return None, "too long before the first answer that is learned"
        return self._finished(lesson.ids[:end], mask[:end]), note

    def _finished(self, ids: list[int], mask: BoolArray) -> Sample:
        return _sample(ids, np.ones(len(ids)) if self.options.train_on_prompt else mask)

    def _pair(self, chosen: Conversation, rejected: Conversation) -> Outcome:
        """Two samples whose last answers are learned, and nothing else."""
        samples: list[Sample] = []
        cut = detail = ""
        for said in (chosen, rejected):
            lesson = self._lessons(said)[-1]
            start, end = list(_runs(np.array(lesson.mask)))[-1]
            mask = np.zeros(len(lesson.ids), dtype=np.bool_)
            mask[start:end] = True
            if len(lesson.ids) > self.options.cutoff:
                detail = self._length(len(lesson.ids))
                if self.options.too_long == "refuse" or start >= self.options.cutoff:
                    return Outcome(refused="too long", detail=detail)
                cut = "the answer's end left out"
            samples.append(_sample(lesson.ids[: self.options.cutoff], mask[: self.options.cutoff]))
        if np.array_equal(samples[0].ids, samples[1].ids):
            return Outcome(refused="chosen and rejected are the same", detail="once they are cut")
        return Outcome(tuple(samples), cut=cut, detail=detail)

    def _lessons(self, said: Conversation) -> list[Encoded]:
        messages: list[Message] = said.messages
        if self.options.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.options.default_system}, *messages]
        return self.chat.lessons(messages, self.tokenizer, tools=said.tools, now=self.now)


def _answers(lessons: Sequence[Encoded]) -> list[tuple[int, int]]:
    """Of every answer in turn, (its lesson, its number among what that lesson teaches)."""
    return [
        (number, at)
        for number, lesson in enumerate(lessons)
        for at, _ in enumerate(_runs(np.array(lesson.mask)))
    ]


def _runs(mask: BoolArray) -> Iterator[tuple[int, int]]:
    """(start, end) of everything in a row that is True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    yield from ((int(a), int(b)) for a, b in pairwise(edges) if mask[a])


def _sample(ids: Sequence[int], learned: Any) -> Sample:
    return Sample(np.array(ids, dtype=np.int32), np.array(learned, dtype=np.bool_))
