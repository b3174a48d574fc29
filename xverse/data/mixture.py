"""RATIOS -> WHICH DOCUMENTS. Sampling by language and kind: from a TOML file to a list."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xverse.config import nearest, read_toml
from xverse.data.presets import PRESETS
from xverse.data.shards import Group
from xverse.data.source import Reading
from xverse.errors import XverseError

CODE = "code"  # the kind whose languages are programming languages
REST = "*"  # the share of all languages, or kinds, that are not named
ROUNDS = 200
# Up to four times, repeated text is worth about as much as new text (Muennighoff et al., 2023,
# "Scaling Data-Constrained Language Models").
MAX_EPOCHS = 4.0


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a mixture file holds: shares (in any unit), how much to draw, and what files are."""

    preset: str = ""
    languages: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)
    code: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0  # to draw in all; 0: as many as there are of what has a share
    max_epochs: float = MAX_EPOCHS
    seed: int = 0
    sources: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, file: Path) -> Self:
        """The mixture in a TOML file; XverseError for what is unknown, negative or no number."""
        table: dict[str, Any] = dict(read_toml(file, cls))
        preset = str(table.get("preset", ""))
        if preset and preset not in PRESETS:
            raise _wrong(file, f"There is no preset {preset!r}.{nearest(preset, PRESETS)}")
        table = {**PRESETS.get(preset, {}), **table}
        for name in ("languages", "kinds", "code"):
            shares = table.get(name, {})
            if not isinstance(shares, dict) or not all(map(_is_share, shares.values())):
                raise _wrong(file, f"[{name}] is no table of shares of 0 and more.")
            if shares and not sum(shares.values()):
                raise _wrong(file, f"[{name}] gives nothing to anything.")
        numbers = {"tokens": 0, "seed": 0, "max_epochs": 0.0}
        for name, least in numbers.items():
            value = table.get(name, least)
            if not _is_share(value) or (name != "max_epochs" and not isinstance(value, int)):
                raise _wrong(file, f"{name} = {value!r} is no such number.")
        mixture = cls(**table)
        mixture.check_sources(file)
        return mixture

    def check_sources(self, file: Path) -> None:
        """Raise XverseError for a [[sources]] entry that is malformed."""
        known = {"files", *(item.name for item in dataclasses.fields(Reading))} - {"fixed"}
        for entry in self.sources:
            if not isinstance(entry, dict) or not isinstance(entry.get("files"), str):
                raise _wrong(file, 'Every [[sources]] needs files = "a pattern".')
            if entry.get("txt", "file") not in ("file", "paragraph", "line"):
                raise _wrong(file, "txt is one of file, paragraph, line.")
            for key in sorted(entry.keys() - known):
                raise _wrong(file, f"[[sources]] knows no {key!r}.{nearest(key, known)}")

    def reading_of(self, path: Path, default: Reading) -> Reading:
        """How the file `path` is read: by the first of `sources` whose pattern it matches."""
        for entry in self.sources:
            pattern = str(entry["files"])
            if fnmatch(path.name, pattern) or fnmatch(path.as_posix(), pattern):
                given = {key: value for key, value in entry.items() if key != "files"}
                fixed = bool({"language", "kind"} & given.keys())
                return dataclasses.replace(default, **given, fixed=fixed)
        return default

    @property
    def has_shares(self) -> bool:
        """Whether it says what to draw, and not only what the files are."""
        return bool(self.languages or self.kinds or self.code or self.tokens)

    def to_json(self) -> dict[str, Any]:
        """The mixture as JSON values, for the index."""
        return {**dataclasses.asdict(self), "sources": [dict(entry) for entry in self.sources]}


@dataclass(frozen=True)
class Draw:
    """What is taken of one group: `epochs` times all of it."""

    group: Group
    wanted: float  # share of all tokens drawn that the mixture asks for
    epochs: float

    @property
    def tokens(self) -> float:
        """Tokens drawn."""
        return self.epochs * self.group.tokens


