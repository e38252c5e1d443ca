"""Cache logits: store the parent's most likely next tokens on a text, for many trainings."""

import math
from pathlib import Path

import torch
from torch import Tensor

from molcli.config.sections import Data, TrainConfig
from molcli.config.stages import repeats_in_force
from molcli.data.logits import FORMAT, SHARD_BYTES, cache_folder, write_logits
from molcli.data.mixture import load_rows
from molcli.data.repeats import list_tokens
from molcli.data.tokenizer import tokenizer_fingerprint
from molcli.errors import MolError
from molcli.families.parent import Parent
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
    """Write a cache of the parent's predictions on the rows that a training would see.

    A stopped run leaves its complete shards. Resuming it writes the others, with the same tensors
    as without the stop.

    Args:
        parent: the dense model.
        data: source of the text.
        config: of the training; context_length, seed, precision, tokens, repeats and
            micro_batch_size (rows per forward pass) matter. Data of fewer than `tokens` tokens is
            cached once, with its part of rows that repeat themselves; training repeats both.
        out: folder of the cache.
        top_k: number of tokens to store for each position.
        resume: continue a stopped run.
        progress: called with processed and total tokens.
        shard_bytes: size of a shard.

    Returns:
        The number of cached tokens.

    Raises:
        MolError: the data or the folder cannot be used, top_k is outside the vocabulary, the
            folder to resume holds another cache, or a prediction is not finite.
    """
    vocabulary = parent.config.vocab_size
    if not 1 <= top_k <= vocabulary:
        raise MolError(f"--top-k is {top_k}", allowed=f"1 to {vocabulary}, the parent's vocabulary")
    tokenizer, length = parent.tokenizer(), config.context_length
    parent.check_context(length, "train.context_length")
    with cache_folder(out, resume=resume):  # before anything is read
        step_tokens = config.batch_size * length  # a training rounds its tokens up to whole steps
        num_rows = -(-config.tokens // step_tokens) * config.batch_size
        repeats = repeats_in_force(config.repeats, length)
        plain = load_rows(
            data,
            tokenizer,
            vocab_size=vocabulary,
            length=length,
            limit=math.ceil(num_rows * (1 - repeats)) * length,
            seed=config.seed,
            progress=progress,
        )
        count = math.ceil(len(plain) * repeats / (1 - repeats))
        tokens = list_tokens(tokenizer, vocabulary)
        rows = plain.with_repeats(repeats, count=count, seed=config.seed, tokens=tokens)
        per_row = length * (top_k * 6 + 12)
        metadata = {
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
                top = top_k_predictions(Head(hidden, model.lm_head.weight), top_k)
                ids.append(top.ids.int().cpu())
                log_probs.append(top.log_probs.half().cpu())
                rest.append(top.rest.float().cpu())
                progress((first + done + len(batch.input_ids)) * length, rows.tokens)
            return {
                "input_ids": packed.input_ids.contiguous(),
                "document_ids": packed.document_ids.contiguous(),
                "lengths": packed.lengths.contiguous(),
                "ids": torch.cat(ids),
                "log_probs": torch.cat(log_probs),
                "rest": torch.cat(rest),
            }

        write_logits(out, metadata, predict)
        return rows.tokens
