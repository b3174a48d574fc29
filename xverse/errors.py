"""MISTAKES -> WORDS. The one exception a user can cause: what happened, why, how to mend it."""


class XverseError(Exception):
    """A failure that the person at the keyboard can mend.

    Every one says three things: `what` failed, `why`, and the `fix`. Broken invariants of our own
    code are assertions instead, and never this.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"
