"""Run text through the parent once, and keep its most likely tokens for many trainings."""

from pathlib import Path

import torch
from torch import Tensor

from molcli.config.sections import Data, TrainConfig
from molcli.data.logits import FORMAT, SHARD_BYTES, write_logits
from molcli.data.mixture import load_rows
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.files.folders import refuse_existing
from molcli.maths.losses import Head, top_k_predictions
from molcli.model.checkpoint import default_device
from molcli.model.parent import load_dense
from molcli.model.precision import matmul_dtype
from molcli.progress import Progress, silent


@torch.no_grad()
def cache_logits(
    parent: Parent,
    data: Data,
    config: TrainConfig,
    out: Path,
    *,
    top_k: int,
    resume: bool = False,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a cache of the rows that a training with `config` would see; returns their tokens.

    Of the config count context_length, seed, precision, micro_batch_size (rows at once), and tokens
    (at most so many; less data is cached once, and training repeats it). A run that was stopped
    leaves its whole shards, and resume=True adds the others: the same tensors as without the stop.
    Raises MolError for data or a folder that cannot be used, a top_k outside the vocabulary, or to
    resume another cache.
    """
    if not resume:
        refuse_existing(out)  # before anything is read
    vocabulary = parent.config.vocab_size
    if not 1 <= top_k <= vocabulary:
        raise MolError(f"--top-k is {top_k}", allowed=f"1 to {vocabulary}, the parent's vocabulary")
    tokenizer, length = parent.tokenizer(), config.context_length
    step_tokens = config.batch_size * length  # a training rounds its tokens up to whole steps
    rows = load_rows(
        data,
        tokenizer,
        vocab_size=vocabulary,
        length=length,
        limit=-(-config.tokens // step_tokens) * step_tokens,
        seed=config.seed,
        progress=progress,
    )
    per_row = length * (top_k * 6 + 12)
    about = {
        "format": FORMAT,
        "parent": parent.fingerprint(),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "vocab_size": vocabulary,
        "top_k": top_k,
        "context_length": length,
        "data": rows.fingerprint(),
        "sources": {name: len(part) for name, part in rows.sources.items()},
        "weights": rows.weights,
        "rows": len(rows),
        "rows_per_shard": max(1, shard_bytes // per_row),
    }
    device = default_device()
    model = load_dense(parent, matmul_dtype(config, device), device)

    def predict(first: int, last: int) -> dict[str, Tensor]:
        packed = rows.select(torch.arange(first, last))
        ids, log_probs, rest = [], [], []
        for done in range(0, last - first, config.micro_batch_size):
            batch = packed.batch(slice(done, done + config.micro_batch_size), device)
            hidden = model.model(**batch.inputs(), use_cache=False).last_hidden_state
            kept = top_k_predictions(Head(hidden, model.lm_head.weight), top_k)
            ids.append(kept.ids.int().cpu())
            log_probs.append(kept.log_probs.half().cpu())
            rest.append(kept.rest.float().cpu())
            progress((first + done + len(batch.input_ids)) * length, rows.tokens)
        return {
            "input_ids": packed.input_ids.contiguous(),
            "document_ids": packed.document_ids.contiguous(),
            "lengths": packed.lengths.contiguous(),
            "ids": torch.cat(ids),
            "log_probs": torch.cat(log_probs),
            "rest": torch.cat(rest),
        }

    write_logits(out, about, predict, resume=resume)
    return rows.tokens
