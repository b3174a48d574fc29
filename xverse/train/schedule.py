"""STEP -> LEARNING RATE. Warm-up, then cosine, warm-up-stable-decay, or constant."""

import math

from xverse.train.options import Updating


def learning_rate(step: int, steps: int, options: Updating) -> float:
    """Of update `step`, counted from 0, of `steps`.

    Linear warm-up; cosine to `lowest_share` (Loshchilov and Hutter 2017), or stable and then
    linear to it over the last `decay_share` of the steps (Hu et al. 2024, MiniCPM).
    """
    highest, lowest = options.learning_rate, options.learning_rate * options.lowest_share
    if step < options.warmup_steps:
        return highest * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return highest
    if options.schedule == "wsd":
        length = max(1, round(steps * options.decay_share))
        done = (step + 1 - (steps - length)) / length
        return highest + (lowest - highest) * min(1.0, max(0.0, done))
    length = max(1, steps - options.warmup_steps)
    done = min(1.0, (step + 1 - options.warmup_steps) / length)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2
