"""Routed blocks kept in use without a loss, and more of them at the start."""

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.maths.balance import bias_step, block_counts
from molcli.model import MoLForCausalLM
from molcli.model.layers import MoLLayer
from molcli.model.router import Router


class RouterLoads:
    """Tokens that each routed block received in the micro-batches of a step, on this rank.

    After a step, every block's correction_bias moves by a fixed rate towards an even load of the
    global batch. Clones of a cluster, which `upcycle` starts with equal router rows, receive the
    same tokens, so their biases move together and a token goes on visiting one of each family.
    Where the families differ in size an even load is not to be had that way: there the bias wins.
    """

    def __init__(self, model: MoLForCausalLM) -> None:
        self.routers = routers(model)
        blocks = model.config.num_routed_blocks
        device = self.routers[0].weight.device if self.routers else None
        self._counts = torch.zeros(len(self.routers), blocks, dtype=torch.int64, device=device)

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
            for router, step in zip(self.routers, steps, strict=True):
                router.correction_bias.add_(step.to(router.correction_bias))
        self.clear()

    def clear(self) -> None:
        """Counts anew, after a step that was left out."""
        self._counts.zero_()


def routers(model: MoLForCausalLM) -> list[Router]:
    """The routers of all layers that have one, in the order of the model's `routing`."""
    layers = (layer for layer in model.model.layers if isinstance(layer, MoLLayer))
    return [layer.router for layer in layers if layer.router is not None]


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
