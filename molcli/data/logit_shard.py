"""A shard of cached logits: rows of tokens with a parent's predictions, in a safetensors file.

It holds input_ids and document_ids, (rows, T) int32; lengths, (rows,) int64; ids, (rows, T, k)
int32; log_probs, (rows, T, k) float16; and rest, (rows, T) float32. The header has a sha256 of the
index, the shard's number and the tensors.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molcli.data.checked import SUM, check_once, sum_of
from molcli.errors import MolError
from molcli.files.atomic import write_atomically
from molcli.files.regular import check_regular

_DTYPES = {
    "input_ids": "I32",
    "document_ids": "I32",
    "lengths": "I64",
    "ids": "I32",
    "log_probs": "F16",
    "rest": "F32",
}
_PIECE = 2**22  # entries that are checked at a time
_ABOVE_ZERO = 1e-3  # what rounding may add to the logarithm of a probability
_SHARD = re.compile(r"logits-(\d{5,})\.safetensors", re.ASCII)
# Of `write_atomically`, and of earlier versions.
_PARTIAL = re.compile(r"\.logits(-\d{5,}\.safetensors|\.json)\.(molcli-)?partial")


class LogitShard:
    """A file of rows and predictions, which are checked when the first row is read.

    Args:
        folder: Has the file.
        number: From 0.
        index: Content of logits.json.
        has_sum: Whether the file must have a sum; those of earlier versions have none.

    Raises:
        ValueError, OSError, SafetensorError: If the file's header is not what the index says.
    """

    def __init__(self, folder: Path, number: int, index: dict[str, Any], *, has_sum: bool) -> None:
        self._path, self._index = folder / shard_name(number), index
        self._seal = _seal(index, number)
        self._file = _open(self._path)
        self._sum = (self._file.metadata() or {}).get(SUM)
        if has_sum and self._sum is None:
            raise ValueError(f"{self._path.name} has no {SUM}")
        shapes = _shapes(index, number)
        if set(self._file.keys()) != set(shapes):
            raise ValueError(f"{self._path.name} has tensors {', '.join(self._file.keys())[:200]}")
        for name, shape in shapes.items():
            part = self._file.get_slice(name)
            if tuple(part.get_shape()) != shape or part.get_dtype() != _DTYPES[name]:
                found = f"{part.get_shape()} {part.get_dtype()}"
                raise ValueError(f"{name} in {self._path.name} is {found}, not {shape}")

    def read(self, field: str, row: int) -> Tensor:
        """Return one row of a tensor, (1, ...).

        Raises:
            MolError: If the shard is not what was written.
        """
        try:
            self.check()
            part: Tensor = self._file.get_slice(field)[row : row + 1]
            return part
        except (OSError, SafetensorError) as error:
            raise self._refusal(f"cannot be read ({error})") from error

    def check(self) -> None:
        """Check all of the shard, unless this process did.

        Raises:
            MolError: If it is not what was written.
            OSError, SafetensorError: If it cannot be read.
        """
        check_once([self._path], f"{self._seal} {self._sum}", self._check)

    def _check(self) -> None:
        digest = hashlib.sha256(self._seal.encode())
        for name in _DTYPES:
            for _, part in self._pieces(name):
                digest.update(part.numpy().data)
        # First what changed, then what is wrong in a file that did not change.
        if self._sum is not None and digest.hexdigest() != self._sum:
            raise self._refusal("does not have the sha256 that was written: it was changed")
        for name in _DTYPES:
            for first, part in self._pieces(name):
                problem = _problem(name, part, self._index)
                if problem is not None:
                    raise self._refusal(f"has {problem[1]} in row {first + problem[0]}")

    def _pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        part = self._file.get_slice(name)
        rows, *others = part.get_shape()
        step = max(1, _PIECE // max(1, torch.Size(others).numel()))
        for first in range(0, rows, step):
            yield first, part[first : first + step].contiguous()

    def _refusal(self, problem: str) -> MolError:
        return MolError(
            f"{self._path.parent} is damaged: {self._path.name} {problem}",
            allowed="a cache as `molcli data cache-logits` wrote it",
            hint=f"remove {self._path}, and run molcli data cache-logits with the same arguments "
            "and --resume",
        )


def write_logit_shard(
    folder: Path, number: int, index: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a shard, completely or not at all.

    Args:
        folder: Of the cache.
        number: From 0.
        index: Content of logits.json.
        tensors: As in the module's docstring.

    Raises:
        MolError: If a prediction is NaN or infinite, or a value is out of its range.
    """
    digest = hashlib.sha256(_seal(index, number).encode())
    for name in _DTYPES:
        problem = _problem(name, tensors[name], index)
        if problem is not None:
            row = number * index["rows_per_shard"] + problem[0]
            raise MolError(
                f"the parent predicts {problem[1]} for row {row} of the data",
                allowed="finite predictions",
                hint="--set train.precision=fp32, if the parent's weights are finite",
            )
        digest.update(tensors[name].contiguous().numpy().data)
    # Not save_file: its errors are no OSErrors, and its files are private.
    write_atomically(folder / shard_name(number), save(tensors, {SUM: digest.hexdigest()}))


def is_partial(name: str) -> bool:
    """Whether a file is a shard or an index that was not finished."""
    return _PARTIAL.fullmatch(name) is not None


def shard_name(number: int) -> str:
    """Return the file's name of a shard."""
    return f"logits-{number:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Return the number of the shard that has this name; None for other names."""
    match = _SHARD.fullmatch(name)
    return None if match is None or shard_name(int(match[1])) != name else int(match[1])


def _open(path: Path) -> Any:  # not typed by safetensors
    check_regular(path)
    return safe_open(path, framework="pt")


def _shapes(index: dict[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    first, length = number * index["rows_per_shard"], index["context_length"]
    rows = min(index["rows_per_shard"], index["rows"] - first)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_DTYPES, (rows, length))
    top = (rows, length, index["top_k"])
    return shapes | {"lengths": (rows,), "ids": top, "log_probs": top}


def _seal(index: dict[str, Any], number: int) -> str:
    """Identify the place of a shard: its sum covers it, so that no two can be exchanged."""
    return f"{sum_of(index)} {number}"


def _problem(name: str, part: Tensor, index: dict[str, Any]) -> tuple[int, str] | None:
    """Return (row, what is wrong) for the first row that no parent could have given."""
    length, vocabulary = index["context_length"], index["vocab_size"]
    if name in ("log_probs", "rest"):
        # rest is -inf where k is the whole vocabulary. aminmax is fast, and keeps NaN.
        low, high = part.aminmax()
        finite = name == "rest" or bool(low > -torch.inf)
        if finite and bool(high <= _ABOVE_ZERO):
            return None
        wrong = ~(part <= _ABOVE_ZERO)  # NaN, too
        if name == "log_probs":
            wrong |= part == -torch.inf
        what = f"{name} of {part[wrong][0].item()}"
    elif name == "lengths":
        wrong = part != length
        what = "another length than the context's"
    elif name == "document_ids":
        steps = part.diff(dim=1, prepend=part.new_zeros(len(part), 1))
        wrong = (steps < 0) | (part[:, :1] != 0) | (part >= length)
        what = "documents that are not numbered from 0 on"
    else:
        wrong = (part < 0) | (part >= vocabulary)
        what = f"{name} outside the vocabulary of {vocabulary}"
    if not wrong.any():
        return None
    return int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0]), what
