"""Start Gated DeltaNet from softmax attention: from its weights, inputs and heads' outputs.

Inputs: what the mixer's B blocks read, (M, d), and what their softmax heads give, (M, heads,
head_dim), one chunk of the text at a time. Output: all parameters of a GatedDeltaNet but o_proj.

Decay and beta are constants of a head, searched on a grid: for each value the heads run, and a
ridge regression per head measures how much of the softmax head's output a linear map of theirs
predicts.
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
from molcli.model.mixers import GatedDeltaNet

# SiLU is nearly linear for small inputs; q and k are normalised after it, and the read-out too.
INPUT_RMS = 0.3
# Half-lives of a head's memory, in tokens that its block sees; and the fraction of a key's old
# value that a new one replaces.
HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 2048.0)
BETAS = (0.1, 0.25, 0.5, 0.75)
FIRST_BETA = 0.25
SEARCH_TOKENS = 4096  # of the text: enough for two numbers per head
SEARCH_PENALTY = 1e-2

Regression = Callable[[Iterator[Sample]], Tensor]
"""Solves for a linear map per block: features (M, p), targets (M, q), by chunk -> (B, q, p)."""


@dataclass(frozen=True)
class MixerInputs:
    """Inputs and softmax targets of a mixer, one chunk.

    read: (M, d), what the blocks read, normalised. rows: the blocks and tokens of these rows.
    context: of the chunk's tokens. targets: (M, heads, head_dim), the softmax heads' outputs.
    """

    read: Tensor
    rows: PackedRows
    context: Context
    targets: Tensor

    def of_first_tokens(self, count: int) -> "MixerInputs":
        """Return the rows of the chunk's first `count` tokens."""
        rows, kept = self.rows.first_tokens(count)
        return MixerInputs(self.read[kept], rows, self.context, self.targets[kept])


