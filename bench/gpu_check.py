"""THE SAME ON A GPU. A small published folder gives there what it gives on the CPU.

Loads, chats, samples and quantizes on both, in fp32, and compares: ids equal, logits within 1e-3.
"""

import tempfile
from pathlib import Path

import torch

from tests.tiny_model import write_published_folder
from xverse import LLM, Sampling
from xverse.model.cache import Packed

OPTIONS = (
    Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=40, ignore_eos=True),
    Sampling(temperature=0.8, top_k=30, top_p=0.85, seed=3, max_tokens=40, ignore_eos=True),
)
PROMPTS = ["Hello", "The 1 and 2", "北京的天气", "a", "Tell me (now), please: is it so?", "x" * 40]


def logits(llm: LLM) -> torch.Tensor:
    device = next(llm.decoder.parameters()).device
    kv = Packed([20, 5], device)
    with torch.inference_mode():
        return llm.decoder(torch.arange(25, device=device) * 5 % 200, kv.positions(), kv).cpu()


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as place:
        for moe in (False, True):
            folder = Path(place) / f"moe-{moe}"
            write_published_folder(folder, moe=moe)
            for bits in (None, 8, 4):
                here = LLM(folder, dtype="float32", device="cpu", quantize=bits)
                there = LLM(folder, dtype="float32", device="cuda", quantize=bits)
                difference = float((logits(here) - logits(there)).abs().max())
                assert difference < 1e-3, (moe, bits, difference)
                for options in OPTIONS:
                    ours, theirs = (llm.generate(PROMPTS, options) for llm in (here, there))
                    assert ours == theirs, (moe, bits, options)
                messages = [{"role": "user", "content": "你好"}]
                assert here.chat(messages, OPTIONS[0]) == there.chat(messages, OPTIONS[0])
                print(f"moe={moe} bits={bits}: equal ids, logits within {difference:.1e}")
            bf16 = LLM(folder, device="cuda")
            assert bf16.decoder.model.norm.weight.dtype == torch.bfloat16
            assert len(bf16.generate(PROMPTS, OPTIONS[0])[0].tokens) == 40
    print("all equal")


if __name__ == "__main__":
    main()
