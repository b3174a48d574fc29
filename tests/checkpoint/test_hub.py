"""Pulling from both hubs: what comes, what stays away, offline, names of models and hubs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.fake_hubs import MODEL, FakeHub
from tests.checkpoint.pulls import BOTH, KEPT, SHARDS, Source, assert_says, expected, prepare, tree
from xverse.checkpoint.hub import parse_model_id, pull
from xverse.errors import XverseError


@BOTH
def test_pull_gives_owner_and_name_under_cache_dir(
    hub: FakeHub, source: Source, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    prepare(hub, source)
    folder = pull(MODEL, source=source, cache_dir=tmp_path / "d")
    assert folder == tmp_path / "d" / "xverse" / "XVERSE-7B-Chat"
    assert tree(folder) == expected(hub)
    assert not list((folder / ".xverse").glob("*.part"))
    assert (
        "left out: .gitattributes, .hidden/config.json, modeling_xverse.py, pytorch_model.bin"
        in log.text
    )
    assert "apache-2.0, xverse, MODEL_LICENSE.pdf" in log.text


def test_both_hubs_share_one_folder(hub: FakeHub, tmp_path: Path) -> None:
    pull(MODEL, source="hf", cache_dir=tmp_path)
    hub.branch = "master"
    hub.asked.clear()
    pull(MODEL, source="modelscope", cache_dir=tmp_path)
    assert hub.fetched() == set()


@BOTH
@pytest.mark.parametrize("kept", [True, False])
def test_offline_asks_nothing(hub: FakeHub, source: Source, tmp_path: Path, kept: bool) -> None:
    prepare(hub, source)
    root = tmp_path / "d" if kept else None
    folder = pull(MODEL, source=source, cache_dir=root)
    hub.asked.clear()
    assert pull(MODEL, source=source, cache_dir=root, offline=True) == folder
    assert pull(MODEL, source=source, cache_dir=root, offline=True, revision=hub.branch) == folder
    assert hub.asked == []
    (folder / SHARDS[1]).unlink()
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source=source, cache_dir=root, offline=True)
    assert_says(caught.value, SHARDS[1], "lacks 1")
    pull(MODEL, source=source, cache_dir=root, offline=True, include_weights=False)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_environment(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(XverseError) as caught:
        pull(MODEL, cache_dir=tmp_path)
    assert_says(caught.value, "not complete on this disk", "config.json")
    with pytest.raises(XverseError):
        pull(MODEL)
    assert hub.asked == []


@BOTH
@pytest.mark.parametrize("fault", ["refused", "503"])
def test_unreachable_hub_is_replaced_by_the_complete_folder(
    hub: FakeHub,
    source: Source,
    fault: str,
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(hub, source)
    folder = pull(MODEL, source=source, cache_dir=tmp_path / "d")
    if fault == "503":
        hub.status = 503
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    assert pull(MODEL, source=source, cache_dir=tmp_path / "d") == folder
    assert "using the copy" in log.text
    with pytest.raises(XverseError) as caught:
        pull(MODEL, source=source, cache_dir=tmp_path / "other")
    assert_says(caught.value, MODEL, "could not be had")


@pytest.mark.parametrize("revision", ["", "../x", "a b", "-x", "a//b", "a/../b", "x\n"])
def test_revision_is_a_name(hub: FakeHub, revision: str) -> None:
    with pytest.raises(XverseError, match="revision"):
        pull(MODEL, revision=revision)
    assert hub.asked == []


def test_pickles_come_only_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {name: hub.files[name] for name in hub.files if "safetensors" not in name}
    names = set(tree(pull(MODEL, source="hf", cache_dir=tmp_path)))
    assert {"pytorch_model.bin", "pytorch_model.bin.index.json"} <= names
    assert "modeling_xverse.py" not in names


def test_weights_can_wait(hub: FakeHub, tmp_path: Path) -> None:
    folder = pull(MODEL, source="hf", cache_dir=tmp_path, include_weights=False)
    assert set(tree(folder)) == set(KEPT) - set(SHARDS)
    with pytest.raises(XverseError, match="lacks 3"):
        pull(MODEL, source="hf", cache_dir=tmp_path, offline=True)
    hub.asked.clear()
    pull(MODEL, source="hf", cache_dir=tmp_path)
    assert hub.fetched() == set(SHARDS)
    pull(MODEL, source="hf", cache_dir=tmp_path, include_weights=False)
    assert pull(MODEL, source="hf", cache_dir=tmp_path, offline=True) == folder


def test_model_without_weights_is_said(
    hub: FakeHub, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    hub.files = {"config.json": b"{}", "ggml-q4.bin": b"unknown"}
    assert set(tree(pull(MODEL, source="hf", cache_dir=tmp_path))) == {"config.json"}
    assert "no weights" in log.text


def test_data_set_is_no_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"README.md": b"rows", "data.parquet": b"rows"}
    with pytest.raises(XverseError, match="holds no model"):
        pull(MODEL, source="hf", cache_dir=tmp_path)


def test_folder_that_cannot_be_written(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "xverse").write_text("a file, not a folder")
    with pytest.raises(XverseError, match="could not be written"):
        pull(MODEL, source="hf", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "x", "a/b/c", "/b", "a/", "../b", "a/..b", "a..b/c", "-a/b", "a/.b", "a/b\n", "a b/c",
     "名/b", "https://huggingface.co/a/b", "a/" + "b" * 97, "a\\b"],
)  # fmt: skip
def test_model_id_grammar(text: str) -> None:
    with pytest.raises(XverseError, match="owner/name"):
        parse_model_id(text)


@given(st.text(max_size=300))
def test_model_id_of_any_text(text: str) -> None:
    try:
        owner, name = parse_model_id(text)
    except XverseError:
        return
    assert f"{owner}/{name}" == text


def test_model_id() -> None:
    assert parse_model_id(MODEL) == ("xverse", "XVERSE-7B-Chat")
    assert parse_model_id("a/" + "b" * 96) == ("a", "b" * 96)


def test_source(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(hub, "modelscope")
    monkeypatch.setenv("XVERSE_SOURCE", "modelscope")
    pull(MODEL, cache_dir=tmp_path)
    assert any(asked.path.startswith("/api/v1/models/") for asked in hub.asked)
    monkeypatch.setenv("XVERSE_SOURCE", "github")
    with pytest.raises(XverseError, match="github"):
        pull(MODEL, cache_dir=tmp_path)
