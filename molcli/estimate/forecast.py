"""Forecast the KL right after a conversion, from its shape and the parent's reading spectra."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molcli.families.parent import Parent
from molcli.fitting.partition import BlockPart
from molcli.fitting.projection import reading_gram
from molcli.maths.bases import square_roots
from molcli.model.checkpoint import default_device
from molcli.model.configuration_mol import MoLConfig
from molcli.model.parent import dense_layer
from molcli.model.shapes import dense_shape, routed_shape, shared_shape

# Tokens per feature below which calibration text is scarce; of 0, 10, 30 and 100 the best value on
# conversions that the fit left out.
SCARCE_TOKENS = 10.0


@dataclass(frozen=True)
class Predictors:
    """The numbers that a forecast is computed from.

    Means are over the active blocks of a layer, weighted by the blocks' parameters.

    Attributes:
        layers: number of converted layers.
        lost_reading: mean share of the reading energy outside a basis of a block's width, averaged
            over the converted layers.
        weights: parameters of the active blocks over those of the parent's layer.
        shared_heads: heads of shared blocks over the parent's heads; at least one head.
        tokens_a_feature: calibration tokens over the mean number of a block's features (entries of
            its heads' outputs, and neurons).
        clones: mean number of blocks in a family; 1 for a shared block.
    """

    layers: float
    lost_reading: float
    weights: float
    shared_heads: float
    tokens_a_feature: float
    clones: float

    def log_terms(self) -> list[float]:
        """Return 1 and the six logarithms that the forecast's constants multiply."""
        scarcity = 1 + SCARCE_TOKENS / max(self.tokens_a_feature, 1e-9)
        terms = (
            self.layers,
            self.lost_reading,
            self.weights,
            self.shared_heads,
            scarcity,
            self.clones,
        )
        return [1.0, *np.log(np.maximum(terms, 1e-9)).tolist()]


@dataclass(frozen=True)
class Forecast:
    """A power law: log KL is linear in the logarithms of the predictors.

    Attributes:
        constants: c0 to c6, one for each of `Predictors.log_terms`.
    """

    constants: tuple[float, ...]

    def kl(self, predictors: Predictors) -> float:
        """Return the KL to the parent right after conversion, in nats a token."""
        return float(np.exp(np.dot(self.constants, predictors.log_terms())))


# Fitted to 30 conversions of SmolLM2-135M, of 3, 15 and all 30 layers on 8k to 197k tokens. With
# each conversion forecast from the others, the rank correlation is 0.955
# (tests/bench/results/plan.md).
FORECAST = Forecast((-1.936, 0.808, 0.101, -0.364, -0.141, -0.371, -0.098))


def compute_predictors(config: MoLConfig, spectra: Mapping[int, Tensor], tokens: int) -> Predictors:
    """Compute a conversion's predictors.

    Args:
        config: the converted model.
        spectra: layer -> (d_model,) `reading_spectrum`, at least of all converted layers.
        tokens: calibration tokens that blocks are fitted to.
    """
    converted = config.converted_layers
    shared, top_k = config.num_shared_blocks, config.num_blocks_per_tok
    kinds = [(shared_shape(config), shared, 1.0)] * bool(shared)
    kinds += [(routed_shape(config), top_k, config.num_routed_blocks / max(1, top_k))] * bool(top_k)
    dense = dense_shape(config)
    weights = [count * shape.num_thin_weights(dense.width) for shape, count, _ in kinds]

    def mean(of_kinds: list[float]) -> float:
        return sum(w * x for w, x in zip(weights, of_kinds, strict=True)) / sum(weights)

    lost = [sum(spectra[i][shape.width :].sum().item() for i in converted) for shape, *_ in kinds]
    features = [float(shape.num_heads * config.head_dim + shape.d_ff) for shape, *_ in kinds]
    heads = max(1, shared * shared_shape(config).num_heads)
    return Predictors(
        layers=len(converted),
        lost_reading=mean(lost) / max(1, len(converted)),
        weights=sum(weights) / dense.num_weights,
        shared_heads=min(1.0, heads / config.num_attention_heads),
        tokens_a_feature=tokens / mean(features),
        clones=mean([clones for *_, clones in kinds]),
    )


@torch.no_grad()
def layer_spectra(
    parent: Parent, moment: Callable[[int], Tensor], layers: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each layer's index and reading spectrum, with one layer in memory at a time.

    Args:
        parent: the opened dense model.
        moment: layer -> (d_model, d_model) float64 second moment of the unit-rms residual, as
            calibration wrote it.
        layers: indices of layers.

    Yields:
        The layer and the (d_model,) float64 `reading_spectrum` of all its reading matrices.
    """
    parent.check_weights()
    config, device = MoLConfig(**parent.mol_config_kwargs()), default_device()
    counts = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    whole = BlockPart(*(tuple(range(count)) for count in counts))
    for i in layers:
        gram = reading_gram(dense_layer(parent, config, i, device).block, whole)
        yield i, reading_spectrum(gram, moment(i).to(device)).cpu()


def reading_spectrum(gram: Tensor, moment: Tensor) -> Tensor:
    """Compute how the reading energy spreads over directions.

    Args:
        gram: (d, d) float64, sum of W^T W over the reading matrices.
        moment: (d, d) float64, second moment of their inputs.

    Returns:
        (d,) float64, descending, of sum 1. The sum of the first r entries is the `retained` of a
        `reading_basis` of rank r.
    """
    root, _ = square_roots(moment)
    energy = torch.linalg.eigvalsh(root @ gram @ root).flip(0).clamp(min=0)
    return energy / energy.sum()


def fit_forecast(settings: Sequence[Predictors], kl: Sequence[float]) -> Forecast:
    """Fit a forecast's constants by least squares on log KL.

    A small ridge penalty gives a predictor that never varied the constant 0.

    Args:
        settings: predictors of each conversion.
        kl: measured KL of each conversion, nats a token.
    """
    x = np.array([setting.log_terms() for setting in settings])
    centre, y = x.mean(0), np.log(np.array(kl))
    centred = x - centre
    gram = centred.T @ centred + 1e-3 * np.eye(x.shape[1])
    slopes = np.linalg.solve(gram, centred.T @ (y - y.mean()))
    slopes[0] = y.mean() - centre[1:] @ slopes[1:]
    return Forecast(tuple(slopes.tolist()))


def leave_one_out_forecasts(settings: Sequence[Predictors], kl: Sequence[float]) -> list[float]:
    """Forecast each conversion's KL with constants fitted to all the others."""
    forecasts = []
    for i, setting in enumerate(settings):
        rest = [j for j in range(len(kl)) if j != i]
        fitted = fit_forecast([settings[j] for j in rest], [kl[j] for j in rest])
        forecasts.append(fitted.kl(setting))
    return forecasts


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; equal values get their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    _, inverse, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
