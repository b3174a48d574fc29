"""dataset_info.json: names, columns and tags as LLaMA-Factory has them, and errors that help."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data import shared_data
from xverse.data.dataset_info import find_data_sets
from xverse.errors import XverseError


def listed(folder: Path, **entries: Any) -> Path:
    """A folder with these entries, and the files that they name."""
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for entry in entries.values():
        if isinstance(entry, dict) and "file_name" in entry:
            (folder / entry["file_name"]).write_text("{}")
    return folder


def test_several_names_with_commas(tmp_path: Path) -> None:
    folder = listed(
        tmp_path,
        one={"file_name": "1.json"},
        two={
            "file_name": "2.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "tools": "functions"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me"},
            "num_samples": 7,
        },
        three={"file_name": "3.json", "ranking": True, "columns": {"chosen": "good"}},
        four={"file_name": "4.json", "columns": {"prompt": "text"}},
    )
    one, two, three, four = find_data_sets(["one, two", "three", "four"], folder)
    assert one.layout is not None
    assert one.layout.columns["prompt"] == "instruction"
    assert two.layout is not None
    assert two.files == (tmp_path / "2.jsonl",)
    assert (two.layout.columns["messages"], two.layout.columns["tools"]) == ("talk", "functions")
    assert two.layout.role("me") == "user"
    assert two.limit == 7
    assert three.layout is not None
    assert three.layout.ranking
    assert three.layout.columns["chosen"] == "good"
    assert three.layout.columns["rejected"] == "rejected"
    assert four.layout is not None
    assert (four.layout.kind, four.layout.columns) == ("text", {"text": "text"})


def test_files_and_folders_need_no_list(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl", "c.txt", "LICENSE", "dataset_info.json"):
        (tmp_path / name).write_text("")
    (found,) = find_data_sets([tmp_path], "nowhere")
    assert [file.name for file in found.files] == ["a.jsonl", "b.json", "c.txt"]
    assert found.layout is None
    with pytest.raises(XverseError, match="is no data that can be read"):
        find_data_sets([tmp_path / "LICENSE"], "nowhere")
    with pytest.raises(XverseError, match="lists data sets, and is none"):
        find_data_sets([tmp_path / "dataset_info.json"], "nowhere")
    with pytest.raises(XverseError, match="There is no data"):
        find_data_sets([], "nowhere")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"hf_hub_url": "a/b"}, "lies on a hub \\(a/b\\)(.|\n)*Download it"),
        ({"script_url": "belle"}, "lies on a hub \\(belle\\)"),
        ({"file_name": "x.json", "colums": {}}, "'colums', which is not known"),
        ({"file_name": "x.json", "formatting": "chatml"}, "none of alpaca, sharegpt"),
        ({"file_name": "x.json", "columns": {"kto_tag": "label"}}, "KTO"),
        ({"file_name": "x.json", "columns": {"images": "images"}}, "what is no text"),
        ({"file_name": "x.json", "columns": {"promt": "a"}}, "'promt' is not known"),
        ({"file_name": "x.json", "columns": "prompt"}, "no table of names"),
        ({"file_name": "x.json", "formatting": "sharegpt", "tags": {"user": "a"}}, "tag 'user'"),
        ({"file_name": "x.json", "ranking": "yes"}, "should be true or false"),
        ({"file_name": "x.json", "num_samples": 0}, "no number of rows"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(XverseError, match="entry 'it' of") as failed:
        find_data_sets(["it"], listed(tmp_path, it=entry))
    import re

    assert re.search(words, str(failed.value))


def test_names_that_are_not_there(tmp_path: Path) -> None:
    folder = listed(tmp_path, alpaca_en={"file_name": "x.json"})
    (tmp_path / "x.json").unlink()
    with pytest.raises(XverseError, match="alpaca_en"):
        find_data_sets(["alpaca_eng"], folder)
    with pytest.raises(XverseError, match="can't be used") as failed:
        find_data_sets(["alpaca_en"], folder)
    assert "x.json is missing" in failed.value.why
    with pytest.raises(XverseError, match="There is no data 'x'"):
        find_data_sets(["x"], tmp_path / "nowhere")


def test_the_list_that_llama_factory_ships() -> None:
    folder = shared_data("sft/llamafactory-demo")
    found = find_data_sets(["identity,alpaca_en_demo", "dpo_zh_demo,c4_demo,wiki_demo"], folder)
    kinds = [(one.layout.kind, one.layout.ranking) for one in found if one.layout]
    assert kinds == [
        ("alpaca", False),
        ("alpaca", False),
        ("sharegpt", True),
        ("text", False),
        ("text", False),
    ]
    with pytest.raises(XverseError, match="can't be used"):
        find_data_sets(["alpaca_gpt4_en"], folder)
