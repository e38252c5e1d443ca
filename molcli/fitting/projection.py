"""What a share of a dense layer reads from the residual."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.fitting.partition import Part
from molcli.maths.bases import leading_directions, procrustes_rotation, trace_normalised_sum
from molcli.model.blocks import BlockStack
from molcli.model.layers import DenseLayer, ThinBlocks
from molcli.model.mixers import Attention


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
    assert isinstance(mixer, Attention) and mlp.gate_proj is not None
    device = mixer.q_proj.device
    q, kv = (head_rows(heads, mixer.head_dim, device) for heads in (part.heads, part.kv_heads))
    neurons = torch.tensor(part.neurons, device=device)
    attention = torch.cat([mixer.q_proj[0, q], mixer.k_proj[0, kv], mixer.v_proj[0, kv]])
    mlp_reads = torch.cat([mlp.gate_proj[0, neurons], mlp.up_proj[0, neurons]])
    return trace_normalised_sum(
        _folded(attention, block.input_norm), _folded(mlp_reads, block.post_norm)
    )


def _folded(weight: Tensor, norm: Tensor | None) -> Tensor:
    """weight: (out, d_model), norm: (1, d_model) or None -> their product, float64."""
    return weight.double() if norm is None else weight.double() * norm.double()


@dataclass(frozen=True)
class Bases:
    """read, write: (d_model, r) float64, orthonormal columns. norm: the thin norms' weight, which
    makes up for the energy that the reading leaves out. retained: share of it that stays."""

    read: Tensor
    write: Tensor
    norm: float
    retained: float


class FoldedWeights:
    """A part's matrices with the parent's norms folded in, float64.

    head_visits, neuron_visits: how many parts hold each head and neuron; what several hold is
    divided between them, as the output bias is between all `parts`.
    """

    def __init__(
        self,
        dense: DenseLayer,
        part: Part,
        head_visits: Mapping[int, int],
        neuron_visits: Mapping[int, int],
        parts: int,
    ) -> None:
        block, mixer = dense.block, dense.block.mixer
        assert isinstance(mixer, Attention) and block.mlp.gate_proj is not None
        self.mixer, self.parts = mixer, parts
        device = mixer.q_proj.device
        self.index = {
            "q": head_rows(part.heads, mixer.head_dim, device),
            "kv": head_rows(part.kv_heads, mixer.head_dim, device),
            "ff": torch.tensor(part.neurons, device=device),
        }
        self.q, self.k, self.v = (
            _folded(getattr(mixer, f"{name}_proj")[0, self.index[rows]], block.input_norm)
            for name, rows in (("q", "q"), ("k", "kv"), ("v", "kv"))
        )
        self.gate, self.up = (
            _folded(weight[0, self.index["ff"]], block.post_norm)
            for weight in (block.mlp.gate_proj, block.mlp.up_proj)
        )
        of_head, of_neuron = (
            torch.tensor([visits[i] for i in own], dtype=torch.float64, device=device)
            for visits, own in ((head_visits, part.heads), (neuron_visits, part.neurons))
        )
        o = mixer.o_proj[0, :, self.index["q"]].double()
        self.o = o / of_head.repeat_interleave(mixer.head_dim)
        self.down = block.mlp.down_proj[0, :, self.index["ff"]].double() / of_neuron


def svd_bases(share: FoldedWeights, rank: int) -> Bases:
    """Leading right singular vectors of what reads, left ones of what writes, attention and FFN
    with equal say.

    The thin norms' weight is 1: right for a residual with the same energy in every direction, of
    which weights know nothing else.
    """
    reading, writing = (
        trace_normalised_sum(a, b)
        for a, b in (
            (torch.cat([share.q, share.k, share.v]), torch.cat([share.gate, share.up])),
            (share.o.mT, share.down.mT),
        )
    )
    read, retained = leading_directions(reading, rank)
    write, _ = leading_directions(writing, rank)
    return Bases(read, procrustes_rotation(write, read), 1.0, retained)


def pca_bases(moment: Tensor, rank: int) -> Bases:
    """The residual's leading principal axes, to read and to write."""
    axes, retained = leading_directions(moment, rank)
    return Bases(axes, axes, (retained * len(moment) / rank) ** 0.5, retained)


def project(stack: ThinBlocks, blocks: slice, share: FoldedWeights, bases: Bases) -> None:
    """Sets some blocks of a stack, all alike. What Gated DeltaNet has beyond q, k, v and o stays
    as it was drawn."""
    read, write, block, source = bases.read, bases.write, stack.block, share.mixer
    mixer, mlp = block.mixer, block.mlp
    assert mlp.gate_proj is not None
    # Gated DeltaNet has a key-value head for every query head.
    copies = mixer.k_proj.shape[1] // len(share.k)
    k, v = (
        x.unflatten(0, (-1, source.head_dim)).repeat_interleave(copies, dim=0).flatten(0, 1)
        for x in (share.k, share.v)
    )
    assert block.input_norm is not None and block.post_norm is not None
    values = [
        (stack.thin_in, read.mT),
        (stack.thin_out, write),
        (block.input_norm, bases.norm * torch.ones(len(read.mT))),
        (block.post_norm, bases.norm * torch.ones(len(read.mT))),
        (mixer.q_proj, share.q @ read),
        (mixer.k_proj, k @ read),
        (mixer.v_proj, v @ read),
        (mixer.o_proj, write.mT @ share.o),
        (mlp.gate_proj, share.gate @ read),
        (mlp.up_proj, share.up @ read),
        (mlp.down_proj, write.mT @ share.down),
    ]
    if isinstance(mixer, Attention):
        for name, rows in (("q_bias", "q"), ("k_bias", "kv"), ("v_bias", "kv")):
            if getattr(mixer, name) is not None:
                values.append((getattr(mixer, name), getattr(source, name)[0, share.index[rows]]))
        for name in ("q_norm", "k_norm"):
            if getattr(mixer, name) is not None:
                values.append((getattr(mixer, name), getattr(source, name)[0]))
        if mixer.o_bias is not None and source.o_bias is not None:
            values.append((mixer.o_bias, write.mT @ source.o_bias[0].double() / share.parts))
    for parameter, value in values:
        parameter[blocks] = value.to(parameter)
