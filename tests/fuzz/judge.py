"""What a run must not do, whatever its input."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from tests.forked import Outcome
from tests.fuzz.mutations.mutation import Effect
from tests.kills.commands import VOLATILE
from tests.kills.judge import FOLDER, Tree, file_sum

OUT = ("out", "out.json", "out.jsonl")  # what commands write, in work/
FAULTS = (*("bug", "hang", "memory", "outside", "unpickled", "non-finite", "left over", "wrong"),)
# The sums of progress.json, which holds seconds.
_MEASURED = VOLATILE | {"progress.json"}


def read_tree(folder: Path) -> Tree:
    """Paths below the folder -> sha256 without what is measured, or the target of a link."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"  # noqa: PTH115
        elif path.is_dir():
            found[name] = FOLDER
        else:
            found[name] = _sum(path, name)
    return found


def _sum(path: Path, name: str) -> str:
    if _is_output(name):
        with suppress(RecursionError):  # of a changed input that lies in the output
            return file_sum(path, _MEASURED)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outputs(tree: Tree) -> Tree:
    """What a run wrote."""
    return {path: content for path, content in tree.items() if _is_output(path)}


def _is_output(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return parts[0] == "work" and len(parts) > 1 and parts[1] in OUT


def judge(
    outcome: Outcome,
    before: Tree,
    after: Tree,
    seen: Sequence[tuple[str, str]],
    effect: Effect,
    reference: Tree | None,
    broken: Sequence[str],
    ignored: Sequence[str] = (),
) -> list[str]:
    """Faults of a run, in words that begin with one of `FAULTS`.

    Args:
        outcome: of the run.
        before: its folder before.
        after: the same after it.
        seen: what `Watch` noted.
        effect: what may come of the mutation.
        reference: what the run of the unchanged input wrote, where it is needed.
        broken: files of the output that hold numbers that are not finite.
        ignored: patterns of files of the output that the change may lie in.
    """
    faults = _endings(outcome)
    faults += [f"{kind} {what}" for kind, what in dict.fromkeys(seen)]
    changed = {path for path in {**before, **after} if before.get(path) != after.get(path)}
    for path in sorted(changed):
        if not (_is_output(path) or path.startswith("cache/")):
            faults.append(f"outside {path}")
    faults += [f"non-finite {path}" for path in broken]
    written = outputs(after)
    if outcome.code == 0:
        names = [
            path
            for path in sorted({**written, **(reference or {})})
            if reference is not None
            and written.get(path) != reference.get(path)
            and not any(PurePosixPath(path).match(pattern) for pattern in ignored)
        ]
        if effect is not Effect.ANY and names:
            faults.append(f"wrong {', '.join(names[:4])} not as without the change")
    elif outcome.code == 2:
        if effect is Effect.HARMLESS:
            faults.append(f"wrong refusal: {last_lines(outcome)}")
        # A run of training that was under way keeps its log and checkpoints.
        if written != outputs(before) and "work/out/log.jsonl" not in written:
            names = [path for path in written if written[path] != before.get(path)]
            faults.append(f"left over {', '.join(names[:4])}")
    return faults


def _endings(outcome: Outcome) -> list[str]:
    if outcome.over:
        return [f"{'hang' if outcome.over == 'seconds' else 'memory'} {outcome.cpu:.0f} s, "
                f"{outcome.peak / 2**20:.0f} MB"]  # fmt: skip
    if outcome.code in (0, 2):
        return []
    if outcome.code == 1 and "out of memory" in outcome.stderr:
        return [f"memory {last_lines(outcome)}"]
    return [f"bug, exit {outcome.code}: {last_lines(outcome)}"]


def last_lines(outcome: Outcome) -> str:
    """The end of what a run printed, in a line."""
    lines = (outcome.stderr or outcome.stdout).strip().splitlines()
    return " | ".join(line.strip()[:200] for line in lines[-6:])


def not_finite(folder: Path, before: Tree, after: Tree) -> list[str]:
    """What was written, of JSON and safetensors, and holds a NaN or an infinity, or is damaged."""
    return [
        path
        for path, content in outputs(after).items()
        if content != before.get(path)
        and (folder / path).is_file()
        and not (folder / path).is_symlink()
        and not _is_finite(folder / path)
    ]


def _is_finite(path: Path) -> bool:
    if path.suffix in (".json", ".jsonl"):
        try:
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        return all(
            bool(tensor.isfinite().all())
            for tensor in tensors.values()
            if tensor.is_floating_point()
        )
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
