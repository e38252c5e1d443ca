"""Being asked to stop: the step at hand is finished first."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, SIGINT and SIGTERM are noted. A second one acts as if nobody had listened;
    not under torchrun, which sends one more for every Ctrl-C.

    What is ignored, as SIGINT is by what a script starts in its background, stays so. Python gives
    signals to its main thread alone; entered in another one, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heard = (n for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal's number, 0 if there was none; the same on every rank, which all must call."""
        if accelerator.num_processes == 1:
            return self.received
        mine = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(mine).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and "LOCAL_WORLD_SIZE" not in os.environ:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
