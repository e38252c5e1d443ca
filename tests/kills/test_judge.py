"""The campaign sees what it is there to see."""

from pathlib import Path

import pytest

from tests.kills.commands import Command
from tests.kills.judge import FOLDER, Judge, read_tree

BEFORE = {"work/notes": "n", "work/old.json": "o", "tmp/other": "t"}
AFTER = BEFORE | {"work/out": FOLDER, "work/out/a": "1", "work/out/b": "2"}
ONCE = Judge(Command(["x"]), BEFORE, AFTER)
IN_PLACE = Judge(
    Command(["x"], out="old.json", whole=("old.json",), replaced=("old.json",)),
    BEFORE,
    BEFORE | {"work/old.json": "new"},
)
GROWS = Judge(
    Command(["x"], done="out/b", whole=("out/?",), removed=("out/step-?*",), kept=(".out.kept*",)),
    BEFORE,
    AFTER,
)


@pytest.mark.parametrize("gone, faults", [([], []), (["work/out/b"], ["work/out"])])
def test_an_output_is_absent_or_complete(gone: list[str], faults: list[str]) -> None:
    now = {path: content for path, content in AFTER.items() if path not in gone}
    assert ONCE.half_written(now) == faults
    assert ONCE.is_done(now) == (not faults)
    assert ONCE.unequal(now) == gone
    assert ONCE.half_written(BEFORE) == [] and not ONCE.is_done(BEFORE)


def test_files_in_the_cache_are_absent_or_complete() -> None:
    made = {"cache/molcli/p": FOLDER, "cache/molcli/p/a": "1", "cache/molcli/.p.lock": "2"}
    judge = Judge(Command(["x"]), BEFORE, AFTER | made)
    assert judge.half_written({**BEFORE, "cache/molcli/.p.lock": "3"}) == []
    assert judge.half_written({**BEFORE, "cache/molcli/p": FOLDER}) == ["cache/molcli/p"]


@pytest.mark.parametrize(
    "content, half, lost",
    [("o", False, False), ("new", False, False), ("ne", True, True), (None, False, True)],
)
def test_an_old_file_stays_or_the_new_one_is_whole(
    content: str | None, half: bool, lost: bool
) -> None:
    now = BEFORE | ({} if content is None else {"work/old.json": content})
    if content is None:
        del now["work/old.json"]
    assert bool(IN_PLACE.half_written(now)) == half
    assert bool(IN_PLACE.lost(now)) == lost


def test_what_was_there_is_lost_if_it_is_gone_or_changed() -> None:
    assert ONCE.lost(AFTER) == []
    assert ONCE.lost(AFTER | {"work/notes": "other"}) == ["work/notes"]
    assert ONCE.lost({"work/notes": "n", "work/old.json": "o"}) == ["tmp/other"]


def test_scratch_is_what_does_not_belong_there() -> None:
    left = AFTER | {"work/.out.partial": FOLDER, "work/.out.partial/a": "1", "tmp/x": "1"}
    assert ONCE.scratch(left) == ["work/.out.partial", "tmp/x"]
    assert ONCE.scratch(AFTER) == []
    unfinished = BEFORE | {"work/out": FOLDER, "work/out/step-1": FOLDER, "work/out/step-1/x": "1"}
    assert GROWS.scratch(unfinished) == []
    assert GROWS.scratch(unfinished | {"work/out/.a": "1"}) == ["work/out/.a"]
    stopped = BEFORE | {"work/.out.kept": FOLDER, "work/.out.kept/state": "1"}
    assert GROWS.scratch(stopped, stopped=True) == []
    assert GROWS.scratch(stopped) == ["work/.out.kept"]


def test_measured_fields_and_nothing_else_may_differ(tmp_path: Path) -> None:
    def sums(name: str, content: str, measured: frozenset[str] = frozenset()) -> dict[str, str]:
        (tmp_path / name).write_text(content)
        return read_tree(tmp_path, measured)

    line = '{"loss": %s, "seconds": %s, "deep": [{"seconds": %s}]}'
    for name in ("a.json", "a.jsonl"):
        assert sums(name, line % (1, 2, 3)) == sums(name, line % (1, 4, 5))
        assert sums(name, line % (1, 2, 3)) != sums(name, line % (1.5, 2, 3))
        assert sums(name, '{"loss": 1') != sums(name, '{"loss": 2')
        found = frozenset({"loss"})
        assert sums(name, line % (1, 2, 3), found) == sums(name, line % (2, 2, 3), found)
    assert sums("receipt.html", "<b>1.5 s</b>") == sums("receipt.html", "<b>12 s</b>")
    assert sums("receipt.html", "<b>1.5 s</b>") != sums("receipt.html", "<b>1.5")
    assert sums("train.html", "<b>1</b></html>") == sums("train.html", "<i></html>\n")
    assert sums("train.html", "<b>1</b></html>") != sums("train.html", "<b>1</b>")
    assert sums("x.safetensors", "1") != sums("x.safetensors", "2")
