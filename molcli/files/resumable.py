"""State of long work on disk, from which the next run on the same output path continues."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molcli.errors import MolError
from molcli.files.hidden_folders import (
    UNFINISHED,
    clear_hidden,
    hidden_path,
    make_hidden,
    remove_leftover,
)
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
            MolError: If the folder's name is in use.
        """
        make_hidden(self.folder)
        try:
            with safe_open(self.folder / _STATE, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") == self.identity:
                    names = file.keys()
                    return int(metadata["done"]), {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        clear_hidden(self.folder)
        return None

    def save_if_due(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Save the state if the last save was long enough ago.

        A kill while saving leaves the previous state. So does a full disk, which is reported when
        the result is written.

        Args:
            done: Number of finished steps.
            tensors: State after them.
        """
        start = time.monotonic()
        if start < self._next_save:
            return
        on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        new = self.folder / f"{_STATE}.new"
        try:
            save_tensors(on_host, new, {"identity": self.identity, "done": str(done)})
            new.replace(self.folder / _STATE)
        except OSError:
            new.unlink(missing_ok=True)
        end = time.monotonic()
        self._next_save = end + max(MIN_SAVE_INTERVAL, MIN_WORK_PER_SAVE * (end - start))

    def remove(self) -> None:
        """Remove the folder, for example when the work is finished."""
        remove_leftover(self.folder)
