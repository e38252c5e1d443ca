"""The attention of one layer becomes Gated DeltaNet."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molcli.kernels.grouped_linear import grouped_linear
from molcli.maths.moments import Sample, regression_moments
from molcli.maths.refit import ridge
from molcli.model.block_stack import BlockStack, StackedAttention
from molcli.model.chunks import Chunks
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import Context
from molcli.model.deltanet_start import Regress, Site, set_gated_deltanet, unshared
from molcli.model.gated_deltanet import StackedGatedDeltaNet
from molcli.model.layers import DenseLayer, Layer, new_layer


@torch.no_grad()
def convert_layer(
    config: MoLConfig, index: int, softmax: Layer, x: Tensor, chunks: Chunks, penalty: float
) -> Layer:
    """The layer with Gated DeltaNet in its dense or routed blocks, all other tensors its own.

    config: of the converted model. x: (n, d_model), the residual before the layer. Every block is
    fitted to what its own softmax attention gives on it. penalty: of the regressions (`ridge`).
    """
    layer = new_layer(config, index).to(x.device).requires_grad_(False).eval()
    prefix = mixer_prefix(softmax)
    kept = {n: y for n, y in softmax.state_dict().items() if not n.startswith(prefix)}
    layer.load_state_dict(kept, strict=False)
    old, new = converted_block(softmax).mixer, converted_block(layer).mixer
    assert isinstance(old, StackedAttention) and isinstance(new, StackedGatedDeltaNet)
    sites = [_site(softmax, old, x[chunk.tokens], chunk.context) for chunk in chunks]

    def regress(samples: Iterator[Sample]) -> Tensor:
        return ridge(*regression_moments(samples, 0.0), penalty)

    for name in ("q", "k", "v"):
        getattr(new, f"{name}_proj").copy_(_projection(old, name, sites, regress))
    set_gated_deltanet(new, sites, regress)
    new.o_proj.copy_(regress(_outputs(old, new, sites)))
    return layer


def mixer_prefix(layer: Layer) -> str:
    """Under which names a layer has the tensors that a conversion replaces."""
    return "block.mixer." if isinstance(layer, DenseLayer) else "routed.block.mixer."


def converted_block(layer: Layer) -> BlockStack:
    """The blocks of a layer whose mixer a conversion replaces."""
    if isinstance(layer, DenseLayer):
        return layer.block
    assert layer.routed is not None
    return layer.routed.block


def _site(layer: Layer, mixer: StackedAttention, x: Tensor, context: Context) -> Site:
    """Where the converted blocks stand, on a chunk of the text: x (tokens, d_model)."""
    block = converted_block(layer)
    if isinstance(layer, DenseLayer):
        rows, thin = context.dense_rows, x
    else:
        assert layer.routed is not None and layer.router is not None
        rows, _ = layer.route(layer.router(x), context.stream)
        thin = grouped_linear(rows.gather(x), layer.routed.thin_in, rows)
    read = block.norm(thin, block.input_norm, rows)
    return Site(read, rows, context, mixer.heads(read, rows, context.rotary, context.stream, None))


def _outputs(
    old: StackedAttention, new: StackedGatedDeltaNet, sites: Sequence[Site]
) -> Iterator[Sample]:
    """What the new heads give, and what the old output projection makes of the old ones."""
    for site in sites:
        rows, context = site.rows, site.context
        out = new.heads(site.read, rows, context.rotary, context.stream, None)
        wanted = grouped_linear(site.wanted.flatten(1), old.o_proj, rows, old.o_bias)
        yield out.flatten(1), wanted, rows.offsets


def _projection(
    old: StackedAttention, name: str, sites: Sequence[Site], regress: Regress
) -> Tensor:
    """(B, heads * head_dim, width), q, k or v for every query head.

    Gated DeltaNet has no biases here, and brings q and k to unit length without weights of its own:
    a bias is fitted into the matrix, a norm's weights multiply its rows.
    """
    weight: Tensor = getattr(old, f"{name}_proj")
    bias: Tensor | None = getattr(old, f"{name}_bias")
    if bias is not None:
        given = (
            (s.read, grouped_linear(s.read, weight, s.rows, bias), s.rows.offsets) for s in sites
        )
        weight = regress(given).to(weight)
    heads = weight.unflatten(1, (-1, old.head_dim))
    norm = None if name == "v" else getattr(old, f"{name}_norm")
    if norm is not None:
        heads = heads * norm[:, None, :, None]
    return unshared(heads, old.q_proj.shape[1] // old.head_dim).flatten(1, 2)
