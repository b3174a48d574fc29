"""OPENAPI -> HOSTILE REQUESTS. schemathesis's cases, valid ones, and mutants of both."""

import json
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from bench.fuzz_mutants import Case, Headers, as_object, mutated
from bench.fuzz_seeds import SEEDS


class Source:
    """Endless cases for one server, the same for the same seed."""

    def __init__(
        self, specs: Mapping[bool, dict[str, Any]], host: str, key: str, model: str, seed: int
    ) -> None:
        """`specs`: the OpenAPI documents, of the API under False and of the guide's under True."""
        self._specs, self._model, self._rng = specs, model, random.Random(seed)
        self._head = ((b"host", host.encode()), (b"authorization", b"Bearer " + key.encode()))
        self._bases: list[Case] = [self._seed(each) for each in range(len(SEEDS))]
        self._operations = list(self._all_operations())
        self._turn = 0

    def block(self, examples: int, mutants: int) -> list[Case]:
        """`examples` cases of schemathesis's for one operation, positive ones and negative ones,
        each as it is and with the model's right name; mutants of those seen so far; valid ones."""
        guide, label, strategies = self._operations[self._turn % len(self._operations)]
        self._turn += 1
        found: list[Case] = []
        for mode, strategy in strategies.items():
            drawn = _draw(strategy, examples // 2, self._rng.getrandbits(32))
            made = [self._of(case, guide, label, mode) for case in drawn]
            found += made
            found += [self._aimed(case) for case in made if case.body is not None]
        self._bases[len(SEEDS) :] = [*self._bases[len(SEEDS) :], *found][-2000:]
        found += [self._seed(self._rng.randrange(len(SEEDS))) for _ in range(mutants // 6)]
        found += [self._mutant() for _ in range(mutants)]
        self._rng.shuffle(found)
        return found

    def _all_operations(self) -> Iterator[tuple[bool, str, dict[str, Any]]]:
        import schemathesis
        from schemathesis.generation import GenerationMode

        logging.getLogger("schemathesis").setLevel(logging.ERROR)
        for guide, spec in self._specs.items():
            for result in schemathesis.openapi.from_dict(spec).get_all_operations():
                operation: Any = result.ok()  # type: ignore[union-attr]
                modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
                made = {m.name.lower(): operation.as_strategy(generation_mode=m) for m in modes}
                yield guide, operation.path, made

    def _of(self, case: Any, guide: bool, path: str, mode: str) -> Case:
        """A case of schemathesis's, with the right key nearly always: else it tries nothing."""
        target = path
        for name, value in (case.path_parameters or {}).items():
            target = target.replace("{" + name + "}", quote(str(value), safe="%"))
        query = "&".join(f"{quote(str(k))}={quote(str(v))}" for k, v in (case.query or {}).items())
        target += f"?{query}" if query else ""
        head: Headers = self._head
        body = None
        given = {str(name).lower(): str(value) for name, value in (case.headers or {}).items()}
        if self._rng.random() < 0.03 and "authorization" in given:
            name = given["authorization"].encode("latin-1", "replace")
            head = (self._head[0], (b"authorization", name.strip()))
        if case.media_type:
            head = (*head, (b"content-type", b"application/json"))
            body = case.body if isinstance(case.body, bytes) else self._json(case.body)
        path_or_none: str | None = path
        if "{" in path and target.count("/") < path.count("/"):
            path_or_none = None
        return Case(
            f"schemathesis {mode}",
            guide,
            case.method.upper(),
            target.encode("ascii", "replace") or b"/",
            path_or_none,
            head,
            body,
        )

    def _json(self, value: object) -> bytes:
        try:
            return json.dumps(value, ensure_ascii=self._rng.random() < 0.5).encode()
        except (TypeError, UnicodeEncodeError):
            return json.dumps(value, default=str).encode()  # a lone surrogate stays escaped

    def _aimed(self, case: Case) -> Case:
        """The same for the model that is there, and with an answer that ends soon."""
        asked = as_object(case.body)
        if asked is None:
            return case
        asked["model"] = self._model
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if asked.get(name) is not None:
                asked[name] = self._rng.randint(1, 8)
        return replace(case, body=self._json(asked), source=f"{case.source}, aimed")

    def _seed(self, number: int) -> Case:
        path, guide, asked = SEEDS[number]
        asked = {**asked, **({} if guide or "tokens" in asked else {"model": self._model})}
        head = (*self._head, (b"content-type", b"application/json"))
        body = self._json(asked)
        # A grammar has 4.5 s to compile, which a machine that is busy elsewhere may not give it.
        held = asked.get("tool_choice") or asked.get("response_format")
        expects = (200, 400 if held else 200)
        return Case("valid", guide, "POST", path.encode(), path, head, body, expects=expects)

    def _mutant(self) -> Case:
        rng = self._rng
        pool = self._bases[: len(SEEDS)] if rng.random() < 0.7 else self._bases
        return mutated(rng, rng.choice(pool))


def _draw(strategy: Any, count: int, seed: int) -> list[Any]:
    """So many examples of a hypothesis strategy; none where there can be none."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import HypothesisException

    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        found.append(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            collect()
        except HypothesisException:
            return found  # a route without input has no wrong input
    return found
