"""Residuals of an original model and of what it becomes, side by side through the layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.io.packing import TokenRows
from molcli.maths.losses import Head, TokenLosses, token_losses
from molcli.maths.moments import CHUNK_ROWS
from molcli.model.block_stack import rms_norm
from molcli.model.chunks import Chunks, chunk_text
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer


@dataclass
class Streams:
    """parent, student: (n, d_model) float32, the residuals before the next layer; one tensor as
    long as they are the same. All else is computed of a chunk of tokens at a time."""

    rows: TokenRows
    chunks: Chunks
    parent: Tensor
    student: Tensor

    @torch.no_grad()
    def advance(self, original: Layer, converted: Layer) -> None:
        """Both go through their own layer; once, as long as they are the same."""
        same = self.student is self.parent and converted is original
        before = self.student
        self.parent = self.chunks.run(original, self.parent)
        self.student = self.parent if same else self.chunks.run(converted, before)

    def documents(self) -> Tensor:
        """(n,) int64, ascending: tokens of one document share a number."""
        found, seen = [], 0
        for chunk in self.chunks:
            stream = chunk.context.stream
            found.append(stream.document + seen)
            seen += stream.num_documents
        return torch.cat(found)

    def error(self) -> float:
        """Mean over tokens of |student - parent|^2 / |parent|^2."""
        return relative_error(self.student, self.parent)

    @torch.no_grad()
    def losses(self, norm: Tensor, head: Tensor, eps: float) -> TokenLosses:
        """After the last layer: the student's losses towards the text and the parent.

        norm: (d_model,), the final norm's weight; head: (V, d_model).
        """
        labels = self.rows.batch(slice(None)).labels
        student, parent = (
            Head(rms_norm(x, norm, eps).unflatten(0, labels.shape), head)
            for x in (self.student, self.parent)
        )
        return token_losses(student, labels.to(head.device), parent)


def open_streams(
    rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
) -> Streams:
    """The residuals before the first layer: the embeddings, the same for both."""
    ids = rows.input_ids.flatten().long()
    x = F.embedding(ids, embedding).to(device, torch.float32)
    return Streams(rows, chunk_text(config, rows, device), x, x)


def relative_error(have: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of the squared error relative to the squared size."""
    errors = [
        (a - b).square().sum(-1) / b.square().sum(-1)
        for a, b in zip(have.split(CHUNK_ROWS), wanted.split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(errors).mean().item()
