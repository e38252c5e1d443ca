"""A file that is replaced is complete, or as it was."""

import os
from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.files.atomic import partial_of, write_atomically
from molcli.files.json_files import write_object
from molcli.files.writable import check_writable


def test_a_file_is_written_and_replaced_with_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("one", "two é"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_the_umask_sets_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_object(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100_000 + "\ud800")
    with pytest.raises(MolError, match=r"a\.b in a\.json"):
        write_object(path, {"a": {"b": float("nan")}})
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("there/b")
    write_atomically(tmp_path / "a", "x")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "there" / "b").read_text() == "x"


def test_what_a_killed_process_left_is_replaced_and_a_link_there_is_not_followed(
    tmp_path: Path,
) -> None:
    path, mine = tmp_path / "a", tmp_path / "mine"
    mine.write_text("mine")
    os.link(mine, partial_of(path))  # a second name of a file is not emptied
    write_atomically(path, "x")
    assert (path.read_text(), mine.read_text()) == ("x", "mine")
    partial_of(path).symlink_to(mine)
    with pytest.raises(OSError, match="symbolic"):
        write_atomically(path, "y")
    assert (path.read_text(), mine.read_text()) == ("x", "mine")


def test_a_pipe_is_written_directly() -> None:
    reading, writing = os.pipe()
    write_atomically(Path(f"/dev/fd/{writing}"), "x")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "x"


def test_a_path_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(MolError, match="file is a file"):
        check_writable(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(MolError, match="may not write"):
        check_writable(tmp_path / "new" / "out")
