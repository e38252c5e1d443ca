"""Drawing tokens by inverting the cumulative distribution, with the kernel and without."""

import pytest
import torch

from molcli.kernels.draw_tokens import draw_tokens, draw_tokens_reference


def between(logits, uniform, temperature, drawn):
    """How far 1 - uniform lies outside of the share of the cumulative odds that was drawn."""
    odds = (logits.double() / temperature).softmax(-1)
    above = odds.cumsum(-1).gather(1, drawn[:, None])[:, 0]
    own = odds.gather(1, drawn[:, None])[:, 0]
    assert (own > 0).all()
    wanted = 1 - uniform
    return torch.maximum(wanted - above, above - own - wanted).max().item()


# One piece, and several of which the last is not full.
@pytest.mark.parametrize("size", [7, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("half", [False, True])
def test_the_drawn_entry_is_where_the_odds_reach_the_number(
    triton_device, poisoned, size, temperature, half
):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(24, size, generator=generator)
    logits[:, ::3] = -torch.inf
    uniform = torch.rand(24, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    dtype = torch.float32 if not half else torch.float16
    logits, uniform = logits.to(triton_device, dtype), uniform.to(triton_device)
    for draw in (draw_tokens, draw_tokens_reference):
        drawn = draw(logits, uniform, temperature)
        assert drawn.dtype == torch.int64 and drawn.shape == (24,)
        assert between(logits, uniform, temperature, drawn) < 1e-6


def test_rows_that_are_not_finite_draw_nothing(triton_device, poisoned):
    logits = torch.zeros(5, 40, device=triton_device)
    logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 3] = 1e30
    uniform = torch.full((5,), 0.5, dtype=torch.float64, device=triton_device)
    for draw in (draw_tokens, draw_tokens_reference):
        assert draw(logits, uniform, 1.0).tolist() == [-1, -1, -1, 3, 19]


def test_draws_follow_the_odds(triton_device):
    odds = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5000, generator=generator, dtype=torch.float64).to(triton_device)
    logits = odds.log().expand(5000, -1).to(triton_device)
    shares = draw_tokens(logits, uniform, 1.0).bincount(minlength=6).cpu() / 5000
    assert shares[[0, 2, 5]].sum() == 0
    assert ((shares - odds).abs() <= 4 * (odds * (1 - odds) / 5000).sqrt()).all()


def test_the_operator_describes_itself_correctly_to_torch_compile():
    arguments = torch.randn(3, 8), torch.rand(3, dtype=torch.float64), 1.0
    torch.library.opcheck(torch.ops.molcli.draw_tokens.default, arguments)
