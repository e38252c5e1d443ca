"""JSON is read from regular files: a device may have no end."""

from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.files.json_files import read_object


@pytest.mark.parametrize("target", ["/dev/zero", "."])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "link.json").symlink_to(target)
    with pytest.raises(MolError, match="not a regular file"):
        read_object(tmp_path / "link.json", allowed="a JSON object", hint="write it again")


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to("file.json")
    found = read_object(tmp_path / "link.json", {"a": int}, allowed="a JSON object", hint="")
    assert found == {"a": 1}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(MolError, match=f"{number} is not a number"):
        read_object(tmp_path / "a.json", allowed="a JSON object", hint="write it again")
