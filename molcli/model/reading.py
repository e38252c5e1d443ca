"""What a share of a dense layer reads from the residual."""

import torch
from torch import Tensor

from molcli.maths.partition import Part
from molcli.maths.projections import equal_say
from molcli.model.block_stack import BlockStack, StackedAttention


def head_rows(heads: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    """(heads * head_dim,) int64, the rows of a projection that belong to these heads."""
    index = torch.tensor(heads, device=device)
    return (index[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()


def reading_gram(block: BlockStack, part: Part) -> Tensor:
    """(d_model, d_model) float64, sum of W^T W over what the part's heads and neurons read from the
    unit-rms residual, attention and FFN scaled to the same energy.

    block: a stack of one dense block with softmax attention.
    """
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, StackedAttention) and mlp.gate_proj is not None
    device = mixer.q_proj.device
    q, kv = (head_rows(heads, mixer.head_dim, device) for heads in (part.heads, part.kv_heads))
    neurons = torch.tensor(part.neurons, device=device)
    attention = torch.cat([mixer.q_proj[0, q], mixer.k_proj[0, kv], mixer.v_proj[0, kv]])
    mlp_reads = torch.cat([mlp.gate_proj[0, neurons], mlp.up_proj[0, neurons]])
    return equal_say(
        (attention * block.input_norm).double(), (mlp_reads * block.post_norm).double()
    )
