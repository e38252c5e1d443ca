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


def test_a_command_without_work_of_that_kind_leaves_no_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bar("converting"):
        pass
    assert capsys.readouterr().err.strip() == ""


def test_a_bar_that_is_not_shown_and_another_processes_bar_print_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bar("training", shown=False) as progress:
        progress(4, 4)
    monkeypatch.setenv("RANK", "1")
    with bar("training") as progress:
        progress(4, 4)
    assert capsys.readouterr() == ("", "")


def test_a_notebook_without_widgets_gets_the_finished_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("molcli.report.bars.find_spec", lambda name: None)
    with bar("training") as progress:
        progress(3, 4)
    assert "3/4" in capsys.readouterr().err
