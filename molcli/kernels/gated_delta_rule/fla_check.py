"""A check that fla-core's kernels of the gated delta rule compute correct gradients on this GPU.

Some pairs of Triton release and GPU miscompile fla's gated backward pass (fla issue 640). fla then
refuses to run, by version. Here one small forward and backward pass is run on the GPU and compared
with the recurrence.
"""

import functools
import importlib
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.gated_delta_rule.fla_chunk import fla_chunk_gated_delta_rule, load_fla
from molcli.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

# bf16 rounds with a relative error of 2^-9; sums of a few hundred such terms stay well below this.
MAX_RELATIVE_ERROR = 2e-2


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fla_is_correct(device: int, head_dim: int) -> bool:
    """Return whether fla-core is installed and agrees with the recurrence, gradients included.

    The first call for a GPU and a head dimension runs the check, and warns if it fails.

    Args:
        device: index of the CUDA device.
        head_dim: channels of a head.

    Returns:
        True if the relative error is at most MAX_RELATIVE_ERROR.
    """
    return _fla_is_correct(device, head_dim)


@functools.cache
def _fla_is_correct(device: int, head_dim: int) -> bool:
    try:
        load_fla()
        guard = importlib.import_module("fla.ops.common.chunk_o")
    except ImportError:
        warnings.warn(
            "fla-core is not installed: Gated DeltaNet runs eagerly and slowly "
            "(pip install 'molcli[gpu]')",
            stacklevel=2,
        )
        return False
    if hasattr(guard, "TRITON_ABOVE_3_7_1"):  # the check below decides instead
        setattr(guard, "TRITON_ABOVE_3_7_1", True)  # noqa: B010 - an attribute of fla
    with _isolated(device):
        error = _gradient_error(torch.device("cuda", device), head_dim)
    if not error <= MAX_RELATIVE_ERROR:
        warnings.warn(
            f"fla-core's gradients are off by {error:.1%} on this GPU: "
            "Gated DeltaNet runs eagerly and slowly",
            stacklevel=2,
        )
        return False
    return True


@contextmanager
def _isolated(device: int) -> Iterator[None]:
    """Isolate the check from the first layer's forward pass, which runs it.

    That pass may run under autocast, and under activation checkpointing, which counts the tensors
    that are saved: in the recomputation the check does not run, and saves none.
    """
    with (
        torch.enable_grad(),
        torch.autocast("cuda", enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_identity, _identity),
        torch.random.fork_rng(devices=[device]),
    ):
        yield


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _gradient_error(device: torch.device, head_dim: int) -> float:
    """The largest relative error over three segments of different lengths.

    Compares outputs and gradients as in training, where states start at zero, and outputs and final
    states as in decoding, where they do not. The gradient of the decay with a large initial state
    is left out: it is a difference of large terms, which a correct bf16 kernel resolves to a few
    percent only.
    """
    torch.manual_seed(0)
    bounds, heads = [0, 70, 71, 300], 2
    shape = (bounds[-1], heads, head_dim)
    q, k = (F.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(2))
    v, g = torch.randn(shape, device=device), -torch.rand(shape[:2], device=device)
    beta = torch.rand(shape[:2], device=device)
    inputs = [x.bfloat16().float() for x in (q, k, v)] + [g, beta]
    cu = torch.tensor(bounds, device=device, dtype=torch.int32)
    state = torch.randn(3, heads, head_dim, head_dim, device=device)

    def by_recurrence(tensors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = tensors
        pieces = [
            recurrent_gated_delta_rule(
                q[None, a:b],
                k[None, a:b],
                v[None, a:b],
                g[None, a:b],
                beta[None, a:b],
                state[i : i + 1],
            )
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat([o[0] for o, _ in pieces]), torch.cat([s for _, s in pieces])

    def by_fla(tensors: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, beta = tensors
        return fla_chunk_gated_delta_rule(q, k, v, g, beta, cu, state)

    fast = [x.clone().requires_grad_() for x in inputs]
    exact = [x.clone().requires_grad_() for x in inputs]
    out = by_fla(fast, None)[0]
    expected = by_recurrence(exact, torch.zeros_like(state))[0]
    weight = torch.randn_like(expected)
    pairs: list[tuple[Any, Any]] = [(out, expected)]
    gradients = (
        torch.autograd.grad((x * weight).sum(), z) for x, z in ((out, fast), (expected, exact))
    )
    pairs += zip(*gradients, strict=True)
    with torch.no_grad():
        pairs += zip(by_fla(inputs, state), by_recurrence(inputs, state), strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
