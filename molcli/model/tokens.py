"""The flat stream of tokens that every layer reads.

Padding is dropped once, before the first layer. What is not in the stream is neither attended to
nor routed, and changes no convolution or recurrent state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStream:
    """n unpadded tokens of a (batch_size, length) batch, row by row.

    Attributes:
        sequence: (n,) int64, row of the batch.
        time: (n,) int64, column of the batch, padding counted.
        document: (n,) int64, ascending; tokens of different documents do not see each other.
        position: (n,) int64, for rotary embeddings.
        padded: whether padding was dropped.
        packed: whether a row may hold several documents.
    """

    sequence: Tensor
    time: Tensor
    document: Tensor
    position: Tensor
    num_documents: int
    batch_size: int
    length: int
    padded: bool
    packed: bool

    def flatten(self, x: Tensor) -> Tensor:
        """Drop padding: x, (batch_size, length, ...) -> (n, ...).

        The result is never a view: compiled layers guard on the base of a view, and the first layer
        would need a graph of its own.
        """
        return x[self.sequence, self.time] if self.padded else x.flatten(0, 1).clone()

    def unflatten(self, x: Tensor) -> Tensor:
        """Restore the batch: x, (n, ...) -> (batch_size, length, ...), zeros at padding."""
        if not self.padded:
            return x.view(self.batch_size, self.length, *x.shape[1:])
        out = x.new_zeros(self.batch_size, self.length, *x.shape[1:])
        return out.index_put((self.sequence, self.time), x)


def token_stream(
    shape: tuple[int, int],
    device: torch.device,
    *,
    past_length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    num_documents: int | None = None,
) -> TokenStream:
    """Drop padding from a batch and say where its documents begin.

    Args:
        shape: batch size B and length T of the new tokens.
        past_length: tokens of each row, padding counted, that a cache holds already.
        attention_mask: (B, at least past_length + T), 0 at padding, or None.
        position_ids: (B or 1, T) int, for rotary embeddings. Where `document_ids` is None and no
            cache holds tokens, a document begins wherever the position does not rise.
        document_ids: (B, T) int; a document is a run of one number in one row.
        num_documents: how many documents have tokens, or None to count them.

    Returns:
        The tokens that are not padding. The device is waited for where there is a mask, where
        documents are to be counted, and where positions are to be searched for documents.

    Raises:
        ValueError: for packed documents in a batch that continues a cache, and for a mask with
            other entries than 0 and 1.
    """
    batch_size, length = shape
    keep = None
    if attention_mask is not None:
        mask = attention_mask[:, -length:]
        keep = mask.bool()
        whole, binary = torch.stack([keep.all(), (mask == keep).all()]).tolist()
        if not binary:
            raise ValueError(
                "attention_mask has entries other than 0 or 1; give packed documents as "
                "position_ids that start again at 0, or as document_ids"
            )
        if whole:
            keep = None
    if keep is None:
        index = torch.arange(batch_size * length, device=device)
        sequence, time = index // length, index % length
    else:
        sequence, time = keep.nonzero(as_tuple=True)
    if position_ids is None:
        if attention_mask is None:
            position = time + past_length
        else:
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position = counted[:, -length:][sequence, time]
    else:
        position = position_ids.expand(batch_size, length)[sequence, time]
    begins = None
    if document_ids is not None:
        if past_length:
            raise ValueError("packed documents cannot continue a cache that holds tokens")
        ids = document_ids[sequence, time]
        begins = ids[1:] != ids[:-1]
    elif position_ids is not None and not past_length and length > 1:
        restarts = (position[1:] <= position[:-1]) & (sequence[1:] == sequence[:-1])
        begins = restarts if bool(restarts.any()) else None
    document, count = sequence, batch_size
    if begins is not None:
        begins = begins | (sequence[1:] != sequence[:-1])
        document = torch.cat([sequence.new_zeros(1), begins.long().cumsum(0)])
        count = int(document[-1]) + 1 if num_documents is None else num_documents
        if document_ids is not None and position_ids is None:
            token = torch.arange(len(document), device=device)
            starts = torch.where(begins, token[1:], 0)
            position = token - torch.cat([token[:1], starts]).cummax(0).values
    return TokenStream(
        sequence=sequence,
        time=time,
        document=document,
        position=position,
        num_documents=count,
        batch_size=batch_size,
        length=length,
        padded=keep is not None,
        packed=begins is not None,
    )
