"""Where a Gated DeltaNet mixer starts from."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.kernels.rows import all_rows
from molcli.model import MoLConfig
from molcli.model.gated_deltanet import StackedGatedDeltaNet
from molcli.stages.upcycle.deltanet import (
    GATE,
    INPUT_RMS,
    LONGEST,
    SHORTEST,
    set_gated_deltanet,
)

BLOCKS, HEADS, HEAD_DIM, WIDTH, TOKENS = 2, 3, 8, 12, 50


@pytest.fixture
@torch.no_grad()
def started() -> tuple[StackedGatedDeltaNet, Tensor, Tensor]:
    """A mixer after its start, what it read, and what the regression gave for its gate."""
    config = MoLConfig(
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        num_blocks=BLOCKS,
        num_shared_blocks=0,
        num_blocks_per_tok=1,
        d_thin=WIDTH,
        thin_num_attention_heads=HEADS,
    )
    mixer = StackedGatedDeltaNet(config.routed_spec(0), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    read = torch.randn(BLOCKS * TOKENS, WIDTH, generator=generator)
    gate = torch.randn(mixer.g_proj.shape, generator=generator)

    def regress(features: Tensor, wanted: Tensor) -> Tensor:
        assert features is read
        assert torch.equal(wanted, torch.full((len(read), HEADS * HEAD_DIM), GATE))
        return gate

    rows = all_rows(torch.zeros(TOKENS, dtype=torch.int64), 1, BLOCKS, TOKENS)
    set_gated_deltanet(mixer, read, rows, regress)
    for name in ("q", "k", "v"):
        made = grouped_linear(read, getattr(mixer, f"{name}_proj"), rows)
        assert made.square().mean().sqrt().item() == pytest.approx(INPUT_RMS, rel=1e-5)
    return mixer, read, gate


def test_convolutions_pass_the_newest_token_on(
    started: tuple[StackedGatedDeltaNet, Tensor, Tensor],
) -> None:
    for conv in (started[0].q_conv, started[0].k_conv, started[0].v_conv):
        assert torch.equal(conv[..., -1], torch.ones_like(conv[..., -1]))
        assert not conv[..., :-1].any()


def test_memories_halve_over_a_spread_of_times(
    started: tuple[StackedGatedDeltaNet, Tensor, Tensor],
) -> None:
    """Whatever is read: neither the decay nor beta depends on it yet."""
    mixer = started[0]
    assert not mixer.a_proj.any() and not mixer.b_proj.any()
    a_token = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.dt_bias))
    half_lives = torch.tensor([SHORTEST, (SHORTEST * LONGEST) ** 0.5, LONGEST])
    torch.testing.assert_close(
        a_token**half_lives, torch.full((BLOCKS, HEADS), 0.5), rtol=1e-3, atol=0
    )


def test_the_gate_is_what_the_regression_gives(
    started: tuple[StackedGatedDeltaNet, Tensor, Tensor],
) -> None:
    assert torch.equal(started[0].g_proj, started[2])
    assert torch.equal(started[0].o_norm, torch.ones(BLOCKS, HEAD_DIM))
