"""The CV^2 loss against its definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molcli.model.routing.balance import bias_step, block_counts, block_weights, cv_squared


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 20), num_blocks=st.integers(2, 6), seed=st.integers(0, 2**16))
def test_equals_the_definition_with_its_gradient(tokens: int, num_blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_blocks, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    chosen = logits.topk(2)
    weights = chosen.values.softmax(-1)

    full = torch.zeros_like(logits).scatter(1, chosen.indices, weights)  # (n, R), zeros elsewhere
    loads = full.sum(0)
    expected = ((loads - loads.mean()) ** 2).mean() / loads.mean() ** 2

    ours = cv_squared(weights, chosen.indices, num_blocks)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    )


def test_even_load_costs_nothing_and_collapse_costs_the_most() -> None:
    weights = torch.ones(8, 1)
    assert cv_squared(weights, torch.arange(8)[:, None] % 4, 4) == 0
    assert cv_squared(weights, torch.zeros(8, 1, dtype=torch.int64), 4) == 3


def test_a_step_down_the_gradient_evens_the_load() -> None:
    weights = torch.tensor([[0.9, 0.1]] * 4, requires_grad=True)
    cv_squared(weights, torch.tensor([[0, 1]] * 4), 2).backward()
    assert weights.grad is not None
    assert (weights.grad[:, 0] > 0).all()
    assert (weights.grad[:, 1] < 0).all()


def test_weights_go_to_the_chosen_blocks() -> None:
    weights, blocks = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 2], [2, 0]])
    assert block_weights(weights, blocks, 3).tolist() == [1.25, 0.0, 0.75]


def test_the_bias_moves_against_the_load_at_a_fixed_rate() -> None:
    blocks = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    loads = block_counts(blocks, 4)
    assert loads.tolist() == [4, 3, 1, 0]
    assert torch.equal(bias_step(loads, 0.25), torch.tensor([-0.25, -0.25, 0.25, 0.25]))
    layers = torch.stack([loads, torch.full((4,), 3)])
    assert torch.equal(bias_step(layers, 0.25)[1], torch.zeros(4))
    assert torch.equal(bias_step(layers, 0.25)[0], bias_step(loads, 0.25))
