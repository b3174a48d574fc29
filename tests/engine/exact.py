"""Log-probabilities as transformers gives them, and all of an `LLM` beside them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from xverse import LLM, Sampling
from xverse.engine.request import Logprob

WITHIN = 1e-4


def exact_logprobs(theirs: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    """What transformers foretells after each of `ids`: [T, V] in fp32."""
    with torch.inference_mode():
        return theirs(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def check_rows(found: Sequence[Logprob], table_TV: Tensor) -> None:
    """Each token's own log-probability and those of the best beside it, within 1e-4."""
    assert len(found) == len(table_TV)
    for each, row_V in zip(found, table_TV, strict=True):
        assert each.logprob == pytest.approx(float(row_V[each.id]), abs=WITHIN)
        best = row_V.topk(len(each.top)).values.tolist() if each.top else []
        assert [token.logprob for token in each.top] == pytest.approx(best, abs=WITHIN)
        for token in each.top:
            assert token.logprob == pytest.approx(float(row_V[token.id]), abs=WITHIN)


def check_answer(llm: LLM, theirs: torch.nn.Module, prompt: str) -> None:
    """Greedy tokens, sampled tokens and the prompt's, each with five best."""
    ids = llm.tokenizer.encode(prompt)
    for temperature in (0.0, 1.0):
        asked = Sampling(
            temperature=temperature,
            seed=3,
            repetition_penalty=1.2,  # log-probabilities are the model's own, whatever is chosen
            max_tokens=12,
            ignore_eos=True,
            logprobs=5,
            prompt_logprobs=5,
        )
        answer = llm.generate(prompt, asked)
        table_TV = exact_logprobs(theirs, [*ids, *answer.tokens])
        check_rows(answer.prompt_logprobs, table_TV[: len(ids) - 1])
        check_rows(answer.logprobs, table_TV[len(ids) - 1 : -1])
        assert [each.id for each in answer.logprobs] == list(answer.tokens)
        assert [each.id for each in answer.prompt_logprobs] == ids[1:]
    check_rows(llm.logprobs(prompt), exact_logprobs(theirs, ids)[:-1])


def check_labels(llm: LLM, theirs: torch.nn.Module, prompt: str, labels: Sequence[str]) -> None:
    """Sums over the tokens of each label; the labels have several."""
    start = len(llm.tokenizer.encode(prompt))
    for label, score in zip(labels, llm.score(prompt, labels), strict=True):
        ids = llm.tokenizer.encode(prompt + label)
        assert len(ids) > start + 1, label
        assert ids[:start] == llm.tokenizer.encode(prompt), label
        table_TV = exact_logprobs(theirs, ids)
        expected = sum(float(table_TV[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert score == pytest.approx(expected, abs=WITHIN * (len(ids) - start))
