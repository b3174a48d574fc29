"""FOLDERS -> TOKENS A SECOND. The model before and after it was quantized, in turn."""

import time
from pathlib import Path

from xverse.quant.report import Speed

PROMPT = "The history of the printing press begins in"
TOKENS, ROUNDS, KV_TOKENS = 48, 3, 512
SHARE = 0.6  # of the free memory that a model's weights may take: KV memory and steps come on top


def measure_speed(model: str, folder: Path, device: str, dtype: str) -> Speed | str:
    """One sequence decoding on `device`, or why that was not measured."""
    from xverse.checkpoint.load import open_checkpoint
    from xverse.checkpoint.resolve import resolve
    from xverse.device import free_memory, machine_name, pick_device

    place = pick_device(device)
    needed = 2 * open_checkpoint(resolve(model)).shape.num_parameters
    free = free_memory(place)
    if needed > SHARE * free:
        return f"the source takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free."
    before, after = (_tokens_per_second(name, device, dtype) for name in (model, str(folder)))
    return Speed(before, after, machine_name(place))


def _tokens_per_second(model: str, device: str, dtype: str) -> float:
    from xverse.engine.llm import LLM
    from xverse.engine.request import Sampling

    llm = LLM(model, device=device, dtype=dtype, kv_tokens=KV_TOKENS)
    times = []
    for count in (TOKENS // 4, *([TOKENS] * ROUNDS)):  # the first one warms up
        greedy = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        answer = llm.generate(PROMPT, greedy)
        times.append((time.perf_counter() - start) / len(answer.tokens))
    return 1 / min(times[1:])
