"""Change an input at random, run a command on it, and judge what came of it."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.forked import Forked, Outcome
from tests.fuzz.judge import judge, last_lines, not_finite, outputs, read_tree
from tests.fuzz.kinds import KINDS, words
from tests.fuzz.mutations.mutation import Effect, NotApplicable
from tests.kills.judge import Tree

SECONDS, MEMORY = 20, 2 * 2**30
_PLACES = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}


@dataclass(frozen=True)
class Case:
    """A command on a changed input. The seed, the kind and the number decide everything else."""

    kind: str
    number: int
    seed: int


@dataclass
class Verdict:
    """What became of a case.

    Attributes:
        case: the case.
        command: as it was typed, without its settings.
        change: what was changed, in words.
        outcome: of the run.
        faults: what is wrong, in words; see `FAULTS`.
    """

    case: Case
    command: str
    change: str
    outcome: Outcome
    faults: list[str] = field(default_factory=list)


class Campaign:
    """Runs cases in a folder of its own.

    Args:
        folder: empty, or absent.
        world: what `make_world` made.
        forked: runs the commands.
    """

    def __init__(self, folder: Path, world: Path, forked: Forked) -> None:
        self.folder, self.world, self.forked = folder, world, forked
        self.stage, self.note = folder / "stage", folder / "note"
        folder.mkdir(exist_ok=True)
        self.inputs = _stamps(world)
        self._references: dict[tuple[str, str, int], Tree] = {}

    def run(self, case: Case) -> Verdict:
        """Change, run, look."""
        kind, draw = KINDS[case.kind], Random(f"{case.seed} {case.kind} {case.number}")
        source, number = draw.choice(kind.inputs), draw.randrange(len(kind.commands))
        changes, weights = list(kind.mutations), list(kind.mutations.values())
        change = reference = None
        while change is None:
            [mutation] = draw.choices(changes, weights)
            if mutation.effect is not Effect.ANY:
                reference = self.reference(case.kind, source, number)
            place = self._prepare(case.kind, source)
            with suppress(NotApplicable):
                change = f"{source}: {mutation.name}, {mutation.change(place, draw)}"
        before = read_tree(self.stage)
        self.note.unlink(missing_ok=True)
        outcome = self._run(case.kind, source, number)
        after = read_tree(self.stage)
        broken = not_finite(self.stage, before, after)
        lines = self.note.read_text(encoding="utf-8").splitlines()
        seen = [tuple(json.loads(line)) for line in lines]
        faults = judge(
            outcome, before, after, seen, mutation.effect, reference, broken, kind.ignored
        )
        if _stamps(self.world) != self.inputs:
            raise RuntimeError(f"{case}: {change}: the other inputs changed")
        command = " ".join(kind.commands[number])
        return Verdict(case, command, change, outcome, faults)

    def reference(self, name: str, source: str, number: int) -> Tree:
        """What a command writes when its input is not changed."""
        key = (name, source, number)
        if key not in self._references:
            self._prepare(name, source)
            done = self._run(name, source, number)
            if done.code:
                raise RuntimeError(f"{key} ended with {done.code}: {last_lines(done)}")
            self._references[key] = outputs(read_tree(self.stage))
        return self._references[key]

    def _prepare(self, name: str, source: str) -> Path:
        """Empty the stage, and copy the input there. Returns the copy."""
        shutil.rmtree(self.stage, ignore_errors=True)
        for folder in ("work", *_PLACES.values()):
            (self.stage / folder).mkdir(parents=True)
        place = self.stage / "work" / _name(name, source)
        copy = shutil.copytree if (self.world / source).is_dir() else shutil.copy
        copy(self.world / source, place)
        return place

    def _run(self, name: str, source: str, number: int) -> Outcome:
        return self.forked.run(
            words(KINDS[name].commands[number], str(self.world), _name(name, source)),
            self.stage / "work",
            env={variable: str(self.stage / place) for variable, place in _PLACES.items()},
            seconds=SECONDS,
            memory=MEMORY,
            setup="tests.fuzz.watch:install",
            payload={"root": str(self.stage), "note": str(self.note)},
        )


def _name(kind: str, source: str) -> str:
    """The name of the copy of an input."""
    return KINDS[kind].place or "input" + "".join(Path(source).suffixes)


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files: cheaper than their sums."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}
