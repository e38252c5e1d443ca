"""Gated DeltaNet that starts from softmax attention: from its projections, and from what it read.

Decay and beta are constants of a head, searched on a grid: for every value the heads run, and a
ridge regression per head tells how much of the softmax head's output a linear map of theirs gives.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.fitting.chunks import Context
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import PackedRows
from molcli.maths.least_squares import ridge
from molcli.maths.moments import Sample, add_cross_moments
from molcli.model.mixers.gated_deltanet import GatedDeltaNet

# SiLU is nearly linear for small inputs; q and k are normalised after it, and the read-out too.
INPUT_RMS = 0.3
# Half-lives of a head's memory, in its block's own tokens, and how much of a key's old value a new
# one replaces.
HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 2048.0)
BETAS = (0.1, 0.25, 0.5, 0.75)
FIRST_BETA = 0.25
SEARCH_TOKENS = 4096  # of the stream: enough for two numbers a head
SEARCH_PENALTY = 1e-2

Regress = Callable[[Iterator[Sample]], Tensor]
"""features (M, p), wanted (M, q), by chunks of the text -> a (B, q, p) map."""


@dataclass(frozen=True)
class Site:
    """Where a mixer stands, on a chunk of the text.

    read: (M, d), what the blocks read; rows: whose tokens they are. wanted: (M, heads, head_dim),
    what the softmax heads give.
    """

    read: Tensor
    rows: PackedRows
    context: Context
    wanted: Tensor

    def of_first_tokens(self, count: int) -> "Site":
        """The rows of the chunk's first `count` tokens."""
        rows, kept = self.rows.first_tokens(count)
        return Site(self.read[kept], rows, self.context, self.wanted[kept])


@torch.no_grad()
def set_gated_deltanet(mixer: GatedDeltaNet, sites: Sequence[Site], regress: Regress) -> None:
    """Sets everything but q, k, v (already fitted) and o (fitted next).

    sites: the whole text, in order. Convolutions pass their input through, at the size that SiLU
    wants; decay and beta are searched. The gate is half constant, and half the softmax head's
    output in size, which the normalised read-out cannot follow: as far as a linear map of the input
    gives either. Convolutions and the read-out's norm take the sizes, so that q, k, v and o are as
    large as with softmax: Adam's steps are as long for a small weight as for a large one.
    """
    count = sum(len(site.read) for site in sites)
    for name in ("q", "k", "v"):
        weight, conv = getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")
        products = (grouped_linear(site.read, weight, site.rows) for site in sites)
        energy = torch.stack([made.square().sum() for made in products]).sum()
        conv.zero_()
        conv[..., -1] = INPUT_RMS / (energy / (count * weight.shape[1])).sqrt()
    mixer.a_proj.zero_()
    mixer.A_log.zero_()
    sizes = [site.wanted.norm(dim=-1, keepdim=True) for site in sites]
    mean = (torch.stack([size.sum(0) for size in sizes]).sum(0) / count).clamp(min=1e-30)
    of_a_number = (mean.mean() / math.sqrt(mixer.o_norm.shape[1])).clamp(min=1e-6)
    mixer.o_norm.copy_(of_a_number.expand_as(mixer.o_norm))
    gates = (
        (s.read, ((1 + size / mean) / 2).expand_as(s.wanted).flatten(1), s.rows.offsets)
        for s, size in zip(sites, sizes, strict=True)
    )
    mixer.g_proj.copy_(regress(gates))
    # What gives a constant, as far as a linear map of the input can.
    constant = regress((s.read, torch.ones_like(s.read[:, :1]), s.rows.offsets) for s in sites)

    def set_half_lives(values: Tensor) -> None:
        rate = (math.log(2.0) / values).to(mixer.dt_bias)
        mixer.dt_bias.copy_(torch.log(torch.expm1(rate)))

    def set_betas(values: Tensor) -> None:
        mixer.b_proj.copy_(torch.logit(values)[..., None] * constant)

    few = list(_first_tokens(sites, SEARCH_TOKENS))
    set_betas(torch.full_like(mixer.dt_bias, FIRST_BETA))
    for grid, setter in ((HALF_LIVES, set_half_lives), (BETAS, set_betas)):
        errors = []
        for value in grid:
            setter(torch.full_like(mixer.dt_bias, value))
            errors.append(head_errors(mixer, few))
        best = torch.stack(errors).argmin(0)
        setter(torch.tensor(grid).to(mixer.dt_bias)[best])


def head_errors(mixer: GatedDeltaNet, sites: Sequence[Site]) -> Tensor:
    """(B, heads) float64: what a linear map of a head's gated read-out leaves of the softmax head's
    output, summed over the block's tokens."""
    heads, dim = sites[0].wanted.shape[1:]
    blocks, device = sites[0].rows.num_blocks, sites[0].read.device
    # By head: gram of the read-out, its cross moment with what is wanted, gram of the latter.
    sums = torch.zeros(3, heads, blocks, dim, dim, dtype=torch.float64, device=device)
    for site in sites:
        have = mixer.heads(site.read, site.context.blocks(site.rows))
        for head, (x, y) in enumerate(zip(have.unbind(1), site.wanted.unbind(1), strict=True)):
            for total, a, b in zip(sums[:, head], (x, x, y), (x, y, y), strict=True):
                add_cross_moments(total, a, b, site.rows.offsets)
    gram, cross, energy = sums
    fitted = ridge(gram, cross, SEARCH_PENALTY)
    error = energy - 2 * fitted @ cross + fitted @ gram @ fitted.mT
    return error.diagonal(dim1=-2, dim2=-1).sum(-1).mT


def _first_tokens(sites: Sequence[Site], count: int) -> Iterator[Site]:
    """Of the text's first `count` tokens."""
    for site in sites:
        if count <= 0:
            return
        yield site.of_first_tokens(count)
        count -= len(site.context.stream.document)


def unshared(heads: Tensor, query_heads: int) -> Tensor:
    """A key-value head for every query head. heads: (B, kv, ...) -> (B, query_heads, ...)."""
    return heads.repeat_interleave(query_heads // heads.shape[1], dim=1)
