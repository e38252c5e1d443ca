"""Work that a CUDA graph may do beside other work."""

from types import TracebackType

import torch


class Branch:
    """A context whose launches run beside what follows it, until `join`.

    In a graph that is being captured the launches go to a second stream; everywhere else to the
    stream they would go to anyway. Tensors that the context reads must live until `join`.
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
        """What follows sees what the context did."""
        if self.stream is not None and self.open:
            self.main.wait_stream(self.stream)
            self.open = False
