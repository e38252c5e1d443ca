"""State of long work on disk, from which the next run on the same output path continues."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from molcli.errors import MolError
from molcli.files.checksums import file_sha256
from molcli.files.hidden_folders import (
    UNFINISHED,
    clear_hidden,
    hidden_path,
    make_hidden,
    remove_leftover,
)
from molcli.files.regular import check_regular
from molcli.files.tensors import save_tensors

MIN_SAVE_INTERVAL = 60.0  # seconds
MIN_WORK_PER_SAVE = 20  # seconds of work per second of saving: saving takes at most 5% of the time
_STATE = "state.safetensors"


class ResumableWork:
    """A hidden folder beside an output path that keeps the state of unfinished work.

    The caller must hold the output path (`output_folder`), so that no other process uses the
    folder.

    Args:
        out: The output path.
        identity: Of everything that decides the result; state of another identity is discarded.

    Attributes:
        folder: The hidden folder. Large parts of the result may be written there directly, once.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.folder = hidden_path(out, UNFINISHED)
        self.identity = identity
        self._next_save = time.monotonic() + MIN_SAVE_INTERVAL

    @contextmanager
    def remove_if_useless(self) -> Iterator[None]:
        """Remove the folder after a MolError, or after any exception before the first save.

        After other exceptions it stays for the next run.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, MolError) or not (self.folder / _STATE).is_file():
                self.remove()
            raise

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Read the saved state.

        Returns:
            (number of finished steps, tensors); None, with the folder emptied, if there is no
            usable state of this identity.

        Raises:
            MolError: If the folder's name is in use, or if the state or a file that belongs to it
                has another sha256 than when it was saved.
        """
        make_hidden(self.folder)
        try:
            check_regular(self.folder / _STATE)
            with safe_open(self.folder / _STATE, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") == self.identity:
                    names = file.keys()
                    tensors = {name: file.get_tensor(name) for name in names}
                    sums = json.loads(metadata["files"])
                    if sums[_STATE] != _sum_of(tensors):
                        raise self._changed(_STATE)
                    del sums[_STATE]
                    for name, expected in sums.items():
                        if file_sha256(self.folder / name) != expected:
                            raise self._changed(name)
                    return int(metadata["done"]), tensors
        except (
            OSError,
            SafetensorError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            pass
        clear_hidden(self.folder)
        return None

    def save_if_due(
        self, done: int, tensors: dict[str, Tensor], files: Mapping[str, str] | None = None
    ) -> None:
        """Save the state if the last save was long enough ago.

        A kill while saving leaves the previous state. So does a full disk, which is reported when
        the result is written.

        Args:
            done: Number of finished steps.
            tensors: State after them.
            files: The sha256 sums of the files in the folder that the state relies on, by name.
        """
        start = time.monotonic()
        if start < self._next_save:
            return
        on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        new = self.folder / f"{_STATE}.new"
        try:
            sums = json.dumps({**(files or {}), _STATE: _sum_of(on_host)})
            about = {"identity": self.identity, "done": str(done), "files": sums}
            save_tensors(on_host, new, about)
            new.replace(self.folder / _STATE)
        except OSError:
            new.unlink(missing_ok=True)
        end = time.monotonic()
        self._next_save = end + max(MIN_SAVE_INTERVAL, MIN_WORK_PER_SAVE * (end - start))

    def remove(self) -> None:
        """Remove the folder, for example when the work is finished."""
        remove_leftover(self.folder)

    def _changed(self, name: str) -> MolError:
        return MolError(
            f"{self.folder / name}, of unfinished work, does not have its sha256: it was changed",
            allowed="files as they were written",
            hint="check the disk, then the same command again: it begins anew",
        )


def _sum_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the names, dtypes, shapes and bits of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()
