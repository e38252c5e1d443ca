"""The loss of a batch, and its gradient."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from molcli.io.data import Corpus
from molcli.io.logits import LogitCache
from molcli.io.packing import IGNORED, Batch
from molcli.maths.balance import cv_squared
from molcli.maths.losses import Head, TrainingLoss, training_loss
from molcli.maths.top_k import TopK
from molcli.model import MoLForCausalLM


class Student(nn.Module):
    """The model and its losses in one module, whose forward is all that DDP has to watch.

    dtype: of its matrix products, float32 or bfloat16; the weights stay as they are.
    ce_weight, kl_weight: of the two losses.
    """

    def __init__(
        self, model: MoLForCausalLM, dtype: torch.dtype, *, ce_weight: float, kl_weight: float
    ) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.ce_weight, self.kl_weight = ce_weight, kl_weight

    def forward(self, batch: Batch, parent: Head | TopK | None) -> tuple[TrainingLoss, Tensor]:
        """The losses, summed over predicted tokens in nats, and CV^2, mean of layers."""
        device, low = batch.input_ids.device.type, self.dtype != torch.float32
        with torch.autocast(device, self.dtype if low else None, enabled=low):
            out = self.model.model(**batch.inputs(), use_cache=False)
            head = Head(out.last_hidden_state, self.model.lm_head.weight)
            losses = training_loss(
                head, batch.labels, parent, ce_weight=self.ce_weight, kl_weight=self.kl_weight
            )
        terms = [cv_squared(r.weights, r.blocks, r.logits.shape[1]) for r in out.routing]
        balance = torch.stack(terms).mean() if terms else losses.kl.new_zeros(())
        return losses, balance


@dataclass(frozen=True)
class Objective:
    """What is minimised. student: a Student, wrapped by accelerate where there are more ranks.

    parent: the dense model whose predictions are learned, in evaluation mode; its predictions for
    the rows, from the disk; or None.
    """

    student: nn.Module
    parent: MoLForCausalLM | LogitCache | None
    balance_weight: float

    def backward(
        self, rows: Corpus, index: Tensor, micro_batch_size: int, accelerator: Accelerator
    ) -> Tensor:
        """Adds the gradient of the rows `index`, (batch_size,), of which each rank takes a share.

        Returns (4,) this rank's part of the mean loss, cross-entropy, KL and balance. The first
        three are means over the batch's predicted tokens, the balance over its micro-batches.
        """
        ranks = accelerator.num_processes
        # Every rank holds all rows, so none has to ask the others for their counts.
        count = int((rows.batch(index).labels[:, 1:] != IGNORED).sum())
        mine = index.view(ranks, -1)[accelerator.process_index].split(micro_batch_size)
        parts = torch.zeros(4, device=accelerator.device)
        for number, part in enumerate(mine, start=1):
            batch = rows.batch(part).to(accelerator.device)
            parent = self._predictions(batch, part)
            # Gradients are exchanged once, with the last micro-batch.
            with nullcontext() if number == len(mine) else accelerator.no_sync(self.student):
                losses, balance = self.student(batch, parent)
                balance = balance / (len(mine) * ranks)
                loss = losses.loss / count + self.balance_weight * balance
                accelerator.backward(loss * ranks)  # DDP averages over ranks; this is a sum
            means = (losses.cross_entropy / count, losses.kl / count)
            parts += torch.stack([loss, *means, balance]).detach()
        return parts

    @torch.no_grad()
    def _predictions(self, batch: Batch, index: Tensor) -> Head | TopK | None:
        if self.parent is None:
            return None
        if isinstance(self.parent, LogitCache):
            device = batch.input_ids.device
            return TopK(*(field.to(device) for field in self.parent.predictions(index)))
        out = self.parent.model(**batch.inputs(), use_cache=False)
        return Head(out.last_hidden_state, self.parent.lm_head.weight)
