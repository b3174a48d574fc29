"""Data sets become samples: golden ids and masks for every layout, and a reason for every row."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import shared_data
from tests.text.test_chat import ASSISTANT, END, EXEC, HELLO, HI, HUMAN, NIHAO, NL
from tests.text.test_lessons import GOLDEN, KIND
from tests.text.tiny import write_tiny_tokenizer
from xverse.data.lessons import read_samples
from xverse.data.report import Report
from xverse.data.sample_options import SampleOptions
from xverse.data.samples import Pairs, Sample, Samples
from xverse.errors import XverseError
from xverse.text.chat import V1, V2, XVERSE_FORMATS
from xverse.text.message import ChatFormat
from xverse.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.load(shared_data("tokenizer/tokenizer.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return Tokenizer.load(folder)


def said(*turns: str, keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, turn.split(":", 1), strict=True)) for turn in turns]


SHAREGPT = ("from", "value")
OPENAI = {"messages": said("user:你好", "assistant:Hi", "user:Hello", "assistant:你好")}
PAST = [["你好", "Hi"]]
# The same conversation in every layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Hello", "output": "你好", "history": [["你好", "Hi"]]},
    "alpaca-input": {"instruction": "", "input": "Hello", "output": "你好", "history": PAST},
    "prompt-response": {"prompt": "Hello", "response": "你好", "history": [["你好", "Hi"]]},
    "human-gpt": {
        "conversations": said("human:你好", "gpt:Hi", "human:Hello", "gpt:你好", keys=SHAREGPT)
    },
    "human-bot": {
        "conversations": said("human:你好", "bot:Hi", "human:Hello", "bot:你好", keys=SHAREGPT)
    },
    "user-assistant": {
        "conversations": said(
            "user:你好", "assistant:Hi", "user:Hello", "assistant:你好", keys=SHAREGPT
        )
    },
    "openai": OPENAI,
    "openai-parts": {
        "messages": [
            {"role": one["role"], "content": [{"type": "text", "text": one["content"]}]}
            for one in OPENAI["messages"]
        ]
    },
    "json-in-a-cell": {"messages": json.dumps(OPENAI["messages"], ensure_ascii=False)},
}  # fmt: skip


def made(
    folder: Path, rows: Sequence[Any], tokenizer: Tokenizer, chat: ChatFormat = V2, **options: Any
) -> tuple[Samples | Pairs, list[tuple[int, str]]]:
    """The samples of rows, and (line, reason) of what was refused or cut."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    told = io.StringIO()
    samples = read_samples([path], tokenizer, chat, SampleOptions(**options), Report(told))
    entries = map(json.loads, told.getvalue().splitlines())
    return samples, [(entry["line"], entry.get("reason", entry.get("cut"))) for entry in entries]


def one(samples: Samples | Pairs) -> Sample:
    assert len(samples) == 1
    assert isinstance(samples[0], Sample)
    return samples[0]


def learned(sample: Sample) -> list[int]:
    return sample.ids[sample.learned].tolist()


@pytest.mark.parametrize("chat", GOLDEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden(layout: str, chat: str, real: Tokenizer, tmp_path: Path) -> None:
    samples, told = made(tmp_path, [LAYOUTS[layout]], real, XVERSE_FORMATS[chat])
    assert one(samples).ids.tolist() == GOLDEN[chat]
    assert learned(one(samples)) == [*HI, END, *NIHAO, END]
    assert told == []


def test_csv_and_arrays_say_the_same(real: Tokenizer, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output", "history"])
        writer.writeheader()
        writer.writerow({**LAYOUTS["alpaca"], "input": "", "history": '[["你好", "Hi"]]'})
    (tmp_path / "b.json").write_text(json.dumps([OPENAI]), "utf-8")
    both = read_samples([tmp_path], real, V2, SampleOptions(), Report())
    assert [sample.ids.tolist() for sample in both] == [GOLDEN["v2"]] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你好", "output": "Hi", "system": "You are kind."},
        {"conversations": said("human:你好", "gpt:Hi", keys=SHAREGPT), "system": "You are kind."},
        {"conversations": said("system:You are kind.", "human:你好", "gpt:Hi", keys=SHAREGPT)},
        {"messages": said("developer:You are kind.", "user:你好", "assistant:Hi")},
    ],
)
def test_system_messages(row: dict[str, Any], real: Tokenizer, tmp_path: Path) -> None:
    expected = [*HUMAN, *KIND, NL, *HUMAN, *NIHAO, NL, NL, *ASSISTANT, *HI, END]
    assert one(made(tmp_path, [row], real)[0]).ids.tolist() == expected
    given = {"instruction": "你好", "output": "Hi"}
    samples, _ = made(tmp_path, [given], real, default_system="You are kind.")
    assert one(samples).ids.tolist() == expected


