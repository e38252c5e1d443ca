"""Chunked losses equal those from the full logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molcli.maths import losses
from molcli.maths.losses import (
    IGNORED,
    Head,
    token_losses,
    top_k_predictions,
    training_loss,
)
from molcli.maths.top_k import TopK

VOCAB = 11


def naive(model: Head, labels: Tensor, parent: Head) -> dict[str, Tensor]:
    """The same sums, from all logits together."""
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
        patch.setitem(losses.LOGITS_PER_CHUNK, "cpu", chunk * VOCAB)
        ours = token_losses(model, labels, parent)
        full = naive(model, labels, parent)
        for name, value in full.items():
            torch.testing.assert_close(getattr(ours, name), value)
        training = training_loss(model, labels, parent, ce_weight=0.3, kl_weight=0.9)
    loss = 0.9 * full["kl"] + 0.3 * full["cross_entropy"]
    torch.testing.assert_close(training.loss, loss)
    torch.testing.assert_close(training.kl, full["kl"])
    torch.testing.assert_close(training.cross_entropy, full["cross_entropy"])
    leaves = [model.hidden, model.weight]
    gradients = torch.autograd.grad(2 * training.loss, leaves)
    expected = torch.autograd.grad(2 * loss, leaves)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)


def test_only_tensors_that_require_a_gradient_get_one() -> None:
    model, parent = random_head(1, 4, 3, 0), random_head(1, 4, 3, 1)
    frozen = Head(model.hidden, model.weight.detach())
    labels = torch.ones(1, 4, dtype=torch.int64)
    training_loss(frozen, labels, parent, ce_weight=0.0, kl_weight=1.0).loss.backward()
    assert model.hidden.grad is not None and model.weight.grad is None
    assert parent.weight.grad is None and parent.hidden.grad is None


def test_without_parent_the_gradient_is_that_of_cross_entropy() -> None:
    model, labels = random_head(2, 6, 3, 0), torch.ones(2, 6, dtype=torch.int64)
    ours = training_loss(model, labels, None, ce_weight=1.0, kl_weight=1.0)
    full = naive(model, labels, model)["cross_entropy"]
    torch.testing.assert_close(ours.loss, full)
    leaves = [model.hidden, model.weight]
    for a, b in zip(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(full, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


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
    """Only the weight's gradient has a dimension of the vocabulary's size between the passes."""
    model, parent = random_head(2, 65, 4, 0), random_head(2, 65, 4, 1)
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        labels = torch.ones(2, 65, dtype=torch.int64)
        training_loss(model, labels, parent, ce_weight=0.5, kl_weight=1.0)
    assert sorted(shapes) == sorted([model.hidden.shape, model.weight.shape])


def test_autocast_multiplies_in_its_dtype() -> None:
    """The gradient is bf16's, up to the order of its sums."""
    exact = random_head(4, 9, 8, 0)
    single = Head(*(x.detach().float().requires_grad_() for x in (exact.hidden, exact.weight)))
    labels = torch.ones(4, 9, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_loss(single, labels, None, ce_weight=1.0, kl_weight=0.0).loss
        full = naive(single, labels, single)["cross_entropy"]
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, [single.hidden, single.weight])
    eager = torch.autograd.grad(full, [single.hidden, single.weight])
    true = torch.autograd.grad(
        naive(exact, labels, exact)["cross_entropy"], [exact.hidden, exact.weight]
    )
    for ours, theirs, right in zip(gradients, eager, true, strict=True):
        assert (ours - right).norm() < 1.5 * (theirs - right).norm()
        assert not torch.equal(ours, right.float())


