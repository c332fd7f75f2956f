"""Standard errors, intervals and tests, for numbers of a few hundred problems or a few steps."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""

POWER = Z95 + 0.84
"""Standard errors that a difference must have to be found in four of five tests at the 5 % level."""

FLIPS = 20_000
"""Random sign changes of a test whose differences are not all of one size."""


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of `count` trials (Wilson 1927, eq. 1).

    >>> [round(end, 3) for end in interval(0.5, 100)]
    [0.404, 0.596]
    """
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(max(share * (1 - share), 0.0) / count + Z95**2 / (4 * count**2))
    whole = 1 + Z95**2 / count
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)  # rounding leaves the range


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; NaN for the error of a single value."""

    mean: float
    error: float


def estimate(values: Sequence[float] | Float[np.ndarray, " N"]) -> Estimate:
    """Estimate a mean from independent values."""
    count = len(values)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two means with its standard error, and the chance of one as large if there were none."""

    mean: float
    error: float
    p_value: float
    count: int
    """Problems, or steps of the smaller side."""

    @property
    def significant(self) -> bool:
        """Tell whether chance alone gives such a difference less than one time in twenty."""
        return self.p_value < 0.05

    @property
    def needed(self) -> int | None:
        """Return the problems that would show this difference in four of five tests; None where there is none."""
        if not self.mean or not self.error:
            return None
        return math.ceil(self.count * (POWER * self.error / self.mean) ** 2)

    @property
    def smallest(self) -> float:
        """Return the smallest difference that this many problems would show in four of five tests."""
        return POWER * self.error


def paired_difference(before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"]) -> Difference:
    """Compare two results on the same problems: the exact sign-flip test, which is McNemar's for right and wrong.

    >>> paired_difference(np.zeros(5), np.ones(5)).p_value
    0.0625
    """
    changes = after - before
    moved = changes[changes != 0]
    found = estimate(changes)
    equal_sizes = len(moved) == 0 or np.ptp(np.abs(moved)) == 0
    p_value = sign_test(int((moved > 0).sum()), len(moved)) if equal_sizes else flip_test(moved)
    return Difference(found.mean, found.error, p_value, len(changes))


def sign_test(ups: int, count: int) -> float:
    """Return the chance that `count` fair coins fall at least as unevenly as `ups` to the rest.

    >>> sign_test(1, 10) == 2 * 11 / 1024
    True
    """
    fewer = min(ups, count - ups)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


def flip_test(changes: Float[np.ndarray, " N"]) -> float:
    """Return the share of random sign changes whose sum is at least as far from 0."""
    rng, reached = np.random.default_rng(0), 0
    for start in range(0, FLIPS, 500):
        signs = rng.choice((-1.0, 1.0), (min(500, FLIPS - start), len(changes)))
        reached += int((np.abs(signs @ changes) >= abs(changes.sum()) * (1 - 1e-12)).sum())
    return (reached + 1) / (FLIPS + 1)


def share_difference(before: float, after: float, count: int) -> Difference:
    """Compare two shares of `count` problems each, of which it is not known which were right: the two-sample z-test."""
    pooled = (before + after) / 2
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / count)
    under_none = math.sqrt(2 * pooled * (1 - pooled) / count)
    z = abs(after - before) / under_none if under_none else 0.0
    return Difference(after - before, error, math.erfc(z / math.sqrt(2)), count)


def mean_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compare the means of two samples: Welch's t-test (Welch 1947); at least two values each."""
    from scipy.special import stdtr  # takes a while to import

    one, two = estimate(before), estimate(after)
    error = math.hypot(one.error, two.error)
    smaller = min(len(before), len(after))
    if not error:
        return Difference(two.mean - one.mean, 0.0, float(one.mean == two.mean), smaller)
    freedom = error**4 / (one.error**4 / (len(before) - 1) + two.error**4 / (len(after) - 1))
    p_value = 2 * float(stdtr(freedom, -abs(two.mean - one.mean) / error))
    return Difference(two.mean - one.mean, error, p_value, smaller)
