"""Where a value that is not finite first came up. Looked for only after it has happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from molcli.stages.train.distributed import local
from molcli.stages.train.sharding import reshard


def origin(model: nn.Module, forward: Callable[[], bool], accelerator: Accelerator) -> str:
    """In words: a parameter, a module's output, the loss, or the gradient of a parameter.

    model: with the gradients of the step at hand. forward: runs this rank's share of it again and
    returns whether its losses are finite. Every rank calls this and gets the same answer.
    """
    # Ranks agree on a number: the place in this list, in which causes come before effects.
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    places = [
        *(f"the weights {name}" for name in parameters),
        *(f"the output of {name or 'the model'}" for name in modules),
        "the loss",
        *(f"the gradient of {name}" for name in reversed(parameters)),
        "the sum of squared gradients",
    ]
    mine = torch.tensor([_place(model, forward, parameters, modules)], device=accelerator.device)
    return places[int(accelerator.gather(mine).min())]


def _place(
    model: nn.Module, forward: Callable[[], bool], parameters: list[str], modules: list[str]
) -> int:
    """On this rank, which looks at its own part of each parameter and at its own rows."""
    # Compiled modules would run past hooks that came after them. Where weights are shared, ranks
    # need one another for the forward pass: each runs it, whatever it has found before.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), _watched(model) as seen:
        finite = forward()
    reshard(model)
    weights = dict(model.named_parameters())
    for number, name in enumerate(parameters):
        if not local(weights[name]).isfinite().all():
            return number
    first = len(parameters)
    if seen:
        return first + modules.index(seen[0])
    first += len(modules)
    if not finite:
        return first
    for number, name in enumerate(reversed(parameters), start=first + 1):
        gradient = weights[name].grad
        if gradient is not None and not local(gradient).isfinite().all():
            return number
    return first + 1 + len(parameters)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Yields the names of modules whose output is not finite, in the order in which they ran."""
    seen: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                seen.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
