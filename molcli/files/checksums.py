"""Checksums of files, which show bits that flipped on disk."""

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits.

    Raises:
        ValueError: If the path is no regular file: a device may have no end.
        OSError: If it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
