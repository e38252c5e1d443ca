"""Where a Gated DeltaNet mixer starts from."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.fitting.chunks import Context, token_context
from molcli.fitting.gated_deltanet import (
    FIRST_BETA,
    HALF_LIVES,
    INPUT_RMS,
    Site,
    head_errors,
    set_gated_deltanet,
    unshared,
)
from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.packed_rows import all_rows
from molcli.maths.moments import Sample
from molcli.model import MoLConfig
from molcli.model.mixers.gated_deltanet import GatedDeltaNet

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


def site(wanted: Tensor | None = None) -> Site:
    """Two blocks, both on all tokens of one document; the first channel is constant.

    wanted: (BLOCKS * TOKENS, HEADS, HEAD_DIM); null for ones.
    """
    read = torch.randn(BLOCKS * TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    read[:, 0] = 1.0
    rows = all_rows(torch.zeros(TOKENS, dtype=torch.int64), 1, BLOCKS, TOKENS)
    zeros = torch.zeros(1, TOKENS, dtype=torch.int64)
    context = token_context(CONFIG, zeros, zeros, torch.device("cpu"))
    if wanted is None:
        wanted = torch.ones(BLOCKS * TOKENS, HEADS, HEAD_DIM)
    return Site(read, rows, context, wanted)


def least_squares(samples: Iterator[Sample]) -> Tensor:
    """(B, q, p), each block on its own rows."""
    ((features, wanted, _),) = samples
    split = [x.unflatten(0, (BLOCKS, -1)).double() for x in (features, wanted)]
    return torch.linalg.lstsq(*split).solution.mT


def run(mixer: GatedDeltaNet, where: Site) -> Tensor:
    context: Context = where.context
    return mixer.heads(where.read, context.blocks(where.rows))


def start(mixer: GatedDeltaNet, where: Site) -> None:
    set_gated_deltanet(mixer, [where], least_squares)


def test_it_finds_the_memories_behind_what_it_is_to_give() -> None:
    """Wanted is what a mixer of known half-lives reads, brought to one size."""
    where = site()
    teacher = random_mixer()
    start(teacher, where)
    half_lives = torch.tensor(HALF_LIVES)[torch.tensor([[0, 2, 4], [4, 0, 1]])]
    betas = torch.full_like(half_lives, FIRST_BETA)
    teacher.dt_bias.copy_(torch.log(torch.expm1(math.log(2.0) / half_lives)))
    teacher.b_proj.zero_()
    teacher.b_proj[..., 0] = torch.logit(betas)
    wanted = F.normalize(run(teacher, where), dim=-1)

    mixer = random_mixer()
    start(mixer, site(wanted))
    a_token = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.dt_bias))
    torch.testing.assert_close(
        a_token**half_lives, torch.full((BLOCKS, HEADS), 0.5), rtol=1e-3, atol=0
    )
    found = grouped_linear(where.read, mixer.b_proj, where.rows).sigmoid()
    expected = betas.repeat_interleave(TOKENS, dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_convolutions_pass_the_newest_token_on_and_silu_is_nearly_linear() -> None:
    """Weights stay as they were, and the read-out is as large as what is wanted."""
    where, mixer = site(), random_mixer()
    weights = {name: getattr(mixer, f"{name}_proj").clone() for name in ("q", "k", "v")}
    start(mixer, where)
    for name, weight in weights.items():
        assert torch.equal(getattr(mixer, f"{name}_proj"), weight)
        conv = getattr(mixer, f"{name}_conv")
        assert torch.equal(conv[..., -1], conv[:1, :1, -1].expand_as(conv[..., -1]))
        assert not conv[..., :-1].any()
        made = grouped_linear(where.read, weight, where.rows) * conv[0, 0, -1]
        assert made.square().mean().sqrt().item() == pytest.approx(INPUT_RMS, rel=1e-5)
    assert not mixer.a_proj.any()
    size = where.wanted.norm(dim=-1).mean() / math.sqrt(HEAD_DIM)
    torch.testing.assert_close(mixer.o_norm, size.expand(BLOCKS, HEAD_DIM))


def test_the_gate_follows_the_size_of_what_is_wanted() -> None:
    """Half of it, and exactly so where the size is a linear map of the input."""
    where, mixer = site(), random_mixer()
    size = 3.0 + 0.1 * where.read[:, 1:2]
    wanted = F.normalize(torch.randn(BLOCKS * TOKENS, HEADS, HEAD_DIM), dim=-1) * size[..., None]
    start(mixer, site(wanted))
    gate = grouped_linear(where.read, mixer.g_proj, where.rows)
    opened = (1 + size / size.mean()) / 2
    torch.testing.assert_close(gate, opened.expand_as(gate), rtol=1e-3, atol=1e-3)


def test_head_errors_are_those_of_least_squares() -> None:
    where, mixer = site(), random_mixer()
    wanted = torch.randn(
        BLOCKS * TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2)
    )
    found, have = head_errors(mixer, [site(wanted)]), run(mixer, where)
    for head in range(HEADS):
        x, y = (z[:, head].unflatten(0, (BLOCKS, -1)).double() for z in (have, wanted))
        left = y - x @ torch.linalg.lstsq(x, y).solution
        torch.testing.assert_close(
            found[:, head], left.square().sum((1, 2)), rtol=1e-2, atol=0
        )  # a ridge of 1% in `found`


def test_key_value_heads_follow_their_query_heads() -> None:
    heads = torch.arange(6.0).view(1, 2, 3)
    assert unshared(heads, 4)[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
