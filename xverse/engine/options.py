"""HOW MUCH AT ONCE. What an engine may be told, and what the machine chooses where it is not."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from xverse.errors import XverseError
from xverse.kernels.multiply import ROWS

CPU_STEP, CPU_RUNNING = 512, 64
SLOTS = 8  # of adapters, 160 MB each at rank 32 of a 7B model
GPU_STEP, GPU_RUNNING = 8192, 256  # a step of 8,192 tokens of a 7B model takes an H200 0.2 s

_OF_ADAPTERS = {"max_adapters": 0, "adapter_bytes": 1, "adapter_slots": 0, "adapter_rank": 1}


@dataclass(frozen=True)
class EngineOptions:
    """How much is done at once. What is None is chosen by the machine.

    `kv_tokens` is the room for keys and values; on a GPU, None takes what the largest step leaves.
    `kv_dtype` "fp8" stores them in 8 bits: twice the tokens, half the reading, slightly rounded.
    `step_tokens` bounds the prompt tokens beside those who decode, hence how long these wait.
    `deterministic`: equal to the last bit, alone or among others, at some cost in speed.
    `share_prefixes`: what many prompts begin with is computed once. Where the rest is then computed
    in another shape, its last bits differ, unless `deterministic`.
    `grammar_seconds`: how long one grammar may be compiled.
    `speculate`: so many tokens at most are guessed from what a sequence holds already and computed
    beside the one that is due, while few run; answers stay the same. 0 is off.
    `max_adapters`: so many adapters may be loaded at once, in `adapter_bytes` together; 0 is off.
    On a GPU captured steps serve `adapter_slots` of them at once, each of a rank up to
    `adapter_rank`, in memory of its own; by default one more than may be loaded, since an adapter
    that is replaced is in use for a while, and 8 at most.
    """

    kv_tokens: int | None = None
    kv_dtype: Literal["auto", "fp8"] = "auto"
    page_size: int = 16
    step_tokens: int | None = None
    max_running: int | None = None
    deterministic: bool = False
    share_prefixes: bool = True
    grammar_seconds: float = 4.5
    speculate: int = 0
    max_adapters: int = 0
    adapter_bytes: int = 2**30
    adapter_slots: int | None = None
    adapter_rank: int = 32

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "page_size", "step_tokens", "max_running"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise XverseError(
                    f"{name} cannot be {value!r:.60}.",
                    "It counts tokens or sequences.",
                    "Give a whole number of at least 1.",
                )
        if type(self.speculate) is not int or not 0 <= self.speculate < ROWS:
            raise XverseError(
                f"speculate cannot be {self.speculate!r:.60}.",
                f"It is a whole number from 0 to {ROWS - 1}: with the token that is due, what a "
                "product computes at the price of one.",
                "Give 8, or 0 to guess nothing.",
            )
        for name, least in _OF_ADAPTERS.items():
            value = getattr(self, name)
            if name == "adapter_slots" and value is None:
                continue
            if type(value) is not int or not least <= value <= 2**50:
                raise XverseError(
                    f"{name} cannot be {value!r:.60}.",
                    "It bounds the adapters that are loaded at once.",
                    f"Give a whole number of at least {least}.",
                )
        if type(self.grammar_seconds) not in (int, float) or not 0 < self.grammar_seconds <= 600:
            raise XverseError(
                f"grammar_seconds cannot be {self.grammar_seconds!r:.60}.",
                "It is the time that one grammar may take to compile.",
                "Give a number from above 0 to 600.",
            )
        if self.kv_dtype not in ("auto", "fp8"):
            raise XverseError(
                f"Keys and values cannot be kept in {self.kv_dtype!r:.60}.",
                "They are kept in the dtype of the weights, or in fp8.",
                'Give kv_dtype "auto" or "fp8".',
            )
        if self.step_tokens is not None and (self.max_running or 1) > self.step_tokens:
            raise XverseError(
                f"{self.max_running} sequences cannot run in steps of {self.step_tokens} tokens.",
                "Each that decodes brings a token to every step.",
                "Raise step_tokens or lower max_running.",
            )

    def on(self, device: torch.device) -> "EngineOptions":
        """These options, none of steps left open. A GPU is not filled by a CPU's steps."""
        gpu = device.type == "cuda" and not self.deterministic
        step = self.step_tokens or max(GPU_STEP if gpu else CPU_STEP, self.max_running or 0)
        # Each sequence has a page at least; memory for more of them would lie idle.
        pages = -(-(self.kv_tokens or step * self.page_size) // self.page_size)
        running = self.max_running or min(step, pages, GPU_RUNNING if gpu else CPU_RUNNING)
        slots = self.adapter_slots
        if slots is None:
            slots = min(self.max_adapters + 1, SLOTS) if self.max_adapters else 0
        return replace(self, step_tokens=step, max_running=running, adapter_slots=slots)
