"""Where values lie on an axis, and which of them it names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """low at coordinate start, high at end; ticks: the values it names, within them."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool

    def at(self, value: float) -> float:
        """The coordinate of a value; positive ones only on a logarithmic axis."""
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    from_zero: bool = True,
    whole: bool = False,
) -> Axis:
    """About five ticks at round numbers, the outermost of them around all values.

    from_zero: starts at 0 if no value is below it. whole: ticks are integers. Without values, from
    0 to 1.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, or as good as
        high = low + max(1.0, abs(low))
    step = _round_step((high - low) / 5)
    if whole:
        step = math.ceil(step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks, log=False)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Whole powers of ten around all values, which are positive; without values, 1 to 10.

    At most about seven of the powers are ticks.
    """
    low = math.floor(math.log10(min(values, default=1.0)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=10.0))))
    every = math.ceil((high - low) / 7)
    ticks = [10.0**i for i in range(low, high + 1, every)]
    return Axis(10.0**low, 10.0**high, start, end, ticks, log=True)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(
        (m * power for m in (1.0, 2.0, 2.5, 5.0) if m * power >= step * (1 - 1e-9)), 10 * power
    )
