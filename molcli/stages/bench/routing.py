"""Routing of a chosen balance for untrained models, by the routers' correction biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molcli.model import MoLForCausalLM
from molcli.model.routing.balance import bias_step, block_counts
from molcli.model.routing.router import Router

# Logits of an untrained router are normal with a standard deviation of 0.02 sqrt(d_model), about 1.
# Biases from SKEW to -SKEW make the first block the busiest and the last one the least busy.
SKEW = 0.5


@contextmanager
def forced_routing(model: Any, kind: str, ids: Tensor) -> Iterator[None]:
    """Set the routers' correction biases inside the context, and restore them after it.

    In an untrained model, residuals of one sequence point in similar directions, so that untrained
    routers leave blocks empty, and other blocks in each sequence. Biases that balance one sequence
    do not balance the next.

    Args:
        model: a Mixture of Layers model; a dense model is left unchanged.
        kind: "even": each block sees about the same number of the tokens `ids`. "skewed": a ramp is
            added to these biases. Any other kind changes nothing.
        ids: (B, T) int64 tokens that the context runs on.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    saved = [router.correction_bias.clone() for router in routers]
    if routers and kind in ("even", "skewed"):
        _balance_routers(model, routers, ids)
    if kind == "skewed":
        for router in routers:
            ramp = torch.linspace(SKEW, -SKEW, len(router.correction_bias))
            router.correction_bias += ramp.to(router.correction_bias)
    try:
        yield
    finally:
        for router, bias in zip(routers, saved, strict=True):
            router.correction_bias.copy_(bias)


def balancing_bias(logits: Tensor, top_k: int) -> Tensor:
    """Find the biases with which each block is chosen by about the same number of tokens.

    Loss-free balancing (arXiv 2408.15664) with a decreasing rate.

    Args:
        logits: (n, R) of a router.
        top_k: number of blocks that a token chooses.

    Returns:
        (R,), in the dtype of the logits.
    """
    bias, count = torch.zeros_like(logits[0]), logits.shape[1]
    for rate in torch.logspace(0, -3, 150).tolist():
        blocks = (logits + bias).topk(top_k).indices
        bias += bias_step(block_counts(blocks, count), rate * logits.std().item())
    return bias


@torch.no_grad()
def load_extremes(model: MoLForCausalLM, ids: Tensor) -> tuple[float, float]:
    """Measure the load of the busiest and of the least busy block of all layers.

    Args:
        model: the model; both loads are 1 if it has no routed blocks.
        ids: (B, T) int64 tokens.

    Returns:
        Numbers of tokens, over the number under uniform routing.
    """
    routing = model.model(ids, use_cache=False).routing
    if not routing:
        return 1.0, 1.0
    counts = torch.stack(
        [r.blocks.flatten().bincount(minlength=r.logits.shape[1]) for r in routing]
    )
    relative = counts.float() / counts.float().mean(1, keepdim=True)
    return relative.max().item(), relative.min().item()


@torch.no_grad()
def _balance_routers(model: MoLForCausalLM, routers: list[Router], ids: Tensor) -> None:
    """Balance all routers in one pass, each on the output of layers that are balanced already."""

    def balance(router: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        logits = router.forward(*args).logits
        router.correction_bias.copy_(balancing_bias(logits, router.top_k))

    hooks = [router.register_forward_pre_hook(balance) for router in routers]
    with torch.compiler.set_stance("force_eager"):  # compiled layers ignore hooks
        model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
