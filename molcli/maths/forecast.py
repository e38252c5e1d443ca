"""The KL that a conversion will cost, forecast from the spectra of what the parent's layers read.

    log KL = c0 + c1 log(layers) + c2 log(lost reading energy) + c3 log(active weights)
                + c4 log(shared heads) + c5 log(1 + 10 / tokens a feature) + c6 log(clones)

A regression, not a law: constants are fitted to real conversions by tests/bench/plan.py. What it is
for is the order of settings on one parent and text. More text helps a regression of p features like
1 + p / tokens, and less where ridge and shrinkage tame it: hence the fifth term.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molcli.maths.bases import square_roots

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
