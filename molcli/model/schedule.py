"""How the parts of a layer run: one after another, or concurrently in a CUDA graph."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from molcli.model.compiled import compile_part


class Schedule:
    """How the parts of a layer run: one after another.

    `ConcurrentSchedule` runs shared and routed blocks at the same time.
    """

    concurrent = False

    def aside(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part whose result is not needed before `join`."""
        return part(*arguments)

    def run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part whose result is needed next."""
        return part(*arguments)

    def join(self) -> None:
        """Wait for the parts that ran aside."""


class SideStream:
    """A context whose kernels run concurrently with those launched after it, until `join`.

    While a CUDA graph is captured, kernels go to a second stream; otherwise to the current one.
    Tensors that the context reads must live until `join`.
    """

    def __init__(self, device: torch.device) -> None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.stream = torch.cuda.Stream(device) if capturing else None
        self.open = False

    def __enter__(self) -> None:
        if self.stream is not None:
            self.main = torch.cuda.current_stream()
            self.stream.wait_stream(self.main)
            torch.cuda.set_stream(self.stream)
            self.open = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.stream is not None:
            torch.cuda.set_stream(self.main)

    def join(self) -> None:
        """Let the main stream wait for the second one."""
        if self.stream is not None and self.open:
            self.main.wait_stream(self.stream)
            self.open = False


class ConcurrentSchedule(Schedule):
    """Run the parts of a layer, without gradients, with some of them on a second stream.

    Neither the shared nor the routed blocks fill a GPU on their own: their kernels are small, and
    many of the routed ones (scores, sorting, the delta rule) occupy a part of it.

    Args:
        device: of the model.
        compiled: compiled parts by function, or None to run them as they are. Compiled code cannot
            change streams, so that the parts of a layer are compiled separately.
    """

    concurrent = True

    def __init__(
        self,
        device: torch.device,
        compiled: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self.side = SideStream(device)
        self.compiled = compiled

    def aside(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part on the second stream."""
        with self.side:
            return self.run(part, *arguments)

    def run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part on the main stream."""
        if self.compiled is not None:
            if part not in self.compiled:
                self.compiled[part] = compile_part(part)
            part = self.compiled[part]
        return part(*arguments)

    def join(self) -> None:
        """Let the main stream wait for the second one."""
        self.side.join()
