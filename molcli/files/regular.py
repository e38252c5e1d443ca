"""Files that are read must be regular ones: a device may have no end, a pipe may never begin."""

from pathlib import Path


def check_regular(path: Path) -> None:
    """Check that a path is no folder, pipe or device. What is missing is left to who opens it.

    Raises:
        ValueError: If it is one.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
