"""What `forward` accepts from transformers' callers, and what it refuses.

Callers of transformers name the cache `past_key_values` up to 5.23 and `cache` from 5.24 on, and
mark packed documents in three ways. Everything is brought to one form here: a Mixture of Layers
cache and `document_ids`. Arguments that the model cannot honour raise an error instead of being
ignored.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from molcli.model.decoding.cache import MoLCache

# The name of the cache in the installed transformers' outputs and `generate`.
CACHE_FIELD = (
    "cache" if "cache" in {f.name for f in fields(MoeModelOutputWithPast)} else "past_key_values"
)

# Keywords that transformers sends and that change nothing here: sizes for FlashAttention's kernels,
# and positions of the cache, which the cache itself knows.
IGNORED = frozenset({"max_length_q", "max_length_k", "cache_position"})
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
# Keywords of the loss functions of transformers.
LOSS = frozenset({"num_items_in_batch", "shift_labels", "ignore_index"})
_INSTEAD = {
    "head_mask": "remove heads from the checkpoint instead",
    "token_type_ids": "call the tokenizer with return_token_type_ids=False",
}


def refuse_unknown(given: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse keywords that `forward` does not know.

    Args:
        given: keywords and their values; one that is None counts as left out.
        known: names that the caller handles.

    Raises:
        TypeError: for any other keyword, with what to use instead.
    """
    unknown = sorted(name for name, x in given.items() if x is not None and name not in known)
    if unknown:
        instead = _INSTEAD.get(unknown[0], "leave it out")
        raise TypeError(
            f"Mixture of Layers models do not know the keyword {unknown[0]!r} of forward; {instead}"
        )


def refuse_attentions(output_attentions: bool | None) -> None:
    """Refuse to return attention weights, which no kernel here keeps.

    Raises:
        ValueError: where they are asked for.
    """
    if output_attentions:
        raise ValueError(
            "Mixture of Layers models do not return attention weights; use output_hidden_states, "
            "output_router_logits or the output's `routing` instead of output_attentions"
        )


def given_cache(past_key_values: Any, cache: Any) -> MoLCache | None:
    """Return the cache that was given under either of its names.

    Raises:
        ValueError: for two caches.
        TypeError: for a cache of another kind than the model's own.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give the cache once, as `cache` or as `past_key_values`")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, MoLCache):
        raise TypeError(
            f"a {type(found).__name__} has no place for the states of thin blocks; leave the cache "
            'out, or call generate(..., cache_implementation="static")'
        )
    return found


def check_mask(attention_mask: Any, batch_size: int, total: int) -> None:
    """Refuse masks that are not one 0 or 1 for each token.

    Args:
        attention_mask: (batch_size, total) for tokens in the cache and new ones, or None.

    Raises:
        ValueError: for another shape, a mask of pairs of tokens, or one that counts documents.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        found = (
            f"a tensor of {attention_mask.ndim} dimensions"
            if isinstance(attention_mask, Tensor)
            else f"a {type(attention_mask).__name__}"
        )
        raise ValueError(
            f"attention_mask is {found}; Mixture of Layers models take one of shape (batch, "
            "tokens) that is 0 at padding, and packed documents as position_ids that start again "
            "at 0"
        )
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < total:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens seen so far and "
            f"given now have {(batch_size, total)}"
        )


def packed_documents(shape: tuple[int, int], packing: Mapping[str, Any]) -> Tensor | None:
    """Number the documents that a collator packed into one row, where it says so by name.

    Args:
        shape: batch size B and length T of the new tokens.
        packing: `seq_idx`, (B, T) int, a number for each document, or `cu_seq_lens_q` and
            `cu_seq_lens_k`, (documents + 1,) int, where documents begin in the flattened batch.

    Returns:
        (B, T) int64, a number for each document, or None where nothing is said.

    Raises:
        ValueError: for boundaries that do not fit the batch, or differ for queries and keys.
    """
    batch_size, length = shape
    if (seq_idx := packing.get("seq_idx")) is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, the tokens have {shape}")
        return seq_idx.long()
    both = packing.get("cu_seq_lens_q"), packing.get("cu_seq_lens_k")
    given: list[Tensor] = [bounds for bounds in both if bounds is not None]
    if not given:
        return None
    bounds = given[0]
    if not torch.equal(bounds, given[-1]):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k differ; give the same boundaries for both"
        )
    total = batch_size * length
    inside = bounds[0] == 0 and bounds[-1] == total and bool((bounds[1:] >= bounds[:-1]).all())
    if not inside:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the number of tokens, {total}; "
            f"it is {bounds.tolist()}"
        )
    token = torch.arange(total, device=bounds.device)
    return torch.bucketize(token, bounds.long(), right=True).view(shape)
