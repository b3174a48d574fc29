"""A real model: SmolLM2 from its GGUF gives what transformers gives from the same file."""

from pathlib import Path

import pytest
import torch

from tests.data import ROOT
from tests.engine.exact import check_answer, check_labels
from xverse import LLM, Sampling, XverseError
from xverse.checkpoint.resolve import resolve
from xverse.model.cache import Packed

transformers = pytest.importorskip("transformers")

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "Dear Sir or Madam,",
    "To make bread you need",
    "The square root of 144 is",
    "Photosynthesis is the process by which",
    "Roses are red,",
    "import numpy as np\n",
    "La capitale de la France est",
    "1, 2, 3, 4, 5,",
    "The mitochondria",
    "A haiku about autumn:\n",
    "HTTP status 404 means",
    "My favourite book is",
    "The opposite of hot is",
    "Q: Who wrote Hamlet?\nA:",
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    try:
        return resolve("smollm2")
    except XverseError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def llm(gguf_file: Path) -> LLM:
    return LLM(gguf_file, dtype="float32")


@pytest.fixture(scope="module")
def theirs(gguf_file: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # both decode on, to compare more tokens
    return model


def test_logits_over_512_tokens_of_real_text(llm: LLM, theirs: torch.nn.Module) -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    ids = torch.tensor(llm.tokenizer.encode(text)[:512])
    assert len(ids) == 512
    kv = Packed([512])
    with torch.inference_mode():
        ours = llm.decoder(ids, kv.positions(), kv)
        expected = theirs(ids[None]).logits[0]
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    difference = float((ours - expected).abs().max())
    print(f"largest logit difference over 512 tokens: {difference:.2e}")
    assert difference < 1e-3  # logits reach 30; fp32 sums in another order


def test_greedy_text_of_20_prompts(llm: LLM, theirs: torch.nn.Module) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = llm.generate(PROMPTS, greedy)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        with torch.inference_mode():
            expected = theirs.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
            )[0, ids.shape[1] :].tolist()
        assert list(answer.tokens) == expected, prompt
        assert answer.text == llm.tokenizer.decode(expected)


def test_logprobs_of_prompts_answers_and_labels(llm: LLM, theirs: torch.nn.Module) -> None:
    for prompt in PROMPTS[1:3]:
        check_answer(llm, theirs, prompt)
    labels = [" a large city in Europe.", " wonderful, thank you!", " 北京的天气"]
    check_labels(llm, theirs, "The capital of France is", labels)


def test_it_knows_the_capital_of_france(gguf_file: Path) -> None:
    answer = LLM(gguf_file).chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in answer.text
    assert answer.finish == "stop"