@settings(deadline=None, max_examples=20)
@given(
    temperature=st.floats(0.3, 4),
    ce_weight=st.sampled_from([0.0, 0.4]),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_a_temperature_softens_both_distributions(
    temperature: float, ce_weight: float, chunk: int, seed: int
) -> None:
    """T^2 times the KL at T and the cross-entropy at 1, in float64; the KL reported is at 1."""
    model, parent = random_head(2, 6, 4, seed), random_head(2, 6, 5, seed + 1)
    labels = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
    labels[0, 3] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.LOGITS_PER_CHUNK, "cpu", chunk * VOCAB)
        ours = training_loss(
            model, labels, parent, ce_weight=ce_weight, kl_weight=0.7, temperature=temperature
        )
    soft_model = Head(model.hidden / temperature, model.weight)
    soft_parent = Head(parent.hidden / temperature, parent.weight)
    soft = naive(soft_model, labels, soft_parent)["kl"] * temperature**2
    exact = naive(model, labels, parent)
    loss = 0.7 * soft + ce_weight * exact["cross_entropy"]
    torch.testing.assert_close(ours.loss, loss)
    torch.testing.assert_close(ours.kl, exact["kl"])
    torch.testing.assert_close(ours.cross_entropy, exact["cross_entropy"])
    leaves = [model.hidden, model.weight]
    for a, b in zip(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(loss, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def bucketed(model: Head, labels: Tensor, parent: Head, k: int) -> Tensor:
    """KL over the parent's k tokens and the sum of all others, from all probabilities together."""
    known = labels[:, 1:] != IGNORED
    q = (model.hidden @ model.weight.T).softmax(-1)[:, :-1][known]
    p = (parent.hidden @ parent.weight.T).softmax(-1)[:, :-1][known].detach()
    ids = p.argsort(dim=-1, descending=True)[:, :k]
    inside_p, inside_q = p.gather(1, ids), q.gather(1, ids)
    kl = (inside_p * (inside_p / inside_q).log()).sum()
    if k < VOCAB:
        rest_p, rest_q = 1 - inside_p.sum(1), 1 - inside_q.sum(1)
        kl = kl + (rest_p * (rest_p / rest_q).log()).sum()
    return kl


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    chunk=st.integers(1, 30),
    k=st.integers(1, VOCAB),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_top_k_targets_equal_the_full_computation(
    batch: int, length: int, chunk: int, k: int, ignored: float, seed: int
) -> None:
    model, parent = random_head(batch, length, 4, seed), random_head(batch, length, 6, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.LOGITS_PER_CHUNK, "cpu", chunk * VOCAB)
        kept = top_k_predictions(parent, k)
        training = training_loss(model, labels, kept, ce_weight=0.3, kl_weight=0.9)
    assert kept.ids.shape == (batch, length, k) and kept.rest.shape == (batch, length)
    kl = bucketed(model, labels, parent, k)
    full = naive(model, labels, parent)
    loss = 0.9 * kl + 0.3 * full["cross_entropy"]
    torch.testing.assert_close(training.kl, kl)
    torch.testing.assert_close(training.loss, loss)
    assert training.kl <= full["kl"] + 1e-9
    if k == VOCAB:
        torch.testing.assert_close(training.kl, full["kl"])
    leaves = [model.hidden, model.weight]
    gradients = torch.autograd.grad(2 * training.loss, leaves)
    for gradient, value in zip(gradients, torch.autograd.grad(2 * loss, leaves), strict=True):
        torch.testing.assert_close(gradient, value)


def test_the_parent_itself_has_no_kl_to_its_top_k() -> None:
    """Nor a gradient, whatever it is rounded to."""
    head = random_head(2, 6, 4, 0)
    labels = torch.ones(2, 6, dtype=torch.int64)
    for k in (1, 5, VOCAB):
        kept = top_k_predictions(head, k)
        loss = training_loss(head, labels, kept, ce_weight=0.0, kl_weight=1.0).loss
        torch.testing.assert_close(loss, torch.zeros_like(loss))
        (gradient,) = torch.autograd.grad(loss, [head.hidden])
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_rounded_targets_still_sum_to_one() -> None:
    kept = top_k_predictions(random_head(2, 6, 4, 0), 5)
    half = TopK(kept.ids, kept.log_probs.half(), kept.rest.half()).normalise(torch.float64)
    total = half.log_probs.exp().sum(-1) + half.rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    # fp16 keeps 11 bits of a logarithm; these are below 16.
    assert (half.log_probs - kept.log_probs).abs().max() < 2 * 16 * 2**-11


def test_the_rest_of_a_confident_student_is_not_lost_in_rounding() -> None:
    """In fp32 the rest's mass, 1e-9, would vanish in 1 - q; its logarithm does not."""
    logits = torch.tensor([[21.0, 0.0, 0.0, 0.0]])
    model = Head(logits.expand(1, 2, 4).contiguous().requires_grad_(), torch.eye(4))
    labels, half = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), 0.5).log()
    p = TopK(labels[..., None], half[..., None], half)
    loss = training_loss(model, labels, p, ce_weight=0.0, kl_weight=1.0).loss
    q_rest = logits.double().softmax(1)[0, 1:].sum()
    expected = 0.5 * (0.5 / (1 - q_rest)).log() + 0.5 * (0.5 / q_rest).log()
    torch.testing.assert_close(loss.double(), expected)
    (gradient,) = torch.autograd.grad(loss, [model.hidden])
    torch.testing.assert_close(gradient[0, 0], torch.tensor([0.5, -0.5 / 3, -0.5 / 3, -0.5 / 3]))


def test_loss_of_a_chunk_compiles_to_one_graph_for_any_parent() -> None:
    """torch.compile captures it, and it runs eagerly: a graph break would raise."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.compile(losses._chunk_loss, dynamic=True, backend="eager", fullgraph=True)
    for n in (5, 8):
        q, p = torch.randn(2, n, VOCAB, generator=generator)
        known = torch.rand(n, generator=generator) > 0.3
        targets = torch.randint(VOCAB, (n, 1), generator=generator)
        for taught in (None, p, losses.truncate_to_top_k(p.log_softmax(1), 4)):
            arguments = (q, taught, targets, known, 0.3, 0.7)
            for ours, right in zip(whole(*arguments), losses._chunk_loss(*arguments), strict=True):
                torch.testing.assert_close(ours, right)
