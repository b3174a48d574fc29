"""HOW FAR FROM TRANSFORMERS? Logits of SmolLM2 over 512 tokens of real text, both from one GGUF.

In fp32 both compute the same; in bf16 each is compared with its own fp32, so that the error of
the dtype is not blamed on either.
"""

from typing import Any

import torch

from bench.record import ROOT, record
from xverse import LLM
from xverse.checkpoint.resolve import resolve
from xverse.model.cache import Growing, Packed

TOKENS = 512


def whole(llm: LLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens at once."""
    kv = Packed([len(ids)])
    return llm.decoder(ids, kv.positions(), kv).float()


def stepwise(llm: LLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of half the tokens at once, and of the rest one by one."""
    half, dtype = len(ids) // 2, llm.decoder.model.norm.weight.dtype
    kv = Growing(llm.decoder.shape, 1, dtype=dtype)
    parts = [llm.decoder(ids[:half], kv.extend([half]), kv)]
    parts += [llm.decoder(ids[i : i + 1], kv.extend([1]), kv) for i in range(half, len(ids))]
    return torch.cat(parts).float()


@torch.inference_mode()
def main() -> None:
    from transformers import AutoModelForCausalLM

    file = resolve("smollm2")
    exact, small = LLM(file, dtype="float32"), LLM(file, dtype="bfloat16")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    text = (ROOT / "LICENSE").read_text("utf-8")
    ids = torch.tensor(exact.tokenizer.encode(text)[:TOKENS])
    reference = theirs.eval()(ids[None]).logits[0].float()
    their_small = theirs.bfloat16()(ids[None]).logits[0].float()
    rows = {
        "xverse fp32, whole": whole(exact, ids),
        "xverse fp32, stepwise": stepwise(exact, ids),
        "xverse bf16, whole": whole(small, ids),
        "xverse bf16, stepwise": stepwise(small, ids),
        "transformers bf16": their_small,
    }
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "text": f"the first {len(ids)} tokens of LICENSE",
        "reference": "transformers fp32",
        "largest_logit": round(float(reference.abs().max()), 2),
        "rows": {
            name: {
                "largest_difference": float(f"{float((got - reference).abs().max()):.3g}"),
                "mean_difference": float(f"{float((got - reference).abs().mean()):.3g}"),
                "top_1_equal": int((got.argmax(-1) == reference.argmax(-1)).sum()),
            }
            for name, got in rows.items()
        },
    }
    print(figures)
    print(record("parity", figures, ("transformers", "tokenizers")))


if __name__ == "__main__":
    main()
