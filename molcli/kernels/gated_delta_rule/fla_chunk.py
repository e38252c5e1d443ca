"""fla-core's chunk kernels of the gated delta rule, as one custom operator with gradients.

The operator runs without host synchronisation, and what it allocates depends on shapes alone. So
`torch.compile` needs no graph break, and CUDA graphs can capture it.
"""

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from molcli.kernels.segments import chunk_table

CHUNK = 64


@functools.cache  # called in every forward and backward pass of every layer
def load_fla() -> ModuleType:
    """Import fla's module of chunk kernels.

    Raises:
        ImportError: if fla-core is not installed.
    """
    # fla caches what it derives from a tensor of segment bounds, by the tensor's identity. A CUDA
    # graph that is replayed writes other bounds into the same tensor.
    os.environ.setdefault("FLA_DISABLE_TENSOR_CACHE", "1")
    if torch.cuda.get_device_capability() == (9, 0):
        # The configurations that fla's autotuner chose on an H100 (12,288 rows, 8 heads of 64).
        # Its search through some 60 variants takes more than a minute.
        os.environ.setdefault("FLA_CONFIG_DIR", str(Path(__file__).parent / "hopper"))
        os.environ.setdefault("FLA_CACHE_MODE", "full")
    return importlib.import_module("fla.ops.gated_delta_rule.chunk")


def fla_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule with fla-core's chunk kernels, in bf16 with float32 states.

    Args:
        q, k, v, g, beta, cu_seqlens, initial_state: as for `gated_delta_rule`.

    Returns:
        As `gated_delta_rule`.

    Raises:
        ImportError: if fla-core is not installed.
    """
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    bounds = cu_seqlens.long()
    state = None if initial_state is None else initial_state.float()
    out, last, *_ = _forward(
        *half, g.float(), beta.float(), bounds, chunk_table(bounds, q.shape[0], CHUNK), state
    )
    return out.to(v.dtype), None if initial_state is None else last


@custom_op(
    "molcli::chunk_gated_delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens, Tensor table,"
    " Tensor? state) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    table: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final states (empty if state is None), and two tensors for the backward pass: the
    running sum of g inside chunks, in base 2, and the chunks' solved triangular systems."""
    with torch.cuda.device(q.device):
        g, out, solved, last, *_ = load_fla().chunk_gated_delta_rule_fwd(
            *(x.contiguous()[None] for x in (q, k, v, g, beta)),
            scale=q.shape[-1] ** -0.5,
            initial_state=None if state is None else state.contiguous(),
            output_final_state=state is not None,
            cu_seqlens=cu_seqlens,
            chunk_indices=table,
        )
    return out[0], g.new_empty(0) if last is None else last, g[0], solved[0]


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, state = rest
    last = g.new_empty(0) if state is None else torch.empty_like(state)
    return torch.empty_like(v), last, torch.empty_like(g), k.new_empty(*k.shape[:2], CHUNK)


@custom_op(
    "molcli::chunk_gated_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens, Tensor table,"
    " Tensor? state, Tensor solved, Tensor d_out, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    table: Tensor,
    state: Tensor | None,
    solved: Tensor,
    d_out: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and state. g, solved: as `_forward` returned them."""
    with torch.cuda.device(q.device):
        dq, dk, dv, d_beta, dg, d_state, *_ = load_fla().chunk_gated_delta_rule_bwd(
            *(x.contiguous()[None] for x in (q, k, v, g, beta, solved)),
            scale=q.shape[-1] ** -0.5,
            initial_state=None if state is None else state.contiguous(),
            do=d_out.contiguous()[None],
            dht=None if d_last is None else d_last.contiguous(),
            cu_seqlens=cu_seqlens,
            chunk_indices=table,
        )
    d_state = g.new_empty(0) if state is None else d_state
    return dq[0], dk[0], dv[0], dg[0], d_beta[0], d_state


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = rest[2]
    d_state = g.new_empty(0) if state is None else torch.empty_like(state)
    dq, dk, dv, dg, d_beta = (torch.empty_like(x) for x in (q, k, v, g, beta))
    return dq, dk, dv, dg, d_beta, d_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, beta, cu_seqlens, table, state = inputs
    _, _, g, solved = output
    ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, table, state, solved)
    ctx.set_materialize_grads(False)  # else those of g and solved are allocated, as zeros


def _gradients(
    ctx: Any, d_out: Tensor | None, d_last: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *inputs, state, solved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(inputs[2])
    d_last = None if state is None else d_last
    *grads, d_state = _backward(*inputs, state, solved, d_out, d_last)
    return *grads, None, None, None if state is None else d_state


_forward.register_autograd(_gradients, setup_context=_setup_context)