CALL = {"name": "add", "arguments": '{"a": 1}'}


def test_function_calls_of_every_layout(real: Tokenizer, tmp_path: Path) -> None:
    sharegpt = {
        "conversations": said(
            "human:你好", "function_call:", "observation:8", "gpt:Hi", keys=SHAREGPT
        ),
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }
    sharegpt["conversations"][1]["value"] = json.dumps({"name": "add", "arguments": {"a": 1}})
    openai = {
        "messages": [
            *said("user:你好"),
            {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
            *said("tool:8", "assistant:Hi"),
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    older = {
        "messages": [
            *said("user:你好"),
            {"role": "assistant", "content": None, "function_call": CALL},
            *said("function:8", "assistant:Hi"),
        ],
        "tools": openai["tools"],
    }
    ids = []
    for row in (sharegpt, openai, older):
        sample = one(made(tmp_path, [row], real, tools_time="2024-05-06 07:08:09")[0])
        ids.append(sample.ids.tolist())
        text = real.decode(learned(sample), skip_special=False)
        assert text.startswith('<|startofthink|>```JSON\n{ \n   "api_name": "add"')
        assert text.endswith("<|endofthink|><|endoftext|>Hi<|endoftext|>")
        assert sample.ids.tolist()[-13:] == [*EXEC[2:], 59, NL, NL, *ASSISTANT, *HI, END][-13:]
    assert ids[0] == ids[1] == ids[2]
    text = real.decode(ids[0])
    assert text.count("当前时间：2024-05-06 07:08:09") == 1
    assert '1. {"name": "add", "description": "", "parameters": []}' in text


def test_plain_text_is_learned_whole(real: Tokenizer, tmp_path: Path) -> None:
    samples, _ = made(tmp_path, [{"text": "你好" * 5}], real, cutoff=4)
    pieces = [sample.ids.tolist() for sample in samples if isinstance(sample, Sample)]
    whole = [*NIHAO * 5, END]
    assert pieces == [whole[0:4], whole[3:7], whole[6:10], whole[9:11]]
    assert all(sample.learned.all() for sample in samples if isinstance(sample, Sample))
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "a.txt").write_text("你好", "utf-8")
    report = Report()
    text = read_samples([tmp_path], real, V2, SampleOptions(), report)
    assert one(text).ids.tolist() == [*NIHAO, END]
    assert report.read == 1


PAIRS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "你好", "chosen": "Hi", "rejected": "Hello"},
    "alpaca-list": {"instruction": "你好", "output": ["Hi", "Hello"]},
    "sharegpt": {
        "conversations": said("human:你好", keys=SHAREGPT),
        "chosen": {"from": "gpt", "value": "Hi"},
        "rejected": {"from": "gpt", "value": "Hello"},
    },
    "messages": {
        "messages": said("user:你好"),
        "chosen": said("assistant:Hi"),
        "rejected": said("assistant:Hello"),
    },
    "whole": {
        "prompt": "你好",
        "chosen": said("user:你好", "assistant:Hi"),
        "rejected": said("user:你好", "assistant:Hello"),
    },
}


