"""Routed blocks kept in use without a loss, and more of them at the start."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.model import MoLForCausalLM
from molcli.model.layers import MoLLayer
from molcli.model.routing.balance import bias_step, block_counts
from molcli.model.routing.router import Router


class RouterLoads:
    """Tokens that each routed block received in the micro-batches of a step, on this rank.

    After a step, every block's correction_bias moves by a fixed rate towards an even load of the
    global batch. Clones of a cluster, which `upcycle` starts with equal router rows, receive the
    same tokens, so their biases move together and a token goes on visiting one of each family.
    Where the families differ in size an even load is not to be had that way: there the bias wins.
    """

    def __init__(self, model: MoLForCausalLM) -> None:
        self.routers = routers(model)
        numbered = enumerate(model.model.layers)
        self.layers = [number for number, layer in numbered if routers_of(layer)]
        blocks = model.config.num_routed_blocks
        device = self.routers[0].weight.device if self.routers else None
        self._counts = torch.zeros(len(self.routers), blocks, dtype=torch.int64, device=device)
        self._window = torch.zeros_like(self._counts)

    def add(self, blocks: Tensor, first: int = 0) -> None:
        """Counts the choices of layers that route, from the first of those on.

        blocks: (layers, n, k), of unpadded tokens. Counts only where gradients are taken.
        """
        if torch.is_grad_enabled():
            counts = block_counts(blocks, self._counts.shape[1])
            self._counts[first : first + len(blocks)] += counts

    @torch.no_grad()
    def update(self, rate: float, accelerator: Accelerator) -> None:
        """Moves the biases after a step, which all ranks end together, and counts anew."""
        if self.routers:
            steps = bias_step(accelerator.reduce(self._counts, "sum"), rate)
            biases = [router.correction_bias for router in self.routers]
            torch._foreach_add_(biases, list(steps.to(biases[0])))
        self.clear()

    def clear(self) -> None:
        """Counts anew, after a step that was left out."""
        self._counts.zero_()

    def keep(self) -> None:
        """Adds the step at hand to the log's window; no device waits for it."""
        self._window += self._counts

    def take_window(self, accelerator: Accelerator) -> Tensor:
        """(layers, blocks): tokens that each block received in the steps kept since the last call,
        on all ranks, which all call this."""
        window = accelerator.reduce(self._window, "sum") if self.routers else self._window
        self._window = torch.zeros_like(self._window)
        return window


def routers(model: MoLForCausalLM) -> list[Router]:
    """The routers of all layers that have one, in the order of the model's `routing`."""
    return [router for layer in model.model.layers for router in routers_of(layer)]


def routers_of(layer: nn.Module) -> list[Router]:
    """The router of a layer, if it has one."""
    return [layer.router] if isinstance(layer, MoLLayer) and layer.router is not None else []


def set_top_k(model: MoLForCausalLM, top_k: int) -> None:
    """Routed blocks that a token visits from now on.

    Their weights still sum to 1, and their sum is still divided by the model's own number: the
    size of what a layer adds stays as it is, since most of the weight is on the first few.
    """
    for router in routers(model):
        router.top_k = top_k


def top_k_at(done: int, way: int, start: int, end: int) -> int:
    """Linear from `start` to `end`, in equally long steps. done: tokens, of `way` until `end`."""
    left = max(0, way - done)
    return end + -(-(start - end) * left // way) if left else end
