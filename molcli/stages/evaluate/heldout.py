"""How well a model predicts held-out text, beside its parent."""

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
from molcli.maths.losses import Head, token_losses
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.parent import open_teacher
from molcli.progress import Progress


@dataclass(frozen=True)
class Models:
    """Both in the same precision and on the same device. tokenizer: None if there is none."""

    model: MoLForCausalLM
    parent: MoLForCausalLM | None
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def named(self) -> dict[str, MoLForCausalLM]:
        """Those that there are, as "model" and "parent"."""
        return {"model": self.model} | ({} if self.parent is None else {"parent": self.parent})


def open_models(checkpoint: Path, parent: Parent | None) -> Models:
    """In the checkpoint's precision on a GPU, in fp32 on a CPU.

    Raises MolError for a checkpoint that cannot be read, or a parent with another vocabulary.
    """
    model = open_checkpoint(checkpoint, default_device())
    dense = None if parent is None else open_teacher(parent, model, model.dtype)
    if dense is not None:
        dense.generation_config = model.generation_config  # both generate by the same rules
    return Models(model, dense, open_tokenizer(checkpoint))


@dataclass(frozen=True)
class Evaluation:
    """Means over the predicted tokens of held-out text.

    tokens: predicted. ce: cross-entropy of the text, nats a token. params_total, params_active:
    all trainable parameters, and those that one token uses. Beside the parent (None without one):
    kl: KL(parent || model), nats a token. agreement: share of tokens where both rank the same
    next token first. parent_ce, parent_params: the parent's own.
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
        """The fields as plain values."""
        return asdict(self)


@torch.no_grad()
def predict(models: Models, rows: TokenRows, batch_size: int, progress: Progress) -> Evaluation:
    """Both models on the same packed rows; logits are fp32. Raises MolError if every token is a
    document of its own.
    """
    model, dense = models.model, models.parent
    sums = torch.zeros(5, dtype=torch.float64)
    seen = 0
    for batch in rows.batches(batch_size, models.device):
        heads = [_head(net, batch) for net in models.named().values()]
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
        seen += batch.tokens
        progress(seen, rows.tokens)
    tokens = int(sums[4])
    if tokens == 0:
        raise MolError("the data has no token that another one precedes")
    ce, kl, parent_ce, agreement = (sums[:4] / tokens).tolist()
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
    """In fp32: bf16 logits would be rounded by more than the differences that are measured."""
    hidden = model.model(**batch.inputs(), use_cache=False).last_hidden_state
    return Head(hidden.float(), model.lm_head.weight.float())
