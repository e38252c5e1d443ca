"""Forecast the KL that a conversion costs, from its shape and from what the parent reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molcli.families.parent import Parent
from molcli.fitting.partition import Part
from molcli.fitting.projection import reading_gram
from molcli.fitting.shapes import ThinShape, dense_shape
from molcli.maths.bases import square_roots
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import dense_layer
from molcli.model.shapes import routed_shape, shared_shape

SCARCE = 10.0  # tokens a feature; of 0, 10, 30 and 100 the best on conversions left out


@dataclass(frozen=True)
class Predictors:
    """What the forecast knows of a conversion. A mean is over the active blocks of a layer, by
    their weights.

    layers: that are converted. lost_reading: mean share of reading energy that a basis of a block's
    width loses, mean of these layers. weights: of the active blocks, over the parent's layer's.
    shared_heads: heads that see all tokens, over the parent's, no fewer than one head.
    tokens_a_feature: calibration tokens over the mean of a block's heads' outputs and neurons.
    clones: mean of blocks in a family, 1 for a shared one.
    """

    layers: float
    lost_reading: float
    weights: float
    shared_heads: float
    tokens_a_feature: float
    clones: float

    def logs(self) -> list[float]:
        """1, and the logarithms that the constants multiply."""
        scarcity = 1 + SCARCE / max(self.tokens_a_feature, 1e-9)
        found = (
            self.layers,
            self.lost_reading,
            self.weights,
            self.shared_heads,
            scarcity,
            self.clones,
        )
        return [1.0, *np.log(np.maximum(found, 1e-9)).tolist()]


@dataclass(frozen=True)
class Forecast:
    """constants: c0 to c6."""

    constants: tuple[float, ...]

    def kl(self, predictors: Predictors) -> float:
        """Nats a token, right after conversion."""
        return float(np.exp(np.dot(self.constants, predictors.logs())))


def fit_forecast(settings: Sequence[Predictors], kl: Sequence[float]) -> Forecast:
    """Least squares on log KL, with a little ridge: a predictor that never varied gets 0."""
    x = np.array([setting.logs() for setting in settings])
    centre, y = x.mean(0), np.log(np.array(kl))
    centred = x - centre
    gram = centred.T @ centred + 1e-3 * np.eye(x.shape[1])
    slopes = np.linalg.solve(gram, centred.T @ (y - y.mean()))
    slopes[0] = y.mean() - centre[1:] @ slopes[1:]
    return Forecast(tuple(slopes.tolist()))


def left_out_forecasts(settings: Sequence[Predictors], kl: Sequence[float]) -> list[float]:
    """For each conversion the KL that the others forecast for it."""
    found = []
    for i, setting in enumerate(settings):
        rest = [j for j in range(len(kl)) if j != i]
        fitted = fit_forecast([settings[j] for j in rest], [kl[j] for j in rest])
        found.append(fitted.kl(setting))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def reading_spectrum(gram: Tensor, moment: Tensor) -> Tensor:
    """(d,) float64, descending, of sum 1: reading energy by direction, best directions first.

    gram, moment: as in `reading_basis`, whose `retained` at rank r is the sum of the first r.
    """
    root, _ = square_roots(moment)
    energy = torch.linalg.eigvalsh(root @ gram @ root).flip(0).clamp(min=0)
    return energy / energy.sum()


def _ranks(values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    _, inverse, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# Fitted to 30 conversions of SmolLM2-135M, of 3, 15 and all 30 layers on 8k to 197k tokens; each
# forecast from the others, the rank correlation is 0.955 (tests/bench/results/plan.md).
FORECAST = Forecast((-1.936, 0.808, 0.101, -0.364, -0.141, -0.371, -0.098))


def predictors(config: MoLConfig, spectra: Mapping[int, Tensor], tokens: int) -> Predictors:
    """What a forecast is made from. spectra: at least of all converted layers; tokens: calibration
    tokens that blocks are fitted to."""
    converted = [i for i in range(config.num_hidden_layers) if not config.is_dense(i)]
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