def fit_projection(
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    num_heads: int,
    head_dim: int,
    inputs: Sequence[MixerInputs],
    regress: Regression,
) -> Tensor:
    """Turn q_proj, k_proj or v_proj of softmax attention into that of Gated DeltaNet.

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


@torch.no_grad()
def fit_gated_deltanet(
    mixer: GatedDeltaNet, inputs: Sequence[MixerInputs], regress: Regression
) -> None:
    """Set all parameters of a mixer but q_proj, k_proj, v_proj (set before) and o_proj (set next).

    Convolutions and the read-out's norm absorb the sizes of their inputs and outputs, so that q, k,
    v and o are as large as with softmax: Adam's steps are as long for a small weight as for a large
    one.

    Args:
        mixer: of B blocks, changed in place.
        inputs: the whole text, in order.
        regress: solves the regressions of the gate and of the constant in beta.
    """
    count = sum(len(i.read) for i in inputs)
    _set_convolutions(mixer, inputs, count)
    mixer.a_proj.zero_()
    mixer.A_log.zero_()
    _fit_norm_and_gate(mixer, inputs, count, regress)
    # The linear map of the input that is closest to a constant 1, (B, 1, d).
    constant = regress((i.read, torch.ones_like(i.read[:, :1]), i.rows.offsets) for i in inputs)
    _search_decay_and_beta(mixer, list(_first_tokens(inputs, SEARCH_TOKENS)), constant)


def head_errors(mixer: GatedDeltaNet, inputs: Sequence[MixerInputs]) -> Tensor:
    """Measure what a linear map of each head's gated read-out misses of the softmax head's output.

    Returns:
        (B, heads) float64, squared errors summed over the block's tokens.
    """
    heads, dim = inputs[0].targets.shape[1:]
    blocks, device = inputs[0].rows.num_blocks, inputs[0].read.device
    # By head: gram of the read-out, its cross moment with the targets, gram of the targets.
    sums = torch.zeros(3, heads, blocks, dim, dim, dtype=torch.float64, device=device)
    for i in inputs:
        have = mixer.heads(i.read, i.context.blocks(i.rows))
        for head, (x, y) in enumerate(zip(have.unbind(1), i.targets.unbind(1), strict=True)):
            for total, a, b in zip(sums[:, head], (x, x, y), (x, y, y), strict=True):
                add_cross_moments(total, a, b, i.rows.offsets)
    gram, cross, energy = sums
    fitted = ridge(gram, cross, SEARCH_PENALTY)
    error = energy - 2 * fitted @ cross + fitted @ gram @ fitted.mT
    return error.diagonal(dim1=-2, dim2=-1).sum(-1).mT


def repeat_kv_heads(heads: Tensor, num_heads: int) -> Tensor:
    """Repeat key-value heads for their query heads. (B, kv_heads, ...) -> (B, num_heads, ...)."""
    return heads.repeat_interleave(num_heads // heads.shape[1], dim=1)


def _set_convolutions(mixer: GatedDeltaNet, inputs: Sequence[MixerInputs], count: int) -> None:
    """Let convolutions pass the newest token on, scaled to INPUT_RMS."""
    for name in ("q", "k", "v"):
        weight, conv = getattr(mixer, f"{name}_proj"), getattr(mixer, f"{name}_conv")
        products = (grouped_linear(i.read, weight, i.rows) for i in inputs)
        energy = torch.stack([product.square().sum() for product in products]).sum()
        conv.zero_()
        conv[..., -1] = INPUT_RMS / (energy / (count * weight.shape[1])).sqrt()


def _fit_norm_and_gate(
    mixer: GatedDeltaNet, inputs: Sequence[MixerInputs], count: int, regress: Regression
) -> None:
    """Set o_norm to the size of the targets, and fit the gate to how that varies.

    The gate is half constant, and half the norm of the softmax head's output over its mean, which
    the normalised read-out cannot follow: as far as a linear map of the input predicts it.
    """
    sizes = [i.targets.norm(dim=-1, keepdim=True) for i in inputs]
    mean = (torch.stack([size.sum(0) for size in sizes]).sum(0) / count).clamp(min=1e-30)
    rms = (mean.mean() / math.sqrt(mixer.o_norm.shape[1])).clamp(min=1e-6)
    mixer.o_norm.copy_(rms.expand_as(mixer.o_norm))
    gates = (
        (i.read, ((1 + size / mean) / 2).expand_as(i.targets).flatten(1), i.rows.offsets)
        for i, size in zip(inputs, sizes, strict=True)
    )
    mixer.g_proj.copy_(regress(gates))


def _search_decay_and_beta(
    mixer: GatedDeltaNet, inputs: Sequence[MixerInputs], constant: Tensor
) -> None:
    """Choose each head's half-life, then its beta, by `head_errors`. constant: (B, 1, d)."""

    def set_half_lives(values: Tensor) -> None:
        rate = (math.log(2.0) / values).to(mixer.dt_bias)
        mixer.dt_bias.copy_(torch.log(torch.expm1(rate)))

    def set_betas(values: Tensor) -> None:
        mixer.b_proj.copy_(torch.logit(values)[..., None] * constant)

    set_betas(torch.full_like(mixer.dt_bias, FIRST_BETA))
    for grid, setter in ((HALF_LIVES, set_half_lives), (BETAS, set_betas)):
        errors = []
        for value in grid:
            setter(torch.full_like(mixer.dt_bias, value))
            errors.append(head_errors(mixer, inputs))
        best = torch.stack(errors).argmin(0)
        setter(torch.tensor(grid).to(mixer.dt_bias)[best])


def _first_tokens(inputs: Sequence[MixerInputs], count: int) -> Iterator[MixerInputs]:
    """The inputs of the text's first `count` tokens."""
    for chunk in inputs:
        if count <= 0:
            return
        yield chunk.of_first_tokens(count)
        count -= len(chunk.context.stream.document)
