"""lm-evaluation-harness asks our engine, and gets what the model says."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse import LLM, XverseError

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("datasets")


def test_the_harness_runs_a_task_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    from xverse.interop.lm_eval import XverseLM

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_published_folder(tmp_path / "model", shards=1)
    llm = LLM(tmp_path / "model", dtype="float32", share_prefixes=True)
    model = XverseLM(llm, batch_size=4)
    rows = [
        {"prompt": f"The cat {n}", "options": [" sat", " ran"], "gold": n % 2} for n in range(4)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(model=model, tasks=[config], bootstrap_iters=0)
    picks = [max(range(2), key=llm.score(r["prompt"], r["options"]).__getitem__) for r in rows]  # type: ignore[call-overload, arg-type]
    right = sum(pick == row["gold"] for pick, row in zip(picks, rows, strict=True))
    assert found["results"]["cats"]["acc,none"] == right / 4

    def ask(kind: str, *args: object) -> list[Instance]:
        return [Instance(kind, {}, args, 0)]

    options = {"until": ["zzz"], "max_gen_toks": 5}
    (text,) = model.generate_until(ask("generate_until", "The cat", options))
    (loglikelihood, greedy) = model.loglikelihood(ask("loglikelihood", "The cat", text))[0]
    assert loglikelihood < 0
    assert isinstance(greedy, bool)
    (rolling,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", "The cat sat."))
    assert rolling < 0
    with pytest.raises(XverseError, match="not had here"):
        model.generate_until(ask("generate_until", "a", {"do_sample": True}))
