"""DO GRAMMARS AND GUESSES HOLD ON A GPU? A small model, steps that overlap, tokens chosen there.

`python -m bench.features_gpu`: greedy answers with guesses are the plain decoder's or a near tie,
sampled ones run to their end, and answers that are held to a grammar match it. Grammars need
xgrammar; without it that part says so.
"""

import importlib.util
import json
import re
import tempfile
from pathlib import Path

import torch

from bench.throughput_gpu import SMALL
from tests.tiny_model import write_published_folder
from xverse import LLM, Grammar, Sampling
from xverse.engine.agree import judge
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.measure import measure_throughput
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=96, ignore_eos=True)
FORMS = {
    "number": Grammar.regex(r"[0-9]{2,4}(-[a-f]{1,3}){0,2};"),
    "object": Grammar.json_schema(
        {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
        }
    ),
}


def guesses() -> dict[str, object]:
    """Of a model that runs in circles, since attention hardly speaks."""
    decoder = random_decoder(SMALL, dtype=torch.bfloat16, device=torch.device("cuda"), std=0.08)
    for name, parameter in decoder.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter.data.mul_(0.01)
    engine = Engine(fuse(decoder), options=EngineOptions(kv_tokens=16384, speculate=8))
    assert isinstance(engine.runner, DeviceRunner)
    asked = [Request((7 + i, 8, 9) * 3, GREEDY.over({})) for i in range(6)]
    answers = measure_throughput(engine, asked).answers
    judged = [judge(decoder, r, a.ids) for r, a in zip(asked, answers, strict=True)]
    assert not sum(one.wrong for one in judged), [str(one) for one in judged]
    proposed, accepted = engine.speculation.proposed, engine.speculation.accepted
    assert accepted > 0, "a model that repeats itself is guessed"
    warm = Sampling(temperature=0.5, repetition_penalty=1.1, seed=1, logprobs=2, max_tokens=64)
    asked = [Request((7 + i, 8, 9) * 3, warm.over({})) for i in range(12)]
    measure_throughput(engine, asked)  # which asserts that every answer is as long as asked for
    ties = sum(one.ties for one in judged)
    return {"proposed": proposed, "accepted": accepted, "near_ties": ties}


def grammars() -> dict[str, object]:
    """Alone and in a crowd of free answers; some of the held ones may run out of tokens."""
    if importlib.util.find_spec("xgrammar") is None:
        return {"grammars": "not tried: xgrammar is not installed"}
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        write_published_folder(Path(place))
        llm = LLM(place, device="cuda", kv_tokens=16384)
        assert isinstance(llm.engine, Engine)
        assert isinstance(llm.engine.runner, DeviceRunner)
        for name, form in FORMS.items():
            whole = 0
            for seed in range(4):
                held = Sampling(temperature=1.0, seed=seed, max_tokens=90, grammar=form)
                for answer in llm.choices("Hello", 12, held):
                    if answer.finish == "stop":
                        whole += 1
                        assert matches(name, answer.text), answer.text
            assert whole > 24, (name, whole)
            found[name] = f"{whole} of 48 are whole, and match"
    return found


def matches(name: str, text: str) -> bool:
    if name == "number":
        return re.fullmatch(FORMS[name].text, text) is not None
    return 0 <= json.loads(text)["a"] <= 99


if __name__ == "__main__":
    print(guesses())
    print(grammars())
