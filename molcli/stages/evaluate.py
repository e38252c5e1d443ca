"""How well a model predicts held-out text, beside its parent."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from molcli.config.sections import EvaluateConfig
from molcli.errors import MolError
from molcli.io.data import load_rows
from molcli.io.packing import Batch
from molcli.io.parent import Parent
from molcli.io.tokenizer import open_tokenizer
from molcli.maths.losses import Head, token_losses
from molcli.maths.parameters import count_parameters
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.teacher import open_teacher
from molcli.progress import Progress, silent


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
def evaluate(
    checkpoint: Path,
    parent: Parent | None,
    data: str,
    config: EvaluateConfig,
    progress: Progress = silent,
) -> Evaluation:
    """Measures a checkpoint on the first config.tokens of `data`, in the file's order.

    Both models see the same packed rows, in the same precision: that of the checkpoint on a GPU,
    fp32 on a CPU; logits are fp32. Raises MolError for a checkpoint, parent or data that cannot
    be used.
    """
    device = default_device()
    model = open_checkpoint(checkpoint, device)
    dense = None if parent is None else open_teacher(parent, model, model.dtype)
    rows = load_rows(
        data,
        open_tokenizer(checkpoint),
        vocab_size=model.config.vocab_size,
        length=config.context_length,
        limit=config.tokens,
        keep_short=True,
    )
    sums = torch.zeros(5, dtype=torch.float64)
    seen = 0
    for batch in rows.batches(config.batch_size):
        batch = batch.to(device)
        heads = [_head(net, batch) for net in ([model] if dense is None else [model, dense])]
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
        raise MolError(f"data `{data}` has no token that another one precedes")
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
