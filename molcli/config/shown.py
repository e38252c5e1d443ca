"""Values of the user as messages show them: as YAML writes them, and never long."""

_LENGTH = 60


def shown(value: object) -> str:
    """Return the value's text, or the start of it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, or deeply nested lists
        return f"a huge {'number' if isinstance(value, int) else 'value'}"


def cut(text: str, length: int = _LENGTH) -> str:
    """Return the text, or its start where it is longer than `length` characters."""
    return text if len(text) <= length else f"{text[:length]}…"
