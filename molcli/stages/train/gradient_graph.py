"""Replay forward and backward passes from a CUDA graph, and decide where that pays off."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from molcli.config.sections import TrainConfig
from molcli.data.packing import Batch
from molcli.families.rotary import reads_positions_back
from molcli.model import MoLConfig

# Training tokens from which the minute of compiling pays.
MIN_TOKENS_TO_COMPILE = 5_000_000
# The number of micro-batches of one shape that run eagerly; kernels are compiled and chosen then.
_EAGER_RUNS = 2
# A graph has room for more documents than it was captured with; empty ones cost next to nothing.
_SPARE_DOCUMENTS, _DOCUMENTS_MULTIPLE = 1.25, 64

# (batch, 0-d count of predicted tokens) -> detached sums on the device; adds to the gradients.
AddGradient = Callable[[Batch, Tensor], Tensor]


def should_compile(config: TrainConfig, tokens: int, device: torch.device) -> bool:
    """Decide whether layers and losses are compiled.

    Args:
        config: `train.compile` decides unless it is "auto".
        tokens: of all stages.
        device: of the model.
    """
    if isinstance(config.compile, bool):
        return config.compile
    # Every other number of blocks would be compiled again.
    same_top_k = config.start_top_k is None
    return device.type == "cuda" and tokens >= MIN_TOKENS_TO_COMPILE and same_top_k


def should_capture(config: TrainConfig, model: MoLConfig, device: torch.device, ranks: int) -> bool:
    """Decide whether compiled micro-batches are replayed from a CUDA graph (`GradientGraph`).

    Not with several processes, which wait for each other; not where values are read from the disk
    (cached logits) or back from the device (the largest position); not where layers run twice
    (gradient checkpointing) or change (start_top_k); and not with Gated DeltaNet, whose gradients
    have not been tested in a graph.
    """
    alone = device.type == "cuda" and ranks == 1
    reads_back = config.logits is not None or reads_positions_back(model)
    varies = config.gradient_checkpointing or config.start_top_k is not None
    return alone and not (reads_back or varies or model.is_recurrent)


class GradientGraph:
    """Runs `add_gradient(batch, count)`; from the third micro-batch of a shape on, by replay.

    `add_gradient` adds to the gradients of the model and returns detached sums on the device,
    without host synchronisation. The next call overwrites what a replay returned.

    Run eagerly: padded rows, shapes other than the captured one, and a model that synchronises with
    the device, as the eager references of kernels do.

    Attributes:
        model: whose gradients are added to.
        max_documents: documents of a batch that the captured graph has room for.
        captured: the graph, once there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.max_documents = 0
        self.captured: _CapturedGraph | None = None
        self._runs = Counter[torch.Size]()  # eager ones, by shape

    def __call__(self, add_gradient: AddGradient, batch: Batch, count: Tensor) -> Tensor:
        """Run or replay a micro-batch.

        Args:
            add_gradient: what runs; apart from the weights, nothing else that it depends on
                changes between calls.
            batch: on the device.
            count: 0-d, on the device.
        """
        if batch.attention_mask is not None:
            return add_gradient(batch, count)
        if batch.num_documents > self.max_documents:
            self._make_room(batch)
        batch, shape = replace(batch, num_documents=self.max_documents), batch.input_ids.shape
        if self.captured is not None:
            same = self.captured.batch.input_ids.shape == shape
            return self.captured(batch, count) if same else add_gradient(batch, count)
        self._runs[shape] += 1
        if self._runs[shape] != _EAGER_RUNS:
            return add_gradient(batch, count)
        sums, synchronised = _detect_synchronisation(partial(add_gradient, batch, count))
        if not synchronised:
            self.captured = self._capture(add_gradient, batch, count)
        return sums

    def _make_room(self, batch: Batch) -> None:
        # One document for each row is an ordinary batch, for which attention has faster kernels.
        self.max_documents = batch.num_documents
        if batch.num_documents > len(batch.input_ids):
            multiples = -(-int(batch.num_documents * _SPARE_DOCUMENTS) // _DOCUMENTS_MULTIPLE)
            self.max_documents = multiples * _DOCUMENTS_MULTIPLE
        self._runs, self.captured = Counter(), None

    def _capture(self, add_gradient: AddGradient, batch: Batch, count: Tensor) -> "_CapturedGraph":
        """Computes nothing. The eager run before has made every gradient there will be."""
        batch = replace(
            batch,
            input_ids=batch.input_ids.clone(),
            document_ids=batch.document_ids.clone(),
            position_ids=batch.position_ids.clone(),
            labels=batch.labels.clone(),
        )
        count, graph = count.clone(), torch.cuda.CUDAGraph()
        # A checkpoint may be written in the background meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sums = add_gradient(batch, count)
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        return _CapturedGraph(graph, batch, count, sums, gradients)


@dataclass(frozen=True)
class _CapturedGraph:
    """A graph, its input and output tensors, and the gradients that it adds to."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    count: Tensor
    sums: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    def __call__(self, batch: Batch, count: Tensor) -> Tensor:
        for own, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            own.copy_(given)
        self.count.copy_(count)
        self._restore_gradients()
        self.graph.replay()
        return self.sums

    def _restore_gradients(self) -> None:
        """Zeroing after a step sets gradients to None, and the graph adds to fixed tensors."""
        replaced = [(p, gradient) for p, gradient in self.gradients if p.grad is not gradient]
        if unset := [gradient for p, gradient in replaced if p.grad is None]:
            torch._foreach_zero_(unset)
        for parameter, gradient in replaced:
            if parameter.grad is not None:  # of an earlier micro-batch of another shape
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


def _detect_synchronisation(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Return what `run` returns, and whether it synchronised with the device."""
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
