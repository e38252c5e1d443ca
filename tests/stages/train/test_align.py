"""Layers aligned one by one: the loss, its gradient, and that copies have a loss of 0."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from molcli.data.packing import TokenRows, pack
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.fitting.layer import copy_layer
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint
from molcli.model.layers import MoLLayer
from molcli.model.parent import load_dense
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import micro_batches
from molcli.stages.train.objective import AlignmentObjective, check_alignable

CPU, ONE = torch.device("cpu"), Accelerator(cpu=True)


@pytest.fixture
def rows() -> TokenRows:
    """Two unpadded rows of 16, one of them two documents, and one with padding."""
    generator = torch.Generator().manual_seed(3)
    sizes = (16, 9, 7, 11)
    documents = [torch.randint(128, (n,), generator=generator, dtype=torch.int32) for n in sizes]
    return pack(documents, 16, seed=None, pad_last=True)


def alignment(student: MoLForCausalLM, parent: Parent, weight: float = 0.0) -> AlignmentObjective:
    teacher = load_dense(parent, torch.float32, CPU)
    return AlignmentObjective(student, teacher, torch.float32, weight, RouterLoads(student))


def residuals(model: MoLForCausalLM, rows: TokenRows, index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of every layer, from the model's own forward pass, (n, d) unpadded."""
    pairs: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda m, args, out: pairs.append((args[0], out[0])))
        for layer in model.model.layers
    ]
    model.model(**rows.batch(index).inputs(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return pairs


def test_the_loss_is_the_relative_error_on_the_parents_own_residuals(
    tiny_mol: Callable[..., Path], dense_parent: Parent, rows: TokenRows
) -> None:
    student = open_checkpoint(tiny_mol(), CPU).train()
    task, index = alignment(student, dense_parent), torch.arange(3)
    parts = task.backward(micro_batches(rows, index, 3, ONE), ONE)

    # The student's layers by their own forward pass, fed with the parent's residuals.
    pairs, errors = residuals(task.parent, rows, index), []
    for number, (x, wanted) in enumerate(pairs):
        layer = student.model.layers[number]
        if isinstance(layer, MoLLayer):
            swap = layer.register_forward_pre_hook(lambda m, args, x=x: (x, *args[1:]))
            out = residuals(student, rows, index)[number][1]
            swap.remove()
            error = (out - wanted).square().sum(-1) / wanted.square().sum(-1)
            errors.append(error.mean())
    assert rows.tokens == len(pairs[0][0]) == 43  # without padding
    torch.testing.assert_close(parts[0], torch.stack(errors).mean().detach())
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert {name.split(".")[2] for name in gradients} == {"1", "2"}
    for number, error in zip((1, 2), errors, strict=True):
        layer = student.model.layers[number]
        expected = torch.autograd.grad(error, list(layer.parameters()), allow_unused=True)
        for (name, parameter), right in zip(layer.named_parameters(), expected, strict=True):
            assert parameter.grad is not None and right is not None, name
            torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-7)


def test_micro_batches_add_up(
    tiny_mol: Callable[..., Path], dense_parent: Parent, rows: TokenRows
) -> None:
    results = []
    for size in (1, 3):
        student = open_checkpoint(tiny_mol(), CPU).train()
        task = alignment(student, dense_parent)
        loss = task.backward(micro_batches(rows, torch.arange(3), size, ONE), ONE)[0]
        gradient = student.get_parameter("model.layers.1.shared.thin_in").grad
        results.append((loss, gradient))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


def test_a_copy_of_the_parent_has_nothing_to_learn(dense_parent: Parent, rows: TokenRows) -> None:
    full_width = dict(
        layer_structures=["mixture"] * 3,
        layer_mixers=["attention"] * 3,
        num_blocks=1,
        num_shared_blocks=1,
        num_blocks_per_tok=0,
        d_thin=32,
        d_ff_thin=48,
        num_heads_thin=4,
        num_kv_heads_thin=2,
    )
    config = MoLConfig(**(dense_parent.mol_config_kwargs() | full_width))
    student = MoLForCausalLM(config)
    task = alignment(student, dense_parent)
    for i, dense in enumerate(task.parent.model.layers):
        student.model.layers[i] = copy_layer(config, i, dense).layer.requires_grad_()
    loss = task.backward(micro_batches(rows, torch.arange(3), 2, ONE), ONE)[0]
    assert loss < 1e-11


def test_only_one_layers_activations_are_held(
    tiny_mol: Callable[..., Path],
    dense_parent: Parent,
    rows: TokenRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer's gradient is there before the next layer runs."""
    student = open_checkpoint(tiny_mol(), CPU).train()
    task, seen = alignment(student, dense_parent), []
    first = student.get_parameter("model.layers.1.shared.thin_in")
    student.model.layers[2].register_forward_pre_hook(
        lambda module, arguments: seen.append(first.grad is not None)
    )
    task.backward(micro_batches(rows, torch.arange(3), 3, ONE), ONE)
    assert seen == [True]


def test_another_parent_is_refused(
    tiny_mol: Callable[..., Path], tiny_parent: Callable[..., Path], dense_parent: Parent
) -> None:
    student = open_checkpoint(tiny_mol(head_dim=4), CPU)
    with pytest.raises(MolError, match="`head_dim` is 8 in the parent, 4 in the model"):
        check_alignable(student, load_dense(dense_parent, torch.float32, CPU))
