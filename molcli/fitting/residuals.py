"""Carry the residuals of the parent and of the student through the layers, and compare them.

Input: packed rows of n tokens and the embeddings. State: two residuals (n, d_model) float32.
Outputs: relative errors after a layer; after the last one, cross-entropy and KL(parent || student).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.data.packing import TokenRows
from molcli.families.parent import Parent
from molcli.fitting.chunks import Chunks, chunk_text
from molcli.maths.figures import check_figures
from molcli.maths.losses import Head, token_losses
from molcli.maths.moments import CHUNK_ROWS
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import Layer
from molcli.model.norms import rms_norm

MEASURED_TOKENS = 1024  # enough to rank layers by; each runs through all layers above its own


@dataclass
class Residuals:
    """The residuals of parent and student before the next layer, on one text.

    rows: the text. chunks: of its tokens; a layer runs on one of them at a time. parent, student:
    (n, d_model) float32; one and the same tensor as long as the two models agree.
    """

    rows: TokenRows
    chunks: Chunks
    parent: Tensor
    student: Tensor

    @torch.no_grad()
    def advance(self, original: Layer, converted: Layer) -> None:
        """Run each model's layer on its residual; only one of them where the two agree."""
        same = self.student is self.parent and converted is original
        before = self.student
        self.parent = self.chunks.run(original, self.parent)
        self.student = self.parent if same else self.chunks.run(converted, before)

    def documents(self) -> Tensor:
        """Return the number of each token's document, (n,) int64, ascending."""
        found, seen = [], 0
        for chunk in self.chunks:
            stream = chunk.context.stream
            found.append(stream.document + seen)
            seen += stream.num_documents
        return torch.cat(found)

    def error(self) -> float:
        """Return the mean over tokens of |student - parent|^2 / |parent|^2."""
        return relative_error(self.student, self.parent)


def open_residuals(
    rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
) -> Residuals:
    """Return the residuals before the first layer: the embeddings, the same for both models.

    embedding: (V, d_model), any dtype and device.
    """
    ids = rows.input_ids.flatten().long()
    x = F.embedding(ids, embedding).to(device, torch.float32) * config.embedding_scale
    return Residuals(rows, chunk_text(config, rows, device), x, x)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the mean over tokens of `relative_errors`. Both: (n, d_model)."""
    errors = [
        relative_errors(a, b)
        for a, b in zip(found.split(CHUNK_ROWS), wanted.split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(errors).mean().item()


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Return |found - wanted|^2 / |wanted|^2 of each token. Both: (n, d_model).

    Where `wanted` is zero, as with a zero embedding, it is 0 if `found` is zero too, else 1.
    """
    error, energy = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    return torch.where(energy > 0, error / energy, (error > 0).to(error))


def influence(before: Tensor, after: Tensor) -> float:
    """Return how much a layer changes the residual: 1 - the mean cosine of its input and output
    (arXiv 2403.03853). Both: (n, d_model)."""
    pairs = zip(before.split(CHUNK_ROWS), after.split(CHUNK_ROWS), strict=True)
    cosines = torch.cat([F.cosine_similarity(a, b, dim=-1) for a, b in pairs])
    return 1 - cosines.mean().item()


@dataclass(frozen=True)
class OutputHead:
    """The parent's final norm (d_model,), its head (V, d_model), and the norm's epsilon."""

    norm: Tensor
    head: Tensor
    eps: float

    @torch.no_grad()
    def losses(self, residuals: Residuals, student: Tensor) -> dict[str, float]:
        """Compute the losses after the last layer.

        Args:
            residuals: the parent's, and the text.
            student: (n, d_model), a residual to compare with the parent's.

        Raises:
            MolError: one is not finite.

        Returns:
            `tokens`, those that are predicted; in nats per such token, `parent_ce` and `ce`,
            cross-entropy of parent and student, and `kl`, KL(parent || student).
        """
        labels = residuals.rows.batch(slice(None)).labels
        ours, parents = (
            Head(rms_norm(x, self.norm, self.eps).unflatten(0, labels.shape), self.head)
            for x in (student, residuals.parent)
        )
        found = token_losses(ours, labels.to(self.head.device), parents)
        tokens = int(found.count)
        parent_ce, ce, kl = (
            x.item() / tokens for x in (found.parent_cross_entropy, found.cross_entropy, found.kl)
        )
        check_figures(
            {
                "the parent's cross-entropy on held-out text": parent_ce,
                "the converted model's cross-entropy on held-out text": ce,
                "the KL divergence from the parent to the converted model": kl,
            }
        )
        return {"tokens": tokens, "parent_ce": parent_ce, "ce": ce, "kl": kl}


def open_output_head(parent: Parent, device: torch.device) -> OutputHead:
    """Read the parent's final norm and head, in float32."""
    head = parent.lm_head()
    weight = parent.embedding() if head is None else head
    return OutputHead(
        parent.final_norm().to(device, torch.float32),
        weight.to(device).to(torch.float32),
        parent.config.rms_norm_eps,
    )


class LayerSensitivity:
    """Measure KL(original || original with one layer converted), for every converted layer.

    Uses the first MEASURED_TOKENS tokens of the text. Exact: a residual for each converted layer
    runs through the original layers above it.
    """

    def __init__(
        self, rows: TokenRows, config: MoLConfig, embedding: Tensor, device: torch.device
    ) -> None:
        few = rows.select(slice(0, max(1, MEASURED_TOKENS // rows.input_ids.shape[1])))
        if not few.num_targets:
            few = rows
        self._residuals = open_residuals(few, config, embedding, device)
        self._with_one_converted: dict[int, Tensor] = {}

    def advance(self, index: int, original: Layer, converted: Layer) -> None:
        """Move all residuals past layer `index`. converted: `original` where it is kept."""
        run, before = self._residuals.chunks.run, self._residuals.parent
        residuals = {i: run(original, x) for i, x in self._with_one_converted.items()}
        self._with_one_converted = residuals
        if converted is not original:
            self._with_one_converted[index] = run(converted, before)
        self._residuals.advance(original, original)

    def kl_by_layer(self, head: OutputHead) -> dict[int, float]:
        """Return the KL of each converted layer, nats per predicted token. After the last layer."""
        return {
            i: head.losses(self._residuals, x)["kl"] for i, x in self._with_one_converted.items()
        }


def split_rows(rows: TokenRows) -> tuple[TokenRows, TokenRows]:
    """Split rows into those to fit layers on and those to measure them on.

    The latter are the last rows, of up to MEASURED_TOKENS tokens and at most half of all. A single
    row is used for both.
    """
    if len(rows) == 1:
        return rows, rows
    kept = min(max(1, MEASURED_TOKENS // rows.input_ids.shape[1]), len(rows) // 2)
    return rows.select(slice(0, -kept)), rows.select(slice(-kept, None))
