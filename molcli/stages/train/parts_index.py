"""The files of torch.distributed.checkpoint, read without running code that they may hold.

Their index, .metadata, is a pickle, and torch reads it with `pickle.load`, which runs whatever the
file says. Here it becomes inert records; the few fields that are needed are checked against the
tensors that the run has, and torch's own objects are made of them.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from molcli.files.regular import check_regular
from molcli.stages.train.checkpoint_folder import PARTS, PARTS_INDEX

_METADATA = "torch.distributed.checkpoint.metadata"
# Names that such a file may hold. None of them is imported: each becomes a kind of record.
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, f"{name}Metadata") for name in ("TensorStorage", "ChunkStorage", "BytesStorage")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
    ("builtins", "getattr"),  # of an enum's member, in some versions of Python
}
_SMALLEST_LIMIT = 2**20  # bytes
_MAX_SIZE = 2**48  # of a dimension


class PartsReader(FileSystemReader):
    """Reader of a checkpoint folder, for `torch.distributed.checkpoint.load`.

    Args:
        folder: of the checkpoint.
        tensors: by name, into which it is read: the files must hold exactly these.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(folder)
        self._folder, self._tensors = folder, tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read .metadata.

        Raises:
            ValueError: if it is not the index of these tensors.
        """
        found = _metadata(_read_index(self._folder), self._tensors, self._folder)
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Read tensors, after a look at each entry's headers.

        Raises:
            ValueError: if an entry is not one that `torch.save` wrote.
        """
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            with (self._folder / info.relative_path).open("rb") as file:
                check_archive(io.BufferedReader(_Slice(file, info.offset, info.length)))
        return super().read_data(plan, planner)


def check_archive(file: Any) -> None:
    """Check that a file of `torch.save` is not compressed: a small one would become a large one.

    Args:
        file: a path, or an open file.

    Raises:
        ValueError: if it is compressed, or not such a file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"not a whole file of torch.save ({error})") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"compressed, which torch.save does not do ({entry.filename:.60})")


class _Slice(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = min(max(0, base + offset), self._length)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        content = self._file.read(min(len(buffer), self._length - self._place))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class _Record:
    """What a pickle says of an object: nothing of it is run."""

    kind = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> "_Record":
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The unpickler that is written in Python: a file cannot make the other one allocate what it names.
class _Unpickler(pickle._Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _KNOWN:
            raise ValueError(f"it names {module}.{name}, which no index holds")
        if name not in self._kinds:
            self._kinds[name] = type(name, (_Record,), {"kind": name})
        return self._kinds[name]


def _read_index(folder: Path) -> "_Record":
    path = folder / PARTS_INDEX
    check_regular(path)
    size = path.stat().st_size
    # An entry takes less space here than there, so a whole index is smaller than its files.
    parts = [e.stat().st_size for e in os.scandir(folder) if PARTS.fullmatch(e.name)]
    if size > max(_SMALLEST_LIMIT, sum(parts)):
        raise ValueError(f"{path.name} has {size} bytes, more than an index of its files can have")
    try:
        found = _Unpickler(path.read_bytes()).load()
    except Exception as error:  # a damaged pickle raises whatever the objects in it do
        raise ValueError(f"{path.name} is not an index: {error}") from error
    return _expect(found, "Metadata")


def _metadata(index: _Record, tensors: Mapping[str, Tensor], folder: Path) -> Metadata:
    described = _mapping(index, "state_dict_metadata")
    if described.keys() != tensors.keys():
        different = sorted(map(str, described.keys() ^ tensors.keys()))
        raise ValueError(f"it holds other tensors than the run: {different[0]:.100}")
    storage = {}
    for key, value in _mapping(index, "storage_data").items():
        name, offset, info = _storage(key, value, folder)
        storage[MetadataIndex(name, offset)] = info
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, tensor in tensors.items():
        found = _described(name, described[name], tensor)
        if any(MetadataIndex(name, chunk.offsets) not in storage for chunk in found.chunks):
            raise ValueError(f"a part of {name} is in no file")
        state[name] = found
    return Metadata(state, {name: (name,) for name in state}, storage)


def _described(name: str, record: Any, tensor: Tensor) -> TensorStorageMetadata:
    """The parts of one tensor, which must make up all of it."""
    fields = _fields(_expect(record, "TensorStorageMetadata"))
    properties = _expect(fields.get("properties"), "TensorProperties").state
    dtype = properties[0] if isinstance(properties, tuple) and properties else None
    size = _size(fields.get("size"))
    if dtype != tensor.dtype or size != tensor.shape:
        found = f"{dtype} {tuple(size)}, not {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}")
    chunks, elements = [], 0
    if not isinstance(fields.get("chunks"), list):
        raise ValueError(f"{name} has no parts")
    for part in fields["chunks"]:
        values = _fields(_expect(part, "ChunkStorageMetadata"))
        offsets, sizes = _size(values.get("offsets")), _size(values.get("sizes"))
        inside = len(offsets) == len(sizes) == len(size) and all(
            offset + length <= whole
            for offset, length, whole in zip(offsets, sizes, size, strict=True)
        )
        if not inside:
            raise ValueError(f"a part of {name} lies outside of it")
        if sizes.numel():  # a rank may have no part of a small tensor
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            elements += sizes.numel()
    if elements != size.numel() or len({tuple(chunk.offsets) for chunk in chunks}) != len(chunks):
        raise ValueError(f"the parts of {name} are not all of it")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _storage(key: Any, value: Any, folder: Path) -> tuple[str, torch.Size, _StorageInfo]:
    """Where one part of a tensor lies: in a file of the folder, not elsewhere."""
    index, info = _fields(_expect(key, "MetadataIndex")), _fields(_expect(value, "_StorageInfo"))
    path, start, length = (info.get(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(path, str) or not PARTS.fullmatch(path):
        raise ValueError(f"it names the file {path!s:.60}")
    if info.get("transform_descriptors"):
        raise ValueError("its tensors are transformed")
    if not isinstance(start, int) or not isinstance(length, int) or min(start, length) < 0:
        raise ValueError(f"it has an impossible place in {path}")
    if start + length > (folder / path).stat().st_size:
        raise ValueError(f"{path} is shorter than it says")
    return str(index.get("fqn")), _size(index.get("offset")), _StorageInfo(path, start, length)


def _expect(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or value.kind != kind:
        raise ValueError(f"it has no {kind} where there should be one")
    return value


def _fields(record: _Record) -> dict[str, Any]:
    if not isinstance(record.state, dict):
        raise ValueError(f"its {record.kind} is empty")
    return record.state


def _mapping(record: _Record, name: str) -> dict[Any, Any]:
    value = _fields(record).get(name)
    if not isinstance(value, dict):
        raise ValueError(f"it has no {name}")
    return value


def _size(value: Any) -> torch.Size:
    """A shape: sizes that are not negative."""
    arguments = _expect(value, "Size").arguments
    sizes = arguments[0] if len(arguments) == 1 else None
    if not isinstance(sizes, tuple) or not all(_is_size(number) for number in sizes):
        raise ValueError("it has an impossible shape")
    return torch.Size(sizes)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE
