"""Checkpoint folders of safetensors files: lazy reading, and writing shard by shard."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from molcli.errors import MolError
from molcli.files.json_files import read_object, shortened, write_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096  # of each tensor, for the fingerprint
_MAX_HEADER_BYTES = 100_000_000  # of a shard, as in safetensors
_ERRNO = re.compile(r"\(os error (\d+)\)")  # in the message of a SafetensorError


class TensorReader:
    """Lazy reader of a folder with `model.safetensors`, or with shards and their index.

    Opening reads the headers only. A tensor that is in several shards is read from the one that the
    index names.

    Attributes:
        shards: Files, sorted.
        tensors: Name -> header.

    Raises:
        MolError: If there are no safetensors, a shard is missing, truncated or outside of the
            folder, or the index and the shards disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = self._read_index()
        self.shards = sorted({folder / shard for shard in index.values()} or {folder / SINGLE})
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in _read_header(shard).items():
                named = index.get(name)
                if named is None and name in self.tensors:
                    raise self._disagree(f"{name} is in several shards, and not in {INDEX}")
                if named is None or shard.name == named:
                    self.tensors[name] = info
        for name, file in index.items():
            if name not in self.tensors:
                raise self._disagree(f"{INDEX} places {name} in {file}, which does not hold it")

    def _disagree(self, problem: str) -> MolError:
        return MolError(
            problem,
            allowed="an index that matches its shards",
            hint=f"download {self.folder} again",
        )

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, or some of its rows, in its stored dtype, to the CPU.

        Raises:
            MolError: If the file cannot be read.
        """
        path = self.tensors[name].shard
        try:
            with safe_open(path, framework="pt") as shard:
                tensor: torch.Tensor
                tensor = shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
                return tensor
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"cannot be read ({error})") from error

    def fingerprint(self) -> str:
        """Return the sha256 of every tensor's name, dtype, shape and first 4096 bytes.

        Shapes alone would not distinguish a model from its fine-tune, and reading all data would
        take minutes for a large model. The distribution over shards does not matter.
        """
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} ".encode())
            with info.shard.open("rb") as file:
                file.seek(info.start)
                digest.update(file.read(min(info.num_bytes, _SAMPLE_BYTES)))
        return digest.hexdigest()

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> shard's file name; empty if the single file exists.

        The single file has precedence over an index, as in transformers.
        """
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return {}
        if not path.is_file():
            pickles = sorted(file.name for file in self.folder.glob("*.bin"))
            found = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
            raise MolError(
                f"{self.folder} holds {found}",
                allowed=f"{SINGLE}, or shards with {INDEX}",
                hint="AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) "
                "writes safetensors",
            )
        index = read_object(
            path,
            {"weight_map": dict},
            allowed="JSON with a weight_map from tensor names to shards",
            hint=f"download {path} again",
        )
        if not index["weight_map"]:
            raise MolError(
                f"{path} cannot be read (weight_map is empty)",
                allowed="a weight_map from tensor names to shards",
                hint=f"download {path} again",
            )
        for name, file in index["weight_map"].items():
            # A file of this folder, which may be a link, as in the cache of the Hub.
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
                raise MolError(
                    f"{path} places {shortened(name)} in {shortened(file)}",
                    allowed="the name of a file beside the index",
                    hint=f"download {path} again",
                )
        return dict(index["weight_map"])


class ShardedWriter:
    """Writer of tensors to a folder, which holds at most one shard in memory.

    Args:
        folder: Existing folder.
        max_shard_bytes: A shard is written before it would exceed this size. A larger tensor is
            written immediately, as a shard of its own. The default is about one layer of an 8B
            model in bfloat16.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 512 * 2**20) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor in its dtype; it must not be modified before `close`."""
        assert all(name not in names for names in (self._pending, *self._shards)), name
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        alone = tensor.nbytes > self.max_shard_bytes
        if tensor.untyped_storage().nbytes() > tensor.nbytes and not alone:
            tensor = tensor.clone()  # a view would keep its whole base tensor in memory
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        if alone:
            self._flush()

    def close(self) -> None:
        """Write the last shard, rename the shards to their final names, and write the index."""
        self._flush()
        count = len(self._shards)
        if count <= 1:
            self._part(1).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_object(self.folder / INDEX, index)

    def _part(self, number: int) -> Path:
        """A shard's name until the number of shards is known."""
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending and self._shards:
            return  # without any tensor, one empty file is written
        self._shards.append(list(self._pending))
        part = self._part(len(self._shards))
        save_tensors(self._pending, part, {"format": "pt"})
        self._pending, self._pending_bytes = {}, 0


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor in a shard.

    dtype: Name in safetensors, such as "BF16".
    start: Position of the data in the shard, in bytes.
    """

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    num_bytes: int


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with the permissions of any new file.

    Args:
        tensors: Name -> contiguous tensor on the CPU.
        path: Of the file.
        metadata: Of its header.

    Raises:
        OSError: If the disk is full, or the folder cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise writing_error(error, path) from error
    path.chmod(mode)  # safetensors makes a new file, private to the user


def writing_error(error: SafetensorError, path: Path) -> Exception:
    """Return the OSError that safetensors reports as its own; the same error if it is none."""
    number = _ERRNO.search(str(error))
    if number is None:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _read_header(shard: Path) -> dict[str, TensorInfo]:
    """Read a shard's header and check it against the file's size."""
    if not shard.is_file():
        raise MolError(
            f"{shard} is missing, though {INDEX} names it",
            allowed="all shards of the index",
            hint=f"download {shard.name} again",
        )
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        whole = 8 + length <= size and length <= _MAX_HEADER_BYTES
        raw = file.read(length) if whole else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _info(shard, entry, 8 + length) for name, entry in header.items()}
        expected = 8 + length + sum(info.num_bytes for info in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(shard, f"is not a whole safetensors file ({size} bytes)") from error
    if size != expected:
        raise _damaged(shard, f"has {size} bytes, but its header describes {expected}")
    try:
        with safe_open(shard, framework="pt"):  # checks dtypes, shapes and places
            return tensors
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, f"has a header that cannot be read ({error})") from error


def _info(shard: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    return TensorInfo(shard, shape, str(entry["dtype"]), data_start + begin, end - begin)


def _damaged(shard: Path, problem: str) -> MolError:
    return MolError(
        f"{shard} {problem}",
        allowed="a complete safetensors file",
        hint=f"download {shard.name} again (with git: git lfs pull)",
    )
