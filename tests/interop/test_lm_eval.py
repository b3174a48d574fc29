"""lm-evaluation-harness asks our engine, and gets what the model says."""

from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse import LLM, XverseError
from xverse.evals.door import Prompt

pytest.importorskip("lm_eval")


def test_the_harness_model_class_answers_all_it_is_asked(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from xverse.interop.lm_eval import XverseLM

    def asks(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, {}, some, place) for place, some in enumerate(arguments)]

    assert get_model("xverse") is XverseLM
    write_published_folder(tmp_path / "model", shards=1)
    llm = LLM(tmp_path / "model", dtype="float32", share_prefixes=True)
    model = XverseLM(llm, batch_size=4)

    pairs = [(f"The cat {n}", option) for n in range(3) for option in (" sat", " ran")]
    found = model.loglikelihood(asks("loglikelihood", *pairs))
    expected = [llm.score(prompt, [option])[0] for prompt, option in pairs]
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-3)

    plan = ("The cat", {"until": ["zzz"], "max_gen_toks": 5})
    texts = model.generate_until(asks("generate_until", plan))
    assert texts == model.door.write([Prompt("The cat")], 5, ["zzz"], "")
    whole = model.loglikelihood_rolling(asks("loglikelihood_rolling", ("The cat sat.",)))
    assert whole == [model.door.foretell(["The cat sat."], "")[0].logprob]
    with pytest.raises(XverseError, match="not had here"):
        model.generate_until(asks("generate_until", ("a", {"do_sample": True})))
