"""Work that a killed run leaves to the next one: the tensors it had so far."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molcli.errors import MolError

SAVE_EVERY = 60.0  # seconds, at least; and saving takes at most a twentieth of the time
_SHARE = 20
_STATE = "state.safetensors"


class Unfinished:
    """A hidden folder beside `out`, for a run on the same path with the same identity, which nobody
    else may be at work on (`output_folder`).

    identity: of all that decides what the work comes to. folder: also for parts of the result,
    which are large, and written once.
    """

    def __init__(self, out: Path, identity: str) -> None:
        out = out.expanduser().resolve()
        self.folder = out.with_name(f".{out.name}.unfinished")
        self.identity = identity
        self._next = time.monotonic() + SAVE_EVERY

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A refusal ends the work for good; anything else leaves what has been saved, if any."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, MolError) or not (self.folder / _STATE).is_file():
                self.clear()
            raise

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """How many steps were done, and what they gave; None, and an empty folder, where there is
        nothing of use."""
        try:
            with safe_open(self.folder / _STATE, "pt") as file:
                about = file.metadata() or {}
                if about.get("identity") == self.identity:
                    names = file.keys()
                    return int(about["done"]), {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        self.clear()
        self.folder.mkdir()
        return None

    def save(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Every once in a while; otherwise does nothing. A kill leaves the state before it, and so
        does a full disk, which is reported where the result is written."""
        start = time.monotonic()
        if start < self._next:
            return
        on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        new = self.folder / f"{_STATE}.new"
        try:
            save_file(on_host, new, {"identity": self.identity, "done": str(done)})
            new.replace(self.folder / _STATE)
        except (OSError, SafetensorError):
            new.unlink(missing_ok=True)
        end = time.monotonic()
        self._next = end + max(SAVE_EVERY, _SHARE * (end - start))

    def clear(self) -> None:
        """The work is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
