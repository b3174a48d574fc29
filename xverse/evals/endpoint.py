"""HTTP -> DOOR. Any server of OpenAI's API, asked for log-probabilities where it gives them.

Where it does not, or in chat format, it is asked to write, and the letter of its answer is read.
"""

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx

from xverse.device import env
from xverse.errors import XverseError
from xverse.evals.door import Ask, Foretold, Prompt, Reading
from xverse.evals.item import LETTERS

TRIES, WAIT_S, TIMEOUT_S = 5, 1.0, 600.0
ANSWER_TOKENS = 32  # of an answer of which a letter is read


class EndpointDoor:
    """A model behind `url` (".../v1"). XverseError where nothing answers there."""

    batch = 64
    context: int | None = None  # nobody tells it; the server refuses what is too long

    def __init__(
        self, url: str, model: str | None = None, *, chat: bool, parallel: int = 8
    ) -> None:
        """`model` may be left out where the server has only one. The key is $XVERSE_API_KEY's, or
        else $OPENAI_API_KEY's."""
        self._url = url.rstrip("/")
        key = env("XVERSE_API_KEY", "") or env("OPENAI_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=TIMEOUT_S, headers=headers)
        self._parallel = parallel
        self._model = model or self._only_model()
        self.reads: Literal["scores", "letters"] = (
            "scores" if not chat and self._scores() else "letters"
        )
        # The model's generation_config.json may have one, which would change greedy answers.
        self._neutral = {"repetition_penalty": 1.0} if self._takes_penalty(chat) else {}
        self.facts: Mapping[str, object] = {
            "model": self._model,
            "endpoint": self._url,
            "weights": "unknown",
            "repetition_penalty": "off" if self._neutral else "the server's own",
        }

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Not known here."""
        return [0] * len(prompts)

    def without_middle(self, text: str, tokens: int) -> str:
        """Not to be had: nobody counts tokens here."""
        raise AssertionError("a prompt is cut only where the context is known")

    def read(self, asks: Sequence[Ask], namespace: str) -> list[Reading]:
        """Log-probabilities of the options by echo, or the letter of a written answer."""
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._score if self.reads == "scores" else self._letter, asks))

    def write(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str], namespace: str
    ) -> list[str]:
        """The greedy continuation of each prompt; OpenAI's API takes four stop strings at most, and
        the text is cut at the others here."""
        with ThreadPoolExecutor(self._parallel) as pool:
            texts = pool.map(lambda prompt: self._written(prompt, max_tokens, stop), prompts)
            return [
                min((text.partition(end)[0] for end in stop), key=len, default=text)
                for text in texts
            ]

    def foretell(self, texts: Sequence[str], namespace: str) -> list[Foretold]:
        """The tokens of each text after its first, which a server does not foretell."""
        with ThreadPoolExecutor(self._parallel) as pool:
            tables = list(pool.map(self._echoed, texts))
        values = [[v for v in table["token_logprobs"] if v is not None] for table in tables]
        return [Foretold(sum(some), len(some)) for some in values]

    def _only_model(self) -> str:
        models = [str(each["id"]) for each in self._get("/models")["data"]]
        if len(models) == 1:
            return models[0]
        raise XverseError(
            f"{self._url} has {len(models)} models.",
            f"They are {', '.join(models[:8]) or 'none'}.",
            "Say which one after `xverse evaluate`.",
        )

    def _scores(self) -> bool:
        """Whether the server tells the log-probabilities of a prompt."""
        body = {"model": self._model, "prompt": "A B", "max_tokens": 0, "echo": True, "logprobs": 1}
        try:
            response = self._client.post(f"{self._url}/completions", json=body)
            values = response.json()["choices"][0]["logprobs"]["token_logprobs"]
            return response.status_code == 200 and values[-1] is not None
        except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError):
            return False

    def _takes_penalty(self, chat: bool) -> bool:
        """Whether the server knows the field, which is not OpenAI's."""
        prompt = {"messages": [{"role": "user", "content": "A"}]} if chat else {"prompt": "A"}
        body = {"model": self._model, "max_tokens": 1, "repetition_penalty": 1.0, **prompt}
        path = "/chat/completions" if chat else "/completions"
        try:
            return self._client.post(self._url + path, json=body).status_code == 200
        except httpx.HTTPError:
            return False

    def _score(self, ask: Ask) -> Reading:
        logprobs: list[float] = []
        greedy: list[bool] = []
        for option in ask.options:
            table = self._echoed(ask.prompt.text + option)
            start = len(ask.prompt.text)
            # A token that begins in the prompt and ends in the option counts, as in LLM.score.
            some = [
                place
                for place, (at, token) in enumerate(
                    zip(table["text_offset"], table["tokens"], strict=True)
                )
                if at + len(token) > start and table["token_logprobs"][place] is not None
            ]
            values = [table["token_logprobs"][place] for place in some]
            logprobs.append(sum(values))
            best = [max(table["top_logprobs"][place].values()) for place in some]
            greedy.append(all(v >= b for v, b in zip(values, best, strict=True)))
        return Reading(tuple(logprobs), tuple(greedy) if ask.greedy else ())

    def _letter(self, ask: Ask) -> Reading:
        letters = [option.strip() for option in ask.options]
        if ask.greedy or letters != [*LETTERS[: len(letters)]]:
            raise XverseError(
                "This server cannot be asked a task that compares whole texts.",
                f"{self._url} tells no log-probabilities of a prompt, or is asked in a chat.",
                "Leave the task out, or evaluate the model itself.",
            )
        said = self._written(ask.prompt, ANSWER_TOKENS, ())
        found = re.search(rf"(?<![A-Za-z])[{''.join(letters)}](?![A-Za-z])", said)
        named = found[0] if found else None
        values = tuple(0.0 if letter == named else float("-inf") for letter in letters)
        return Reading(values, said=said)

    def _written(self, prompt: Prompt, max_tokens: int, stop: Sequence[str]) -> str:
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, **self._neutral}
        body |= {"stop": [*stop[:4]]} if stop else {}
        if prompt.chat:
            answer = self._post("/chat/completions", body | {"messages": prompt.messages})
            return str(answer["choices"][0]["message"]["content"] or "")
        answer = self._post("/completions", body | {"prompt": prompt.text})
        return str(answer["choices"][0]["text"])

    def _echoed(self, text: str) -> dict[str, Any]:
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        table: dict[str, Any] = self._post("/completions", body)["choices"][0]["logprobs"]
        return table

    def _get(self, path: str) -> dict[str, Any]:
        return self._answered("GET", path, None)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._answered("POST", path, {"model": self._model, **body})

    def _answered(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The JSON of an answer. Whoever is busy is asked again; XverseError in the end."""
        why = ""
        for attempt in range(TRIES):
            try:
                response = self._client.request(method, self._url + path, json=body)
                if response.status_code == 200:
                    found: dict[str, Any] = response.json()
                    return found
                why = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code != 429 and response.status_code < 500:
                    break
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
            except ValueError as error:
                why = f"The answer is no JSON: {error}"
            if attempt + 1 < TRIES:
                time.sleep(WAIT_S * 2**attempt)
        raise XverseError(
            f"{self._url}{path} gave no answer.",
            why,
            "Check the address, XVERSE_API_KEY and the model's name (--chat for a server that only "
            "chats); then run the same command again: it goes on from here.",
        )
