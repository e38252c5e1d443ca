"""Forward passes repeated from CUDA graphs.

Up to some ten thousand tokens, the kernels of a layer of thin blocks take less time than launching
them one by one.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molcli.families.rotary import reads_positions_back
from molcli.model.schedule import ConcurrentSchedule, Schedule

if TYPE_CHECKING:
    from molcli.model.modeling_mol import MoLForCausalLM

# Past this many tokens launching no longer limits the speed, and a graph holds on to the memory of
# all that is computed in it.
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
    """Call a model; replay the second call of a shape from the third call of that shape on.

    This holds for calls with token ids only: without a cache, a mask, labels or gradients, on a
    GPU. Their output has logits, and no routing. All other calls go to the model as they are.
    """

    def __init__(self, model: "MoLForCausalLM") -> None:
        self.model = model
        self.parts: dict[Callable[..., Any], Callable[..., Any]] = {}  # compiled ones
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recorded: dict[tuple[int, ...], _Recorded] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = self._ids(*args, **kwargs)
        if ids is None:
            return self.model._call_impl(*args, **kwargs)
        # A graph reads weights at the addresses that they had when it was recorded.
        place = next(self.model.parameters()).data_ptr()
        key = (*ids.shape, kwargs.get("logits_to_keep", 0), place)
        self.seen[key] += 1
        if self.seen[key] == 1:  # compiles the kernels, which recording cannot
            return self._forward(*args, **kwargs)
        if key not in self.recorded:
            if len(self.recorded) == _MAX_GRAPHS:
                del self.recorded[next(iter(self.recorded))]
            self.recorded[key] = self._record(ids, **kwargs)
        return self.recorded[key](ids)

    def _ids(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return the token ids of a call that a graph can repeat, or None."""
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        ids = args[0] if args else kwargs.get("input_ids")
        plain = given <= {"input_ids", "logits_to_keep", "return_dict"} and len(args) <= 1
        if not plain or kwargs.get("use_cache") is not False or not isinstance(ids, Tensor):
            return None
        if not ids.is_cuda or ids.numel() > _MAX_TOKENS or torch.is_grad_enabled():
            return None
        if self.model.training or not isinstance(kwargs.get("logits_to_keep", 0), int):
            return None
        # Grouped products in other dtypes synchronise with the host, and so do such frequencies.
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
        """Call the model with shared and routed blocks running concurrently."""
        inner = self.model.model
        inner.schedule = ConcurrentSchedule(inner.device, self.parts)
        try:
            return self.model._call_impl(*args, **kwargs)
        finally:
            inner.schedule = Schedule()