@pytest.mark.parametrize("layout", PAIRS)
def test_golden_pairs(layout: str, real: Tokenizer, tmp_path: Path) -> None:
    pairs, told = made(tmp_path, [PAIRS[layout]], real)
    assert isinstance(pairs, Pairs)
    (pair,) = pairs
    asked = [*HUMAN, *NIHAO, NL, NL, *ASSISTANT]
    assert pair.chosen.ids.tolist() == [*asked, *HI, END]
    assert pair.rejected.ids.tolist() == [*asked, *HELLO, END]
    assert learned(pair.chosen) == [*HI, END]
    assert learned(pair.rejected) == [*HELLO, END]
    assert told == []


def test_a_pair_learns_the_last_answer_alone(real: Tokenizer, tmp_path: Path) -> None:
    history = {
        "instruction": "Hello",
        "history": [["你好", "Hi"]],
        "chosen": "好",
        "rejected": "你",
    }
    pairs, _ = made(tmp_path, [history], real)
    (pair,) = pairs
    assert not isinstance(pair, Sample)
    assert learned(pair.chosen) == [NIHAO[1], END]
    samples, told = made(tmp_path, [history, {**history, "rejected": "好"}], real, V1)
    assert len(samples) == 1
    assert told == [(2, "chosen and rejected are the same")]


def talk(rounds: int) -> dict[str, Any]:
    return {"messages": said(*["user:你好", "assistant:abc"] * rounds)}


def test_what_is_too_long_is_cut_by_rounds_or_refused(tiny: Tokenizer, tmp_path: Path) -> None:
    whole = one(made(tmp_path, [talk(3)], tiny)[0])
    size = len(whole.ids) // 3
    for cutoff, rounds in ((3 * size, 3), (3 * size - 1, 2), (2 * size, 2), (size, 1)):
        samples, told = made(tmp_path, [talk(3)], tiny, cutoff=cutoff)
        assert one(samples).ids.tolist() == whole.ids.tolist()[: rounds * size]
        assert one(samples).ids[-1] == END
        assert told == ([] if rounds == 3 else [(1, "later rounds left out")])
    samples, told = made(tmp_path, [talk(3)], tiny, cutoff=size - 1)
    assert one(samples).ids.tolist() == whole.ids.tolist()[: size - 1]
    assert END not in one(samples).ids
    assert told == [(1, "the answer's end left out")]
    samples, told = made(tmp_path, [talk(3), talk(1)], tiny, cutoff=size, too_long="refuse")
    assert len(samples) == 1
    assert told == [(1, "too long")]
    long = {"messages": said(f"user:{'好' * 50}", "assistant:a")}
    samples, told = made(tmp_path, [long, talk(1)], tiny, cutoff=40)
    assert len(samples) == 1
    assert told == [(1, "too long before the first answer that is learned")]


def test_what_of_it_is_learned(tiny: Tokenizer, tmp_path: Path) -> None:
    weighted = talk(2)
    weighted["messages"][1]["weight"] = 0
    plain = one(made(tmp_path, [talk(2)], tiny)[0])
    answers = plain.learned.sum() // 2
    last = one(made(tmp_path, [talk(2)], tiny, mask_history=True)[0])
    second = one(made(tmp_path, [weighted], tiny)[0])
    for sample in (last, second):
        assert sample.ids.tolist() == plain.ids.tolist()
        assert sample.learned.sum() == answers
        assert sample.learned[-answers:].all()
    both = one(made(tmp_path, [talk(2)], tiny, train_on_prompt=True)[0])
    assert both.learned.all()
    unrolled, _ = made(tmp_path, [OPENAI], tiny, V1, mask_history=True)
    assert len(unrolled) == 1  # of the two readings that v1 makes


