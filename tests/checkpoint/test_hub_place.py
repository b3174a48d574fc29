"""Where things lie: both caches, folders of other tools, links, our own notes."""

from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from tests.checkpoint.fake_hubs import COMMIT, MODEL, FakeHub
from tests.checkpoint.pulls import KEPT, SHARDS, expected, prepare, tree
from xverse.checkpoint.hub import pull
from xverse.errors import XverseError


def test_hugging_face_cache_has_the_layout_of_its_library(hub: FakeHub) -> None:
    folder = pull(MODEL, source="hf")
    assert folder == Path(
        constants.HF_HUB_CACHE, "models--xverse--XVERSE-7B-Chat/snapshots", COMMIT
    )
    assert tree(folder) == expected(hub)
    assert (folder / SHARDS[0]).is_symlink()
    asked = len(hub.asked)
    assert (
        Path(snapshot_download(MODEL, cache_dir=constants.HF_HUB_CACHE, local_files_only=True))
        == folder
    )
    (repo,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert [revision.refs for revision in repo.revisions] == [frozenset({"main"})]
    assert repo.nb_files == len(KEPT)
    assert len(hub.asked) == asked


def test_modelscope_cache_has_the_layout_of_its_library(hub: FakeHub, tmp_path: Path) -> None:
    prepare(hub, "modelscope")
    folder = pull(MODEL, source="modelscope")
    assert folder == tmp_path / "modelscope/models/xverse--XVERSE-7B-Chat/snapshots/master"
    assert tree(folder) == expected(hub)


def test_modelscope_folder_of_an_older_library_is_taken_up(hub: FakeHub, tmp_path: Path) -> None:
    prepare(hub, "modelscope")
    older = tmp_path / "modelscope/hub/models/xverse/XVERSE-7B-Chat"
    older.mkdir(parents=True)
    for name in ("config.json", *SHARDS):
        (older / name).write_bytes(hub.files[name])
    assert pull(MODEL, source="modelscope") == older
    assert hub.fetched().isdisjoint({"config.json", *SHARDS})
    assert tree(older) == expected(hub)


def test_offline_takes_what_another_tool_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / MODEL
    folder.mkdir(parents=True)
    for name, content in expected(hub).items():
        (folder / name).write_bytes(content)
    assert pull(MODEL, cache_dir=tmp_path, offline=True) == folder
    (folder / SHARDS[2]).unlink()
    with pytest.raises(XverseError, match="00003-of-00003"):
        pull(MODEL, cache_dir=tmp_path, offline=True)


def test_offline_refuses_another_revision(hub: FakeHub, tmp_path: Path) -> None:
    pull(MODEL, source="hf", cache_dir=tmp_path)
    assert pull(MODEL, source="hf", cache_dir=tmp_path, offline=True, revision=COMMIT)
    with pytest.raises(XverseError, match=r"not v1\.0"):
        pull(MODEL, source="hf", cache_dir=tmp_path, offline=True, revision="v1.0")


@pytest.mark.parametrize("kept", [True, False])
def test_links_that_lead_out_are_not_followed(hub: FakeHub, tmp_path: Path, kept: bool) -> None:
    hub.files["sub/deep.json"] = b"{}"
    out = tmp_path / "out"
    out.mkdir()
    root = tmp_path / "d" if kept else None
    snapshot = Path(constants.HF_HUB_CACHE, "models--xverse--XVERSE-7B-Chat/snapshots", COMMIT)
    folder = tmp_path / "d" / MODEL if kept else snapshot
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(out)
    with pytest.raises(XverseError, match="does not follow it"):
        pull(MODEL, source="hf", cache_dir=root)
    assert list(out.iterdir()) == []


def test_link_in_place_of_a_file_is_replaced(hub: FakeHub, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "d" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(precious)
    pull(MODEL, source="hf", cache_dir=tmp_path / "d")
    assert precious.read_text() == "mine"
    assert not (folder / "config.json").is_symlink()


def test_notes_that_are_not_legible_are_ignored(
    hub: FakeHub, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    folder = pull(MODEL, source="hf", cache_dir=tmp_path)
    for text in ("", "[]", '{"revisions": 1}', '{"verified": {"a": 1}}'):
        (folder / ".xverse" / "pull.json").write_text(text)
        hub.asked.clear()
        pull(MODEL, source="hf", cache_dir=tmp_path)
        assert hub.fetched() == set()
    assert "not legible" in log.text
