"""The flat token stream that every layer works on.

Padding is dropped once, at the model's entry: what is not in the stream can neither be attended
to, nor routed, nor shift a convolution or a recurrent state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStream:
    """n unpadded tokens of a (batch_size, length) batch, in batch-major order.

    sequence: (n,) int64, batch row. time: (n,) int64, column, pads counted.
    document: (n,) int64, ascending over the batch; tokens of different documents never meet.
    position: (n,) int64, for rotary embeddings. padded: whether some of the batch was dropped.
    """

    sequence: Tensor
    time: Tensor
    document: Tensor
    position: Tensor
    num_documents: int
    batch_size: int
    length: int
    padded: bool

    def flatten(self, x: Tensor) -> Tensor:
        """x: (batch_size, length, ...) -> (n, ...), never a view: compiled layers of any length
        guard on what a view is of, and the first layer would have a graph of its own."""
        return x[self.sequence, self.time] if self.padded else x.flatten(0, 1).clone()

    def unflatten(self, x: Tensor) -> Tensor:
        """x: (n, ...) -> (batch_size, length, ...), zeros where padding was."""
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
    """attention_mask: (B, past + T) or None, 0 where padded. position_ids: (B or 1, T).
    document_ids: (B, T), a document is a run of one id in one row. num_documents: how many runs
    have tokens; counted where it is None. For that, and for a mask, the device is waited for.

    Raises ValueError for packed documents in a batch that continues a cache.
    """
    batch_size, length = shape
    keep = None
    if attention_mask is not None:
        keep = attention_mask[:, -length:].bool()
        if bool(keep.all()):
            keep = None
    if keep is None:
        index = torch.arange(batch_size * length, device=device)
        sequence, time = index // length, index % length
    else:
        sequence, time = keep.nonzero(as_tuple=True)
    document, count = sequence, batch_size
    if document_ids is not None:
        if past_length:
            raise ValueError("document_ids cannot be combined with a cache that holds tokens")
        ids = document_ids[sequence, time]
        new = (ids[1:] != ids[:-1]) | (sequence[1:] != sequence[:-1])
        document = torch.cat([sequence.new_zeros(1), new.long().cumsum(0)])
        count = int(document[-1]) + 1 if num_documents is None else num_documents
    if position_ids is None:
        if attention_mask is None:
            position = time + past_length
        else:
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position = counted[:, -length:][sequence, time]
    else:
        position = position_ids.expand(batch_size, length)[sequence, time]
    return TokenStream(
        sequence=sequence,
        time=time,
        document=document,
        position=position,
        num_documents=count,
        batch_size=batch_size,
        length=length,
        padded=keep is not None,
    )
