"""Gated DeltaNet that is fitted to softmax heads."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.fitting.chunks import token_context
from molcli.fitting.projection import fit_projection, repeat_kv_heads
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import all_rows
from molcli.maths.moments import Sample
from molcli.model import MoLConfig
from molcli.model.mixers.base import AttentionSample
from molcli.model.mixers.gated_deltanet import (
    FIRST_BETA,
    HALF_LIVES,
    INPUT_RMS,
    GatedDeltaNet,
    head_errors,
)

BLOCKS, HEADS, HEAD_DIM, WIDTH, TOKENS = 2, 3, 8, 12, 400
CONFIG = MoLConfig(
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    head_dim=HEAD_DIM,
    num_blocks=BLOCKS,
    num_shared_blocks=0,
    num_blocks_per_tok=1,
    d_thin=WIDTH,
    num_heads_thin=HEADS,
)


def random_mixer() -> GatedDeltaNet:
    mixer = GatedDeltaNet(CONFIG.routed_spec("gated_deltanet"), CONFIG).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


def mixer_inputs(targets: Tensor | None = None) -> AttentionSample:
    """Two blocks, both on all tokens of one document; the first channel is constant.

    targets: (BLOCKS * TOKENS, HEADS, HEAD_DIM); None for ones.
    """
    read = torch.randn(BLOCKS * TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    read[:, 0] = 1.0
    rows = all_rows(torch.zeros(TOKENS, dtype=torch.int64), 1, BLOCKS, TOKENS)
    zeros = torch.zeros(1, TOKENS, dtype=torch.int64)
    context = token_context(CONFIG, zeros, zeros, torch.device("cpu"))
    if targets is None:
        targets = torch.ones(BLOCKS * TOKENS, HEADS, HEAD_DIM)
    return AttentionSample(read, rows, context, targets)


def least_squares(samples: Iterator[Sample]) -> Tensor:
    """(B, q, p), each block on its own rows."""
    ((features, wanted, _),) = samples
    split = [x.unflatten(0, (BLOCKS, -1)).double() for x in (features, wanted)]
    return torch.linalg.lstsq(*split).solution.mT


def run(mixer: GatedDeltaNet, inputs: AttentionSample) -> Tensor:
    return mixer.heads(inputs.read, inputs.contexts.blocks(inputs.rows))


def fit(mixer: GatedDeltaNet, inputs: AttentionSample) -> None:
    mixer.start_from_attention(lambda: [inputs], least_squares)


def test_it_finds_the_half_lives_behind_the_targets() -> None:
    """The targets are the read-outs of a mixer of known half-lives, normalised."""
    inputs = mixer_inputs()
    teacher = random_mixer()
    fit(teacher, inputs)
    half_lives = torch.tensor(HALF_LIVES)[torch.tensor([[0, 2, 4], [4, 0, 1]])]
    betas = torch.full_like(half_lives, FIRST_BETA)
    teacher.dt_bias.copy_(torch.log(torch.expm1(math.log(2.0) / half_lives)))
    teacher.b_proj.zero_()
    teacher.b_proj[..., 0] = torch.logit(betas)
    wanted = F.normalize(run(teacher, inputs), dim=-1)

    mixer = random_mixer()
    fit(mixer, mixer_inputs(wanted))
    a_token = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.dt_bias))
    torch.testing.assert_close(
        a_token**half_lives, torch.full((BLOCKS, HEADS), 0.5), rtol=1e-3, atol=0
    )
    found = grouped_linear(inputs.read, mixer.b_proj, inputs.rows).sigmoid()
    expected = betas.repeat_interleave(TOKENS, dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_convolutions_pass_the_newest_token_on_at_a_size_where_silu_is_nearly_linear() -> None:
    """Weights stay as they were, and the read-out is as large as the targets."""
    inputs, mixer = mixer_inputs(), random_mixer()
    weights = {name: getattr(mixer, f"{name}_proj").clone() for name in ("q", "k", "v")}
    fit(mixer, inputs)
    for name, weight in weights.items():
        assert torch.equal(getattr(mixer, f"{name}_proj"), weight)
        conv = getattr(mixer, f"{name}_conv")
        assert torch.equal(conv[..., -1], conv[:1, :1, -1].expand_as(conv[..., -1]))
        assert not conv[..., :-1].any()
        made = grouped_linear(inputs.read, weight, inputs.rows) * conv[0, 0, -1]
        assert made.square().mean().sqrt().item() == pytest.approx(INPUT_RMS, rel=1e-5)
    assert not mixer.a_proj.any()
    size = inputs.targets.norm(dim=-1).mean() / math.sqrt(HEAD_DIM)
    torch.testing.assert_close(mixer.o_norm, size.expand(BLOCKS, HEAD_DIM))


def test_the_gate_follows_the_size_of_the_targets() -> None:
    """Half of it, and exactly so where the size is a linear map of the input."""
    inputs, mixer = mixer_inputs(), random_mixer()
    size = 3.0 + 0.1 * inputs.read[:, 1:2]
    wanted = F.normalize(torch.randn(BLOCKS * TOKENS, HEADS, HEAD_DIM), dim=-1) * size[..., None]
    fit(mixer, mixer_inputs(wanted))
    gate = grouped_linear(inputs.read, mixer.g_proj, inputs.rows)
    opened = (1 + size / size.mean()) / 2
    torch.testing.assert_close(gate, opened.expand_as(gate), rtol=1e-3, atol=1e-3)


def test_head_errors_are_those_of_least_squares() -> None:
    inputs, mixer = mixer_inputs(), random_mixer()
    wanted = torch.randn(
        BLOCKS * TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2)
    )
    found, have = head_errors(mixer, [mixer_inputs(wanted)]), run(mixer, inputs)
    for head in range(HEADS):
        x, y = (z[:, head].unflatten(0, (BLOCKS, -1)).double() for z in (have, wanted))
        left = y - x @ torch.linalg.lstsq(x, y).solution
        torch.testing.assert_close(
            found[:, head], left.square().sum((1, 2)), rtol=1e-2, atol=0
        )  # a ridge of 1% in `found`


def test_key_value_heads_follow_their_query_heads() -> None:
    heads = torch.arange(6.0).view(1, 2, 3)
    assert repeat_kv_heads(heads, 4)[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_a_projection_gets_its_norm_and_its_bias_and_a_head_for_every_query_head() -> None:
    """The first channel of the input is 1, so that a bias fits into the matrix."""
    inputs = mixer_inputs()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(BLOCKS, HEAD_DIM, WIDTH, generator=generator)
    bias = torch.randn(BLOCKS, HEAD_DIM, generator=generator)
    norm = torch.randn(BLOCKS, HEAD_DIM, generator=generator)
    found = fit_projection(weight, bias, norm, HEADS, HEAD_DIM, [inputs], least_squares)
    assert found.shape == (BLOCKS, HEADS * HEAD_DIM, WIDTH)
    heads = grouped_linear(inputs.read, found, inputs.rows).unflatten(1, (HEADS, HEAD_DIM))
    expected = grouped_linear(
        inputs.read, weight, inputs.rows, bias
    ) * inputs.rows.gather_per_block(norm)
    torch.testing.assert_close(
        heads, expected[:, None].expand_as(heads).contiguous(), rtol=1e-4, atol=1e-4
    )
