"""Residuals of the parent and of the converted model, side by side through the layers."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.data.packing import TokenRows
from molcli.families.parent import Parent
from molcli.fitting.chunks import Chunks, chunk_text
from molcli.maths.losses import Head, TokenLosses, token_losses
from molcli.maths.moments import CHUNK_ROWS
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.model.norms import rms_norm


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
    x = F.embedding(ids, embedding).to(device, torch.float32) * config.embedding_scale
    return Streams(rows, chunk_text(config, rows, device), x, x)


def relative_error(have: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of the squared error relative to the squared size."""
    errors = [
        (a - b).square().sum(-1) / b.square().sum(-1)
        for a, b in zip(have.split(CHUNK_ROWS), wanted.split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(errors).mean().item()


@dataclass(frozen=True)
class OutputHead:
    """The parent's final norm (d_model,), its head (V, d_model), and the norm's epsilon."""

    norm: Tensor
    head: Tensor
    eps: float

    def figures(self, streams: Streams, student: Tensor) -> dict[str, float]:
        """Nats a predicted token: of the parent and a student (n, d_model) on the text, and
        KL(parent || student)."""
        losses = replace(streams, student=student).losses(self.norm, self.head, self.eps)
        tokens = int(losses.count)
        return {
            "tokens": tokens,
            "parent_ce": losses.parent_cross_entropy.item() / tokens,
            "ce": losses.cross_entropy.item() / tokens,
            "kl": losses.kl.item() / tokens,
        }


def open_output_head(parent: Parent, device: torch.device) -> OutputHead:
    """In float32."""
    head = parent.lm_head()
    weight = parent.embedding() if head is None else head
    return OutputHead(
        parent.final_norm().to(device, torch.float32),
        weight.to(device).to(torch.float32),
        parent.config.rms_norm_eps,
    )


TOKENS = 1024  # enough to rank layers by; every one of them goes through all layers above its own


class Sensitivity:
    """KL(original || original with one layer converted), for every converted layer.

    Measured on the first TOKENS tokens of `rows`, and exact: a residual for each converted layer
    goes through the original layers above it.
    """

    def __init__(
        self, rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
    ) -> None:
        few = rows.select(slice(0, max(1, TOKENS // rows.input_ids.shape[1])))
        if not few.num_targets:
            few = rows
        self._streams = open_streams(few, config, embedding, device)
        self._altered: dict[int, Tensor] = {}

    def advance(self, index: int, original: Layer, converted: Layer) -> None:
        """Moves all residuals past layer `index`."""
        run, before = self._streams.chunks.run, self._streams.parent
        self._altered = {i: run(original, x) for i, x in self._altered.items()}
        if converted is not original:
            self._altered[index] = run(converted, before)
        self._streams.advance(original, original)

    def figures(self, ending: OutputHead) -> dict[int, float]:
        """After the last layer: nats a predicted token, by layer."""
        return {i: ending.figures(self._streams, x)["kl"] for i, x in self._altered.items()}


def split_rows(rows: TokenRows) -> tuple[TokenRows, TokenRows]:
    """Rows to fit layers on, and rows to measure them on: the last, of up to TOKENS tokens and at
    most half of all. Where there is one row alone, it is both."""
    if len(rows) == 1:
        return rows, rows
    kept = min(max(1, TOKENS // rows.input_ids.shape[1]), len(rows) // 2)
    return rows.select(slice(0, -kept)), rows.select(slice(-kept, None))
