"""Select a part of a dense layer, fold its norms into its weights, and project it to a thin width.

Input: a dense layer with softmax attention, as a stack of one block at width d_model, and the
`BlockPart` that a thin block takes over. Output: `reading_gram`, (d_model, d_model), which is all
that a fit needs of the weights; or, without a fit, a thin block's weights at width r by `project`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.fitting.partition import BlockPart
from molcli.kernels.grouped_linear import grouped_linear
from molcli.maths.bases import leading_directions, procrustes_rotation, trace_normalised_sum
from molcli.model.blocks import BlockStack
from molcli.model.layers import DenseLayer, ThinBlocks
from molcli.model.mixers import Attention
from molcli.model.mixers.base import AttentionSample, Regression


def head_rows(heads: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    """Return the rows of a projection that belong to some heads, (len(heads) * head_dim,) int64."""
    index = torch.tensor(heads, device=device)
    return (index[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()


def reading_gram(block: BlockStack, part: BlockPart) -> Tensor:
    """Sum W^T W over the projections with which a part reads the unit-rms residual.

    Attention (q, k, v) and FFN (gate, up) are scaled to the same trace.

    Args:
        block: a stack of one dense block with softmax attention.
        part: the heads and neurons that count.

    Returns:
        (d_model, d_model) float64.
    """
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, Attention) and mlp.gate_proj is not None
    device = mixer.q_proj.device
    q, kv = (head_rows(heads, mixer.head_dim, device) for heads in (part.heads, part.kv_heads))
    neurons = torch.tensor(part.neurons, device=device)
    attention = torch.cat([mixer.q_proj[0, q], mixer.k_proj[0, kv], mixer.v_proj[0, kv]])
    ffn = torch.cat([mlp.gate_proj[0, neurons], mlp.up_proj[0, neurons]])
    return trace_normalised_sum(
        _scale(attention, block.input_norm).double(), _scale(ffn, block.post_norm).double()
    )


def _scale(weight: Tensor, norm: Tensor | None) -> Tensor:
    """Multiply the columns of weight, (out, d_model), by norm, (1, d_model), if there is one."""
    return weight if norm is None else weight * norm


class FoldedWeights:
    """The weights of a part with the parent's norms folded in, float64.

    q: (heads * head_dim, d_model). k, v: (kv_heads * head_dim, d_model). gate, up: (neurons,
    d_model). o: (d_model, heads * head_dim). down: (d_model, neurons).

    Args:
        dense: the parent's layer, with softmax attention.
        part: the heads and neurons to select.
        head_counts, neuron_counts: how many parts hold each head and each neuron. What a head or
            neuron writes is divided by its count.
        num_parts: number of parts, among which the output bias is divided.
    """

    def __init__(
        self,
        dense: DenseLayer,
        part: BlockPart,
        head_counts: Mapping[int, int],
        neuron_counts: Mapping[int, int],
        num_parts: int,
    ) -> None:
        block, mixer = dense.block, dense.block.mixer
        assert isinstance(mixer, Attention) and block.mlp.gate_proj is not None
        self.mixer, self.num_parts = mixer, num_parts
        device = mixer.q_proj.device
        self.rows = {
            "q": head_rows(part.heads, mixer.head_dim, device),
            "kv": head_rows(part.kv_heads, mixer.head_dim, device),
            "ffn": torch.tensor(part.neurons, device=device),
        }
        attention_norm, mlp_norm = (
            None if norm is None else norm.double() for norm in (block.input_norm, block.post_norm)
        )
        self.q, self.k, self.v = (
            _scale(getattr(mixer, f"{name}_proj")[0, self.rows[rows]].double(), attention_norm)
            for name, rows in (("q", "q"), ("k", "kv"), ("v", "kv"))
        )
        self.gate, self.up = (
            _scale(weight[0, self.rows["ffn"]].double(), mlp_norm)
            for weight in (block.mlp.gate_proj, block.mlp.up_proj)
        )
        heads, neurons = (
            torch.tensor([counts[i] for i in own], dtype=torch.float64, device=device)
            for counts, own in ((head_counts, part.heads), (neuron_counts, part.neurons))
        )
        o = mixer.o_proj[0, :, self.rows["q"]].double()
        self.o = o / heads.repeat_interleave(mixer.head_dim)
        self.down = block.mlp.down_proj[0, :, self.rows["ffn"]].double() / neurons


@dataclass(frozen=True)
class Bases:
    """The bases of a thin block's residual at width r, inside the parent's residual.

    read, write: (d_model, r) float64, orthonormal columns. norm: weight of the thin norms, which
    makes up for the energy that `read` loses. retained: fraction of that energy that it retains.
    """

    read: Tensor
    write: Tensor
    norm: float
    retained: float


def svd_bases(weights: FoldedWeights, rank: int) -> Bases:
    """Truncate the weights alone: their leading singular vectors, attention and FFN at equal trace.

    `read` has the right singular vectors of what reads; `write` the left ones of what writes,
    rotated towards `read`. The thin norms' weight is 1: right for a residual with the same energy
    in every direction, and the weights tell nothing else about it.
    """
    reading = trace_normalised_sum(
        torch.cat([weights.q, weights.k, weights.v]), torch.cat([weights.gate, weights.up])
    )
    writing = trace_normalised_sum(weights.o.mT, weights.down.mT)
    read, retained = leading_directions(reading, rank)
    write, _ = leading_directions(writing, rank)
    return Bases(read, procrustes_rotation(write, read), 1.0, retained)


def pca_bases(moment: Tensor, rank: int) -> Bases:
    """Read and write the residual's leading principal axes.

    moment: (d_model, d_model) float64, second moment of the unit-rms residual.
    """
    axes, retained = leading_directions(moment, rank)
    return Bases(axes, axes, (retained * len(moment) / rank) ** 0.5, retained)


def project(stack: ThinBlocks, blocks: slice, weights: FoldedWeights, bases: Bases) -> None:
    """Set some blocks of a stack, all to the same values, to the projected weights.

    Parameters of a mixer that softmax attention does not have keep their initial values.
    """
    read, write, block, source = bases.read, bases.write, stack.block, weights.mixer
    mixer, mlp = block.mixer, block.mlp
    assert mlp.gate_proj is not None
    # A mixer without shared key-value heads gets a copy for every query head.
    copies = mixer.k_proj.shape[1] // len(weights.k)
    k, v = (
        x.unflatten(0, (-1, source.head_dim)).repeat_interleave(copies, dim=0).flatten(0, 1)
        for x in (weights.k, weights.v)
    )
    assert block.input_norm is not None and block.post_norm is not None
    values = [
        (stack.thin_in, read.mT),
        (stack.thin_out, write),
        (block.input_norm, bases.norm * torch.ones(len(read.mT))),
        (block.post_norm, bases.norm * torch.ones(len(read.mT))),
        (mixer.q_proj, weights.q @ read),
        (mixer.k_proj, k @ read),
        (mixer.v_proj, v @ read),
        (mixer.o_proj, write.mT @ weights.o),
        (mlp.gate_proj, weights.gate @ read),
        (mlp.up_proj, weights.up @ read),
        (mlp.down_proj, write.mT @ weights.down),
    ]
    for name, rows in (("q_bias", "q"), ("k_bias", "kv"), ("v_bias", "kv")):
        if getattr(mixer, name, None) is not None:
            values.append((getattr(mixer, name), getattr(source, name)[0, weights.rows[rows]]))
    for name in ("q_norm", "k_norm"):
        if getattr(mixer, name, None) is not None:
            values.append((getattr(mixer, name), getattr(source, name)[0]))
    o_bias = getattr(mixer, "o_bias", None)
    if o_bias is not None and source.o_bias is not None:
        values.append((o_bias, write.mT @ source.o_bias[0].double() / weights.num_parts))
    for parameter, value in values:
        parameter[blocks] = value.to(parameter)


def fit_projection(
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    num_heads: int,
    head_dim: int,
    inputs: Sequence[AttentionSample],
    regress: Regression,
) -> Tensor:
    """Turn q_proj, k_proj or v_proj of softmax attention into that of a mixer that has a
    key-value head for every query head.

    Gated DeltaNet has a key-value head for every query head, no biases here, and brings q and k to
    unit length without weights of its own: a bias is fitted into the matrix, and the weights of a
    norm multiply the matrix's rows.

    Args:
        weight: (B, heads * head_dim, d), of query or of key-value heads.
        bias: (B, heads * head_dim), or None.
        norm: (B, head_dim), the weight of q_norm or k_norm, or None.
        num_heads: query heads.
        head_dim: width of a head.
        inputs: the whole text, in order.
        regress: used where there is a bias.

    Returns:
        (B, num_heads * head_dim, d).
    """
    if bias is not None:
        samples = (
            (i.read, grouped_linear(i.read, weight, i.rows, bias), i.rows.offsets) for i in inputs
        )
        weight = regress(samples).to(weight)
    heads = weight.unflatten(1, (-1, head_dim))
    if norm is not None:
        heads = heads * norm[:, None, :, None]
    return repeat_kv_heads(heads, num_heads).flatten(1, 2)


def repeat_kv_heads(heads: Tensor, num_heads: int) -> Tensor:
    """Repeat key-value heads for their query heads. (B, kv_heads, ...) -> (B, num_heads, ...)."""
    return heads.repeat_interleave(num_heads // heads.shape[1], dim=1)
