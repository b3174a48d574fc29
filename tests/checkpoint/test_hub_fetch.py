"""Moving bytes: kills, broken connections, damage, hashes, tokens, full disks."""

import errno
import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from tests.checkpoint.fake_hubs import MODEL, FakeHub, sha256
from tests.checkpoint.pulls import (
    BOTH,
    KEPT,
    SHARDS,
    Source,
    assert_says,
    expected,
    prepare,
    start_pull,
    tree,
)
from xverse.checkpoint import hub_fetch
from xverse.checkpoint.hub import pull
from xverse.errors import XverseError


@BOTH
def test_second_pull_fetches_nothing_and_a_damaged_file_anew(
    hub: FakeHub, source: Source, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    prepare(hub, source)
    folder = pull(MODEL, source=source, cache_dir=tmp_path)
    hub.asked.clear()
    pull(MODEL, source=source, cache_dir=tmp_path)
    assert hub.fetched() == set()
    (folder / "config.json").write_bytes(b'{"model_type": "XVERSE"}')  # the same length
    pull(MODEL, source=source, cache_dir=tmp_path)
    assert hub.fetched() == {"config.json"}
    assert "config.json is not what the hub has" in log.text
    assert tree(folder) == expected(hub)


@BOTH
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_pulls_go_on_where_they_were(
    hub: FakeHub, source: Source, kills: int, tmp_path: Path
) -> None:
    prepare(hub, source)
    hub.bytes_per_s = 2e6  # of each connection
    total = sum(map(len, expected(hub).values()))
    dice = random.Random(kills)
    resumed = finished = 0
    for kill in range(kills + 1):
        done = {name for name in KEPT if (tmp_path / MODEL / name).is_file()}
        parts = {path.name[:64]: path.stat().st_size for path in tmp_path.rglob("*.part")}
        hub.asked.clear()
        goal = hub.sent + dice.randrange(1, int(0.9 * total / kills))
        pulling = start_pull(source, tmp_path)
        if kill < kills:
            wait_for_bytes(hub, goal)
            pulling.send_signal(signal.SIGKILL)
            assert pulling.wait() == -signal.SIGKILL
        else:
            hub.bytes_per_s = 0
            assert pulling.wait(timeout=20) == 0
        time.sleep(0.1)  # requests of the dead process may still be on their way into the log
        assert hub.fetched().isdisjoint(done)
        finished += len(done)
        for name in hub.fetched() & set(SHARDS):
            held = parts.get(sha256(hub.files[name]), 0)
            assert hub.ranges(name) == [f"bytes={held}-" if held else ""]
            resumed += bool(held)
    assert tree(tmp_path / MODEL) == expected(hub)
    assert resumed > 0
    assert finished > 0


def wait_for_bytes(hub: FakeHub, goal: int) -> None:
    end = time.monotonic() + 20
    while hub.sent < goal:
        assert time.monotonic() < end, "the pulling process does not come on"
        time.sleep(0.002)


def test_two_pulls_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.bytes_per_s = 2e7
    both = [start_pull("hf", tmp_path) for _ in range(2)]
    assert [pulling.wait(timeout=20) for pulling in both] == [0, 0]
    assert tree(tmp_path / MODEL) == expected(hub)
    assert all(len(hub.ranges(name)) == 1 for name in SHARDS)


@BOTH
@pytest.mark.parametrize("tells_length", [True, False])
def test_broken_connection_is_continued(
    hub: FakeHub, source: Source, tells_length: bool, tmp_path: Path
) -> None:
    prepare(hub, source)
    hub.files = {SHARDS[0]: hub.files[SHARDS[0]]}
    hub.drop_after = [300_000, 100_000]
    hub.tells_length = tells_length
    folder = pull(MODEL, source=source, cache_dir=tmp_path)
    assert hub.ranges(SHARDS[0]) == ["", "bytes=300000-", "bytes=400000-"]
    assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_connection_that_never_holds_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {SHARDS[0]: hub.files[SHARDS[0]]}
    hub.drop_after = [200_000] + [0] * 20
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source="hf", cache_dir=tmp_path)
    assert_says(caught.value, SHARDS[0], "kept")
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == 200_000


