"""Folders of checkpoints on disk: which are ours, and whether their files are as they were written.

OUT/checkpoints/step-N holds the tensors (see `checkpoints`), progress.json with the counters and
the identity of the run, and sums.json with the sha256 of every other file.
"""

import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from molcli.errors import MolError
from molcli.files.checksums import file_sha256
from molcli.files.hidden_folders import remove_leftover
from molcli.files.json_files import read_object, shortened, write_object
from molcli.stages.train.state import TrainState

TENSORS, GENERATORS, PROGRESS, SUMS = "state.pt", "generators.pt", "progress.json", "sums.json"
PARTS = re.compile(r"__\d+_\d+\.distcp")  # of torch.distributed.checkpoint; its index:
PARTS_INDEX = ".metadata"
_NAME = re.compile(r"step-(\d{8,18})")
_UNFINISHED = re.compile(r"\.step-\d{8,18}\.partial")  # of `output_folder`
_NUM_KEPT = 2
_FORMAT = 2  # 1, of earlier versions, had no number and no sums
_MAX_COUNT = 2**62
_HASHED_AT_ONCE = 8  # files


@dataclass(frozen=True)
class Checkpoint:
    """A saved state, its tensors not read yet.

    Attributes:
        folder: of this checkpoint.
        counters: the numbers of its TrainState.
        identity: of the run that wrote it.
    """

    folder: Path
    counters: dict[str, Any]
    identity: dict[str, Any]


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint in `folder`."""
    return folder / f"step-{step:08d}"


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `folder`, None if there is none. Its tensors are not read.

    Raises:
        MolError: if it is damaged. The one before it is not taken in silence: steps would be lost.
    """
    found = _step_folders(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        content = _read_progress(newest)
        if (newest / SUMS).exists() or content.get("format") is not None:
            _check_sums(newest, only=(PROGRESS,))
    except MolError as error:
        raise damaged(newest, error.found) from error
    return Checkpoint(newest, _counters(newest, content["state"]), content["identity"])


def describe_newest(folder: Path) -> str:
    """Name the newest checkpoint in words.

    Every checkpoint is good to resume from: none is written with values that are not finite.
    """
    found = _step_folders(folder)
    return str(found[-1]) if found else "the beginning: no checkpoint was written yet"


def write_progress(folder: Path, counters: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write progress.json. A loss that is not known yet is null."""
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in counters.items()
    }
    write_object(folder / PROGRESS, {"format": _FORMAT, "state": known, "identity": identity})


def write_sums(folder: Path) -> None:
    """Write sums.json. All other files are complete."""
    names = sorted(file.name for file in folder.iterdir() if file.name != SUMS)
    write_object(folder / SUMS, {"sha256": dict(zip(names, _sums(folder, names), strict=True))})


def check_sums(checkpoint: Checkpoint) -> None:
    """Check that every file is as it was written. Checkpoints of earlier versions have no sums.

    Raises:
        MolError: if one is not.
    """
    try:
        if (checkpoint.folder / SUMS).exists():
            _check_sums(checkpoint.folder)
    except MolError as error:
        raise damaged(checkpoint.folder, error.found) from error


def remove_old(folder: Path) -> None:
    """Remove all checkpoints but the newest two. Folders with content that is not ours stay."""
    ours = [path for path in _step_folders(folder) if _is_ours(path)]
    for old in ours[:-_NUM_KEPT]:
        shutil.rmtree(old)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left while it wrote a checkpoint. No run writes in `folder` now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            if path.is_dir() and _is_ours(path):  # of an earlier version, which left no mark
                shutil.rmtree(path)
            remove_leftover(path)


def damaged(folder: Path, found: object) -> MolError:
    """Return the error for a checkpoint that cannot be used, with the way to continue."""
    others = [path for path in _step_folders(folder.parent) if path != folder]
    before = f"continues from {others[-1]}" if others else "begins again: there is no other one"
    return MolError(
        f"the checkpoint {folder} cannot be read: {found}",
        allowed="a complete checkpoint, as it was written",
        hint=f"move or remove {folder}; --resume then {before}",
    )


def _step_folders(folder: Path) -> list[Path]:
    """Folders with a checkpoint's exact name, whatever they hold, in the order of their steps."""
    return [path for _, path in sorted(_numbered(folder))]


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and path == step_folder(folder, int(match[1])):
            yield int(match[1]), path


def _is_ours(path: Path) -> bool:
    """Whether a folder holds files of a checkpoint and nothing else; some of them may be gone."""
    known = (TENSORS, GENERATORS, PROGRESS, SUMS, PARTS_INDEX, f"{PARTS_INDEX}.tmp")
    return not path.is_symlink() and all(
        (entry.name in known or PARTS.fullmatch(entry.name)) and not entry.is_dir()
        for entry in path.iterdir()
    )


def _read_progress(folder: Path) -> dict[str, Any]:
    content = read_object(folder / PROGRESS, {"state": dict, "identity": dict}, allowed="", hint="")
    if content.get("format") not in (None, _FORMAT):
        raise MolError(f"{folder / PROGRESS} has format {shortened(content['format'])}")
    return content


def _counters(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The checked counters. Raises MolError if one is missing or impossible."""
    kinds = {f.name: f.type for f in fields(TrainState) if f.type in (int, float)}
    if found.keys() != kinds.keys():
        names = ", ".join(sorted(found.keys() ^ kinds.keys()))
        raise damaged(folder, f"{PROGRESS} lacks, or has too much: {shortened(names)}")
    counters = dict(found)
    if counters["loss"] is None:
        counters["loss"] = math.nan
    for name, kind in kinds.items():
        value = counters[name]
        fits = isinstance(value, int | kind) and not isinstance(value, bool)
        if name != "loss":
            fits = fits and 0 <= value < _MAX_COUNT
        if not fits or math.isinf(value):
            raise damaged(folder, f"{PROGRESS} has {name}: {shortened(value)}")
    return counters


def _check_sums(folder: Path, only: tuple[str, ...] = ()) -> None:
    """only: these files, all if empty. Raises MolError."""
    expected = read_object(folder / SUMS, {"sha256": dict}, allowed="", hint="")["sha256"]
    there = {file.name for file in folder.iterdir() if file.is_file()} - {SUMS}
    if missing := sorted(expected.keys() - there):
        raise MolError(f"{shortened(missing[0])} is missing")
    unknown = sorted(name for name in there - expected.keys() if _is_state(name))
    if unknown:
        raise MolError(f"{unknown[0]} was not written with the rest")
    names = list(only or expected)
    for name, found in zip(names, _sums(folder, names), strict=True):
        if expected.get(name) != found:
            raise MolError(f"{name} is not as it was written: its sha256 differs")


def _is_state(name: str) -> bool:
    return name in (TENSORS, GENERATORS, PROGRESS, PARTS_INDEX) or bool(PARTS.fullmatch(name))


def _sums(folder: Path, names: list[str]) -> list[str]:
    # Hashing releases the interpreter's lock; the file of each rank is a large one.
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return list(pool.map(file_sha256, (folder / name for name in names)))
