"""The preview: what is learned in colour or in brackets, and nothing that steers a terminal."""

import io
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.text.tiny import write_tiny_tokenizer
from xverse.data.preview import SHOWN, show
from xverse.data.samples import Pair, Pairs, Sample, Samples, samples_of
from xverse.text.tokenizer import Tokenizer


def sample(ids: list[int], learned_from: int) -> Sample:
    return Sample(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= learned_from)


def shown(samples: Samples | Pairs, folder: Path, *, terminal: bool = False) -> str:
    write_tiny_tokenizer(folder)
    file = io.StringIO()
    colours = "standard" if terminal else None
    console = Console(file=file, width=90, force_terminal=terminal, color_system=colours)
    show(samples, Tokenizer.load(folder), 2, console)
    return file.getvalue()


def test_what_is_learned_stands_in_brackets(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_folder(tmp_path))
    said = [*tokenizer.encode("\x1b[a", add_special=False), tokenizer.encode("ü")[0], 3]
    asked = tokenizer.encode("Hi\n", add_special=False)
    text = shown(samples_of([sample(asked + said, len(asked))]), tmp_path)
    assert f"1 of 1: {len(asked + said)} tokens, {len(said)} learned" in text
    assert "Hi⏎\n⟦<U+001B>[a<0xC3><|endoftext|>⟧" in text
    assert "\x1b" not in text


def test_colours_on_a_terminal(tmp_path: Path) -> None:
    text = shown(samples_of([sample([70, 71, 72, 73], 2)]), tmp_path, terminal=True)
    assert "⟦" not in text
    assert "\x1b[1;32m" in text


def test_pairs_and_long_samples(tmp_path: Path) -> None:
    long = sample([70] * (SHOWN + 7), 5)
    text = shown(samples_of([Pair(long, sample([71, 72], 1))] * 3), tmp_path)
    assert "1 of 3, chosen" in text
    assert "2 of 3, rejected" in text
    assert "3 of 3" not in text
    assert "... 7 tokens ..." in text


def _folder(folder: Path) -> Path:
    write_tiny_tokenizer(folder)
    return folder
