"""WHAT SAMPLES ARE TOLD. The options by which conversations become samples; nothing heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SampleOptions:
    """How data becomes samples."""

    cutoff: int = 2048
    """Tokens of a sample at most."""
    too_long: Literal["cut", "refuse"] = "cut"
    """What becomes of longer ones. cut: whole rounds from the beginning stay; of a first round that
    is too long alone, the answer's end goes. refuse: they are skipped. Both are told."""
    train_on_prompt: bool = False
    """Learn to say the questions too."""
    mask_history: bool = False
    """Learn the last answer of a conversation alone."""
    max_samples: int | None = None
    """Rows of each data set at most."""
    dataset_dir: str = "data"
    """Where the dataset_info.json lies that explains names of data sets."""
    default_system: str | None = None
    """System message of conversations that have none."""
    tools_time: str = "2024-01-01 12:00:00"
    """The time that prompts with tools tell, the same in every run."""
    workers: int = 0
    """Processes that encode; 0 is this one alone."""