def test_server_errors_on_files_are_retried(hub: FakeHub, tmp_path: Path) -> None:
    hub.file_status = [503, 429, 500]
    assert tree(pull(MODEL, source="hf", cache_dir=tmp_path)) == expected(hub)


def test_part_that_the_server_cannot_continue_begins_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"config.json": b'{"a": "long enough to be cut"}', "tokenizer.json": b"{}"}
    hub.drop_after = [8, 8]  # small files: the whole comes again instead of the rest
    folder = pull(MODEL, source="hf", cache_dir=tmp_path)
    assert tree(folder) == hub.files


@BOTH
@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_corrupted_file_is_deleted_and_named(
    hub: FakeHub, source: Source, name: str, tmp_path: Path
) -> None:
    prepare(hub, source)
    hub.corrupt = {name}
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source=source, cache_dir=tmp_path)
    assert_says(caught.value, name, "damaged")
    assert not (tmp_path / MODEL / name).exists()
    digest = sha256(hub.files[name])
    assert not list(tmp_path.rglob(f"{digest}*.part"))
    hub.corrupt = set()
    assert tree(pull(MODEL, source=source, cache_dir=tmp_path)) == expected(hub)


def test_refused_file_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.file_status = [403] * 20
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source="hf", cache_dir=tmp_path)
    assert_says(caught.value, "The file ", "HTTP 403")


@BOTH
def test_token_is_sent_to_the_hub_and_not_beyond(
    hub: FakeHub, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(hub, source)
    hub.token = "hf_secret"
    with pytest.raises(XverseError):
        pull(MODEL, source=source, cache_dir=tmp_path)
    monkeypatch.setenv("HF_TOKEN" if source == "hf" else "MODELSCOPE_API_TOKEN", hub.token)
    hub.asked.clear()
    assert tree(pull(MODEL, source=source, cache_dir=tmp_path)) == expected(hub)
    beyond = {asked.authorization for asked in hub.asked if asked.path.startswith("/cdn/")}
    assert beyond == {""}


def test_file_changed_on_the_hub_is_not_mixed_with_its_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {SHARDS[0]: hub.files[SHARDS[0]]}
    hub.drop_after = [200_000] + [0] * 20
    with pytest.raises(XverseError):
        pull(MODEL, source="hf", cache_dir=tmp_path)
    hub.drop_after = []
    hub.files = {SHARDS[0]: random.Random(9).randbytes(500_000)}
    assert tree(pull(MODEL, source="hf", cache_dir=tmp_path)) == hub.files


@pytest.mark.parametrize("kept", [True, False])
def test_files_that_are_alike(hub: FakeHub, tmp_path: Path, kept: bool) -> None:
    hub.files = dict.fromkeys(["config.json", "a.json", *SHARDS], hub.files[SHARDS[0]])
    hub.bytes_per_s = 2e7
    root = tmp_path / "d" if kept else None
    assert tree(pull(MODEL, source="hf", cache_dir=root)) == hub.files
    pull(MODEL, source="hf", cache_dir=root, offline=True)


def test_missing_hash_is_said(hub: FakeHub, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    prepare(hub, "modelscope")
    hub.no_hash = True
    assert tree(pull(MODEL, source="modelscope", cache_dir=tmp_path)) == expected(hub)
    assert "only the size was checked" in log.text


def test_full_disk(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(XverseError, match="not enough room"):
        pull(MODEL, source="hf", cache_dir=tmp_path)
    assert hub.fetched() == set()


def test_disk_that_fills_up_meanwhile(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(XverseError, match="not enough room"):
        pull(MODEL, source="hf", cache_dir=tmp_path)


def test_hash_of_a_git_blob(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")
    # What `git hash-object` says of these six bytes.
    assert hub_fetch.digest_of(tmp_path / "hello", "git") == (
        "git:ce013625030ba8dba906f756967f9e9ca394464a"
    )
    assert hub_fetch.digest_of(tmp_path / "hello", "sha256") == (
        f"sha256:{hashlib.sha256(b'hello' + bytes([10])).hexdigest()}"
    )
