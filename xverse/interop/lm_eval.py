"""LM-EVALUATION-HARNESS -> ENGINE. Its model class over our engine; registers itself as "xverse".

from xverse.interop.lm_eval import XverseLM
lm_eval.simple_evaluate(model=XverseLM(model="xverse/XVERSE-7B"), tasks=["hellaswag"])
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from xverse.engine.llm import LLM
from xverse.errors import XverseError
from xverse.evals.door import Ask, Prompt
from xverse.evals.local import LocalDoor

DEFAULT_TOKENS = 256  # of an answer whose task names no length, as in the harness' own classes
_KNOWN = {"until", "max_gen_toks", "temperature", "do_sample", "top_k", "top_p"}
_register = cast(Callable[[type[LM]], type[LM]], register_model("xverse"))


@_register
class XverseLM(LM):  # type: ignore[misc]  # the harness has no types
    """A model of ours as lm-evaluation-harness asks it. Beginnings that questions share are
    computed once, and everything runs side by side."""

    def __init__(self, model: str | LLM, **options: Any) -> None:
        """`model` is what `LLM` takes, or one that is open; options are LLM's own.

        Those that the harness gives every model, such as batch_size, have no meaning here.
        """
        super().__init__()
        for name in ("batch_size", "max_batch_size"):
            options.pop(name, None)
        if isinstance(model, str):
            model = LLM(model, **{"share_prefixes": True, **options})
        self.llm = model
        self.door = LocalDoor(model)

    @property
    def tokenizer_name(self) -> str:
        """What the harness' cache of chat prompts goes by."""
        return self.llm.title

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness' records; the chat format is the engine's own."""
        return self.llm.tokenizer.chat_template or "XVERSE's own format"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation as text."""
        ids = self.llm.encode_chat(chat_history).ids
        return self.llm.tokenizer.decode(ids, skip_special=False)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether it is the greedy one."""
        asks = []
        for request in requests:
            context, continuation = request.args
            # Spaces before a word belong to the word's token.
            kept = context.rstrip(" ")
            asks.append(Ask(Prompt(kept), (context[len(kept) :] + continuation,), greedy=True))
        found = self.door.read(asks, "lm_eval")
        return [(reading.logprobs[0], reading.greedy[0]) for reading in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Sum of the log-probabilities of all tokens of each text."""
        texts = [request.args[0] for request in requests]
        return [found.logprob for found in self.door.foretell(texts, "lm_eval")]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy continuation of each, up to its stop strings. XverseError for a task that
        wants anything but greedy decoding."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for place, request in enumerate(requests):
            _, options = request.args
            groups.setdefault(_plan(options), []).append(place)
        for (stop, most), places in groups.items():
            prompts = [Prompt(requests[place].args[0]) for place in places]
            for place, text in zip(places, self._written(prompts, most, stop), strict=True):
                answers[place] = text
        return answers

    def _written(self, prompts: Sequence[Prompt], most: int, stop: Sequence[str]) -> list[str]:
        return self.door.write(prompts, most, stop, "lm_eval")


def _plan(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and length of an answer."""
    unknown = options.keys() - _KNOWN
    if unknown or options.get("do_sample") or float(options.get("temperature") or 0) > 0:
        raise XverseError(
            f"A task wants answers written in a way that is not had here: {options!r:.200}.",
            "Answers are greedy; known options are until and max_gen_toks.",
            "Change the task's generation_kwargs.",
        )
    until = options.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return tuple(text for text in stop if text), int(options.get("max_gen_toks", DEFAULT_TOKENS))
