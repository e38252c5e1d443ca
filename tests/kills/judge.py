"""What lies on the disk before, between and after the runs, and what should."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from tests.kills.commands import CURVES_VARY, NUMBERS_VARY, VOLATILE, Command

WORK = "work"
FOLDER = "folder"  # in place of a sum
Tree = dict[str, str]


def read_tree(folder: Path, measured: frozenset[str] = frozenset()) -> Tree:
    """Paths below the folder -> sha256 of what must not differ between two runs.

    measured: fields that may differ, besides `VOLATILE`.
    """
    return {
        path.relative_to(folder).as_posix(): (
            FOLDER if path.is_dir() else file_sum(path, VOLATILE | measured)
        )
        for path in sorted(folder.rglob("*"))
    }


def file_sum(path: Path, measured: frozenset[str]) -> str:
    """The sha256 of a file, without what is measured."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        with suppress(ValueError):  # half a file is compared as it is
            plain = [_without(json.loads(line), measured) for line in lines]
            content = json.dumps(plain, sort_keys=True).encode()
    elif path.name == NUMBERS_VARY:
        content = bytes(byte for byte in content if byte not in b"0123456789.")
    elif path.name == CURVES_VARY:
        content = content.rstrip()[-len(b"</html>") :]
    return hashlib.sha256(content).hexdigest()


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Judge:
    """Compares a folder's tree with those before the command, and after an unkilled run of it.

    Paths begin with `work/`, `cache/`, `home/` or `tmp/`. Patterns of commands are in `work/`.
    """

    command: Command
    before: Tree
    reference: Tree

    def half_written(self, now: Tree) -> list[str]:
        """What should appear at once, and is neither absent, nor as before, nor complete."""
        return [
            unit
            for unit in self._units()
            if self._part(now, unit)
            and self._part(now, unit)
            not in (self._part(self.before, unit), self._part(self.reference, unit))
        ]

    def is_done(self, now: Tree) -> bool:
        """If the output is complete."""
        name = f"{WORK}/{self.command.done or self.command.out}"
        return name in now and self._part(now, name) == self._part(self.reference, name)

    def lost(self, now: Tree) -> list[str]:
        """What was there before, and is gone or has another content."""
        return [
            path
            for path, content in self.before.items()
            if now.get(path) != content
            and not self._matches(path, self.command.removed)
            and not (
                self._matches(path, self.command.replaced)
                and (self.command.done or now.get(path) == self.reference[path])
            )
        ]

    def unequal(self, now: Tree) -> list[str]:
        """What the unkilled run wrote, and is not there or has another content."""
        return [
            path
            for path, content in self.reference.items()
            if now.get(path) != content
            and not (path not in now and self._matches(path, self.command.removed))
        ]

    def scratch(self, now: Tree, *, stopped: bool = False) -> list[str]:
        """What neither was there before nor belongs to the output; of a folder, only its name.

        stopped: the run was interrupted, and the next one may continue from what it left.
        """
        kept = (*self.command.removed, *(self.command.kept if stopped else ()))
        found = [
            path
            for path in now
            if path not in self.before
            and path not in self.reference
            and not self._matches(path, kept)
        ]
        return [path for path in found if str(PurePosixPath(path).parent) not in found]

    def _units(self) -> list[str]:
        """What appears at once: as the command says, and each visible entry of the cache."""
        patterns = [f"{WORK}/{pattern}" for pattern in self.command.whole] + ["cache/molcli/[!.]*"]
        return [
            path
            for path in {**self.before, **self.reference}
            if any(_match(path, pattern) for pattern in patterns)
        ]

    def _matches(self, path: str, patterns: tuple[str, ...]) -> bool:
        return any(_match(path, f"{WORK}/{pattern}") for pattern in patterns)

    @staticmethod
    def _part(tree: Tree, unit: str) -> Tree:
        return {
            path: content
            for path, content in tree.items()
            if path == unit or path.startswith(f"{unit}/")
        }


def _match(path: str, pattern: str) -> bool:
    """As fnmatch, where only a last `*` matches a slash."""
    names, parts = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    if len(names) > len(parts) and pattern.endswith("*"):
        names = (*names[: len(parts) - 1], "/".join(names[len(parts) - 1 :]))
    return len(names) == len(parts) and all(map(fnmatch, names, parts))
