"""TWO REPORTS -> WHICH IS BETTER. The same items side by side: McNemar's test and a bootstrap."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.evals.evaluate import ITEMS
from xverse.evals.report import markdown_table
from xverse.files import read_json

RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """B against A on the items of one task that both were asked, in the same words.

    `low` and `high` bound the difference in percent with 95 % certainty (bootstrap over items).
    `p` is the exact two-sided McNemar test's: how probable so uneven a split of the items that
    only one got right would be between equal models; None where scores are not right or wrong.
    """

    task: str
    n: int
    a: float
    b: float
    only_a: int
    only_b: int
    low: float
    high: float
    p: float | None

    @property
    def significant(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def compare(a: Path, b: Path, seed: int = 0) -> list[Difference]:
    """Two folders of `evaluate`, task by task; XverseError where they have no task in common, or
    asked it in other words."""
    ours, theirs = _items(a), _items(b)
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise XverseError(
            "The two reports have no task in common.",
            f"{a} has {', '.join(ours)}; {b} has {', '.join(theirs)}.",
            "Evaluate both models on the same tasks.",
        )
    return [_difference(task, ours[task], theirs[task], seed) for task in shared]


def as_markdown(a: str, b: str, found: Sequence[Difference]) -> str:
    """The differences for people."""
    head = ("Task", "n", a, b, "Difference", "95 % interval", "only A", "only B", "p (McNemar)")
    rows = [
        (
            each.task,
            str(each.n),
            f"{each.a:.2f}",
            f"{each.b:.2f}",
            f"{'**' * each.significant}{each.b - each.a:+.2f}{'**' * each.significant}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            str(each.only_a),
            str(each.only_b),
            "" if each.p is None else f"{each.p:.4f}",
        )
        for each in found
    ]
    return "\n".join([f"# {b} against {a}", "", *markdown_table(head, rows)])


def as_json(a: str, b: str, found: Sequence[Difference]) -> dict[str, object]:
    """The differences as JSON."""
    return {"a": a, "b": b, "differences": [asdict(each) for each in found]}


def name_of(folder: Path) -> str:
    """The title of the model whose report is in `folder`."""
    model: Any = read_json(folder / "report.json")["model"]
    return str(model["model"])


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin, `only_a` + `only_b` throws."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)
    ]
    tail = math.fsum(math.exp(log - n * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def bootstrap(differences: Sequence[float], seed: int) -> tuple[float, float]:
    """The middle 95 % of the mean of items drawn with repetition, `RESAMPLES` times."""
    import numpy

    values = numpy.asarray(differences, dtype=float)
    chance = numpy.random.default_rng(seed)
    means = [
        float(values[chance.integers(0, len(values), len(values))].mean()) for _ in range(RESAMPLES)
    ]
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _difference(
    task: str,
    ours: Mapping[str, tuple[str, float]],
    theirs: Mapping[str, tuple[str, float]],
    seed: int,
) -> Difference:
    if {h for h, _ in ours.values()} != {
        h for h, _ in theirs.values()
    } or ours.keys() != theirs.keys():
        raise XverseError(
            f"The two reports did not ask {task} alike.",
            "The hashes of their prompts, or their items, differ.",
            "Evaluate both with the same --limit, --seed, --shots and --chat.",
        )
    pairs = [(score, theirs[name][1]) for name, (_, score) in ours.items()]
    exact = all(score in (0.0, 1.0) for pair in pairs for score in pair)
    only_a, only_b = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    low, high = bootstrap([y - x for x, y in pairs], seed)
    return Difference(
        task,
        len(pairs),
        100 * math.fsum(x for x, _ in pairs) / len(pairs),
        100 * math.fsum(y for _, y in pairs) / len(pairs),
        only_a,
        only_b,
        100 * low,
        100 * high,
        mcnemar(only_a, only_b) if exact else None,
    )


def _items(folder: Path) -> dict[str, dict[str, tuple[str, float]]]:
    """Hash of the prompts, and score, of every scored item, by task and name."""
    try:
        with (folder / ITEMS).open(encoding="utf-8", errors="surrogatepass") as lines:
            rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise XverseError(
            f"There is no report in {folder}.",
            str(error),
            "Name two folders of `xverse evaluate --out`.",
        ) from error
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for row in rows:
        if "score" in row:
            found.setdefault(row["task"], {})[row["name"]] = (row["hash"], row["score"])
    return found
