"""The bar that a stage's reports draw."""

import pytest

from molcli.report.bars import bar


def test_the_bar_shows_title_count_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("training") as progress:
        progress(1, None)
        progress(3, 4, "loss 2.5")
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("training", "3/4", "loss 2.5"):
        assert part in shown.err


def test_a_second_phase_counts_from_its_own_start(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("training") as progress:
        progress(4, 4)  # the text is read
        progress(0, 9)
        progress(9, 9)
    assert "9/9" in capsys.readouterr().err


def test_an_error_before_any_work_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), bar("training"):
        raise ZeroDivisionError
    assert capsys.readouterr().err.strip() == ""
