"""Whether fla-core's Gated DeltaNet kernels compute right gradients on the GPU at hand.

Some pairs of Triton release and GPU miscompile fla's gated backward (fla issue 640), and fla then
refuses by version. We ask the GPU instead: one small forward and backward against the recurrence.
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

from molcli.kernels.gated_delta_rule.chunked import chunk_gated_delta_rule_fla, load_fla
from molcli.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

# bf16 rounds to 2^-9; sums of a few hundred such terms stay well under this.
MAX_RELATIVE_ERROR = 2e-2


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fla_is_sound(device: int, head_dim: int) -> bool:
    """Whether fla-core is installed and agrees with the recurrence on this GPU, gradients too.

    The first call for a GPU and a head width runs the check.
    """
    return _fla_is_sound(device, head_dim)


@functools.cache
def _fla_is_sound(device: int, head_dim: int) -> bool:
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
    if hasattr(guard, "TRITON_ABOVE_3_7_1"):  # the check below decides, not the version
        setattr(guard, "TRITON_ABOVE_3_7_1", True)  # noqa: B010 - a name of fla's, not of ours
    with _as_if_alone(device):
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
def _as_if_alone(device: int) -> Iterator[None]:
    """The first layer's forward pass runs the check, under autocast perhaps, and perhaps where a
    checkpoint counts the tensors that are saved: those of the check would not be saved again."""
    with (
        torch.enable_grad(),
        torch.autocast("cuda", enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        torch.random.fork_rng(devices=[device]),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _gradient_error(device: torch.device, head_dim: int) -> float:
    """The largest relative error over three ragged segments: outputs and gradients as in training,
    where states start at zero; outputs and last states as in decoding, where they do not.

    Gradients towards the decay of a large first state are left out: they are differences of large
    terms, which bf16 resolves to a few percent wherever the kernel is right.
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

    def exactly(tensors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
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
        return chunk_gated_delta_rule_fla(q, k, v, g, beta, cu, state)

    fast = [x.clone().requires_grad_() for x in inputs]
    exact = [x.clone().requires_grad_() for x in inputs]
    out = by_fla(fast, None)[0]
    expected = exactly(exact, torch.zeros_like(state))[0]
    weight = torch.randn_like(expected)
    pairs: list[tuple[Any, Any]] = [(out, expected)]
    gradients = (
        torch.autograd.grad((x * weight).sum(), z) for x, z in ((out, fast), (expected, exact))
    )
    pairs += zip(*gradients, strict=True)
    with torch.no_grad():
        pairs += zip(by_fla(inputs, state), exactly(inputs, state), strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
