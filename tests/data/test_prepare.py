"""A dirty little corpus becomes shards: nothing lost silently, nothing twice, and never half."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.text.tiny import HAN, write_tiny_tokenizer
from xverse.data.mixture import Mixture
from xverse.data.pipeline import Execution, build_stages, prepare
from xverse.data.plan import Plan, Settings
from xverse.data.shards import Shards
from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

pytest.importorskip("datatrove.pipeline.dedup")
ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "of", "and", "in", "to", "water", "river", "stone", "light", "under", "morning"]
WORDS += ["garden", "letter", "house", "winter"]


def prose(seed: int, count: int = 60) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) + str(chance.randrange(100)) for _ in range(count))


def han(seed: int) -> str:
    return "".join(random.Random(seed).choices(HAN, k=120))


ENGLISH = [prose(seed) for seed in range(20)]
CHINESE = [han(seed) for seed in range(10)]
NEAR = ENGLISH[3].replace("river", "lake", 1) + " and more"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 English documents, 10 Chinese ones; copies, near copies, junk and dirt among them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_tokenizer(folder.parent / "tokenizer")
    rows = [{"text": text, "lang": "en", "kind": "web"} for text in ENGLISH]
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(5, b"{broken")
    lines.insert(9, b'{"text": "\xff"}')
    (folder / "a-en.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    extra = [ENGLISH[3], NEAR, "buy now " * 99, "short", ENGLISH[7]]
    rows = [{"text": text, "lang": "en", "kind": "books"} for text in extra]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (folder / "b-more.jsonl.gz").write_bytes(packed)
    (folder / "c-zh.txt").write_text("\n\n".join(CHINESE), "utf-8")
    (folder / "d-empty.jsonl").write_bytes(b"")
    return folder


def plan(corpus: Path, out: Path, **changes: Any) -> Plan:
    sources = [{"files": "c-*", "language": "zh", "kind": "books", "txt": "paragraph"}]
    given: dict[str, Any] = {
        "tokenizer": str(corpus.parent / "tokenizer"),
        "mixture": Mixture(sources=sources),
        "max_dirty": 0.2,
        "validation": 0.2,
        **changes,
    }
    return Plan.make([str(corpus)], Settings(**given), out)


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> tuple[Path, dict[str, Any]]:
    out = corpus.parent / "prepared"
    statistics = prepare(plan(corpus, out), Execution())
    assert statistics is not None
    return out, statistics


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    shards = Shards.open(folder, verify=True)
    documents = [shards.document(index) for index in range(shards.documents)]
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def files_of(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_good_document_is_there_once(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, _ = prepared
    tokenizer = Tokenizer.load(out)
    train, held_out = texts_of(out, tokenizer), texts_of(out / "validation", tokenizer)
    # Of the near copy and what it copies, one is kept.
    found = sorted(ENGLISH[3] if text == NEAR else text for text in train + held_out)
    assert found == sorted(ENGLISH + CHINESE)
    assert 1 <= len(held_out) <= 14


def test_everything_that_was_left_out_is_counted(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, statistics = prepared
    assert statistics["dirty_lines"] == {"bad JSON": 1, "bad UTF-8": 1}
    documents = statistics["documents"]
    assert documents["read"] == 35
    assert documents["dropped"] == {"repetition": 1, "too short": 1}
    assert documents["duplicates"] == {"exact": 2, "near": 1}
    assert documents["kept"] == 30
    dirty = [json.loads(line) for line in (out / "dirty.jsonl").read_text().splitlines()]
    assert [(Path(d["file"]).name, d["line"]) for d in dirty] == [
        ("a-en.jsonl", 6),
        ("a-en.jsonl", 10),
    ]


def test_languages_kinds_and_bytes_are_told(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, statistics = prepared
    shards = Shards.open(out)
    assert {(g.language, g.kind) for g in shards.groups} >= {("en", "web"), ("zh", "books")}
    assert sum(group["documents"] for group in statistics["groups"]) == shards.documents
    chinese = next(group for group in shards.groups if group.language == "zh")
    assert chinese.bytes == 3 * 120 * chinese.documents
    assert shards.tokenizer_sha256
    assert not list(out.parent.glob(".prepared.work")), "the work folder is gone"


def test_more_workers_give_the_same_folder(
    corpus: Path, prepared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    prepare(plan(corpus, tmp_path / "two"), Execution(workers=2))
    assert files_of(tmp_path / "two") == files_of(prepared[0])


def test_the_same_command_again_does_nothing(
    corpus: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    out, statistics = prepared
    before = (out / "index.json").stat()
    assert prepare(plan(corpus, out), Execution()) == statistics
    assert (out / "index.json").stat() == before
    with pytest.raises(XverseError, match="is there already"):
        prepare(plan(corpus, out, dedup="none"), Execution())


KILLED = """
import os, signal, sys
from pathlib import Path
from xverse.data import publish, steps
from tests.data.test_prepare import plan, prepare, Execution

