"""Checksums of files, which show bits that flipped on disk."""

import hashlib
from pathlib import Path

from molcli.files.regular import check_regular


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits.

    Raises:
        ValueError: If the path is no regular file.
        OSError: If it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
