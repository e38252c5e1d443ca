"""Forecast when a falling loss reaches a target, from its curve so far."""

from collections.abc import Sequence

import numpy as np

FEWEST = 10  # points that a curve needs for a forecast
# A forecast reaches at most this many times the tokens so far. Beyond that, a small error of the
# exponent decides the result.
REACH = 30.0
_GROUPS = 32  # points of a long curve, each the median of several


def tokens_to_recovery(
    tokens: Sequence[float], kl: Sequence[float], recovery: float = 0.5
) -> float | None:
    """Forecast how many more tokens it takes until the KL has recovered to a given degree.

    The curve a * tokens**-b is fitted to the later half of the points. The fit is a line through
    their logarithms, by the median of slopes and offsets, which a few outliers do not move.

    Args:
        tokens: increasing, counted from where training on the KL began.
        kl: nats, means over the windows of training that end at these tokens.
        recovery: 1 - KL / KL at the start, in (0, 1); the first window stands for the start.

    Returns:
        Tokens from the end of the curve on; 0.0 if the KL has already recovered so far. None for
        fewer than FEWEST positive points, for a curve that does not fall, and where it would take
        more than REACH times the tokens so far.

    Source: the Theil-Sen estimator (Sen, Journal of the American Statistical Association 63, 1968).
    """
    points = [(t, x) for t, x in zip(tokens, kl, strict=True) if t > 0 and 0 < x < np.inf]
    if len(points) < FEWEST:
        return None
    curve = np.log(np.array(points, dtype=np.float64))
    later = curve[len(curve) // 2 :]
    groups = np.array_split(later, min(len(later), _GROUPS))
    x, y = np.array([np.median(group, axis=0) for group in groups]).T
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    offset = float(np.median(y - slope * x))
    target = float(curve[0, 1]) + float(np.log1p(-recovery))
    now = float(curve[-1, 0])
    if offset + slope * now <= target:
        return 0.0
    if slope >= -1e-6:  # flat but for rounding
        return None
    log_end = (target - offset) / slope
    if log_end - now > np.log(REACH):
        return None
    return float(np.exp(log_end) - np.exp(now))
