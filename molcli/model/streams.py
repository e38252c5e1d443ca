"""Residuals of an original model and of what it becomes, side by side through the layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.io.packing import Batch, TokenRows
from molcli.maths.losses import Head, TokenLosses, token_losses
from molcli.model.block_stack import rms_norm
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import Context, token_context
from molcli.model.layers import Layer


@dataclass
class Streams:
    """parent, student: (n, d_model) float32, the residuals before the next layer."""

    batch: Batch
    context: Context
    parent: Tensor
    student: Tensor

    @torch.no_grad()
    def advance(self, original: Layer, converted: Layer) -> None:
        """Both go through their own layer; once, as long as they are the same."""
        same = self.student is self.parent and converted is original
        self.parent, before = self.context.run(original, self.parent), self.student
        self.student = self.parent if same else self.context.run(converted, before)

    def error(self) -> float:
        """Mean over tokens of |student - parent|^2 / |parent|^2."""
        return relative_error(self.student, self.parent)

    @torch.no_grad()
    def losses(self, norm: Tensor, head: Tensor, eps: float) -> TokenLosses:
        """After the last layer: the student's losses towards the text and the parent.

        norm: (d_model,), the final norm's weight; head: (V, d_model).
        """
        shape = self.batch.input_ids.shape
        student, parent = (
            Head(rms_norm(x, norm, eps).unflatten(0, shape), head)
            for x in (self.student, self.parent)
        )
        return token_losses(student, self.batch.labels.to(head.device), parent)


def open_streams(
    rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
) -> Streams:
    """The residuals before the first layer: the embeddings, the same for both."""
    batch = rows.batch(slice(None))
    x = F.embedding(batch.input_ids.flatten(), embedding).to(device, torch.float32)
    context = token_context(config, batch.document_ids, batch.position_ids, device)
    return Streams(batch, context, x, x)


def relative_error(have: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of the squared error relative to the squared size."""
    return ((have - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()
