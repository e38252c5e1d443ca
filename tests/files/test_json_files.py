"""JSON objects that are read: whole, within bounds, and with finite numbers."""

from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.files.json_files import read_object


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": [-Infinity]}',
        '{"a": 1e999}',
        '{"a": {"b": -1e999}}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' * 100_000,
        "[1]",
        '{"b": 1}',
        '{"a": "1"}',
        '{"a": true}',
    ],
    ids=lambda text: text[:20],
)
def test_what_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MolError) as caught:
        read_object(path, {"a": (int, float, list, dict)}, allowed="figures", hint="again")
    assert caught.value.found.startswith(f"{path} ")
    assert caught.value.allowed == "figures"


def test_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1e308, "b": 5e-324, "c": 0.1, "d": 7}', encoding="utf-8")
    found = read_object(path, {"a": float, "d": float}, allowed="figures", hint="again")
    assert found == {"a": 1e308, "b": 5e-324, "c": 0.1, "d": 7}
    assert isinstance(found["d"], int)
