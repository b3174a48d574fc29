"""STEP -> LEARNING RATE. Warm-up, then cosine, linear, stable and decay, or constant."""

import math

from xverse.train.options import Updating


def learning_rate(step: int, steps: int, options: Updating) -> float:
    """Of update `step`, counted from 0, of `steps`.

    Linear warm-up; cosine to `lowest_share` (Loshchilov and Hutter 2017), or a line to it, or
    stable and then a line to it over the last `decay_share` of the steps (Hu et al. 2024, MiniCPM).
    """
    step += options.first_step
    highest, lowest = options.learning_rate, options.learning_rate * options.lowest_share
    if step <= options.warmup_steps > 0:
        return highest * step / options.warmup_steps
    if options.schedule == "constant":
        return highest
    if options.schedule == "wsd":
        length = max(1, round(steps * options.decay_share))
        done = (step - (steps - length)) / length
        return highest + (lowest - highest) * min(1.0, max(0.0, done))
    length = max(1, steps - options.warmup_steps)
    done = min(1.0, (step - options.warmup_steps) / length)
    if options.schedule == "linear":
        return highest + (lowest - highest) * done
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2
