"""A short training of one converted layer, alone."""

import torch
from torch import Tensor

from molcli.config.sections import ConvertConfig
from molcli.io.packing import RowOrder, TokenRows
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import Context, token_context
from molcli.model.layers import Layer
from molcli.stages.convert.layer import converted_block

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
    order = RowOrder(len(rows), seed)
    residual = x.unflatten(0, (len(rows), length))
    for step in range(options.steps):
        index = order.take(step * at_once, at_once)
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
