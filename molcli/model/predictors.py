"""What forecasts the KL of a conversion: its shape, and spectra of what its parent reads."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from molcli.io.parent import Parent
from molcli.maths.architecture import routed_shape, shared_shape
from molcli.maths.forecast import Forecast, Predictors, reading_spectrum
from molcli.maths.partition import Part
from molcli.maths.shapes import ThinShape
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.conversion import dense_shape
from molcli.model.from_parent import dense_layer
from molcli.model.reading import reading_gram

# Fitted to 30 conversions of SmolLM2-135M, of 3, 15 and all 30 layers on 8k to 197k tokens; each
# forecast from the others, the rank correlation is 0.955 (tests/bench/results/plan.md).
FORECAST = Forecast((-1.936, 0.808, 0.101, -0.364, -0.141, -0.371, -0.098))


def predictors(config: MoLConfig, spectra: Mapping[int, Tensor], tokens: int) -> Predictors:
    """What a forecast is made from. spectra: at least of all converted layers; tokens: calibration
    tokens that blocks are fitted to."""
    converted = [i for i, kind in enumerate(config.layer_kinds) if kind != "dense"]
    shared, top_k = config.num_shared_blocks, config.num_blocks_per_tok
    kinds = [(shared_shape(config), shared, 1.0)] * bool(shared)
    kinds += [(routed_shape(config), top_k, config.num_routed_blocks / max(1, top_k))] * bool(top_k)
    dense = dense_shape(config.to_dict())
    weights = [
        count * dense.thin_weights(ThinShape(shape.width, shape.num_heads, shape.d_ff))
        for shape, count, _ in kinds
    ]

    def mean(of_kinds: list[float]) -> float:
        return sum(w * x for w, x in zip(weights, of_kinds, strict=True)) / sum(weights)

    lost = [sum(spectra[i][shape.width :].sum().item() for i in converted) for shape, *_ in kinds]
    features = [float(shape.num_heads * config.head_dim + shape.d_ff) for shape, *_ in kinds]
    heads = max(1, shared * shared_shape(config).num_heads)
    return Predictors(
        layers=len(converted),
        lost_reading=mean(lost) / max(1, len(converted)),
        weights=sum(weights) / dense.weights,
        shared_heads=min(1.0, heads / config.num_attention_heads),
        tokens_a_feature=tokens / mean(features),
        clones=mean([clones for *_, clones in kinds]),
    )


@torch.no_grad()
def layer_spectra(
    parent: Parent, moment: Callable[[int], Tensor], layers: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Each layer's `reading_spectrum`, (d_model,), of all that it reads. One layer in memory.

    moment: layer -> (d_model, d_model) float64, of the unit-rms residual, as calibration wrote it.
    """
    config, device = MoLConfig(**parent.mol_config_kwargs()), default_device()
    counts = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    whole = Part(*(tuple(range(count)) for count in counts))
    for i in layers:
        gram = reading_gram(dense_layer(parent, config, i, device).block, whole)
        yield i, reading_spectrum(gram, moment(i).to(device)).cpu()
