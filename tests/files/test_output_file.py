"""An output file appears complete or not at all, and no file of the user's is lost."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from molcli.errors import MolError
from molcli.files.output_file import output_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path) -> None:
    with output_file(path) as file:
        file.write("{}")


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    with output_file(out) as file:
        file.write("{é}\n")
        assert not out.exists()
    assert out.read_text(encoding="utf-8") == "{é}\n"
    assert names(out.parent) == ["a.jsonl"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [MolError("x"), KeyboardInterrupt(), OSError("disk")])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with output_file(tmp_path / "a") as file:
            file.write("{")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert not names(tmp_path)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with output_file(tmp_path / "a") as file:
        file.write("{1")
        with pytest.raises(MolError, match=r"another run is writing .*a"):
            write(tmp_path / "a")
        with output_file(tmp_path / "b") as other:
            other.write("{2")
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["{1", "{2"]


def _killed(out: Path) -> None:
    with output_file(out) as file:
        file.write("{" * 100_000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_what_the_next_one_replaces(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert names(tmp_path) == [".a.partial"]
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "{}"


def test_what_is_not_ours_is_neither_written_nor_removed(tmp_path: Path) -> None:
    theirs, hidden = tmp_path / "theirs", tmp_path / ".a.partial"
    theirs.write_text('{"x": precious')
    for make in (
        lambda: hidden.symlink_to(theirs),
        lambda: hidden.symlink_to(tmp_path / "nowhere"),
        lambda: hidden.hardlink_to(theirs),
        lambda: hidden.write_text("theirs"),
        lambda: os.mkfifo(hidden),
    ):
        make()
        with pytest.raises(MolError, match="molcli did not make it"):
            write(tmp_path / "a")
        assert names(tmp_path) == [".a.partial", "theirs"]
        hidden.unlink()
    hidden.mkdir()
    (hidden / "theirs").write_text("theirs")
    with pytest.raises(MolError, match="molcli did not make it"):
        write(tmp_path / "a")
    assert theirs.read_text() == '{"x": precious' and names(hidden) == ["theirs"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "a"

    def interfere() -> None:
        with output_file(out) as file:
            file.write("{")
            out.write_text("theirs")

    for _ in range(2):
        with pytest.raises(MolError, match="exists"):
            interfere()
        assert names(tmp_path) == ["a"] and out.read_text() == "theirs"
    out.unlink()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(MolError, match="exists"):
        write(out)


def test_a_disk_that_is_full_is_reported_with_the_file(tmp_path: Path) -> None:
    """The limit of a file's size fails as a full disk does: when what was written is flushed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.jsonl") as caught:
            _write_much(tmp_path / "a.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "a.jsonl")
    assert not names(tmp_path)


def _write_much(path: Path) -> None:
    with output_file(path) as file:
        file.write("{" * 100_000)
