"""Kill commands at chosen moments, look at what is left, and run them again."""

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked import Forked, Outcome
from tests.kills.commands import COMMANDS, PREPARED, SETS, Command
from tests.kills.judge import WORK, Judge, Tree, read_tree

_PLACES = (WORK, "home", "cache", "tmp")
# The user's own, beside every output.
_OWN = ("work/notes.txt", "work/out.bak/model.safetensors", "work/.hidden", "tmp/other", "home/x")
# In a growing output: the names look like ours.
_OWN_INSIDE = ("my notes.txt", "checkpoints/step-00000001-best/state.pt", "checkpoints/step-7/x")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Case:
    """A command, and when it is killed.

    Attributes:
        name: of the command.
        number: of the case among those of the command, which decides everything else.
        signal: that ends it.
        moment: see `Moments`; None for a kill from outside.
        fraction: of the command's usual duration, for a kill from outside.
        then: after another signal than SIGKILL, SIGKILL follows this many moments later.
        again: the moment of a second kill, in the run that follows.
    """

    name: str
    number: int
    signal: signal.Signals
    moment: int | None
    fraction: float
    then: int | None
    again: int | None


@dataclass
class Verdict:
    """What became of a case.

    Attributes:
        case: the case.
        moment: in words, where it was killed; "" if it ended before.
        out: "absent", "unfinished" or "complete" after the kill.
        faults: what is wrong, in words; the first word is its kind: half, lost, status, rerun,
            unequal or scratch.
    """

    case: Case
    moment: str = ""
    out: str = "absent"
    faults: list[str] = field(default_factory=list)


