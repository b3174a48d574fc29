"""RUNS -> ROWS. What was measured, as rows of three tables, and the report that holds them."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xverse.engine.measure import Measured

OURS = "xverse"
Runs = Mapping[str, Sequence["Measured"]]  # the rounds of each runner, ours first


@dataclass(frozen=True)
class FirstToken:
    """Seconds from request to first token, of one request alone."""

    who: str
    prompt_tokens: int
    samples: int
    median_s: float
    p95_s: float
    xverse_is_times_as_fast: float


@dataclass(frozen=True)
class Latency:
    """Seconds from token to token, of one request alone; share of the floor for ours."""

    who: str
    prompt_tokens: str
    new_tokens: str
    samples: int
    gap_median_s: float
    gap_p95_s: float
    tokens_per_s: float  # of the time between first and last token
    share_of_floor: float | None
    xverse_is_times_as_fast: float


@dataclass(frozen=True)
class Load:
    """Tokens a second of many requests. Times of all rounds together; speeds are their median."""

    who: str
    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    output_tokens_per_s_all: tuple[float, ...]
    total_tokens_per_s: float
    ttft_median_s: float
    ttft_p95_s: float
    tpot_median_s: float | None  # None where answers have one token
    tpot_p95_s: float | None
    preempted: int | None  # in all rounds; None for peers, who don't tell
    reused_tokens: int | None
    xverse_is_times_as_fast: float


@dataclass(frozen=True)
class Report:
    """Everything `xverse benchmark` tells. Seconds, bytes, tokens; no rows where answers were
    wrong, as nobody wants to know how fast they came."""

    command: str
    date: str
    machine: Mapping[str, object]
    model: Mapping[str, object]
    engine: Mapping[str, object]
    workload: Mapping[str, object]
    correctness: Mapping[str, object]
    memory: Mapping[str, object] = field(default_factory=dict)
    peers: Mapping[str, object] = field(default_factory=dict)
    first_token: tuple[FirstToken, ...] = ()
    latency: tuple[Latency, ...] = ()
    load: tuple[Load, ...] = ()

    @property
    def sound(self) -> bool:
        """False where the engine's answers were not those of the plain decoder; what could not be
        checked counts as sound, and its verdict says so."""
        return self.correctness["sound"] is not False

    def to_json(self) -> dict[str, object]:
        """The report as JSON has it."""
        return dataclasses.asdict(self)


def first_token_rows(runs: Runs) -> list[FirstToken]:
    """A row for each runner of one cell."""
    from xverse.engine.measure import percentile

    times = {who: [ttft for run in rounds for ttft in run.ttfts_s] for who, rounds in runs.items()}
    ours = statistics.median(times[OURS])
    return [
        FirstToken(
            who,
            runs[who][0].answers[0].prompt_tokens,
            len(found),
            _seconds(statistics.median(found)),
            _seconds(percentile(found, 0.95)),
            round(statistics.median(found) / ours, 3),
        )
        for who, found in times.items()
    ]


def latency_rows(
    runs: Runs, prompt: tuple[int, int], new: tuple[int, int], floor_tokens_per_s: float
) -> list[Latency]:
    """A row for each runner of the cell of one request at a time; none for answers of one token."""
    from xverse.engine.measure import percentile

    speeds = {who: _alone(rounds) for who, rounds in runs.items()}
    if new[1] < 2:
        return []
    rows = []
    for who, rounds in runs.items():
        gaps = [gap for run in rounds for gap in run.gaps_s]
        rows.append(
            Latency(
                who,
                _span(prompt),
                _span(new),
                len(gaps),
                _seconds(statistics.median(gaps)),
                _seconds(percentile(gaps, 0.95)),
                round(speeds[who], 2),
                round(speeds[who] / floor_tokens_per_s, 4) if who == OURS else None,
                round(speeds[OURS] / speeds[who], 3),
            )
        )
    return rows


def load_rows(runs: Runs, concurrency: int) -> list[Load]:
    """A row for each runner of one cell."""
    from xverse.engine.measure import percentile

    medians = {
        who: statistics.median(run.output_tokens_per_s for run in rounds)
        for who, rounds in runs.items()
    }
    rows = []
    for who, rounds in runs.items():
        ttfts = [ttft for run in rounds for ttft in run.ttfts_s]
        tpots = [tpot for run in rounds for tpot in run.tpots_s]
        rows.append(
            Load(
                who,
                concurrency,
                len(rounds[0].answers),
                rounds[0].prompt_tokens,
                rounds[0].output_tokens,
                round(medians[who], 2),
                tuple(round(run.output_tokens_per_s, 2) for run in rounds),
                round(statistics.median(run.total_tokens_per_s for run in rounds), 2),
                _seconds(statistics.median(ttfts)),
                _seconds(percentile(ttfts, 0.95)),
                _seconds(statistics.median(tpots)) if tpots else None,
                _seconds(percentile(tpots, 0.95)) if tpots else None,
                _total([run.preempted for run in rounds]),
                _total([run.reused_tokens for run in rounds]),
                round(medians[OURS] / medians[who], 3),
            )
        )
    return rows


def _alone(rounds: Sequence["Measured"]) -> float:
    """Tokens a second after the first one: the median of the rounds; 0 where there is but one."""
    speeds = []
    for run in rounds:
        gaps = run.gaps_s
        speeds.append(len(gaps) / sum(gaps) if gaps else 0.0)
    return statistics.median(speeds)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _seconds(value: float) -> float:
    return round(value, 7)
