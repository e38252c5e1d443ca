"""A shard of a token folder: its tokens, mapped into memory, and the sizes of its documents.

`tokens-N.npy` holds concatenated documents, uint16 if all ids fit, else int32. `documents-N.npy`
holds their sizes, int64.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from molcli.data.checked import check_once
from molcli.errors import MolError
from molcli.files.regular import check_regular
from molcli.files.writable import naming

_PIECE = 2**23  # tokens that are checked at a time


class TokenShard:
    """Tokens on disk, which are checked when the first of them are read.

    Args:
        folder: Has the shard's files.
        number: From 0.
        entry: Of the index: `tokens`, `documents` and `sha256`.
        highest_id: No id is above it.

    Attributes:
        sizes: (documents,) int64, tokens of each document.

    Raises:
        ValueError, OSError: If the files are not what the entry says.
    """

    def __init__(self, folder: Path, number: int, entry: Any, highest_id: int) -> None:
        tokens, documents = _checked_entry(number, entry)
        self._sum, self._highest_id = entry["sha256"], highest_id
        self._files = [folder / file_name(name, number) for name in ("tokens", "documents")]
        self._tokens = _open_array(self._files[0], (np.uint16, np.int32))
        # Mapped, too: a header that claims more than the file holds costs no memory.
        self.sizes = np.array(_open_array(self._files[1], (np.int64,)))
        sizes = self.sizes
        # Each in its range, so that the sum below cannot overflow, nor a negative size fit.
        in_range = not len(sizes) or 1 <= int(sizes.min()) <= int(sizes.max()) <= tokens
        if (len(self._tokens), len(sizes)) != (tokens, documents) or not in_range:
            raise ValueError(f"shard {number} does not match the index")
        if int(sizes.sum()) != tokens:
            raise ValueError(f"the documents of shard {number} do not have its tokens")

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, part: slice) -> np.ndarray:
        """Return some of the tokens, mapped into memory.

        Raises:
            MolError: If the shard is not what was written.
        """
        check_once(self._files, f"{self._sum} {self._highest_id}", self._check)
        return self._tokens[part]

    def _check(self) -> None:
        digest = hashlib.sha256()
        for first in range(0, len(self), _PIECE):
            piece = self._tokens[first : first + _PIECE]
            digest.update(piece.data)
            if not 0 <= int(piece.min()) <= int(piece.max()) <= self._highest_id:
                raise self._refusal(f"has token ids outside 0 to {self._highest_id}")
        digest.update(self.sizes.data)
        if digest.hexdigest() != self._sum:
            raise self._refusal("does not have the sha256 that was written: it was changed")

    def _refusal(self, problem: str) -> MolError:
        names = f"{self._files[0].name} (or {self._files[1].name})"
        return MolError(
            f"data `{self._files[0].parent}` is damaged: {names} {problem}",
            allowed="a folder as `molcli data tokenize` wrote it",
            hint="copy the folder again, or write it again with `molcli data tokenize`",
        )


def write_token_shard(folder: Path, number: int, documents: list[np.ndarray]) -> dict[str, Any]:
    """Write one shard and return its entry in the index."""
    sizes = np.array([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate(documents)
    tokens = tokens.astype(np.uint16 if tokens.max() < 2**16 else np.int32)
    digest = hashlib.sha256()
    for name, array in (("tokens", tokens), ("documents", sizes)):
        _write_array(folder / file_name(name, number), array)
        digest.update(array.data)
    return {"tokens": len(tokens), "documents": len(sizes), "sha256": digest.hexdigest()}


def file_name(name: str, number: int) -> str:
    """Return the name of one of the two files of a shard."""
    return f"{name}-{number:05d}.npy"


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write what `np.save` does, whose error on a full disk does not say so."""
    with naming(path), path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def _checked_entry(number: int, entry: Any) -> tuple[int, int]:
    """Return the numbers of tokens and documents in a shard's entry."""
    if isinstance(entry, dict) and entry.keys() == {"tokens", "documents", "sha256"}:
        tokens, documents, digest = entry["tokens"], entry["documents"], entry["sha256"]
        is_sum = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        if is_sum and type(tokens) is int and type(documents) is int:
            return tokens, documents
    raise ValueError(f"the index does not describe shard {number}")


def _open_array(path: Path, kinds: tuple[type[np.generic], ...]) -> np.ndarray:
    """Map an array of one dimension into memory; never unpickle.

    mmap refuses a header that claims more than the file holds.
    """
    check_regular(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is Python text, whose parser raises many types
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if array.ndim != 1 or array.dtype not in [np.dtype(kind) for kind in kinds]:
        raise ValueError(f"{path.name} holds {array.dtype} in {array.ndim} dimensions")
    return array
