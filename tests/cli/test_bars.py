"""The bar that a stage's reports draw."""

import pytest

from molcli.cli.bars import bar


def test_the_bar_shows_title_count_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("training") as progress:
        progress(1, None)
        progress(3, 4, "loss 2.5")
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("training", "3/4", "loss 2.5"):
        assert part in shown.err


def test_a_second_phase_starts_the_clock_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 100_000, 60))
    monkeypatch.setattr("rich.progress.monotonic", lambda: next(seconds))
    with bar("training") as progress:
        progress(4, 4)  # the text is read
        for done in range(5):
            progress(done, 4)
    assert "4/4" in (shown := capsys.readouterr().err)
    assert "0:00:00 0:00:00" not in shown


def test_an_error_before_any_work_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), bar("training"):
        raise ZeroDivisionError
    assert capsys.readouterr().err.strip() == ""