def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
where, corpus, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if where == "read":
    real = steps.why_dropped
    steps.why_dropped = lambda text, *rest: kill() if text == "short" else real(text, *rest)
elif where == "tokenize":
    real_close = steps._Split.close
    def close(self):
        return kill() if "00002" in str(self._folder) else real_close(self)
    steps._Split.close = close
else:
    publish.write_json = kill
prepare(plan(corpus, out), Execution())
"""


def test_killed_in_three_places_it_comes_out_the_same(
    corpus: Path, prepared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    for where in ("read", "tokenize", "publish"):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, where, str(corpus), str(out)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        assert result.returncode == -9, where
        assert not out.exists(), "nothing is published half"
    assert prepare(plan(corpus, out), Execution()) is not None
    assert files_of(out) == files_of(prepared[0])


def test_a_mixture_is_drawn_without_storing_twice(corpus: Path, tmp_path: Path) -> None:
    mixture = Mixture(
        languages={"en": 1, "zh": 3},
        tokens=5000,
        sources=[{"files": "c-*", "language": "zh", "txt": "paragraph"}],
    )
    settings = plan(corpus, tmp_path / "mixed", mixture=mixture, validation=0.0, dedup="exact")
    statistics = prepare(settings, Execution())
    assert statistics is not None
    shards = Shards.open(tmp_path / "mixed", verify=True)
    drawn = [shards.language(index) for index in range(shards.documents)]
    lengths = shards.lengths()
    share = sum(n for n, language in zip(lengths, drawn, strict=True) if language == "zh") / sum(
        lengths
    )
    assert share == pytest.approx(0.75, abs=0.05)
    assert shards.stored_documents == 31
    assert statistics["tokens"]["served"] == shards.tokens == int(lengths.sum())


def test_other_options_do_not_take_up_the_work(corpus: Path, tmp_path: Path) -> None:
    first = plan(corpus, tmp_path / "out")
    assert (first.claim(), first.claim()) == ("new", "resumed")
    with pytest.raises(XverseError, match="another preparation"):
        prepare(plan(corpus, tmp_path / "out", validation=0.1), Execution())


def test_too_much_dirt_stops_before_anything_is_made(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="Too many lines") as stopped:
        prepare(plan(corpus, tmp_path / "out", max_dirty=0.01), Execution())
    assert "2 of 37" in stopped.value.why
    assert not (tmp_path / "out").exists()


def test_nothing_left_is_an_error(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("short")
    (tmp_path / "tokenizer").symlink_to(corpus.parent / "tokenizer")
    with pytest.raises(XverseError, match="Nothing is left") as nothing:
        prepare(plan(tmp_path / "in", tmp_path / "out"), Execution())
    assert "1 too short" in nothing.value.why
    (tmp_path / "none").mkdir()
    with pytest.raises(XverseError, match="no text to prepare"):
        plan(tmp_path / "none", tmp_path / "out")


def test_slurm_gets_a_chain_of_jobs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch writes down what it is given."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\ncat "$@" >> {tmp_path}/jobs 2>/dev/null\necho "$@" >> {tmp_path}/args\n'
        f'echo "Submitted batch job $(wc -l < {tmp_path}/args)"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    slurm = {"partition": "cpu", "time": "1:00:00"}
    result = prepare(plan(corpus, tmp_path / "out"), Execution("slurm", 4, slurm))
    assert result is None
    calls = [line for line in (tmp_path / "args").read_text().splitlines() if "RUN_OFFSET" in line]
    stages = len(build_stages(plan(corpus, tmp_path / "out")))
    assert len(calls) == stages
    waits = [re.findall(r"--dependency=afterok:\d+", call) for call in calls]
    assert [len(found) for found in waits] == [0] + [1] * (stages - 1)