def plan_draw(mixture: Mixture, groups: Sequence[Group]) -> list[Draw]:
    """How often to take each of `groups`, so that the shares come out as the mixture says.

    No group is taken more than `max_epochs` times; what is then missing is made up by the others
    in proportion, and where none has more, less is drawn.
    """
    wanted = _shares(mixture, groups)
    if not wanted.any():
        raise XverseError(
            "The mixture leaves nothing of this corpus.",
            "None of its languages and kinds has a share: "
            + ", ".join(f"{group.language}/{group.kind}" for group in groups),
            f'Name them in the mixture, or give a share to "{REST}".',
        )
    available = np.array([group.tokens for group in groups], float)
    total = mixture.tokens or available[wanted > 0].sum()
    most = np.where(wanted > 0, mixture.max_epochs * available, 0.0)
    drawn = np.zeros(len(groups))
    open_ = wanted > 0
    while open_.any() and total - drawn.sum() > 1e-6 * total:  # fill up, as water finds its level
        drawn[open_] += (total - drawn.sum()) * wanted[open_] / wanted[open_].sum()
        drawn = np.minimum(drawn, most)
        open_ = open_ & (drawn < most)
    epochs = drawn / np.maximum(available, 1)
    return [Draw(*parts) for parts in zip(groups, wanted.tolist(), epochs.tolist(), strict=True)]


def draw(
    draws: Sequence[Draw], codes: NDArray[np.uint16], lengths: NDArray[np.int64], seed: int
) -> NDArray[np.uint64]:
    """The documents to serve: each as often as its group's epochs say, in the order of the shards.

    The part of an epoch goes to documents chosen by `seed`, until it has its tokens: within one
    document of what was asked. `codes` and `lengths` are of all documents, shape (documents,).
    """
    times = np.zeros(len(codes), np.int64)
    for code, item in enumerate(draws):
        places = np.flatnonzero(codes == code)
        part, whole = math.modf(item.epochs)
        times[places] = int(whole)
        name = f"{seed}/{item.group.language}/{item.group.kind}"
        chance = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
        shuffled = chance.permutation(places)
        before = np.cumsum(lengths[shuffled]) - lengths[shuffled]
        # Half of a document too much or too little, on average nothing.
        target = part * item.group.tokens - lengths[shuffled] / 2
        times[shuffled[before < target]] += 1
    return np.repeat(np.arange(len(codes), dtype=np.uint64), times)


def _shares(mixture: Mixture, groups: Sequence[Group]) -> NDArray[np.float64]:
    """The share of each group: the tables' shares of kinds and of languages, both at once.

    What the tables leave open is as in the corpus: it is scaled to the shares of the languages and
    of the kinds in turn, until both hold (iterative proportional fitting; Deming and Stephan,
    1940). Where no table of these groups can have both, the kinds hold.
    """
    is_code = np.array([group.kind == CODE for group in groups])
    shares = np.array([group.tokens for group in groups], float)
    if shares.sum():
        shares /= shares.sum()
    kinds = _rows(mixture.kinds, [group.kind for group in groups])
    tongues = _rows(
        mixture.languages, ["" if group.kind == CODE else group.language for group in groups]
    )
    code = _rows(mixture.code, [group.language if group.kind == CODE else "" for group in groups])
    for _ in range(ROUNDS):
        for table, among in ((tongues, ~is_code), (code, is_code), (kinds, np.ones_like(is_code))):
            shares = _fit(shares, table, among)
    return shares


def _rows(
    table: Mapping[str, float], names: Sequence[str]
) -> list[tuple[float, NDArray[np.bool_]]]:
    """(share, which groups it is for) of every row of `table`; [] where it is empty."""
    if not table:
        return []
    lower = [name.lower() for name in names]
    own = {key.lower(): share for key, share in table.items() if key != REST}
    rows = [(share, np.array([name == key for name in lower])) for key, share in own.items()]
    rest = np.array([bool(name) and name not in own for name in lower])
    return [*rows, (table.get(REST, 0.0), rest)]


def _fit(
    shares: NDArray[np.float64],
    table: list[tuple[float, NDArray[np.bool_]]],
    among: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """`shares` scaled so that those `among` the groups stand to each other as in `table`."""
    whole = shares[among].sum()
    present = sum(share for share, rows in table if shares[rows & among].sum() > 0)
    if not table or not whole or not present:
        return shares if not table else np.where(among, 0.0, shares)
    fitted = shares.copy()
    for share, rows in table:
        if (sum_ := shares[rows & among].sum()) > 0:
            fitted[rows & among] *= whole * share / present / sum_
    return fitted


def _is_share(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )


def _wrong(file: Path, why: str) -> XverseError:
    return XverseError(f"{file} is no mixture that can be used.", why, "See docs/prepare.md.")
