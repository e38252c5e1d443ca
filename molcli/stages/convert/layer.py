"""Turn the attention of one layer into Gated DeltaNet, and train it alone for a few steps."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molcli.config.sections import ConvertConfig
from molcli.data.order import ShuffledOrder
from molcli.data.packing import TokenRows
from molcli.fitting.chunks import Chunks, Context, token_context
from molcli.fitting.gated_deltanet import Regress, Site, set_gated_deltanet, unshared
from molcli.kernels.grouped_linear import grouped_linear
from molcli.maths.least_squares import ridge
from molcli.maths.moments import Sample, regression_moments
from molcli.model.blocks import BlockStack
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, Layer, new_layer
from molcli.model.mixers import Attention, GatedDeltaNet

TOKENS = 4096  # in a step, at most, where rows are not longer
INHERITED = ("q_proj", "k_proj", "v_proj")


def align(
    config: MoLConfig,
    layer: Layer,
    softmax: Layer,
    x: Tensor,
    rows: TokenRows,
    options: ConvertConfig,
    seed: int,
) -> None:
    """Adam on the converted mixer, q, k and v left as they are, for options.steps steps.

    The loss is the squared error of the layer's output towards what the layer with softmax gives
    on the same input, relative to what that one adds. x: (n, d_model), the residual of `rows`
    before the layer.
    """
    mixer = converted_block(layer).mixer
    trained = [p for n, p in mixer.named_parameters() if n not in INHERITED]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate)
    length = rows.input_ids.shape[1]
    at_once = min(len(rows), max(1, TOKENS // length))
    order = ShuffledOrder(len(rows), seed)
    residual = x.unflatten(0, (len(rows), length))
    for step in range(options.steps):
        index = order.indices(step * at_once, at_once)
        context = _context(config, rows, index, x.device)
        inputs = residual[index.to(x.device)].flatten(0, 1)
        with torch.no_grad():
            wanted = context.run(softmax, inputs)
            size = (wanted - inputs).square().sum()
        loss = (context.run(layer, inputs) - wanted).square().sum() / size
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        optimizer.step()
    layer.requires_grad_(False)


def _context(config: MoLConfig, rows: TokenRows, index: Tensor, device: torch.device) -> Context:
    batch = rows.batch(index)
    return token_context(config, batch.document_ids, batch.position_ids, device)


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
    assert isinstance(old, Attention) and isinstance(new, GatedDeltaNet)
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


def _site(layer: Layer, mixer: Attention, x: Tensor, context: Context) -> Site:
    """Where the converted blocks stand, on a chunk of the text: x (tokens, d_model)."""
    block = converted_block(layer)
    if isinstance(layer, DenseLayer):
        rows, thin = context.dense_rows, x
    else:
        assert layer.routed is not None and layer.router is not None
        rows, _ = layer.route(layer.router(x), context.stream)
        thin = grouped_linear(rows.gather(x), layer.routed.thin_in, rows)
    read = block.norm(thin, block.input_norm, rows)
    return Site(read, rows, context, mixer.heads(read, context.blocks(rows)))


def _outputs(old: Attention, new: GatedDeltaNet, sites: Sequence[Site]) -> Iterator[Sample]:
    """What the new heads give, and what the old output projection makes of the old ones."""
    for site in sites:
        rows, context = site.rows, site.context
        out = new.heads(site.read, context.blocks(rows))
        wanted = grouped_linear(site.wanted.flatten(1), old.o_proj, rows, old.o_bias)
        yield out.flatten(1), wanted, rows.offsets


def _projection(old: Attention, name: str, sites: Sequence[Site], regress: Regress) -> Tensor:
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
