"""Load balancing of routed blocks: without a loss, and with more blocks for each token at first."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.config.sections import TrainConfig
from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import ConvertedLayer
from molcli.model.routing.balance import bias_step, block_counts
from molcli.model.routing.router import Router


class RouterLoads:
    """Counts the tokens that each routed block receives on this rank, and balances with them.

    After a step, the correction_bias of every block moves by a fixed rate towards an even load of
    the global batch (arXiv 2408.15664). Clones of a cluster, which `upcycle` starts with equal
    router rows, receive the same tokens. So their biases move together, and a token still visits
    one block of each family. Where the families differ in size, this cannot reach an even load:
    there the bias wins over the families.

    Attributes:
        routers: of all layers that have one, in the order of the model's `routing`.
        layers: numbers of these layers.
    """

    def __init__(self, model: MoLForCausalLM) -> None:
        self.routers = routers(model)
        numbered = enumerate(model.model.layers)
        self.layers = [number for number, layer in numbered if _routers_of(layer)]
        blocks = model.config.num_routed_blocks
        device = self.routers[0].weight.device if self.routers else None
        # (layers, blocks) tokens: of the step at hand, and of the steps since the last log line.
        self._step = torch.zeros(len(self.routers), blocks, dtype=torch.int64, device=device)
        self._window = torch.zeros_like(self._step)

    def add(self, blocks: Tensor, first: int = 0) -> None:
        """Count a micro-batch; nothing where no gradients are computed.

        Args:
            blocks: (layers, n, k) int64, the blocks chosen for n unpadded tokens.
            first: index, among the layers that route, of the first one in `blocks`.
        """
        if torch.is_grad_enabled():
            counts = block_counts(blocks, self._step.shape[1])
            self._step[first : first + len(blocks)] += counts

    @torch.no_grad()
    def update_biases(self, rate: float, accelerator: Accelerator) -> None:
        """Move the biases by `rate` after a step, then reset its counts. Collective."""
        if self.routers:
            steps = bias_step(accelerator.reduce(self._step, "sum"), rate)
            biases = [router.correction_bias for router in self.routers]
            torch._foreach_add_(biases, list(steps.to(biases[0])))
        self.reset_step()

    def reset_step(self) -> None:
        """Set the counts of the step at hand to 0."""
        self._step.zero_()

    def add_step_to_window(self) -> None:
        """Add the step at hand to the counts for the log. Does not synchronise with the device."""
        self._window += self._step

    def pop_window(self, accelerator: Accelerator) -> Tensor:
        """Return the counts of all steps added since the last call, and reset them. Collective.

        Returns:
            (layers, blocks) int64, tokens on all ranks.
        """
        window = accelerator.reduce(self._window, "sum") if self.routers else self._window
        self._window = torch.zeros_like(self._window)
        return window


def routers(model: MoLForCausalLM) -> list[Router]:
    """Return the routers of all layers that have one, in the order of the model's `routing`."""
    return [router for layer in model.model.layers for router in _routers_of(layer)]


def trains_routers(config: TrainConfig, model: MoLConfig) -> bool:
    """Return whether routers are trained and balanced: `train.routers`, of which "auto" keeps those
    of slices as they are."""
    return not model.has_slices if config.routers == "auto" else config.routers == "train"


def set_top_k(model: MoLForCausalLM, top_k: int) -> None:
    """Set the number of routed blocks for each token.

    Their weights still sum to 1, and their sum is still divided by the model's own number. The size
    of a layer's output stays as it is, since most of the weight is on the first few blocks.
    """
    for router in routers(model):
        router.top_k = top_k


def scheduled_top_k(tokens: int, total: int, start: int, end: int) -> int:
    """Return the number of blocks after `tokens`: from `start` to `end` in steps of equal length.

    Args:
        tokens: seen so far.
        total: tokens after which `end` is reached.
        start: number at 0 tokens.
        end: number from `total` on, at most `start`.
    """
    left = max(0, total - tokens)
    return end + -(-(start - end) * left // total) if left else end


def check_top_k(config: TrainConfig, model: MoLForCausalLM) -> None:
    """Check that the model has a router for `train.start_top_k`, and as many blocks.

    Raises:
        MolError: if not.
    """
    start, routed = config.start_top_k, model.config.num_routed_blocks
    if start is None:
        return
    if not routers(model) or not model.config.num_blocks_per_tok <= start <= routed:
        raise MolError(
            f"`train.start_top_k` is {start}; the model routes a token to "
            f"{model.config.num_blocks_per_tok} of {routed} blocks",
            allowed=f"{model.config.num_blocks_per_tok} to {routed}, on a model with a router",
            hint="--set train.start_top_k=null",
        )


def _routers_of(layer: nn.Module) -> list[Router]:
    """The router of a layer in a list, which is empty if it has none."""
    return [layer.router] if isinstance(layer, ConvertedLayer) and layer.router is not None else []
