from pathlib import Path

import pytest

from molcli.files.paths import expanded


def test_only_homes_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/a") == Path("/somewhere/a")
    assert expanded(Path("a/~")) == Path("a/~")
    assert expanded("~no-such-user-/a") == Path("~no-such-user-/a")
