"""log.jsonl on disk: read and checked when a run is resumed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molcli.errors import MolError

LOG, PAGE = "log.jsonl", "train.html"
_MAX_LINE = 2**20  # bytes; a line has some numbers for each layer


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, in order; none if there is no file.

    A last line that a kill has cut is left out.

    Raises:
        MolError: if a line is not one that `TrainLog` writes.
    """
    if not path.is_file():
        return []
    *whole, cut = path.read_bytes().split(b"\n")
    lines = [_line(text) for text in whole]
    if cut:  # written without its end, or edited by hand
        lines.append(_line(cut))
    if lines and lines[-1] is None:
        lines.pop()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line is None or not _same_layers(line, found):
            raise MolError(
                f"line {number} of {path} is not a line that training writes",
                allowed="the log as the run left it, or none",
                hint=f"correct or remove the line, or move {path} elsewhere: the run then "
                "continues with a new log",
            )
        found.append(line)
    return found


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which a resumed run logs again.

    Raises:
        MolError: as `read_log`.
    """
    if path.is_file():
        kept = [json.dumps(line) for line in read_log(path) if line["step"] <= step]
        new = path.with_name(f".{path.name}.new")  # a kill while writing loses no line
        new.unlink(missing_ok=True)
        with new.open("x", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
        new.replace(path)


def _line(text: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is not one of ours."""
    try:
        if len(text) > _MAX_LINE:
            return None
        # Earlier versions wrote NaN where a figure is not known.
        line = json.loads(text.decode("utf-8"), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    fits = all(name in line and check(line[name]) for name, check in _FIELDS.items())
    return line if fits else None


def _same_layers(line: dict[str, Any], before: list[dict[str, Any]]) -> bool:
    """Whether `routing` is of the same layers as in the last line that has it."""
    routing = line["routing"]
    last = next((found["routing"] for found in reversed(before) if found["routing"]), routing)
    return not routing or routing.keys() == last.keys()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**62
    return type(value) is float and math.isfinite(value)


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_routing(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
        for ends in value.values()
    )


def _is_passes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_or_null(_is_number), value.values()))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "tokens": _is_count,
    "seconds": _is_number,
    "stage": _is_text,
    "loss": _or_null(_is_number),
    "ce": _or_null(_is_number),
    "kl": _or_null(_is_number),
    "balance": _or_null(_is_number),
    "learning_rate": _or_null(_is_number),
    "gradient_norm": _or_null(_is_number),
    "tokens_per_second": _or_null(_is_number),
    "mfu": _or_null(_is_number),
    "routing": _or_null(_is_routing),
    "skipped": _is_count,
    "not_finite": _or_null(_is_text),
    "passes": _is_passes,
}
