"""Turn the softmax attention of one layer into Gated DeltaNet, and train that mixer alone.

Input: a layer with softmax attention and the residual (n, d_model) before it. Output: a layer with
Gated DeltaNet in its routed blocks (or its one dense block) and all other tensors unchanged.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molcli.config.sections import ConvertConfig
from molcli.data.order import ShuffledOrder
from molcli.data.packing import TokenRows
from molcli.fitting.chunks import Chunks, Context, token_context
from molcli.fitting.projection import fit_projection
from molcli.kernels.grouped_linear import grouped_linear
from molcli.maths.least_squares import ridge
from molcli.maths.moments import Sample, regression_moments
from molcli.model.blocks import BlockStack
from molcli.model.configuration_mol import MoLConfig
from molcli.model.layers import DenseLayer, Layer, MoLLayer, SlicedLayer, new_layer
from molcli.model.mixers import Attention, Mixer
from molcli.model.mixers.base import AttentionSample

STEP_TOKENS = 4096  # of a step of Adam, at most, unless a row is longer
FIXED_WEIGHTS = ("q_proj", "k_proj", "v_proj")  # as the conversion sets them


@torch.no_grad()
def convert_layer(
    config: MoLConfig, index: int, softmax: Layer, x: Tensor, chunks: Chunks, penalty: float
) -> Layer:
    """Convert a layer: every block is fitted to what its own softmax attention gives.

    Args:
        config: of the converted model.
        index: of the layer.
        softmax: the layer to convert.
        x: (n, d_model), the residual before the layer.
        chunks: of the same tokens.
        penalty: of the regressions (`ridge`).

    Returns:
        A new layer, which shares no memory with the old one.
    """
    layer = new_layer(config, index).to(x.device).requires_grad_(False).eval()
    prefix = mixer_prefix(softmax)
    kept = {n: y for n, y in softmax.state_dict().items() if not n.startswith(prefix)}
    layer.load_state_dict(kept, strict=False)
    old, new = converted_block(softmax).mixer, converted_block(layer).mixer
    assert isinstance(old, Attention)
    samples = [_sample(softmax, old, x[chunk.tokens], chunk.context) for chunk in chunks]

    def regress(samples: Iterator[Sample]) -> Tensor:
        return ridge(*regression_moments(samples, 0.0), penalty)

    num_heads = old.q_proj.shape[1] // old.head_dim
    for name in ("q", "k", "v"):
        weight, bias = (getattr(old, f"{name}_{kind}") for kind in ("proj", "bias"))
        norm = None if name == "v" else getattr(old, f"{name}_norm")
        projection = fit_projection(weight, bias, norm, num_heads, old.head_dim, samples, regress)
        getattr(new, f"{name}_proj").copy_(projection)
    new.start_from_attention(lambda: samples, regress)
    new.o_proj.copy_(regress(_output_samples(old, new, samples)))
    return layer


def align_mixer(
    config: MoLConfig,
    layer: Layer,
    softmax: Layer,
    x: Tensor,
    rows: TokenRows,
    options: ConvertConfig,
    seed: int,
) -> None:
    """Train the converted mixer with Adam for options.steps steps; q, k and v stay fixed.

    The loss is the squared error between the outputs of the converted layer and of the layer with
    softmax on the same input, relative to the square of what the latter adds.

    Args:
        config: of the converted model.
        layer: the converted layer, changed in place.
        softmax: the layer before its conversion.
        x: (n, d_model), the residual of `rows` before the layer.
        rows: the text to train on.
        options: steps and learning_rate are used; the rate falls linearly to 0.
        seed: of the order of the rows.
    """
    mixer = converted_block(layer).mixer
    trained = [p for n, p in mixer.named_parameters() if n not in FIXED_WEIGHTS]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate)
    length = rows.input_ids.shape[1]
    batch_rows = min(len(rows), max(1, STEP_TOKENS // length))
    order = ShuffledOrder(len(rows), seed)
    residual = x.unflatten(0, (len(rows), length))
    for step in range(options.steps):
        index = order.indices(step * batch_rows, batch_rows)
        batch = rows.batch(index)
        context = token_context(config, batch.document_ids, batch.position_ids, x.device)
        inputs = residual[index.to(x.device)].flatten(0, 1)
        with torch.no_grad():
            wanted = context.run(softmax, inputs)
            size = (wanted - inputs).square().sum().clamp(min=1e-30)
        loss = (context.run(layer, inputs) - wanted).square().sum() / size
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        optimizer.step()
    layer.requires_grad_(False)


def mixer_prefix(layer: Layer) -> str:
    """Return the prefix of the tensors of a layer that a conversion replaces."""
    return "routed.block.mixer." if isinstance(layer, MoLLayer) else "block.mixer."


def converted_block(layer: Layer) -> BlockStack:
    """Return the blocks of a layer whose mixer a conversion replaces."""
    if isinstance(layer, DenseLayer | SlicedLayer):
        return layer.block
    assert isinstance(layer, MoLLayer)
    assert layer.routed is not None
    return layer.routed.block


def _sample(layer: Layer, mixer: Attention, x: Tensor, context: Context) -> AttentionSample:
    """What the blocks to convert read and their heads give, one chunk. x: (tokens, d_model)."""
    block = converted_block(layer)
    if isinstance(layer, DenseLayer | SlicedLayer):
        rows, thin = context.dense_rows, x
    else:
        assert isinstance(layer, MoLLayer)
        assert layer.routed is not None and layer.router is not None
        rows, _ = layer.route(layer.router(x), context.stream)
        thin = grouped_linear(rows.gather(x), layer.routed.thin_in, rows)
    read = block.norm(thin, block.input_norm, rows)
    return AttentionSample(read, rows, context, mixer.heads(read, context.blocks(rows)))


def _output_samples(
    old: Attention, new: Mixer, samples: Sequence[AttentionSample]
) -> Iterator[Sample]:
    """The new heads' outputs, and the old mixer's output."""
    for chunk in samples:
        rows = chunk.rows
        out = new.heads(chunk.read, chunk.contexts.blocks(rows))
        wanted = grouped_linear(chunk.targets.flatten(1), old.o_proj, rows, old.o_bias)
        yield out.flatten(1), wanted, rows.offsets
