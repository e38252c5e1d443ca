"""Layers whose shared and routed blocks run beside each other in a CUDA graph."""

from torch import Tensor

from molcli.kernels.rows import Rows
from molcli.model.branch import Branch
from molcli.model.cache import MoLCacheLayer
from molcli.model.compiled import compile_part
from molcli.model.layers import Layer, MoLLayer
from molcli.model.router import Routing
from molcli.model.tokens import TokenStream


class SideBySide:
    """Calls layers, for one device and without gradients: the shared blocks go to a `Branch`.

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
        branch: Branch,
        layer: Layer,
        x: Tensor,
        rows: Rows,
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


def _combine(kept: Tensor, found: Tensor, routed: Rows) -> Tensor:
    """kept: (n, d_model), found: (M, d_model) -> (n, d_model), as `MoLLayer.forward` ends."""
    return kept + routed.combine(found)
