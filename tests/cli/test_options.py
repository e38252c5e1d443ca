"""Options that several commands share."""

from pathlib import Path

import pytest

from molcli.cli.options import data_for
from molcli.errors import MolError


@pytest.mark.parametrize(
    "sources, expected",
    [
        (None, None),
        (["a.txt"], "a.txt"),
        (["a.txt=2"], "a.txt"),
        (["a=b.txt"], "a=b.txt"),
        (["a.txt=0.7", "hf://org/b:c=3e-1"], {"a.txt": 0.7, "hf://org/b:c": 0.3}),
        (["a.txt", "b.txt"], {"a.txt": 1.0, "b.txt": 1.0}),
    ],
)
def test_data_on_the_command_line(sources: list[str] | None, expected: object) -> None:
    assert data_for(sources) == expected


@pytest.mark.parametrize(
    "sources, found",
    [
        (["a.txt", "a.txt"], "twice"),
        (["a.txt=1", "a.txt=2"], "twice"),
        (["a.txt=1", "b.txt"], "`--data b.txt` has no weight"),
        (["a.txt=0", "b.txt=1"], "weight 0"),
        (["a.txt=inf", "b.txt=1"], "weight inf"),
        (["a.txt=nan", "b.txt=1"], "weight nan"),
    ],
)
def test_unclear_data_is_refused(sources: list[str], found: str) -> None:
    with pytest.raises(MolError, match=found):
        data_for(sources)


def test_a_file_whose_name_looks_weighted_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run=2").mkdir()
    assert data_for(["run=2"]) == "run=2"
