"""Work that a killed run leaves to the next one: the tensors it had so far."""

import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAVE_EVERY = 60.0  # seconds, at least; and saving takes at most a twentieth of the time
_SHARE = 20


class Unfinished:
    """A hidden file beside `out`, for a run on the same path with the same identity.

    identity: of all that decides what the work comes to.
    """

    def __init__(self, out: Path, identity: str) -> None:
        out = out.expanduser().resolve()
        self.path = out.with_name(f".{out.name}.unfinished")
        self.identity = identity
        self._new = self.path.with_name(f"{self.path.name}.new")
        self._next = time.monotonic() + SAVE_EVERY

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """How many steps were done, and what they gave; None where there is nothing of use."""
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("identity") != self.identity:
                    return None
                return int(about["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def save(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Every once in a while; otherwise does nothing. A kill leaves the file before it, and so
        does a full disk, which is reported where the result is written."""
        start = time.monotonic()
        if start < self._next:
            return
        on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(on_host, self._new, {"identity": self.identity, "done": str(done)})
            self._new.replace(self.path)
        except (OSError, SafetensorError):
            self._new.unlink(missing_ok=True)
        end = time.monotonic()
        self._next = end + max(SAVE_EVERY, _SHARE * (end - start))

    def clear(self) -> None:
        """The work is finished."""
        self.path.unlink(missing_ok=True)
        self._new.unlink(missing_ok=True)
