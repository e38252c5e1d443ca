"""One new token a sequence, with a static cache: the layers in few launches, all of fixed shape.

What a layer computes is said in `layers`, `block_stack` and `gated_deltanet`; here it is said again
for rows of one token each, in terms of kernels that do several of its operations. Nothing waits for
the device, and states are updated in place, so that a CUDA graph can repeat it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molcli.kernels.decode_rows import DecodeRows, chosen_rows, every_block
from molcli.kernels.gated_delta_step import gated_delta_step
from molcli.kernels.indexed_combine import indexed_combine
from molcli.kernels.indexed_linear import indexed_linear
from molcli.kernels.route import route
from molcli.kernels.step_attention import append, attend
from molcli.model.blocks import Attention, BlockStack, rms_norm
from molcli.model.decoding.cache import MoLCacheLayer, State
from molcli.model.decoding.graphs import SideStream
from molcli.model.decoding.static_cache import StaticStore
from molcli.model.layers import Layer, MoLLayer, ThinBlocks
from molcli.model.mixers.gated_deltanet import GatedDeltaNet
from molcli.model.routing.router import Routing


@dataclass(frozen=True)
class Step:
    """cos, sin: (B, r). active: (B,) int32, 0 where the new token is padding, which leaves states
    alone. store: of the cache.
    """

    cos: Tensor
    sin: Tensor
    active: Tensor
    store: StaticStore


def step_layer(
    layer: Layer, x: Tensor, step: Step, states: MoLCacheLayer, branch: SideStream
) -> tuple[Tensor, Routing | None]:
    """x: (B, d_model) residual of the new tokens -> the residual after the layer.

    Shared and routed blocks do not need each other's results: the shared ones go to `branch`.
    """
    if not isinstance(layer, MoLLayer):
        return x + _delta(layer.block, x, step.store.always[1], step, states.always), None
    out, routing = x, None
    if layer.shared is not None:
        with branch:
            rows = step.store.always[layer.shared.thin_in.shape[0]]
            out = _thin_blocks(layer.shared, x, rows, step, states.always)
            out = indexed_combine(out, layer.shared.thin_out, rows, None, x)
    if layer.routed is not None and layer.router is not None:
        router, count = layer.router, layer.router.weight.shape[0]
        routing = Routing(*route(x, router.weight, router.correction_bias, layer.top_k))
        share, rows = routing.weights, chosen_rows(routing.blocks, count)
        if not layer.restrict_attention:
            share = torch.zeros_like(routing.logits).scatter(1, routing.blocks, share)
            rows = every_block(len(x), count, x.device)
        delta = _thin_blocks(layer.routed, x, rows, step, states.routed)
        branch.join()
        out = indexed_combine(delta, layer.routed.thin_out, rows, share, out, scale=1 / layer.top_k)
    branch.join()
    return out, routing


def _thin_blocks(
    blocks: ThinBlocks, x: Tensor, rows: DecodeRows, step: Step, state: State
) -> Tensor:
    """x: (B, d_model) -> (R, d_thin), what the blocks add to their thin residuals."""
    thin = indexed_linear(x, [blocks.thin_in], rows)
    return _delta(blocks.block, thin, rows, step, state)


def _delta(block: BlockStack, x: Tensor, rows: DecodeRows, step: Step, state: State) -> Tensor:
    """x: (R, width) -> (R, width), what the blocks add to it."""
    mixer, mlp = block.mixer, block.mlp
    if isinstance(mixer, GatedDeltaNet):
        heads, bias = _deltanet_heads(mixer, x, block.input_norm, rows, step, state), None
    else:
        heads, bias = _attention_heads(mixer, x, block.input_norm, rows, step, state), mixer.o_bias
    mixed = indexed_linear(heads, [mixer.o_proj], rows, bias=bias)
    mixed = _normed(mixed, block.mixer_out_norm, rows, block.eps)
    weights: list[Tensor] = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    hidden = indexed_linear(
        x,
        weights,
        rows,
        plus=mixed,
        norm=block.post_norm,
        eps=block.eps,
        activation=mlp.activation_name,
    )
    if block.mlp_out_norm is None:
        return indexed_linear(hidden, [mlp.down_proj], rows, residual=mixed)
    down = indexed_linear(hidden, [mlp.down_proj], rows)
    return mixed + _normed(down, block.mlp_out_norm, rows, block.eps)


def _normed(x: Tensor, weight: Tensor | None, rows: DecodeRows, eps: float) -> Tensor:
    """RMSNorm with each block's own weight; x itself without one. x: (R, width)."""
    return x if weight is None else rms_norm(x, weight[rows.blocks], eps)


def _deltanet_heads(
    mixer: GatedDeltaNet, x: Tensor, norm: Tensor | None, rows: DecodeRows, step: Step, state: State
) -> Tensor:
    """x: (R, width) -> (R, h * head_dim), gated."""
    weights = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.a_proj, mixer.b_proj]
    projected = indexed_linear(x, list(weights), rows, norm=norm, eps=mixer.eps)
    return gated_delta_step(
        projected,
        [mixer.q_conv, mixer.k_conv, mixer.v_conv],
        mixer.A_log,
        mixer.dt_bias,
        mixer.o_norm,
        state.tensors["conv"],
        state.tensors["recurrent"],
        rows.blocks,
        step.active,
        mixer.eps,
    )


def _attention_heads(
    mixer: Attention, x: Tensor, norm: Tensor | None, rows: DecodeRows, step: Step, state: State
) -> Tensor:
    """x: (R, width) -> (R, h * head_dim)."""
    weights = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    projected = indexed_linear(x, list(weights), rows, norm=norm, eps=mixer.eps)
    biases = [b for b in (mixer.q_bias, mixer.k_bias, mixer.v_bias) if b is not None]
    norms = [w for w in (mixer.q_norm, mixer.k_norm) if w is not None]
    if mixer.qk_norm_full_width:  # which the kernel, head by head, cannot do
        sizes = [w.shape[1] for w in weights]
        q, k, v = projected.split(sizes, dim=-1)
        if biases:
            q, k, v = (z + b[rows.blocks] for z, b in zip((q, k, v), biases, strict=True))
        q, k = mixer.norm_full_width(q, k, lambda weight: weight[rows.blocks])
        projected, biases, norms = torch.cat([q, k, v], dim=-1), [], []
    cache = [state.tensors[name] for name in ("keys", "values", "blocks")]
    filled, heads = step.store.clock.filled, mixer.q_proj.shape[1] // mixer.head_dim
    q = append(
        projected,
        biases,
        norms,
        mixer.of_own_base(step.cos).contiguous(),
        mixer.of_own_base(step.sin).contiguous(),
        *cache,
        filled,
        rows.blocks,
        step.active,
        heads,
        mixer.eps,
    )
    return attend(q, *cache, filled, rows.blocks, rows.num_blocks, mixer.window or 0)
