"""Forward passes repeated from CUDA graphs, and work that runs beside other work in them."""

import operator
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molcli.kernels.packed_rows import PackedRows
from molcli.model.compiled import compile_part
from molcli.model.decoding.cache import MoLCacheLayer
from molcli.model.layers import Layer, MoLLayer
from molcli.model.rotary import reads_positions_back
from molcli.model.routing.router import Routing
from molcli.model.tokens import TokenStream

if TYPE_CHECKING:
    from molcli.model.modeling_mol import MoLForCausalLM


class SideStream:
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


class SideBySide:
    """Calls layers, for one device and without gradients: the shared blocks go to a `SideStream`.

    Neither family's kernels fill a GPU on their own: they are small, and many of the routed ones
    (scores, sorting, the delta rule) occupy a part of it. Compiled code cannot change streams
    midway, so that the parts of a layer are compiled apart.
    """

    def __init__(self) -> None:
        self.with_shared = compile_part(MoLLayer.with_shared)
        self.routed_rows = compile_part(MoLLayer.routed_rows)
        self.combine = compile_part(_combine)

    def __call__(
        self,
        branch: SideStream,
        layer: Layer,
        x: Tensor,
        rows: PackedRows,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        states: MoLCacheLayer | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """branch: one for all layers, so that they take turns with its memory. The rest and the
        result: as `layer` has them.
        """
        if not isinstance(layer, MoLLayer) or layer.shared is None or layer.routed is None:
            out: tuple[Tensor, Routing | None] = layer(x, rows, rotary, stream, states)
            return out
        # The allocator gives freed memory to the next who asks on the same stream, and knows
        # nothing of readers on another. What the branch reads (x, rows, rotary) was there before
        # it began, and this frame holds it until it has joined. What it leaves, `kept`, is freed
        # after being read here; the branch next writes when it begins anew, which waits for that.
        with branch:
            kept = self.with_shared(layer, x, rows, rotary, stream, states)
        found, routed, routing = self.routed_rows(layer, x, rotary, stream, states)
        branch.join()
        return self.combine(kept, found, routed), routing


def _combine(kept: Tensor, found: Tensor, routed: PackedRows) -> Tensor:
    """kept: (n, d_model), found: (M, d_model) -> (n, d_model), as `MoLLayer.forward` ends."""
    return kept + routed.combine(found)


# Past this many tokens launching is no longer what takes time, and a graph holds on to the memory
# of all that is computed in it.
_MAX_TOKENS = 16_384
_MAX_GRAPHS = 8


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    output: Any

    def __call__(self, input_ids: Tensor) -> Any:
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        return type(self.output)(logits=self.output.logits.clone())


class ForwardGraphs:
    """Calls a model; from the third call of one shape on, by playing back the second.

    That goes for calls with token ids alone: without a cache, a mask, labels or gradients, on a
    GPU. Their output has logits, and no routing. All others go to the model as they are.
    """

    def __init__(self, model: "MoLForCausalLM") -> None:
        self.model, self.side_by_side = model, SideBySide()
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recorded: dict[tuple[int, ...], _Recorded] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = self._ids(*args, **kwargs)
        if ids is None:
            return self.model._call_impl(*args, **kwargs)
        # Where a weight lies: a graph reads weights where they were.
        place = next(self.model.parameters()).data_ptr()
        key = (*ids.shape, kwargs.get("logits_to_keep", 0), place)
        self.seen[key] += 1
        if self.seen[key] == 1:  # kernels are compiled now, not while recording
            return self._forward(*args, **kwargs)
        if key not in self.recorded:
            if len(self.recorded) == _MAX_GRAPHS:
                del self.recorded[next(iter(self.recorded))]
            self.recorded[key] = self._record(ids, **kwargs)
        return self.recorded[key](ids)

    def _ids(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The token ids of a call that a graph can repeat."""
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        ids = args[0] if args else kwargs.get("input_ids")
        plain = given <= {"input_ids", "logits_to_keep", "return_dict"} and len(args) <= 1
        if not plain or kwargs.get("use_cache") is not False or not isinstance(ids, Tensor):
            return None
        if not ids.is_cuda or ids.numel() > _MAX_TOKENS or torch.is_grad_enabled():
            return None
        if self.model.training or not isinstance(kwargs.get("logits_to_keep", 0), int):
            return None
        # Grouped products in other dtypes wait for the device, and so do such frequencies.
        if self.model.dtype != torch.bfloat16 or reads_positions_back(self.model.config):
            return None
        return ids

    def _record(self, ids: Tensor, **kwargs: Any) -> _Recorded:
        kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"}
        graph, held = torch.cuda.CUDAGraph(), ids.clone()
        with torch.cuda.graph(graph):
            output = self._forward(input_ids=held, **kwargs)
        return _Recorded(graph, held, output)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call to record, or one that compiles what it will need."""
        inner = self.model.model
        inner.run_layer = partial(self.side_by_side, SideStream(inner.device))
        try:
            return self.model._call_impl(*args, **kwargs)
        finally:
            inner.run_layer = operator.call
