"""Layers that learn one by one what the parent's layers do."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.data.packing import Batch
from molcli.errors import MolError
from molcli.fitting.chunks import token_context
from molcli.model import MoLForCausalLM
from molcli.model.layers import MoLLayer
from molcli.model.routing.balance import cv_squared
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import MicroBatches


def check_alignable(student: MoLForCausalLM, parent: MoLForCausalLM) -> None:
    """Raises MolError unless each of the student's layers stands for one of the parent's."""
    for name in ("num_hidden_layers", "hidden_size", "head_dim"):
        found, wanted = getattr(parent.config, name), getattr(student.config, name)
        if found != wanted:
            raise MolError(
                f"layers cannot be aligned: `{name}` is {found} in the parent, {wanted} in the "
                "model",
                allowed="the parent that the model was converted from",
            )


@dataclass(frozen=True)
class Alignment:
    """Every Mixture of Layers layer gets the parent's residual and learns the parent's next one.

    The loss of a layer is the squared error of its output relative to the output's squared size,
    mean over tokens: what counts in the end passes a norm. No gradient leaves a layer, and each is
    taken before the next layer runs, so that the activations of one layer are held at a time.
    dtype: of matrix products; residuals are float32.
    """

    student: MoLForCausalLM
    parent: MoLForCausalLM
    dtype: torch.dtype
    balance_weight: float
    loads: RouterLoads

    measures = ("loss", "balance")

    def backward(self, step: MicroBatches, accelerator: Accelerator) -> Tensor:
        """Adds this rank's part of the gradient of a step.

        Returns (4,) this rank's part of the mean loss, 0, 0, and balance, means over layers.
        """
        ranks = accelerator.num_processes
        sums, layers = torch.zeros(4, device=accelerator.device), 0
        for _, batch in step.batches:
            for error, balance in self._layers(batch):
                error, balance = error / step.tokens, balance / (len(step) * ranks)
                loss = error + self.balance_weight * balance
                (loss * ranks).backward()  # FSDP averages over ranks; this is a sum
                sums[0] += loss.detach()
                sums[3] += balance.detach()
                layers += 1
        return sums / (layers / len(step))

    @torch.no_grad()
    def is_finite(self, step: MicroBatches, accelerator: Accelerator) -> bool:
        """Whether this rank's share of a step gives finite losses. No gradients."""
        sums = torch.zeros((), device=accelerator.device)
        for _, batch in step.batches:  # to the end: ranks run the same layers
            for error, balance in self._layers(batch):
                sums += error + balance
        return bool(sums.isfinite())

    def _layers(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each Mixture of Layers layer: its loss, summed over tokens, and CV^2."""
        device = batch.input_ids.device
        context = token_context(
            self.student.config,
            batch.document_ids,
            batch.position_ids,
            device,
            batch.attention_mask,
        )
        with torch.no_grad():
            forward = context.forward_context()
            x = context.stream.flatten(self.parent.model.embed_tokens(batch.input_ids)).float()
        routed = 0  # layers so far that route
        pairs = zip(self.parent.model.layers, self.student.model.layers, strict=True)
        for dense, layer in pairs:
            with torch.no_grad(), self._products(device):
                wanted = dense(x, forward)[0]
            if isinstance(layer, MoLLayer):
                with self._products(device):
                    out, routing = layer(x, forward)
                balance = out.new_zeros(())
                if routing is not None:
                    self.loads.add(routing.blocks[None], routed)
                    routed += 1
                    balance = cv_squared(routing.weights, routing.blocks, routing.logits.shape[1])
                yield ((out - wanted).square().sum(-1) / wanted.square().sum(-1)).sum(), balance
            x = wanted

    def _products(self, device: torch.device) -> AbstractContextManager[object]:
        low = self.dtype != torch.float32
        return torch.autocast(device.type, self.dtype if low else None, enabled=low)
