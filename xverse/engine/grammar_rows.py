"""GRAMMARS -> ROWS OF A STEP. What each row may choose, where many are chosen at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xverse.engine.grammar_state import GrammarState
from xverse.engine.runner import Choice, Chosen
from xverse.errors import XverseError

States = Sequence[GrammarState | None]  # of each row; None where it has no grammar


class Allowed:
    """The tokens that the rows of one step may choose."""

    def __init__(self, states: States, vocab_size: int) -> None:
        """Waits for the masks, which threads have been computing since the last token was known.

        `masks_BW` (int32, on the CPU) has bit v % 32 of word v // 32 set where token v is allowed;
        None where no row has a grammar. Whoever's grammar fails may choose anything, and fails.
        """
        self.states = states
        self.masks_BW: Tensor | None = None
        self._errors: dict[int, XverseError] = {}
        if not any(states):
            return
        words = (vocab_size + 31) // 32
        self.masks_BW = torch.full((len(states), words), -1, dtype=torch.int32)
        for row, state in enumerate(states):
            try:
                if state is not None:
                    state.fill(self.masks_BW[row])
            except XverseError as error:
                self._errors[row] = error

    def accept(self, choices: Sequence[Choice]) -> list[Choice]:
        """Each grammar goes on by what was chosen; the choices, errors of grammars among them."""
        return [self._accept(row, choice) for row, choice in enumerate(choices)]

    def _accept(self, row: int, choice: Choice) -> Choice:
        state = self.states[row]
        if row in self._errors:
            return self._errors[row]
        if state is None or not isinstance(choice, Chosen):
            return choice
        try:
            state.accept(choice.id)
        except XverseError as error:
            return error
        return choice
