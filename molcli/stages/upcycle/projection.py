"""A share of a dense layer, its matrices projected onto thin coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.maths.partition import Part
from molcli.maths.projections import leading_directions, turned_towards, unit_trace
from molcli.model.block_stack import StackedAttention
from molcli.model.gated_deltanet import StackedGatedDeltaNet
from molcli.model.layers import DenseLayer, ThinBlocks


@dataclass(frozen=True)
class Bases:
    """read, write: (d_model, r) float64, orthonormal columns. norm: the thin norms' weight, which
    makes up for the energy that the reading leaves out. retained: share of it that stays."""

    read: Tensor
    write: Tensor
    norm: float
    retained: float


class Share:
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
        assert isinstance(mixer, StackedAttention) and block.mlp.gate_proj is not None
        self.mixer, self.part, self.parts = mixer, part, parts
        device = mixer.q_proj.device
        self.index = {
            "q": _rows_of(part.heads, mixer.head_dim, device),
            "kv": _rows_of(part.kv_heads, mixer.head_dim, device),
            "ff": torch.tensor(part.neurons, device=device),
        }
        attention_norm, mlp_norm = block.input_norm.double(), block.post_norm.double()
        self.q, self.k, self.v = (
            getattr(mixer, f"{name}_proj")[0, self.index[rows]].double() * attention_norm
            for name, rows in (("q", "q"), ("k", "kv"), ("v", "kv"))
        )
        self.gate, self.up = (
            weight[0, self.index["ff"]].double() * mlp_norm
            for weight in (block.mlp.gate_proj, block.mlp.up_proj)
        )
        shares = torch.tensor([1 / head_visits[h] for h in part.heads], device=device).double()
        self.o = mixer.o_proj[0][:, self.index["q"]].double() * shares.repeat_interleave(
            mixer.head_dim
        )
        shares = torch.tensor([1 / neuron_visits[n] for n in part.neurons], device=device).double()
        self.down = block.mlp.down_proj[0][:, self.index["ff"]].double() * shares


def svd_bases(share: Share, rank: int) -> Bases:
    """Leading right singular vectors of what reads, left ones of what writes, attention and FFN
    with equal say.

    The thin norms' weight is 1: right for a residual with the same energy in every direction, of
    which weights know nothing else.
    """
    reading, writing = (
        unit_trace(a.mT @ a) + unit_trace(b.mT @ b)
        for a, b in (
            (torch.cat([share.q, share.k, share.v]), torch.cat([share.gate, share.up])),
            (share.o.mT, share.down.mT),
        )
    )
    read, retained = leading_directions(reading, rank)
    write, _ = leading_directions(writing, rank)
    return Bases(read, turned_towards(write, read), 1.0, retained)


def pca_bases(moment: Tensor, rank: int) -> Bases:
    """The residual's leading principal axes, to read and to write."""
    axes, retained = leading_directions(moment, rank)
    return Bases(axes, axes, (retained * len(moment) / rank) ** 0.5, retained)


def project(stack: ThinBlocks, blocks: slice, share: Share, bases: Bases) -> None:
    """Sets some blocks of a stack, all alike. What Gated DeltaNet has beyond q, k, v and o stays
    as it was drawn."""
    read, write, block, source = bases.read, bases.write, stack.block, share.mixer
    stack.thin_in[blocks], stack.thin_out[blocks] = read.mT.float(), write.float()
    block.input_norm[blocks] = block.post_norm[blocks] = bases.norm
    mixer, mlp = block.mixer, block.mlp
    assert mlp.gate_proj is not None
    values = [
        (mixer.q_proj, share.q @ read),
        (mixer.k_proj, share.k @ read),
        (mixer.v_proj, share.v @ read),
        (mixer.o_proj, write.mT @ share.o),
        (mlp.gate_proj, share.gate @ read),
        (mlp.up_proj, share.up @ read),
        (mlp.down_proj, write.mT @ share.down),
    ]
    if isinstance(mixer, StackedGatedDeltaNet):  # a key-value head for every query head
        copies = len(share.part.heads) // len(share.part.kv_heads)
        for i in (1, 2):
            parameter, value = values[i]
            heads = value.unflatten(0, (-1, source.head_dim))
            values[i] = parameter, heads.repeat_interleave(copies, dim=0).flatten(0, 1)
    else:
        for mine, bias, rows in (
            (mixer.q_bias, source.q_bias, "q"),
            (mixer.k_bias, source.k_bias, "kv"),
            (mixer.v_bias, source.v_bias, "kv"),
        ):
            if mine is not None and bias is not None:
                values.append((mine, bias[0, share.index[rows]]))
        for mine, norm in ((mixer.q_norm, source.q_norm), (mixer.k_norm, source.k_norm)):
            if mine is not None and norm is not None:
                values.append((mine, norm[0]))
        if mixer.o_bias is not None and source.o_bias is not None:
            values.append((mixer.o_bias, write.mT @ source.o_bias[0].double() / share.parts))
    for parameter, value in values:
        parameter[blocks] = value.to(parameter)


def _rows_of(heads: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    index = torch.tensor(heads, device=device)
    return (index[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()
