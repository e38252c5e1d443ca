"""Sums are those of regular files."""

import hashlib
from pathlib import Path

import pytest

from molcli.files.checksums import file_sha256


def test_the_sum_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert file_sha256(tmp_path / "link") == file_sha256(tmp_path / "a")


@pytest.mark.parametrize("target", ["/dev/zero", "."])
def test_what_is_no_regular_file_has_none(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match="not a regular file"):
        file_sha256(tmp_path / "link")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "gone")
