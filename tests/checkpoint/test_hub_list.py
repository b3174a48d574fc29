"""What a hub says: refusals, revisions, hostile names, answers without sense."""

from pathlib import Path

import pytest

from tests.checkpoint import fake_hubs
from tests.checkpoint.fake_hubs import COMMIT, MODEL, FakeHub
from tests.checkpoint.pulls import BOTH, Source, assert_says, prepare
from xverse.checkpoint.hub import pull
from xverse.errors import XverseError


@BOTH
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, ("HF_TOKEN", "licence")),
        (403, ("HF_TOKEN", "licence")),
        (404, ("spelling", "--source")),
        (500, ("HTTP 500", "later")),
        (418, ("HTTP 418",)),
    ],
)
def test_refusals(
    hub: FakeHub, source: Source, status: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    hub.status = status
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source=source, cache_dir=tmp_path)
    assert_says(caught.value, MODEL, *words)


@BOTH
def test_revision(
    hub: FakeHub, source: Source, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    prepare(hub, source)
    other = "master" if source == "hf" else "main"
    pull(MODEL, source=source, cache_dir=tmp_path, revision=hub.branch)
    assert "taking" not in log.text
    pull(MODEL, source=source, cache_dir=tmp_path, revision=other)
    assert f"no revision '{other}' here; taking '{hub.branch}'" in log.text
    assert pull(MODEL, source=source, cache_dir=tmp_path, revision=other, offline=True)
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source=source, cache_dir=tmp_path, revision="v9")
    assert_says(caught.value, "'v9'", "--revision")
    hub.branch = other  # it exists by that name, so nothing is replaced
    log.clear()
    pull(MODEL, source=source, cache_dir=tmp_path, revision=other)
    assert "taking" not in log.text


@BOTH
@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "a\\..\\x.json", "C:/x.json", "a\0.json"]
)
def test_hostile_names_are_refused(hub: FakeHub, source: Source, name: str, tmp_path: Path) -> None:
    prepare(hub, source)
    hub.files[name] = b"{}"
    with pytest.raises(XverseError, match="does not belong in a folder"):
        pull(MODEL, source=source, cache_dir=tmp_path / "d")
    assert hub.fetched() == set()
    assert list(tmp_path.rglob("x.json")) == []


@BOTH
@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://", "http://[x", "http://x:y"])
def test_endpoint_has_to_be_an_address(
    hub: FakeHub, source: Source, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "modelscope" and "://" not in endpoint:
        endpoint = ":"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    with pytest.raises(XverseError, match="ENDPOINT"):
        pull(MODEL, source=source)


@BOTH
@pytest.mark.parametrize(
    "answer",
    [
        b"<html>please log in</html>",
        b"[]",
        b"{}",
        b'{"sha": 7, "siblings": []}',
        b'{"id": "x", "sha": "../x", "siblings": [{"rfilename": "config.json", "size": 2, '
        b'"blobId": "9e26dfeeb6e641a33dae4961196235bdb965b21b"}]}',
        b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": "config.json", "size": -1}]}'
        % COMMIT.encode(),
        b'{"id": "x", "siblings": [{"rfilename": "a.json", "size": 2, "blobId": "../../x"}]}',
        b'{"Code": 200, "Data": {"Files": [7]}}',
        b'{"Code": 200, "Data": {"Files": [{"Path": "a.json", "Size": "2"}]}}',
        b'{"Code": 200, "Data": {"Files": [{"Path": "a.json", "Size": 2, "Sha256": "../x"}]}}',
        b'{"Code": 200, "Data": {"Files": [{"Path": "a.json", "Size": 2, "Sha256": 7}]}}',
        b'{"Code": 200, "Data": {"Files": null}}',
    ],
)
def test_answers_without_sense(
    hub: FakeHub,
    source: Source,
    answer: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def reply(self: fake_hubs._Answer, *_: object) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    monkeypatch.setattr(fake_hubs._Answer, "_hugging_face", reply)
    monkeypatch.setattr(fake_hubs._Answer, "_modelscope", reply)
    prepare(hub, source)
    with pytest.raises(XverseError, match="not that of a model hub"):
        pull(MODEL, source=source, cache_dir=tmp_path)
