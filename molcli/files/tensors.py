"""Checkpoint folders of safetensors files: lazy reading, and writing shard by shard."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from molcli.errors import MolError
from molcli.files.finite import is_finite
from molcli.files.json_files import read_object, shortened, write_object
from molcli.files.tensor_header import TensorInfo, damaged_file, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096  # of each tensor, for the fingerprint


class TensorReader:
    """Lazy reader of a folder with `model.safetensors`, or with shards and their index.

    Opening reads the headers only.

    Attributes:
        shards: Files, sorted.
        tensors: Name -> header.

    Raises:
        MolError: If there are no safetensors, a shard is missing or truncated, or the index and the
            shards disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = self._read_index()
        self.shards = sorted({folder / shard for shard in index.values()} or {folder / SINGLE})
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            self._add_shard(shard, index)
        for name, file in index.items():
            if name not in self.tensors:
                raise MolError(
                    f"{INDEX} places {name} in {file}, which does not hold it",
                    allowed="an index that matches its shards",
                    hint=f"download {folder} again",
                )

    def _add_shard(self, shard: Path, index: Mapping[str, str]) -> None:
        if not shard.is_file():
            raise MolError(
                f"{shard} is missing, though {INDEX} names it",
                allowed="all shards of the index",
                hint=f"download {shard.name} again",
            )
        for name, info in read_header(shard).items():
            if index.get(name, shard.name) != shard.name:
                continue  # left behind when the tensor was moved: the index decides
            if name in self.tensors:
                other = self.tensors[name].shard.name
                raise MolError(
                    f"{name} is in {other} and in {shard.name}, and {INDEX} does not name it",
                    allowed="an index that says where each tensor is",
                    hint=f"download {self.folder} again",
                )
            self.tensors[name] = info

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, or some of its rows, in its stored dtype, to the CPU."""
        path, tensor = self.tensors[name].shard, torch.empty(0)
        try:
            with safe_open(path, framework="pt") as shard:
                tensor = shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
        except SafetensorError as error:  # the file was changed since, or the disk fails
            raise damaged_file(path, f"cannot be read ({error})") from error
        return tensor

    def read_all(self) -> dict[str, torch.Tensor]:
        """Return all tensors; they are read from the files when they are used."""
        return {name: self.read(name) for name in self.tensors}

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
        content = read_object(
            path,
            {"weight_map": dict},
            allowed="JSON with a weight_map from tensor names to shards",
            hint=f"download {path} again",
        )
        weight_map: dict[str, str] = content["weight_map"]
        if not weight_map:
            raise MolError(f"{path} names no tensors", hint=f"download {path} again")
        for name, shard in weight_map.items():
            if not is_file_name(shard):
                raise MolError(
                    f"{path} places {shortened(name)} in {shortened(shard)}",
                    allowed="shards in the same folder, by their names alone",
                    hint=f"download {path} again, and trust no folder with such an index",
                )
        return weight_map


def is_file_name(name: object) -> bool:
    """Whether a name in a file of others names a file of the same folder, and no other place."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of a new file.

    safetensors' own function makes files that are private, and its errors are no OSErrors.

    Args:
        tensors: Contiguous, on any device.
        path: The file; one that exists is replaced.
        metadata: Text to store beside the tensors.

    Raises:
        OSError: The file cannot be written; what was written of it is removed.
    """
    try:
        with path.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
        path.chmod(mode & 0o777)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


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
        """Add a tensor in its dtype; it must not be modified before `close`.

        Raises:
            MolError: If an entry is NaN or infinite.
        """
        if tensor.is_floating_point() and not is_finite(tensor):
            raise MolError(
                f"{name} would be written with entries that are NaN or infinite",
                allowed="finite weights",
                hint="--set train.precision=fp32, or other settings",
            )
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
        total = {"total_size": self.total_bytes}
        by_name = dict(sorted(weight_map.items()))
        write_object(self.folder / INDEX, {"metadata": total, "weight_map": by_name})

    def _part(self, number: int) -> Path:
        """A shard's name until the number of shards is known."""
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending and self._shards:
            return  # without any tensor, one empty file is written
        self._shards.append(list(self._pending))
        save_tensors(self._pending, self._part(len(self._shards)), {"format": "pt"})
        self._pending, self._pending_bytes = {}, 0
