"""How well a model predicts held-out text, beside its parent."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from molcli.errors import MolError
from molcli.io.packing import Batch, TokenRows
from molcli.maths.losses import Head, token_losses
from molcli.maths.parameters import count_parameters
from molcli.model import MoLForCausalLM
from molcli.progress import Progress
from molcli.stages.evaluate.models import Models


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
