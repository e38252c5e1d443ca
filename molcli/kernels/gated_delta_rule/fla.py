"""fla-core's Gated DeltaNet kernels, used only where they compute right gradients.

Some pairs of Triton release and GPU miscompile fla's gated backward (fla issue 640), and fla then
refuses by version. We ask the GPU instead: one small forward and backward against the recurrence.
"""

import functools
import importlib
import itertools
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
        warnings.warn(
            "fla-core is not installed: Gated DeltaNet runs eagerly and slowly "
            "(pip install 'molcli[gpu]')",
            stacklevel=2,
        )
        return False
    if hasattr(guard, "TRITON_ABOVE_3_7_1"):  # the check below decides, not the version
        setattr(guard, "TRITON_ABOVE_3_7_1", True)  # noqa: B010 - a name of fla's, not of ours
    with torch.enable_grad(), torch.random.fork_rng(devices=[device]):
        error = _gradient_error(torch.device("cuda", device), head_dim)
    if not error <= MAX_RELATIVE_ERROR:
        warnings.warn(
            f"fla-core's gradients are off by {error:.1%} on this GPU: "
            "Gated DeltaNet runs eagerly and slowly",
            stacklevel=2,
        )
        return False
    return True


def _load() -> tuple[ModuleType, ModuleType]:
    return (
        importlib.import_module("fla.ops.gated_delta_rule"),
        importlib.import_module("fla.ops.common.chunk_o"),
    )


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

    def by_fla(tensors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = tensors
        return chunk_gated_delta_rule_fla(q, k, v, g, beta, cu, state)

    fast = [x.clone().requires_grad_() for x in inputs]
    exact = [x.clone().requires_grad_() for x in inputs]
    out = by_fla(fast, torch.zeros_like(state))[0]
    expected = exactly(exact, torch.zeros_like(state))[0]
    weight = torch.randn_like(expected)
    pairs = [(out, expected)]
    gradients = (
        torch.autograd.grad((x * weight).sum(), z) for x, z in ((out, fast), (expected, exact))
    )
    pairs += zip(*gradients, strict=True)
    with torch.no_grad():
        pairs += zip(by_fla(inputs, state), exactly(inputs, state), strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
