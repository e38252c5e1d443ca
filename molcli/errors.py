"""Exceptions that end a command with a message instead of a traceback."""


class MolError(Exception):
    """The user's input, data or machine does not allow the work; the user can fix it.

    The command line prints the three parts and exits with status 2.

    Args:
        found: What was found, with the value.
        allowed: What would be accepted.
        hint: A command or value that works.
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
    """A signal stopped a run after it saved its state; the exit status is 128 + signal.

    Args:
        signal: Number of the signal, such as 15 for SIGTERM.
        saved: Describes the saved state.
        resume: Command that continues the run, if the command line knows one.
    """

    def __init__(self, signal: int, saved: str, resume: str = "") -> None:
        super().__init__(saved)
        self.signal = signal
        self.saved = saved
        self.resume = resume
