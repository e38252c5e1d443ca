"""How many more tokens a falling loss needs, from its curve so far."""

from collections.abc import Sequence

import numpy as np

FEWEST = 10  # points on a curve that is worth a forecast
# A forecast reaches no further than this times what was seen: beyond it a small error of the
# exponent decides alone.
REACH = 30.0
_GROUPS = 32  # into which a long curve is gathered


def tokens_to_recovery(
    tokens: Sequence[float], kl: Sequence[float], recovery: float = 0.5
) -> float | None:
    """Tokens from the end of the curve until the KL has recovered so far, 0.0 if it has by now.

    tokens: increasing, counted from where the KL began to be learned; kl: nats, means over the
    windows that end there. recovery: 1 - KL / KL at the start, in (0, 1), where the first window
    stands for the start. The curve a * tokens**-b is fitted to the later half of the points, as a
    line through their logarithms by medians of slopes and offsets (Theil and Sen), which a few
    wild windows do not move. None for fewer than FEWEST positive points, where the curve does not
    fall, and where it gets there only after REACH times the tokens so far.
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
