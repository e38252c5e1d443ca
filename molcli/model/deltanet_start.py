"""Gated DeltaNet that starts from softmax attention: from its projections, and from what it read.

Decay and beta are constants of a head, searched on a grid: for every value the heads run, and a
ridge regression per head tells how much of the softmax head's output a linear map of theirs gives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.rows import Rows
from molcli.maths.moments import grouped_cross_moment
from molcli.maths.refit import ridge
from molcli.model.context import Context
from molcli.model.gated_deltanet import StackedGatedDeltaNet

# SiLU is nearly linear for small inputs; q and k are normalised after it, and the read-out too.
INPUT_RMS = 0.3
# Half-lives of a head's memory, in its block's own tokens, and how much of a key's old value a new
# one replaces.
HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 2048.0)
BETAS = (0.1, 0.25, 0.5, 0.75)
FIRST_BETA = 0.25
SEARCH_TOKENS = 4096  # of the stream: enough for two numbers a head
SEARCH_PENALTY = 1e-2

Regress = Callable[[Tensor, Tensor], Tensor]
"""features (M, p), wanted (M, q) -> a (B, q, p) map."""


@dataclass(frozen=True)
class Site:
    """Where a mixer stands. read: (M, d), what the blocks read; rows: whose tokens they are."""

    read: Tensor
    rows: Rows
    context: Context


@torch.no_grad()
def set_gated_deltanet(
    mixer: StackedGatedDeltaNet, site: Site, wanted: Tensor, regress: Regress
) -> None:
    """Sets everything but q, k, v (already fitted) and o (fitted next).

    wanted: (M, heads, head_dim), what the softmax heads give. Convolutions pass their input
    through; decay and beta are searched. The gate is half constant, and half the softmax head's
    output in size, which the normalised read-out cannot follow: as far as a linear map of the input
    gives either.
    """
    read, rows = site.read, site.rows
    for name in ("q", "k", "v"):
        weight, conv = getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")
        weight.mul_(INPUT_RMS / grouped_linear(read, weight, rows).square().mean().sqrt())
        conv.zero_()
        conv[..., -1] = 1.0
    mixer.a_proj.zero_()
    mixer.A_log.zero_()
    mixer.o_norm.fill_(1.0)
    size = wanted.norm(dim=-1, keepdim=True)
    size = size / size.mean(0).clamp(min=1e-30)
    mixer.g_proj.copy_(regress(read, ((1 + size) / 2).expand_as(wanted).flatten(1)))
    # What gives a constant, as far as a linear map of the input can.
    constant = regress(read, torch.ones_like(read[:, :1]))

    def set_half_lives(values: Tensor) -> None:
        rate = (math.log(2.0) / values).to(mixer.dt_bias)
        mixer.dt_bias.copy_(torch.log(torch.expm1(rate)))

    def set_betas(values: Tensor) -> None:
        mixer.b_proj.copy_(torch.logit(values)[..., None] * constant)

    rows, few = rows.of_first_tokens(SEARCH_TOKENS)
    site, wanted = Site(read[few], rows, site.context), wanted[few]
    set_betas(torch.full_like(mixer.dt_bias, FIRST_BETA))
    for grid, setter in ((HALF_LIVES, set_half_lives), (BETAS, set_betas)):
        errors = []
        for value in grid:
            setter(torch.full_like(mixer.dt_bias, value))
            errors.append(head_errors(mixer, site, wanted))
        best = torch.stack(errors).argmin(0)
        setter(torch.tensor(grid).to(mixer.dt_bias)[best])


def head_errors(mixer: StackedGatedDeltaNet, site: Site, wanted: Tensor) -> Tensor:
    """(B, heads) float64: what a linear map of a head's gated read-out leaves of the softmax head's
    output, summed over the block's tokens. wanted: (M, heads, head_dim)."""
    context, offsets = site.context, site.rows.offsets
    have = mixer.heads(site.read, site.rows, context.rotary, context.stream, None)
    left = []
    for x, y in zip(have.unbind(1), wanted.unbind(1), strict=True):
        gram, cross, energy = (
            grouped_cross_moment(a, b, offsets, 0.0) for a, b in ((x, x), (x, y), (y, y))
        )
        fitted = ridge(gram, cross, SEARCH_PENALTY)
        error = energy - 2 * fitted @ cross + fitted @ gram @ fitted.mT
        left.append(error.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.stack(left, dim=1)


def unshared(heads: Tensor, query_heads: int) -> Tensor:
    """A key-value head for every query head. heads: (B, kv, ...) -> (B, query_heads, ...)."""
    return heads.repeat_interleave(query_heads // heads.shape[1], dim=1)
