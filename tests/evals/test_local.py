"""A model in this process gives the log-probabilities that the plain decoder and others give."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.evals.fake import own_questions
from tests.server.inside import inside
from tests.tiny_model import write_published_folder
from xverse import LLM, XverseError
from xverse.evals.door import Ask, Prompt, Reading
from xverse.evals.endpoint import EndpointDoor
from xverse.evals.evaluate import evaluate
from xverse.evals.local import LocalDoor

TEXTS = ["Question: 1 + 1?\nA. 1\nB. 2\nAnswer:", "Question: 2 + 3?\nA. 5\nB. 2\nAnswer:"]
ASKS = [
    *(Ask(Prompt(text), (" A", " B", " C")) for text in TEXTS),
    Ask(Prompt("The cat sat"), (" on the mat.", " A", "")),
    Ask(Prompt("The cat sat"), (" on",), greedy=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path, shards=1)
    return path


@pytest.fixture(scope="module")
def door(folder: Path) -> LocalDoor:
    return LocalDoor(LLM(folder, dtype="float32", share_prefixes=True))


def exact(door: LocalDoor, prompt: str, option: str) -> float:
    """By the plain decoder, the whole text at once."""
    from xverse.model.cache import Packed

    tokenizer, decoder = door.llm.tokenizer, door.llm.decoder
    alone, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + option)
    kv = Packed([len(ids)])
    logprobs_TV = decoder(torch.tensor(ids), kv.positions(), kv).log_softmax(-1)
    same = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), None)
    start = min(len(alone), len(ids)) if same is None else same
    return sum(float(logprobs_TV[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_readings_are_the_plain_decoders(door: LocalDoor) -> None:
    for ask, reading in zip(ASKS, door.read(ASKS, "here"), strict=True):
        expected = [exact(door, ask.prompt.text, option) for option in ask.options]
        assert list(reading.logprobs) == pytest.approx(expected, abs=1e-3)


def test_labels_take_one_reading_of_the_prompt(door: LocalDoor) -> None:
    plans = [door._plan(ask, "") for ask in ASKS]
    assert [len(plan) for plan in plans] == [1, 1, 3, 1]
    assert len(plans[0][0].labels) == 3


def test_the_same_is_read_to_the_last_bit_whatever_came_before(door: LocalDoor) -> None:
    first = door.read(ASKS, "a")
    door.read([Ask(Prompt(TEXTS[0] + " A\n\n" + TEXTS[1]), (" A", " B"))], "b")
    assert door.read(ASKS, "c") == first


def test_shared_beginnings_are_computed_once(door: LocalDoor) -> None:
    before = door.llm.engine.scheduler.reused_tokens  # type: ignore[union-attr]
    stem = "A long beginning that is the same for all of them. " * 2
    door.read([Ask(Prompt(f"{stem}{n}"), (" A", " B")) for n in range(5)], "shared")
    assert door.llm.engine.scheduler.reused_tokens - before >= 4 * 64  # type: ignore[union-attr]


def test_beginnings_of_what_is_written_are_read_once(door: LocalDoor) -> None:
    scheduler = door.llm.engine.scheduler  # type: ignore[union-attr]
    before = scheduler.reused_tokens
    stem = "A long beginning that is the same for all of them. " * 2
    prompts = [Prompt(f"{stem}{n}") for n in range(4)]
    together = door.write(prompts, 4, (), "written")
    assert scheduler.reused_tokens - before >= 4 * 64
    assert together == [door.write([p], 4, (), f"alone {p.text[-1]}")[0] for p in prompts]


def test_the_latest_prompts_stay_tokenized(folder: Path) -> None:
    """However many came before; a batch is planned while the next one is tokenized."""
    it = LocalDoor(LLM(folder, dtype="float32"))
    it.batch = 4
    for start in range(0, 400, 4):
        it.lengths([Prompt(f"{start + n} and {n}") for n in range(4)])
        kept = [Prompt(f"{n} and {n % 4}") for n in range(max(0, start - 28), start + 4)]
        assert all(prompt in it._ids for prompt in kept)
    assert len(it._ids) <= 17 * it.batch


def test_greedy_is_what_would_be_written(door: LocalDoor) -> None:
    (written,) = door.write([Prompt("The cat")], 3, (), "w")
    right = Ask(Prompt("The cat"), (written,), greedy=True)
    wrong = Ask(Prompt("The cat"), (" zzz",), greedy=True)
    readings = door.read([right, wrong], "g")
    assert not readings[1].greedy[0]
    ids = door.llm.tokenizer.encode
    if ids("The cat" + written)[: len(ids("The cat"))] == ids("The cat"):
        assert readings[0].greedy[0]


def test_a_long_text_is_foretold_in_windows(door: LocalDoor) -> None:
    text = "It was a dark night, and the rain fell. " * 12
    (found,) = door.foretell([text], "f")
    ids = door.llm.tokenizer.encode(text)
    assert found.tokens == len(ids) > door.context
    short = "It was a dark night."
    (alone,) = door.foretell([short], "f")
    rest = sum(token.logprob for token in door.llm.logprobs(short))
    assert alone.logprob < rest  # the first token counts, too


def test_chat_prompts_are_the_models_own(door: LocalDoor) -> None:
    prompt = Prompt("Which?\nA. x\nB. y\nAnswer:", chat=True)
    expected = door.llm.encode_chat([{"role": "user", "content": prompt.text}]).ids
    (plan,) = door._plan(Ask(prompt, (" A", " B")), "")
    assert list(plan.ids) == expected
    spelled = [door.llm.tokenizer.encode(letter, add_special=False)[0] for letter in "AB"]
    assert list(plan.labels) == spelled
    assert door.lengths([Prompt("x" * 1000, chat=True)])[0] > door.context


def test_transformers_gives_the_same(door: LocalDoor) -> None:
    from xverse.verbs._peer_transformers import llama_of

    model = llama_of(door.llm.decoder.shape, door.llm.decoder)
    for ask, reading in zip(ASKS[:2], door.read(ASKS[:2], "hf"), strict=True):
        expected = []
        for option in ask.options:
            ids = door.llm.tokenizer.encode(ask.prompt.text + option)
            start = len(door.llm.tokenizer.encode(ask.prompt.text))
            with torch.inference_mode():
                logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(float(logprobs_TV[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert list(reading.logprobs) == pytest.approx(expected, abs=1e-3)
        assert _best(reading) == max(range(3), key=expected.__getitem__)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with inside(folder) as server:
        yield f"{server.url}/v1"


def test_a_server_gives_the_same_scores(door: LocalDoor, url: str, tmp_path: Path) -> None:
    far = EndpointDoor(url, chat=False)
    assert far.reads == "scores"
    half = LocalDoor(LLM(door.llm.model.checkpoint.path))  # as the server computes: bfloat16
    asks = [ask for ask in ASKS if "" not in ask.options]
    for here, there in zip(half.read(asks, ""), far.read(asks, ""), strict=True):
        assert list(there.logprobs) == pytest.approx(list(here.logprobs), abs=0.15)
        assert _best(here) == _best(there)
    assert far.write([Prompt("The cat")], 5, (), "") == half.write([Prompt("The cat")], 5, (), "")


def test_a_server_in_chat_is_asked_for_letters_and_this_is_said(url: str, tmp_path: Path) -> None:
    far = EndpointDoor(url, chat=True)
    assert far.reads == "letters"
    own = str(own_questions(tmp_path, 3))
    report = evaluate(far, own, out=tmp_path / "out", data=tmp_path, chat=True, plots=False)
    assert report.figures[0].reads == "letters"
    assert "letter read, not scored" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(XverseError, match="compares whole texts"):
        far.read([Ask(Prompt("a", chat=True), (" on the mat",))], "")


def test_nobody_at_the_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.evals.endpoint.WAIT_S", 0.0)
    with pytest.raises(XverseError, match="gave no answer"):
        EndpointDoor("http://127.0.0.1:9/v1", chat=False)


def _best(reading: Reading) -> int:
    return max(range(len(reading.logprobs)), key=reading.logprobs.__getitem__)
