"""Errors that are not bugs: what the user can correct, and interruptions."""


class MolError(Exception):
    """The user's input, data or machine does not allow the work, and the user can correct it.

    found: what was found, with the value. allowed: what would be accepted. hint: the command or
    value that works. The command line prints the three and exits with status 2.
    """

    def __init__(self, found: str, *, allowed: str = "", hint: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.found]
        if self.allowed:
            lines.append(f"allowed: {self.allowed}")
        if self.hint:
            lines.append(f"try: {self.hint}")
        return "\n".join(lines)


class Interrupted(Exception):
    """A signal stopped a run after it had saved its state; the exit status is 128 + signal.

    signal: the number, such as 15 for SIGTERM. saved: what was saved, in words. resume: the command
    that continues the run, if the command line knows one.
    """

    def __init__(self, signal: int, saved: str, resume: str = "") -> None:
        super().__init__(saved)
        self.signal = signal
        self.saved = saved
        self.resume = resume
