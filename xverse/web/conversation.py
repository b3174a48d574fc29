"""WHAT WAS SAID -> WHAT IS SHOWN. The conversation of one page, and what its buttons do to it."""

from dataclasses import dataclass, replace

from xverse.errors import XverseError

ASKING = ("user", "exec")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, after the system message."""

    role: str  # user, exec or assistant
    content: str


@dataclass(frozen=True)
class Conversation:
    """Everything said on one page. The system message is fixed with the first turn."""

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def asked(self, text: str, *, system: str = "", exec: str = "") -> "Conversation":
        """With one more turn of the user's side: `exec`, the result of a function call, if it is
        not blank, else `text`. `system` counts only where this is the first turn.

        Raises XverseError where both are blank.
        """
        turn = Turn("exec", exec) if exec.strip() else Turn("user", text)
        if not turn.content.strip():
            raise XverseError(
                "There is no message.", "It is empty.", "Write something, then send it."
            )
        system = self.system if self.turns else system.strip()
        return Conversation(system, (*self.turns, turn))

    def answered(self, text: str) -> "Conversation":
        """With the model's next turn."""
        return replace(self, turns=(*self.turns, Turn("assistant", text)))

    def asked_again(
        self, place: int, *, system: str = "", text: str | None = None
    ) -> "Conversation":
        """Up to the turn of the user's side at `place` among those shown, or else the last one
        before it; with `text` that turn says this instead. What followed is gone, and `system`
        counts where this is the first turn."""
        at = self._asking(place)
        turn, earlier = self.turns[at], replace(self, turns=self.turns[:at])
        said = turn.content if text is None else text
        if turn.role == "exec":
            return earlier.asked("", system=system, exec=said)
        return earlier.asked(said, system=system)

    def messages(self) -> list[dict[str, str]]:
        """As the model gets it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": turn.role, "content": turn.content} for turn in self.turns]

    def _asking(self, place: int) -> int:
        places = [at for at, turn in enumerate(self.turns[: place + 1]) if turn.role in ASKING]
        if place < 0 or not places:
            raise XverseError(
                "There is no such message.",
                "The conversation has changed since the page was drawn.",
                "Load the page again.",
            )
        return places[-1]
