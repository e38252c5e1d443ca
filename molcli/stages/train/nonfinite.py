"""Find where a value that is not finite is: in the state of a run, or in a step that went wrong."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from molcli.stages.train.distributed import local_shard, reshard


def first_nonfinite(tensors: Mapping[str, Tensor], accelerator: Accelerator | None = None) -> str:
    """Return the name of the first tensor with a value that is not finite, "" if there is none.

    Reads each tensor once, and waits for the device once.

    Args:
        tensors: by name; of a sharded one, this rank's part is read.
        accelerator: of several ranks, which all call this and get the same answer.
    """
    parts = [local_shard(t) for t in tensors.values()]
    bad = _first_nonfinite([part.detach() for part in parts])
    if accelerator is not None and accelerator.num_processes > 1:
        found = torch.tensor([bad], device=accelerator.device)
        bad = int(accelerator.gather(found).min())
    return list(tensors)[bad] if bad < len(parts) else ""


def _first_nonfinite(tensors: list[Tensor]) -> int:
    """Index of the first such tensor; their number if there is none."""
    # A sum is not finite if one of its terms is not, and takes no memory. It may also overflow.
    sums: dict[torch.device, dict[int, Tensor]] = {}
    for number, tensor in enumerate(tensors):
        sums.setdefault(tensor.device, {})[number] = tensor.sum(dtype=torch.float32)
    suspects: list[int] = []
    for totals in sums.values():
        finite = torch.stack(list(totals.values())).isfinite().tolist()
        suspects += [number for number, good in zip(totals, finite, strict=True) if not good]
    return next((n for n in sorted(suspects) if not tensors[n].isfinite().all()), len(tensors))


def find_nonfinite(
    model: nn.Module, losses_are_finite: Callable[[], bool], accelerator: Accelerator
) -> str:
    """Name the first non-finite value: in a parameter, an output, the loss or a gradient.

    Collective: every rank calls this and gets the same answer.

    Args:
        model: with the gradients of the step that failed.
        losses_are_finite: runs this rank's part of the step again, without gradients.
        accelerator: gives ranks and device.

    Returns:
        A place in words, such as "the output of model.layers.2".
    """
    # Ranks agree on an index into this list, in which causes come before their effects.
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    places = [
        *(f"the weights {name}" for name in parameters),
        *(f"the output of {name or 'the model'}" for name in modules),
        "the loss",
        *(f"the gradient of {name}" for name in reversed(parameters)),
        "the sum of squared gradients",
    ]
    index = _first_place(model, losses_are_finite, parameters, modules)
    found = torch.tensor([index], device=accelerator.device)
    return places[int(accelerator.gather(found).min())]


def _first_place(
    model: nn.Module,
    losses_are_finite: Callable[[], bool],
    parameters: list[str],
    modules: list[str],
) -> int:
    """Index of the first place on this rank, in its shard of each parameter and in its rows."""
    # Compiled modules would skip hooks that are added now. Every rank runs the forward pass,
    # whatever it has found before: with sharded weights, ranks need each other for it.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), _nonfinite_outputs(model) as outputs:
        finite = losses_are_finite()
    reshard(model)
    weights = dict(model.named_parameters())
    for number, name in enumerate(parameters):
        if not local_shard(weights[name]).isfinite().all():
            return number
    first = len(parameters)
    if outputs:
        return first + modules.index(outputs[0])
    first += len(modules)
    if not finite:
        return first
    for number, name in enumerate(reversed(parameters), start=first + 1):
        gradient = weights[name].grad
        if gradient is not None and not local_shard(gradient).isfinite().all():
            return number
    return first + 1 + len(parameters)


@contextmanager
def _nonfinite_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that collects the names of modules with such outputs, in order of execution."""
    found: list[str] = []

    def check(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
