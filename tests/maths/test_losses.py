"""Chunked losses against the full logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molcli.maths import losses
from molcli.maths.losses import IGNORED, Head, token_losses

VOCAB = 11


def naive(model: Head, labels: Tensor, parent: Head) -> dict[str, Tensor]:
    """The same sums from all logits at once."""
    known = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][known][:, None]
    log_q = (model.hidden @ model.weight.T).log_softmax(-1)[:, :-1][known]
    log_p = (parent.hidden @ parent.weight.T).log_softmax(-1)[:, :-1][known]
    return {
        "cross_entropy": -log_q.gather(1, targets).sum(),
        "kl": torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True),
        "parent_cross_entropy": -log_p.gather(1, targets).sum(),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).sum().double(),
        "count": known.sum(),
    }


def random_head(batch: int, length: int, width: int, seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    return Head(normal(batch, length, width), normal(VOCAB, width))


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    chunk=st.integers(1, 30),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_sums_and_gradients_equal_the_full_computation(
    batch: int, length: int, chunk: int, ignored: float, seed: int
) -> None:
    model, parent = random_head(batch, length, 4, seed), random_head(batch, length, 6, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_AT_ONCE", chunk * VOCAB)
        ours = token_losses(model, labels, parent)
        full = naive(model, labels, parent)
        for name, value in full.items():
            torch.testing.assert_close(getattr(ours, name), value)
        leaves = [model.hidden, model.weight]
        gradients = torch.autograd.grad(ours.kl + 0.3 * ours.cross_entropy, leaves)
    expected = torch.autograd.grad(full["kl"] + 0.3 * full["cross_entropy"], leaves)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)


def test_parent_gets_no_gradient() -> None:
    model, parent = random_head(1, 4, 3, 0), random_head(1, 4, 3, 1)
    token_losses(model, torch.ones(1, 4, dtype=torch.int64), parent).kl.backward()
    assert model.weight.grad is not None
    assert parent.weight.grad is None and parent.hidden.grad is None


def test_without_parent_only_cross_entropy_is_measured() -> None:
    result = token_losses(random_head(1, 4, 3, 0), torch.ones(1, 4, dtype=torch.int64))
    assert result.cross_entropy > 0
    assert (result.kl, result.parent_cross_entropy, result.agreement) == (0, 0, 0)


def test_same_distribution_has_no_kl_and_full_agreement() -> None:
    head = random_head(2, 5, 3, 0)
    result = token_losses(head, torch.ones(2, 5, dtype=torch.int64), head)
    torch.testing.assert_close(result.kl, torch.zeros((), dtype=torch.float64))
    assert result.agreement == result.count == 8


def test_low_precision_is_reduced_in_fp32() -> None:
    exact = random_head(2, 5, 3, 0)
    low = Head(exact.hidden.detach().bfloat16(), exact.weight.detach().bfloat16())
    assert token_losses(low, torch.ones(2, 5, dtype=torch.int64), low).kl.dtype == torch.float32


def test_no_graph_keeps_logits() -> None:
    """Nothing as wide as the vocabulary waits for the backward pass."""
    model, parent = random_head(2, 65, 4, 0), random_head(2, 65, 4, 1)
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        patch.setattr(losses, "LOGITS_AT_ONCE", 16 * VOCAB)
        token_losses(model, torch.ones(2, 65, dtype=torch.int64), parent)
    assert not [shape for shape in shapes if shape[-1:] == (VOCAB,)]
