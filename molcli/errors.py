"""The one error that a user can mend."""


class MolError(Exception):
    """Something in the user's input, data or machine stops the work before it starts.

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