class Campaign:
    """The world of a campaign in a folder; a context manager that owns the warmed process.

    Args:
        folder: empty.
        forked: runs the commands.
        seed: of the cases.
        outside: the share of cases that are killed from outside, at a time.
    """

    def __init__(self, folder: Path, forked: Forked, seed: int, outside: float = 0.0) -> None:
        self.world, self.stage, self.notes = (folder / name for name in ("world", "stage", "notes"))
        self.forked, self.seed, self.outside = forked, seed, outside
        self._references: dict[str, Reference] = {}
        for path in (self.world, self.notes):
            path.mkdir()
        self._build()
        self.inputs = read_tree(self.world)

    def cases(self, name: str, count: int) -> list[Case]:
        """The first cases of a command: all its moments in a random order, then again."""
        total = self.reference(name).moments
        order = random.Random(f"{self.seed} {name}")
        moments: list[int] = []
        while len(moments) < count:
            moments += order.sample(range(total), total)
        return [self._case(name, number, moments[number], total) for number in range(count)]

    def _case(self, name: str, number: int, moment: int, total: int) -> Case:
        draw = random.Random(f"{self.seed} {name} {number}")
        ends = draw.choice(_SIGNALS) if draw.random() < 0.3 else signal.SIGKILL
        outside, fraction = draw.random() < self.outside, draw.random()
        again = draw.randrange(total) if draw.random() < 0.25 else None
        then = draw.randrange(1, 12) if ends != signal.SIGKILL and draw.random() < 0.3 else None
        return Case(name, number, ends, None if outside else moment, fraction, then, again)

    def reference(self, name: str) -> "Reference":
        """The unkilled run of a command, made when it is first needed."""
        if name not in self._references:
            self._prepare(COMMANDS[name])
            before = self._tree(COMMANDS[name])
            done = self._run(COMMANDS[name])
            if done.code:
                raise RuntimeError(f"{name} ended with {done.code}\n{done.stdout}{done.stderr}")
            judge = Judge(COMMANDS[name], before, self._tree(COMMANDS[name]))
            self._references[name] = Reference(judge, int(self._noted("count")), done.seconds)
        return self._references[name]

    def check_reference(self, name: str) -> list[str]:
        """Run it unkilled once more: what differs cannot be compared after a kill."""
        reference = self.reference(name)
        self._prepare(COMMANDS[name])
        self._run(COMMANDS[name])
        now = self._tree(COMMANDS[name])
        return reference.judge.unequal(now) + reference.judge.scratch(now)

    def run(self, case: Case) -> Verdict:
        """Kill, look, run again, look."""
        command, reference = COMMANDS[case.name], self.reference(case.name)
        judge, verdict = reference.judge, Verdict(case)
        self._prepare(command)
        if case.moment is None:
            after = (case.fraction * reference.seconds, int(case.signal))
            killed = self._run(command, signal_after=after)
            verdict.moment = f"after {after[0]:.3f} s" if killed.code else ""
        else:
            killed = self._run(command, at=case.moment, number=case.signal, then=case.then)
            verdict.moment = self._noted("moment")
        now = self._tree(command)
        done = judge.is_done(now)
        verdict.out = (
            "complete" if done else
            "unfinished" if f"{WORK}/{command.out}" in now and command.done else "absent"
        )  # fmt: skip
        self._look(verdict, now)
        statuses = {128 + case.signal, *([137] if case.then else ()), *([0] if done else ())}
        if killed.code not in statuses:
            verdict.faults.append(f"status {killed.code} after {case.signal.name}: {_end(killed)}")
        if killed.code != 128 + signal.SIGKILL:
            verdict.faults += [f"scratch {path}" for path in judge.scratch(now, stopped=True)]
        if case.again is not None:
            self._rerun(command, at=case.again, number=signal.SIGKILL)
            now = self._tree(command)
            self._look(verdict, now)
        done = judge.is_done(now)
        last = self._rerun(command)
        if last.code and not (done and last.code == 2):
            verdict.faults.append(f"rerun ended with {last.code}: {_end(last)}")
        now = self._tree(command)
        self._look(verdict, now)
        verdict.faults += [f"unequal {path}" for path in judge.unequal(now)][:3]
        verdict.faults += [f"scratch {path} after the next run" for path in judge.scratch(now)]
        if read_tree(self.world) != self.inputs:
            raise RuntimeError(f"{case}: the inputs changed")
        return verdict

    def run_in(self, name: str, setup: str, payload: object) -> tuple[Outcome, list[str]]:
        """Run a command unkilled in another setting, such as a full disk.

        Args:
            name: Of the command.
            setup: "module:function", called in the child before the command.
            payload: Its argument.

        Returns:
            How it ended, and the faults that it left. What it wrote is in `stage`.
        """
        command, judge = COMMANDS[name], self.reference(name).judge
        self._prepare(command)
        places = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
        done = self.forked.run(
            command.words(str(self.world)),
            self.stage / WORK,
            env={name: str(self.stage / place) for name, place in places.items()},
            setup=setup,
            payload=payload,
        )
        verdict, now = (
            Verdict(Case(name, 0, signal.SIGKILL, None, 0, None, None)),
            self._tree(command),
        )
        self._look(verdict, now)
        scratch = judge.scratch(now, stopped=True)
        return done, [*verdict.faults, *(f"scratch {path}" for path in scratch)]

    def written(self, name: str) -> list[Path]:
        """Return the files and folders that the last run of a command made."""
        before = self.reference(name).judge.before
        return [self.stage / path for path in self._tree(COMMANDS[name]) if path not in before]

    def rerun(self, name: str) -> list[str]:
        """Run a command again as it was run last, and return its faults."""
        command, judge = COMMANDS[name], self.reference(name).judge
        done = self._rerun(command)
        now = self._tree(command)
        faults = [f"unequal {path}" for path in judge.unequal(now)]
        faults += [f"scratch {path}" for path in judge.scratch(now)]
        return [*faults, *([f"status {done.code}: {_end(done)}"] if done.code else [])]

    def _look(self, verdict: Verdict, now: Tree) -> None:
        judge = self.reference(verdict.case.name).judge
        verdict.faults += [f"half {path}" for path in judge.half_written(now)]
        verdict.faults += [f"lost {path}" for path in judge.lost(now)]

    def _rerun(self, command: Command, **how: Any) -> Outcome:
        """The same command, or with or without --resume as its refusal says."""
        done = self._run(command, **how)
        if done.code == 2 and "--resume" in done.stderr:
            done = self._run(command, other_mode=True, **how)
        return done

    def _tree(self, command: Command) -> Tree:
        return read_tree(self.stage, command.measured)

    def _prepare(self, command: Command) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)
        for place in _PLACES:
            (self.stage / place).mkdir(parents=True)
        for name in _OWN:
            _write(self.stage / name)
        for name, source in command.before.items():
            copy = shutil.copytree if (self.world / source).is_dir() else shutil.copy
            copy(self.world / source, self.stage / WORK / name)
            if command.done and (self.world / source).is_dir():
                for own in _OWN_INSIDE:
                    _write(self.stage / WORK / name / own)

    def _run(
        self,
        command: Command,
        *,
        other_mode: bool = False,
        **how: Any,
    ) -> Outcome:
        words = command.words(str(self.world))
        if other_mode:
            words = [w for w in words if w != "--resume"] + ["--resume"] * ("--resume" not in words)
        return self._molcli(words, self.stage, WORK, **how)

    def _molcli(
        self,
        words: list[str],
        root: Path,
        cwd: str = "",
        at: int | None = None,
        number: int = signal.SIGKILL,
        then: int | None = None,
        **fields: Any,
    ) -> Outcome:
        for name in ("moment", "count"):
            (self.notes / name).unlink(missing_ok=True)
        places = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
        payload = dict(root=str(root), note=str(self.notes), at=at, number=number, then=then)
        return self.forked.run(
            words,
            root / cwd,
            env={name: str(self.stage / place) for name, place in places.items()},
            setup="tests.kills.moments:arm",
            payload=payload,
            **fields,
        )

    def _noted(self, name: str) -> str:
        """What the last run noted about itself: the moment of its end, or the count of moments."""
        path = self.notes / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _build(self) -> None:
        """Make the inputs: in a fork, and by commands."""
        self.stage.mkdir()
        (self.stage / "tmp").mkdir()
        built = self.forked.run(
            [], self.world, setup="tests.kills.world:build", payload=str(self.world)
        )
        if built.code:
            raise RuntimeError(built.stderr)
        for name, words in PREPARED.items():
            at, status = None, 0
            if name == "stopped":  # by SIGTERM, half-way
                self._prepared([*words[:2], "whole", *words[3:]])
                shutil.rmtree(self.world / "whole")
                at, status = int(self._noted("count")) // 2, 128 + signal.SIGTERM
            self._prepared(words, status, at=at, number=signal.SIGTERM)
        (self.world / "empty").mkdir()
        _write(self.world / "old.json")

    def _prepared(self, words: list[str], status: int = 0, **how: Any) -> None:
        done = self._molcli([*words, *SETS], self.world, **how)
        if done.code != status:
            raise RuntimeError(f"{words} ended with {done.code}\n{done.stderr}")


@dataclass(frozen=True)
class Reference:
    """An unkilled run. moments: how many it has. seconds: how long it took."""

    judge: Judge
    moments: int
    seconds: float


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the user's own\n", encoding="utf-8")


def _end(outcome: Outcome) -> str:
    return " | ".join((outcome.stderr or outcome.stdout).strip().splitlines()[-3:])
