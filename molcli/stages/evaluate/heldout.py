"""Open a model and its parent, and measure how well they predict held-out text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from molcli.data.packing import Batch, TokenRows
from molcli.data.tokenizer import open_tokenizer
from molcli.errors import MolError
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import Parent
from molcli.maths.figures import check_figures
from molcli.maths.losses import Head, token_losses
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.parent import open_teacher
from molcli.progress import Progress


@dataclass(frozen=True)
class Models:
    """A model and its parent, in the same precision and on the same device.

    Attributes:
        model: the model to evaluate.
        parent: the dense model that it is compared with, if any.
        tokenizer: the checkpoint's, if it has one.
    """

    model: MoLForCausalLM
    parent: MoLForCausalLM | None
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def positions(self) -> int:
        """Tokens that both models have positions for."""
        return min(model.config.max_position_embeddings for model in self.named().values())

    def check_context(self, length: int, setting: str, *, found: str = "") -> None:
        """Refuse a context that is longer than one of the models allows; see `ContextLimit`."""
        for model in self.named().values():
            model.config.check_context(length, setting, found=found)

    def named(self) -> dict[str, MoLForCausalLM]:
        """Return the models by name: "model", and "parent" if there is one."""
        return {"model": self.model} | ({} if self.parent is None else {"parent": self.parent})


def open_models(checkpoint: Path, parent: Parent | None) -> Models:
    """Open both models, in the checkpoint's precision on a GPU, in fp32 on a CPU.

    Raises:
        MolError: the checkpoint cannot be read, or the parent has another vocabulary.
    """
    model = open_checkpoint(checkpoint, default_device())
    dense = None if parent is None else open_teacher(parent, model, model.dtype)
    if dense is not None:
        dense.generation_config = model.generation_config  # both generate by the same rules
    return Models(model, dense, open_tokenizer(checkpoint))


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out text: means over the predicted tokens.

    Figures that need a parent are None without one.

    Attributes:
        tokens: number of predicted tokens.
        ce: cross-entropy of the text, nats a token.
        params_total: trainable parameters of the model.
        params_active: parameters that one token uses.
        kl: KL(parent || model), nats a token.
        agreement: share of tokens for which both rank the same next token first.
        parent_ce: cross-entropy of the parent, nats a token.
        parent_params: trainable parameters of the parent.
    """

    tokens: int
    ce: float
    params_total: int
    params_active: int
    kl: float | None = None
    agreement: float | None = None
    parent_ce: float | None = None
    parent_params: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate_rows(
    models: Models, rows: TokenRows, batch_size: int, progress: Progress
) -> Evaluation:
    """Evaluate both models on the same packed rows, with logits in fp32.

    Args:
        models: the model, and its parent if there is one.
        rows: packed held-out text.
        batch_size: rows at a time.
        progress: called with processed and total tokens.

    Raises:
        MolError: no document has a second token, so that there is nothing to predict, or a loss is
            not finite.
    """
    model, dense = models.model, models.parent
    sums = torch.zeros(5, dtype=torch.float64)
    done = 0
    for batch in rows.batches(batch_size, models.device):
        heads = [_head(one, batch) for one in models.named().values()]
        losses = token_losses(heads[0], batch.labels, None if dense is None else heads[1])
        sums += torch.stack(
            [
                losses.cross_entropy,
                losses.kl,
                losses.parent_cross_entropy,
                losses.agreement,
                losses.count,
            ]
        ).cpu()
        done += batch.tokens
        progress(done, rows.tokens)
    tokens = int(sums[4])
    if tokens == 0:
        raise MolError(
            "the data has no token that another one precedes",
            allowed="documents of 2 tokens or more",
            hint="longer documents, or more evaluate.tokens",
        )
    ce, kl, parent_ce, agreement = (sums[:4] / tokens).tolist()
    check_figures(
        {
            "the model's cross-entropy": ce,
            "the parent's cross-entropy": parent_ce,
            "the KL divergence from the parent to the model": kl,
        }
    )
    counts = count_parameters(model.config)
    if dense is None:
        return Evaluation(tokens, ce, counts.total, counts.active)
    return Evaluation(
        tokens,
        ce,
        counts.total,
        counts.active,
        kl=kl,
        agreement=agreement,
        parent_ce=parent_ce,
        parent_params=count_parameters(dense.config).total,
    )


def _head(model: MoLForCausalLM, batch: Batch) -> Head:
    """Hidden states and head in fp32: rounding of bf16 logits exceeds the measured differences."""
    hidden = model.model(**batch.inputs(), use_cache=False).last_hidden_state
    return Head(hidden.float(), model.lm_head.weight.float())
