"""A micro-batch's forward and backward pass, compiled or repeated from a CUDA graph."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from molcli.config.sections import TrainConfig
from molcli.data.packing import Batch
from molcli.model import MoLConfig
from molcli.model.rotary import reads_positions_back

# Tokens that pay for the minute of compiling.
COMPILED_FROM = 5_000_000


def worth_compiling(config: TrainConfig, tokens: int, device: torch.device) -> bool:
    """tokens: of all stages. `train.compile` decides where it is not "auto"."""
    if isinstance(config.compile, bool):
        return config.compile
    # Every other number of blocks would be compiled anew.
    same_top_k = config.start_top_k is None
    return device.type == "cuda" and tokens >= COMPILED_FROM and same_top_k


def worth_recording(
    config: TrainConfig, model: MoLConfig, device: torch.device, ranks: int
) -> bool:
    """Whether compiled micro-batches are repeated from a CUDA graph (`GradientGraph`): not where
    processes wait for one another, where the disk or the largest position has a say, where layers
    run twice, or change, nor with Gated DeltaNet, whose gradients have not been seen in a graph.
    """
    alone = device.type == "cuda" and ranks == 1
    told = config.logits is not None or reads_positions_back(model)
    twice = config.gradient_checkpointing or config.start_top_k is not None
    return alone and not (told or twice or model.is_recurrent)


# Micro-batches of one shape that run as they are: kernels are compiled and chosen in these.
_FIRST = 2
# A graph has room for more documents than it was recorded with: empty ones cost next to nothing.
_SPARE, _STEP = 1.25, 64

Pass = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class _Recorded:
    """A graph, the tensors it reads and leaves, and the gradients it adds to."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    count: Tensor
    sums: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    def __call__(self, batch: Batch, count: Tensor) -> Tensor:
        for mine, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            mine.copy_(given)
        self.count.copy_(count)
        self._put_back()
        self.graph.replay()
        return self.sums

    def _put_back(self) -> None:
        """The optimiser lets go of gradients after each step, and the graph knows their place."""
        lost = [(p, gradient) for p, gradient in self.gradients if p.grad is not gradient]
        if unset := [gradient for p, gradient in lost if p.grad is None]:
            torch._foreach_zero_(unset)
        for parameter, gradient in lost:
            if parameter.grad is not None:  # of a micro-batch before, of another shape
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


class GradientGraph:
    """Runs `both(batch, count)`, which adds to the gradients of model and returns detached sums on
    the device, without a word from it to the host; from the third micro-batch of a shape on, by
    playing back. What it returns is overwritten by the next call.

    Rows that are padded run as they are, and so do shapes other than the one at hand, and a model
    that waits for the device, as eager references of kernels do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.room, self.seen = 0, Counter[torch.Size]()
        self.recorded: _Recorded | None = None

    def __call__(self, both: Pass, batch: Batch, count: Tensor) -> Tensor:
        """count: 0-d, on the device; whatever else `both` depends on stays as it is."""
        if batch.attention_mask is not None:
            return both(batch, count)
        if batch.num_documents > self.room:
            self._make_room(batch)
        batch, shape = replace(batch, num_documents=self.room), batch.input_ids.shape
        if self.recorded is not None:
            same = self.recorded.batch.input_ids.shape == shape
            return self.recorded(batch, count) if same else both(batch, count)
        self.seen[shape] += 1
        if self.seen[shape] != _FIRST:
            return both(batch, count)
        sums, waits = _watched(partial(both, batch, count))
        if not waits:
            self.recorded = self._record(both, batch, count)
        return sums

    def _make_room(self, batch: Batch) -> None:
        # Rows of one document each are a batch, which attention has quicker kernels for.
        self.room = batch.num_documents
        if batch.num_documents > len(batch.input_ids):
            self.room = -(-int(batch.num_documents * _SPARE) // _STEP) * _STEP
        self.seen, self.recorded = Counter(), None

    def _record(self, both: Pass, batch: Batch, count: Tensor) -> _Recorded:
        """Computes nothing. The pass before has left a gradient where there is to be one."""
        batch = replace(
            batch,
            input_ids=batch.input_ids.clone(),
            document_ids=batch.document_ids.clone(),
            position_ids=batch.position_ids.clone(),
            labels=batch.labels.clone(),
        )
        count, graph = count.clone(), torch.cuda.CUDAGraph()
        # A checkpoint that is written in the background may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sums = both(batch, count)
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        return _Recorded(graph, batch, count, sums, gradients)


def _watched(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """What it returns, and whether it waited for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            out = run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return out, any("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.input_ids, batch.document_ids, batch.position_ids, batch.labels
