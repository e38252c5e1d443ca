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


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' * 100_000,
        "[1]",
        '{"b": 1}',
        '{"a": "1"}',
        '{"a": true}',
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_such_an_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MolError) as caught:
        read_object(path, {"a": (int, float, list, dict)}, allowed="figures", hint="again")
    assert caught.value.found.startswith(f"{path} ")


def test_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1e308, "b": 5e-324, "c": 0.1, "d": 7}', encoding="utf-8")
    found = read_object(path, {"a": float, "d": float}, allowed="figures", hint="again")
    assert found == {"a": 1e308, "b": 5e-324, "c": 0.1, "d": 7}
    assert isinstance(found["d"], int)
