"""What a study says: which trials nothing beats, and how the error falls with size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

# With fewer sizes the constant is left out: it could be anything.
_SIZES_FOR_CONSTANT = 4
_MIN_SIZES = 3
_NUM_BOOTSTRAP = 200
_STARTS = (0.1, 0.5, 1.5)  # exponents from which the fit begins; the best end counts
_MAX_EXPONENT = 10.0


def pareto_front(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point beats.

    A point beats another that is not better in anything and worse in something.

    Args:
        costs: [N, K]; less is better in every column.

    Returns:
        [N]; equal points are both on the front.
    """
    no_worse = (costs[:, None] <= costs[None]).all(-1)
    better = (costs[:, None] < costs[None]).any(-1)
    return ~(no_worse & better).any(axis=0)


@dataclass(frozen=True)
class PowerLaw:
    """`error = scale * (size / reference) ** -exponent + constant`.

    Attributes:
        scale: the part of the error at the reference size that size takes away.
        exponent, constant: the constant is 0 where there are too few sizes to tell.
        reference: geometric mean of the sizes.
        exponent_interval, constant_interval: 95% of the fits to resampled residuals.
        num_points: trials that it was fitted to.
    """

    scale: float
    exponent: float
    constant: float
    reference: float
    exponent_interval: tuple[float, float]
    constant_interval: tuple[float, float]
    num_points: int

    def at(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the errors at sizes."""
        return self.scale * (sizes / self.reference) ** -self.exponent + self.constant


def fit_power_law(
    sizes: NDArray[np.float64], errors: NDArray[np.float64], seed: int = 0
) -> PowerLaw | None:
    """Fit a power law plus a constant by least squares of the logarithm of the error.

    The interval is that of a residual bootstrap: residuals, scaled up for the degrees of freedom
    that the fit used, are drawn with replacement and added to the fit, which is fitted again.

    Args:
        sizes, errors: [N] positive; the same size may come several times.

    Returns:
        None for fewer than three different sizes.
    """
    different = len(np.unique(sizes))
    if different < _MIN_SIZES:
        return None
    with_constant = different >= _SIZES_FOR_CONSTANT
    reference = float(np.exp(np.log(sizes).mean()))
    relative, logs = sizes / reference, np.log(errors)
    parameters = _fit(relative, logs, with_constant)
    fitted = _log_error(parameters, relative)
    freedom = len(sizes) - 2 - with_constant
    residuals = (logs - fitted) * np.sqrt(len(sizes) / max(1, freedom))
    residuals = residuals - residuals.mean()
    rng = np.random.default_rng(seed)
    resampled = (fitted + rng.choice(residuals, len(sizes)) for _ in range(_NUM_BOOTSTRAP))
    again = np.array([_fit(relative, y, with_constant, parameters) for y in resampled])
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    scale, exponent, constant = (float(value) for value in _natural(parameters))
    return PowerLaw(
        scale=scale,
        exponent=exponent,
        constant=constant,
        reference=reference,
        exponent_interval=(float(low[1]), float(high[1])),
        constant_interval=(float(low[2]), float(high[2])),
        num_points=len(sizes),
    )


def _natural(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([np.exp(parameters[0]), parameters[1], parameters[2]])


def _log_error(
    parameters: NDArray[np.float64], relative: NDArray[np.float64]
) -> NDArray[np.float64]:
    scale, exponent, constant = _natural(parameters)
    return np.log(scale * relative**-exponent + constant)


def _fit(
    relative: NDArray[np.float64],
    logs: NDArray[np.float64],
    with_constant: bool,
    start: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return logarithm of the scale, exponent and constant of the best fit."""
    least = float(np.exp(logs.min()))
    # A constant above the least error cannot be: the law comes to it from above.
    highest = least if with_constant else 1e-300
    low, high = [-np.inf, -_MAX_EXPONENT, 0.0], [np.inf, _MAX_EXPONENT, highest]
    share = 0.5 * highest
    starts = [np.array([logs.mean(), exponent, share]) for exponent in _STARTS]
    if start is not None:
        starts = [np.array([start[0], start[1], min(start[2], 0.999 * highest)])]
    fits = [
        least_squares(
            lambda p: _log_error(p, relative) - logs,
            begin,
            bounds=(low, high),
            x_scale=[1, 1, least],
        )
        for begin in starts
    ]
    best = min(fits, key=lambda fit: fit.cost).x
    if not with_constant:
        best[2] = 0.0
    return best
