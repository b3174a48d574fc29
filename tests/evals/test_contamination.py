"""Questions that stand in a corpus are found; those that only resemble it are not."""

from pathlib import Path

from tests.evals.fake import own_questions
from xverse.evals.contamination import as_markdown, overlap, words_of
from xverse.evals.tasks.own import own_task


def test_seen_questions_are_named(tmp_path: Path) -> None:
    data, corpus = tmp_path / "data", tmp_path / "corpus"
    data.mkdir()
    corpus.mkdir()
    task = own_task(own_questions(data))
    (corpus / "a.txt").write_text("Quiz. Question: what is 3 + 3? A. 3 B. 6 C. 7 Answer: B!")
    (corpus / "b.jsonl").write_text('{"text": "What is 4 + 4? It is 8."}\n')
    (found,) = overlap([task], data, corpus)
    assert found.names == ("4",)  # the fourth line asks for 3 + 3
    assert (found.judged, found.seen) == (12, 1)
    assert "8.33 %" in as_markdown([found])


def test_ideographs_are_words() -> None:
    assert words_of("Ab-c 12, 北京かな!") == ["ab", "c", "12", "北", "京", "か", "な"]
