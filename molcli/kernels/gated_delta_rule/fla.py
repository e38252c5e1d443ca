"""fla-core's Gated DeltaNet kernels, used only where they compute right gradients.

Some pairs of Triton release and GPU miscompile fla's gated backward (fla issue 640), and fla then
refuses by version. We ask the GPU instead: one small forward and backward against the recurrence.
"""

import functools
import importlib
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from molcli.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

# bf16 rounds to 2^-9; sums of a few hundred such terms stay well under this.
MAX_RELATIVE_ERROR = 2e-2


def chunk_gated_delta_rule_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes as `gated_delta_rule`. Computes in bf16 with float32 states."""
    ops, _ = _load()
    half = [x[None].to(torch.bfloat16) for x in (q, k, v)]
    out, last = ops.chunk_gated_delta_rule(
        *half,
        g[None].float(),
        beta[None].float(),
        initial_state=state.float(),
        output_final_state=True,
        cu_seqlens=cu_seqlens.long(),
    )
    return out[0].to(v.dtype), last


@functools.cache
def fla_is_sound(device: int, head_dim: int) -> bool:
    """Whether fla-core is installed and agrees with the recurrence on this GPU, gradients too."""
    try:
        _, guard = _load()
    except ImportError:
        warnings.warn("fla-core is not installed: Gated DeltaNet runs eagerly and slowly "
                      "(pip install 'molcli[gpu]')", stacklevel=2)
        return False
    if hasattr(guard, "TRITON_ABOVE_3_7_1"):
        guard.TRITON_ABOVE_3_7_1 = True  # the check below decides, not the version
    with torch.enable_grad(), torch.random.fork_rng(devices=[device]):
        error = _gradient_error(torch.device("cuda", device), head_dim)
    if not error <= MAX_RELATIVE_ERROR:
        warnings.warn(f"fla-core's gradients are off by {error:.1%} on this GPU: "
                      "Gated DeltaNet runs eagerly and slowly", stacklevel=2)
        return False
    return True


def _load() -> tuple[ModuleType, ModuleType]:
    return (
        importlib.import_module("fla.ops.gated_delta_rule"),
        importlib.import_module("fla.ops.common.chunk_o"),
    )


def _gradient_error(device: torch.device, head_dim: int) -> float:
    """The largest relative error of outputs, states and gradients, over three ragged segments."""
    torch.manual_seed(0)
    bounds, heads = [0, 70, 71, 300], 2
    rows = bounds[-1]
    shape = (rows, heads, head_dim)
    q, k = (F.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(2))
    v, g = torch.randn(shape, device=device), -torch.rand(shape[:2], device=device)
    beta = torch.rand(shape[:2], device=device)
    state = torch.randn(3, heads, head_dim, head_dim, device=device)
    inputs = [x.bfloat16().float() for x in (q, k, v)] + [g, beta, state]
    cu = torch.tensor(bounds, device=device, dtype=torch.int32)
    fast = [x.clone().requires_grad_() for x in inputs]
    exact = [x.clone().requires_grad_() for x in inputs]
    results = chunk_gated_delta_rule_fla(*fast[:5], cu, fast[5])
    pieces = [
        recurrent_gated_delta_rule(*(x[None, a:b] for x in exact[:5]), exact[5][i : i + 1])
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    expected = torch.cat([o[0] for o, _ in pieces]), torch.cat([s for _, s in pieces])
    weights = [torch.randn_like(x) for x in expected]
    sum((a * w).sum() for a, w in zip(results, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    pairs = [*zip(results, expected, strict=True)]
    pairs += [(a.grad, b.grad) for a, b in zip(fast, exact, strict=True)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
