"""What a folder says of itself is read strictly; nothing in it runs."""

import json
import logging
import os
import time
from pathlib import Path

import pytest

from xverse.checkpoint.folder import ModelFolder, verify_manifest, write_manifest
from xverse.errors import XverseError
from xverse.files import parse_json, read_json, write_json

CONFIG = {"model_type": "xverse", "hidden_size": 64, "rms_norm_eps": 1e-06, "rope_scaling": None}


def test_configs_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder = ModelFolder.open(str(tmp_path))
    assert (folder.path, folder.config, folder.generation_config) == (tmp_path, CONFIG, {})
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert ModelFolder.open(tmp_path).generation_config == {"temperature": 0.5}


def test_code_in_the_folder_is_ignored_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "modeling_xverse.py").write_text(f"open({str(canary)!r}, 'w')")
    config = {**CONFIG, "auto_map": {"AutoModel": "modeling_xverse.X"}, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.DEBUG, "xverse"):
        assert ModelFolder.open(tmp_path).config == config
    assert not canary.exists()
    assert len(caplog.records) == 1
    assert "modeling_xverse.py" in caplog.text
    assert "auto_map" in caplog.text


@pytest.mark.parametrize("name", ["absent", "config.json", "a" * 5000, "nul\0byte"])
def test_paths_that_are_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(XverseError, match="not a model folder"):
        ModelFolder.open(tmp_path / name)


HOSTILE = {
    "empty": (b"", "0 bytes"),
    "no JSON": (b"hidden_size: 64", "line 1"),
    "cut short": (b'{"hidden_size": 6', "line 1"),
    "two values": (b"{} {}", "Extra data"),
    "array": (b"[1]", "object"),
    "null": (b"null", "object"),
    "string": (b'"x"', "object"),
    "number": (b"1", "object"),
    "key twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs more than once"),
    "key twice inside": (b'{"a": {"b": 2, "b": 3}}', "'b' occurs more than once"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b'{"a": [-Infinity]}', "Infinity"),
    "beyond double": (b'{"a": 1e999}', "double"),
    "huge int": (b'{"a": ' + b"9" * 41 + b"}", "larger than any"),
    "million digits": (b'{"a": -' + b"9" * 10**6 + b"}", "larger than any"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "broken UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "lone surrogate": (b'{"a": ["\\ud800"]}', "surrogates"),
    "surrogate key": (b'{"a": {"\\udfff": 1}}', "surrogates"),
    "control character": (b'{"a": "\x00"}', "control character"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper"),
    "a million levels": (b'{"a":' * 10**6, "nested deeper"),
    "a million arrays": (b'{"a":' + b"[" * 10**6, "nested deeper"),
    "too large": (b'{"a": "' + b"x" * 2**24 + b'"}', "at most 16777216"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "pickle": (b"\x80\x02cposix\nsystem\n.", "utf-8"),
    "comment": (b'{"a": 1} // x', "Extra data"),
    "single quotes": (b"{'a': 1}", "double quotes"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_configs_are_refused(tmp_path: Path, file: str, content: bytes, match: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(XverseError, match=match) as caught:
        ModelFolder.open(tmp_path)
    assert time.perf_counter() - began < 2
    assert str(tmp_path / file) in caught.value.what
    assert len(str(caught.value)) < 1000


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="no such file"):
        ModelFolder.open(tmp_path)
    config = tmp_path / "config.json"
    config.symlink_to("nowhere")
    with pytest.raises(XverseError, match="leads nowhere"):
        ModelFolder.open(tmp_path)
    config.unlink()
    os.mkfifo(config)  # reading it would wait for ever
    with pytest.raises(XverseError, match=r"config\.json is missing"):
        ModelFolder.open(tmp_path)
    config.unlink()
    config.symlink_to("/dev/zero")  # reading it would never end
    with pytest.raises(XverseError, match=r"config\.json is missing"):
        ModelFolder.open(tmp_path)
    config.unlink()
    config.symlink_to(config.name)
    with pytest.raises(XverseError, match=r"config\.json"):
        ModelFolder.open(tmp_path)


def test_what_json_allows_is_read() -> None:
    value: dict[str, object] = {
        "a": [1, -1, 2**63 - 1, 0.5, 1e-300, True, None, "权重 😀", {}],
        "": {"b": []},
    }
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}')
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    deep = b'{"a":' * 63 + b"1" + b"}" * 63
    assert parse_json(deep)


def test_many_keys_with_one_double_end_soon() -> None:
    keys = ",".join(f'"{i}":0' for i in range(200_000))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="'199999' occurs"):
        parse_json(f'{{{keys},"199999":1}}'.encode())
    assert time.perf_counter() - began < 2


def test_written_json_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"词": "😀"})
    assert read_json(tmp_path / "a.json") == {"词": "😀"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"词": "😀"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_manifest_finds_every_change(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "b.json", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, source="xverse/XVERSE-7B", licence="see MODEL_LICENSE.pdf")
    written = read_json(tmp_path / "manifest.json")
    assert (written["source"], written["licence"]) == ("xverse/XVERSE-7B", "see MODEL_LICENSE.pdf")
    assert isinstance(written["files"], dict)
    assert list(written["files"]) == ["a.bin", "b.json", "sub/c.txt"]
    assert written["files"]["a.bin"]["bytes"] == 5
    assert verify_manifest(tmp_path) == []
    (tmp_path / "a.bin").write_text("a.bim")
    (tmp_path / "sub" / "c.txt").write_text("longer than before")
    (tmp_path / "b.json").unlink()
    (tmp_path / "new").write_text("not in the manifest")
    assert verify_manifest(tmp_path) == ["a.bin", "b.json", "sub/c.txt"]
    write_manifest(tmp_path)
    assert verify_manifest(tmp_path) == []


@pytest.mark.parametrize(
    "files",
    [None, [], "x", {"a": None}, {"a": {}}, {"a": {"bytes": 1}}]
    + [{name: {"bytes": 1, "sha256": ""}} for name in ("../a", "/etc/passwd", "a/../../b", "\0")],
)
def test_hostile_manifests_are_refused(tmp_path: Path, files: object) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(XverseError, match=r"manifest\.json is malformed"):
        verify_manifest(tmp_path)
