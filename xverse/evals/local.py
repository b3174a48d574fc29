"""LLM -> DOOR. A model in this process, asked for log-probabilities and for answers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

from xverse.engine.footprint import weight_bytes
from xverse.engine.llm import LLM
from xverse.engine.request import Request, Sampling, Scores
from xverse.errors import XverseError
from xverse.evals.door import Ask, Foretold, Prompt, Reading
from xverse.evals.item import digest

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, presence_penalty=0, frequency_penalty=0)


@dataclass(frozen=True)
class Labels:
    """Options as ids: what all of them begin with, and the last one of each."""

    before: tuple[int, ...]
    last: tuple[int, ...]


class LocalDoor:
    """`LLM` as a Door. Prompts are tokenized side by side; beginnings are computed once where the
    model was opened with `share_prefixes`."""

    reads: Literal["scores", "letters"] = "scores"

    def __init__(self, llm: LLM, **facts: object) -> None:
        """`facts` are added to what a report says of the model, for instance how it is rounded."""
        self.llm = llm
        gpu = llm.decoder.device.type == "cuda"
        self.batch = 512 if gpu else 64
        # Not what memory has room for, which is another number on another day.
        self.context = llm.context
        dtype = str(llm.decoder.dtype).removeprefix("torch.")
        backend = llm.tokenizer.backend.to_str()
        self.facts: Mapping[str, object] = {
            "model": llm.title,
            "weights": weights_digest(llm.model.checkpoint.path),
            "tokenizer": digest(backend),
            "chat_template": digest(llm.tokenizer.chat_template),
            "dtype": dtype,
            "weights_bytes": weight_bytes(llm.decoder),
            "context": self.context,
            **facts,
        }
        self._ids: dict[Prompt, list[int]] = {}
        self._labels: dict[tuple[str, bool, tuple[str, ...]], Labels | None] = {}

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, the marks of the chat format included."""
        if len(self._ids) > 16 * self.batch:
            for old in [*self._ids][: 4 * self.batch]:  # the latest are still to be asked
                self._ids.pop(old, None)
        new = [p for p in dict.fromkeys(prompts) if not p.chat and p not in self._ids]
        tokenizer = self.llm.tokenizer
        if len(new) > 1 and not tokenizer.encode(""):  # else something is added to every text
            texts = [prompt.text for prompt in new]
            self._ids |= zip(new, tokenizer.encode_many(texts), strict=True)
        return [len(self._encode(prompt)) for prompt in prompts]

    def without_middle(self, text: str, tokens: int) -> str:
        """The text's first and last tokens, half of `tokens` each."""
        ids = self.llm.tokenizer.encode(text, add_special=False)
        half = tokens // 2
        if len(ids) <= tokens:
            return text
        ends = (ids[:half], ids[len(ids) - half :])
        return "".join(self.llm.tokenizer.decode(some) for some in ends)

    def read(self, asks: Sequence[Ask], namespace: str) -> list[Reading]:
        """Log-probabilities of the options of each; options that differ in their last token only,
        as letters do, are all read at once."""
        plans = [self._plan(ask, namespace) for ask in asks]
        # What is shared is known once the first has been computed: of all prompts, then of one's
        # options.
        places = [(row, column) for row, plan in enumerate(plans) for column in range(len(plan))]
        first = [place for place in places if place[1] == 0]
        found: dict[tuple[int, int], Scores] = {}
        for some in (first[:1], first[1:], [place for place in places if place[1]]):
            scores = self.llm.read([plans[row][column] for row, column in some]) if some else []
            found |= zip(some, scores, strict=True)
        return [
            _reading(ask, plan, [found[row, column] for column in range(len(plan))])
            for row, (ask, plan) in enumerate(zip(asks, plans, strict=True))
        ]

    def write(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str], namespace: str
    ) -> list[str]:
        """The greedy continuation of each prompt, up to the first stop string."""
        sampling = Sampling(**{**GREEDY.__dict__, "max_tokens": max_tokens, "stop": tuple(stop)})
        ids = [self._encode(prompt) for prompt in prompts]
        if len(ids) > 1:  # what is shared is known once the first has been read
            self.llm.read([Request(tuple(ids[0]), None, namespace)])
        answers = self.llm.continue_ids(ids, sampling, namespace=namespace)
        return [answer.text for answer in answers]

    def foretell(self, texts: Sequence[str], namespace: str) -> list[Foretold]:
        """Each text in windows of the context, every token counted once; a window that is not the
        first sees as much of the text before it as there is room for."""
        requests: list[Request] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            ids = [self._beginning(), *self.llm.tokenizer.encode(text, add_special=False)]
            starts = [*range(1, len(ids), self.context - 1), len(ids)]
            for start, end in pairwise(starts):
                back = max(0, end - self.context)
                window = tuple(ids[back:end])
                requests.append(Request(window, None, namespace, score_from=start - back))
                owners.append(owner)
        sums, counts = [0.0] * len(texts), [0] * len(texts)
        for owner, scores in zip(owners, self.llm.read(requests), strict=True):
            sums[owner] += sum(scores.logprobs)
            counts[owner] += len(scores.logprobs)
        return [Foretold(*pair) for pair in zip(sums, counts, strict=True)]

    def _beginning(self) -> int:
        """What stands before a text's first token, so that it can be foretold."""
        tokenizer = self.llm.tokenizer
        id = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if id is None:
            raise XverseError(
                "A text cannot be foretold from its first token on.",
                "This model has no token that begins or ends a text.",
                "Use another model, or leave the task out.",
            )
        return id

    def _encode(self, prompt: Prompt) -> list[int]:
        known = self._ids.get(prompt)
        if known is None:
            known = self._ids[prompt] = self._encoded(prompt)
        return known

    def _encoded(self, prompt: Prompt) -> list[int]:
        if not prompt.chat:
            return self.llm.tokenizer.encode(prompt.text)
        encoded = self.llm.encode_chat(prompt.messages, Sampling(max_tokens=1))
        if encoded.cut is not None:  # then it does not fit, which the length must tell
            return self.llm.tokenizer.encode(prompt.text) + [0] * self.llm.context
        return encoded.ids

    def _plan(self, ask: Ask, namespace: str) -> list[Request]:
        """The requests that answer it: one for all options, or one for each."""
        labels = None if ask.greedy else self._labels_of(ask)
        if labels is None:
            return [self._scored(ask, option, namespace) for option in ask.options]
        ids = self._encode(ask.prompt)
        start = len(ids) if labels.before else None
        return [Request((*ids, *labels.before), None, namespace, start, labels=labels.last)]

    def _labels_of(self, ask: Ask) -> Labels | None:
        """Options that differ in their last id only; None where they do not.

        It is decided on the whole prompt, once for all that end in the same short line, such as
        "Answer:": what an option merges with stands right before it.
        """
        line = ask.prompt.text.rpartition("\n")[2]
        key = (line, ask.prompt.chat, ask.options)
        if key in self._labels:
            return self._labels[key]
        alone = self._encode(ask.prompt)
        joined = [self._joined(ask.prompt, option) for option in ask.options]
        stem = joined[0][:-1]
        alike = all(ids[:-1] == stem for ids in joined) and stem[: len(alone)] == alone
        found = None
        if alike and alone:
            found = Labels(tuple(stem[len(alone) :]), tuple(ids[-1] for ids in joined))
        if 0 < len(line) <= 32 and len(self._labels) < 10_000:
            self._labels[key] = found
        return found

    def _joined(self, prompt: Prompt, option: str) -> list[int]:
        """Ids of prompt and option. In a chat the option begins the answer, without its space."""
        if not prompt.chat:
            return self.llm.tokenizer.encode(prompt.text + option)
        more = self.llm.tokenizer.encode(option.lstrip(), add_special=False)
        return [*self._encode(prompt), *more]

    def _scored(self, ask: Ask, option: str, namespace: str) -> Request:
        """Where prompt and option together change the prompt's last ids, those count, too."""
        alone, ids = self._encode(ask.prompt), self._joined(ask.prompt, option)
        pairs = zip(alone, ids, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(ids)))
        if start == 0:
            ids, start = [self._beginning(), *ids], 1
        best = int(ask.greedy)
        return Request(tuple(ids), None, namespace, score_from=start, score_best=best)


def _reading(ask: Ask, plan: Sequence[Request], found: Sequence[Scores]) -> Reading:
    if plan[0].labels:
        before = sum(found[0].logprobs)
        return Reading(tuple(before + logprob for logprob in found[0].labels))
    logprobs = tuple(sum(scores.logprobs) for scores in found)
    if not ask.greedy:
        return Reading(logprobs)
    return Reading(logprobs, tuple(map(_is_greedy, plan, found)))


def _is_greedy(request: Request, scores: Scores) -> bool:
    """Whether each scored token was the likeliest there."""
    wanted = request.ids[request.score_from :]
    return all(top[0][0] == id for top, id in zip(scores.tops, wanted, strict=True))


@cache
def weights_digest(path: Path) -> str:
    """16 hexadecimal digits of the sha256 over the names and bytes of a model's weight files."""
    some = [path] if path.is_file() else [f for kind in WEIGHT_FILES for f in path.glob(kind)]
    hasher = hashlib.sha256()
    for file in sorted(some):
        with file.open("rb") as opened:
            hasher.update(hashlib.file_digest(opened, "sha256").digest())
    return hasher.hexdigest()[:16]