REFUSED: list[tuple[Any, str]] = [
    ([1], "bad JSON"),
    ({"messages": []}, "missing field"),
    ({"messages": said("assistant:a")}, "begins without a question"),
    ({"messages": said("system:a", "assistant:a")}, "begins without a question"),
    ({"messages": said("user:a")}, "no answer at the end"),
    ({"messages": said("user:a", "assistant:b", "user:c")}, "no answer at the end"),
    ({"messages": said("user:a", "assistant: ")}, "empty"),
    ({"messages": said("user:", "assistant:a")}, "empty"),
    ({"messages": said("user:a\0", "assistant:a")}, "NUL"),
    ({"messages": said("robot:a", "assistant:a")}, "unknown role"),
    ({"messages": ["a"]}, "bad message"),
    ({"messages": [{"content": "a"}]}, "bad message"),
    ({"messages": [{"role": "user", "content": 5}]}, "no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
    ({"messages": said("user:a", "system:b", "assistant:c")}, "can't be rendered"),
    ({"messages": said("user:a", "assistant:c"), "images": ["x.png"]}, "not text alone"),
    ({"messages": said("user:a", "assistant:c"), "tools": "x"}, "bad tools"),
    ({"messages": "x"}, "bad messages"),
    ({"messages": said("user:a", "function_call:x", "assistant:c")}, "bad function_call"),
    ({"messages": said("user:a", 'function_call:{"a": 1}', "assistant:c")}, "bad function call"),
    ({"messages": [*said("user:a"), {"role": "assistant", "content": "b", "weight": 0}]},
     "nothing to learn"),
    ({"messages": [*said("user:a"), {"role": "assistant", "content": "b", "weight": 2}]},
     "bad weight"),
    ({"messages": [*said("user:a"), {"role": "assistant", "content": "", "tool_calls": [5]}]},
     "can't be rendered"),
]  # fmt: skip


def test_every_row_that_is_refused_is_named(tiny: Tokenizer, tmp_path: Path) -> None:
    samples, told = made(tmp_path, [talk(1), *(row for row, _ in REFUSED)], tiny)
    assert len(samples) == 1
    assert told == [(line, reason) for line, (_, reason) in enumerate(REFUSED, start=2)]


def test_alpaca_rows_that_are_none(tiny: Tokenizer, tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "a"}, "empty"),
        ({"instruction": "", "output": "b"}, "empty"),
        ({**good, "history": "x"}, "bad history"),
        ({**good, "history": [["x"]]}, "bad history"),
        ({**good, "history": {"x": 1}}, "bad history"),
        ({**good, "output": 5}, "no text"),
        ({**good, "system": 5}, "no text"),
    ]
    samples, told = made(tmp_path, [good, *(row for row, _ in bad)], tiny)
    assert len(samples) == 1
    assert told == [(line, reason) for line, (_, reason) in enumerate(bad, start=2)]


def test_what_no_run_can_begin_with(tiny: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="nothing to learn from") as failed:
        made(tmp_path, [{"messages": said("user:a")}], tiny)
    assert "1 no answer at the end" in failed.value.why
    with pytest.raises(XverseError, match="no layout that is known") as failed:
        made(tmp_path, [{"a": 1, "b": 2}], tiny)
    assert "a, b" in failed.value.why
    with pytest.raises(XverseError, match="marked as good or bad"):
        made(tmp_path, [{**talk(1), "label": True}], tiny)
    with pytest.raises(XverseError, match="teaches nothing"):
        made(tmp_path, [talk(1)], tiny, cutoff=1)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS["alpaca"]))
    made(tmp_path, [talk(1)], tiny)
    with pytest.raises(XverseError, match="can't be learned from at once"):
        read_samples([tmp_path], tiny, V2, SampleOptions(), Report())


def test_a_limit_holds_for_each_data_set(tiny: Tokenizer, tmp_path: Path) -> None:
    assert len(made(tmp_path, [talk(1)] * 5, tiny, max_samples=3)[0]) == 3
    assert len(made(tmp_path, [talk(1)] * 5, tiny, max_samples=9)[0]) == 5


def test_processes_give_the_same(tiny: Tokenizer, tmp_path: Path) -> None:
    rows = [talk(n % 3 + 1) for n in range(300)] + [{"messages": said("user:a")}]
    here, told = made(tmp_path, rows, tiny)
    there, also = made(tmp_path, rows, tiny, workers=1)
    assert told == also == [(301, "no answer at the end")]
    assert len(here) == len(there) == 300
    assert np.array_equal(here.lengths(), there.lengths())
    assert all(np.array_equal(here.document(at), there.document(at)) for at in range(300))
