"""Record the finished stages of a demo, so that the same command continues an interrupted one."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from molcli import __version__
from molcli.config.sections import Recipe
from molcli.console import say
from molcli.errors import MolError
from molcli.files.json_files import read_object, shortened, write_object

STATE, FIGURES = "demo-state.json", "demo.json"
_FIELDS = ("identity", "results", "seconds")
# Everything that a demo writes; --restart removes nothing else.
_OUTPUTS = (
    *("drawn.jsonl", "heldout.jsonl", "text.jsonl", "upcycled", "trained", "routing.json"),
    FIGURES,
)


@dataclass
class DemoState:
    """The content of STATE, written again after each stage.

    Attributes:
        folder: of the demo.
        identity: what the figures depend on; see `demo_identity`.
        results: figures of finished stages by name; None for a stage that only writes files.
        seconds: duration of each stage, interrupted runs included, killed ones not.
    """

    folder: Path
    identity: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, sentence: str, stage: Callable[[], Any]) -> Any:
        """Run a stage, or return its result of an earlier run.

        Args:
            name: of the stage, in `results` and `seconds`.
            sentence: what the stage does, printed to stderr.
            stage: does the work, and continues from the files of an interrupted run.

        Returns:
            The result of the stage, JSON-serialisable.
        """
        if name in self.results:
            say(f"{sentence} (done before)", stderr=True, style="dim")
            return self.results[name]
        say(sentence, stderr=True, style="dim")
        start = monotonic()
        try:
            self.results[name] = stage()
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + monotonic() - start, 1)
            self.save()
        return self.results[name]

    def save(self) -> None:
        """Write STATE atomically."""
        content = {name: getattr(self, name) for name in _FIELDS}
        content = json.loads(json.dumps(content))  # as it is read back, for the sum
        write_object(self.folder / STATE, content | {"sum": _sum(content)})


def demo_identity(recipe: Recipe, parent: str) -> dict[str, Any]:
    """Return what the figures of a demo depend on. parent: the fingerprint of its weights."""
    settings = json.loads(json.dumps(asdict(recipe)))  # as it is read back: lists, no tuples
    return {"molcli": __version__, "parent": parent, "settings": settings}


def check_folder(out: Path, *, restart: bool) -> None:
    """Check that a demo may start, continue or restart in a folder. Reads only files in `out`.

    Raises:
        MolError: if the folder is not a demo's, or holds a finished demo and `restart` is not set.
    """
    from molcli.files.atomic import partial_of
    from molcli.files.folders import refuse_existing

    if not (out / STATE).is_file():
        if _names(out) != {partial_of(out / STATE).name}:  # that of a demo killed at its beginning
            refuse_existing(out)
    elif (out / FIGURES).is_file() and not restart:
        raise MolError(
            f"{out} holds a finished demo",
            allowed="--restart to begin again, or another folder",
            hint=shlex.join(["molcli", "demo", "--out", str(out), "--restart"]),
        )


def open_state(out: Path, identity: dict[str, Any], *, restart: bool) -> DemoState:
    """Open the state of the demo in a folder that `check_folder` accepted.

    Args:
        out: the folder.
        identity: of this demo.
        restart: remove what an earlier demo wrote; other files stay.

    Raises:
        MolError: if the folder holds an unfinished demo with another identity.
    """
    found = {} if restart else _read(out)
    if not found.get("identity"):
        _clear(out)
        found = {"identity": identity}
    state = DemoState(out, **found)
    if state.identity != identity:
        raise MolError(
            f"{out} holds an unfinished demo with other "
            + ", ".join(_differences(state.identity, identity)),
            allowed="the command that it was started with, or --restart to begin again",
            hint=shlex.join(["molcli", "demo", "--out", str(out), "--restart"]),
        )
    state.save()
    return state


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _clear(out: Path) -> None:
    """Remove what an earlier demo wrote. If killed, it leaves a state without an identity, which
    `open_state` clears."""
    DemoState(out, {}).save()
    for name in _OUTPUTS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _read(out: Path) -> dict[str, Any]:
    """Read identity, results and seconds; empty if no demo was started."""
    path = out / STATE
    if not path.is_file():
        return {}
    try:
        content = read_object(
            path, dict.fromkeys(_FIELDS, dict) | {"sum": str}, allowed="", hint=""
        )
    except MolError as error:
        raise damaged(path, error.found.removeprefix(f"{path} ")) from error
    found = {name: content[name] for name in _FIELDS}
    if content["sum"] != _sum(found):
        raise damaged(path, "its content has another sum than was written with it")
    return found


def read_tokens(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each line of a file of sampled documents, and its number of tokens.

    Raises:
        MolError: The file is not as the demo wrote it.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                ids = json.loads(line)["input_ids"]
                if not isinstance(ids, list):
                    raise TypeError("input_ids is no list")
                yield line, len(ids)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, problem: str) -> MolError:
    """Return the error for a file of the demo that is not as it was written."""
    return MolError(
        f"{path} is damaged ({shortened(problem, 200)})",
        allowed="the file as the demo wrote it, or --restart to begin again",
        hint=shlex.join(["molcli", "demo", "--out", str(path.parent), "--restart"]),
    )


def _sum(content: dict[str, Any]) -> str:
    """A sum over the values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names in which two identities differ: molcli, parent, or section.key."""
    found = [name for name in ("molcli", "parent") if before.get(name) != now[name]]
    old: dict[str, dict[str, Any]] = before.get("settings", {})
    for section, values in now["settings"].items():
        there = old.get(section, {})
        found += [f"{section}.{key}" for key, value in values.items() if there.get(key) != value]
    return found or ["settings"]
