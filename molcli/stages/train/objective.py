"""The loss of a batch, and its gradient."""

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.data.logits import LogitCache
from molcli.data.packing import Batch
from molcli.maths.losses import Head, TrainingLoss, training_loss
from molcli.maths.top_k import TopK
from molcli.model import MoLForCausalLM
from molcli.model.routing.balance import cv_squared
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import MicroBatches
from molcli.stages.train.gradient_graph import GradientGraph
from molcli.stages.train.sharding import set_gradient_sync


@dataclass(frozen=True)
class Weights:
    """Of a stage's losses, and whether they are compiled (`training_loss`)."""

    ce: float
    kl: float
    temperature: float = 1.0
    compiled: bool = False


class Student(nn.Module):
    """The model and its losses in one module: where the weights are shared between processes, its
    forward brings together those of embeddings, final norm and head, a layer's its own.

    dtype: of its matrix products, float32 or bfloat16; the weights stay as they are.
    loads: counts the routing. whole: processes exchange gradients after the last micro-batch of a
    step, not after each (`sharding.keeps_whole`).
    """

    def __init__(
        self,
        model: MoLForCausalLM,
        dtype: torch.dtype,
        loads: RouterLoads,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.loads, self.whole = model, dtype, loads, whole

    def begin(self, anything: Tensor) -> None:
        """Does nothing: a first forward of the whole, before that of any part. Without an argument
        to bring to its GPU, FSDP of torch 2.11 fails."""

    def forward(
        self, batch: Batch, parent: Head | TopK | None, weights: Weights
    ) -> tuple[TrainingLoss, Tensor]:
        """The losses, summed over predicted tokens in nats, and CV^2, mean of layers."""
        device, low = batch.input_ids.device.type, self.dtype != torch.float32
        with torch.autocast(device, self.dtype if low else None, enabled=low):
            out = self.model.model(**batch.inputs(), use_cache=False)
            head = Head(out.last_hidden_state, self.model.lm_head.weight)
            losses = training_loss(
                head,
                batch.labels,
                parent,
                ce_weight=weights.ce,
                kl_weight=weights.kl,
                temperature=weights.temperature,
                compiled=weights.compiled,
            )
        balance = losses.kl.new_zeros(())
        if out.routing:
            shares, blocks = (
                torch.stack([getattr(r, name) for r in out.routing])
                for name in ("weights", "blocks")
            )
            self.loads.add(blocks)
            balance = cv_squared(shares, blocks, out.routing[0].logits.shape[1]).mean()
        return losses, balance


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    parent: the dense model whose predictions are learned, in evaluation mode; its predictions for
    the rows, from the disk; or None. graph: repeats micro-batches, in one process and without
    predictions from the disk; or None.
    """

    student: Student
    parent: MoLForCausalLM | LogitCache | None
    weights: Weights
    balance_weight: float
    graph: GradientGraph | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """Which of loss, ce, kl and balance `backward` fills."""
        return ("loss", "ce", "balance") + (("kl",) if self.parent is not None else ())

    def backward(self, step: MicroBatches, accelerator: Accelerator) -> Tensor:
        """Adds this rank's part of the gradient of a step.

        Returns (4,) this rank's part of the mean loss, cross-entropy, KL and balance. The first
        three are means over the batch's predicted tokens, the balance over its micro-batches.
        """
        device = accelerator.device
        count = torch.full((), step.predicted, dtype=torch.float32, device=device)
        parts = torch.zeros(4, device=device)
        for number, (index, batch) in enumerate(step.batches, start=1):
            if self.student.whole:
                set_gradient_sync(self.student, now=number == len(step))
            both = partial(self._add_gradient, index, len(step), accelerator)
            parts += both(batch, count) if self.graph is None else self.graph(both, batch, count)
        return parts

    def _add_gradient(
        self,
        index: Tensor,
        micro_batches: int,
        accelerator: Accelerator,
        batch: Batch,
        count: Tensor,
    ) -> Tensor:
        """One micro-batch, the rows `index`, of a batch with `count` (0-d) predicted tokens.
        Returns what `backward` does, of this part."""
        ranks = accelerator.num_processes
        losses, balance = self.student(batch, self._predictions(batch, index), self.weights)
        balance = balance / (micro_batches * ranks)
        loss = losses.loss / count + self.balance_weight * balance
        # FSDP averages over ranks; this is a sum.
        accelerator.backward(loss * ranks)
        means = (losses.cross_entropy / count, losses.kl / count)
        return torch.stack([loss, *means, balance]).detach()

    @torch.no_grad()
    def is_finite(self, step: MicroBatches, accelerator: Accelerator) -> bool:
        """Whether this rank's share of a step gives finite losses. No gradients."""
        sums = torch.zeros((), device=accelerator.device)
        for index, batch in step.batches:
            losses, balance = self.student(batch, self._predictions(batch, index), self.weights)
            sums += losses.loss + balance
        return bool(sums.isfinite())

    @torch.no_grad()
    def _predictions(self, batch: Batch, index: Tensor) -> Head | TopK | None:
        if self.parent is None:
            return None
        if isinstance(self.parent, LogitCache):
            device = batch.input_ids.device
            return TopK(*(field.to(device) for field in self.parent.predictions(index)))
        out = self.parent.model(**batch.inputs(), use_cache=False)
        return Head(out.last_hidden_state, self.parent.lm_head.weight)
