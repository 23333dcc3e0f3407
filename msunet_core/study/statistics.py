"""What a few seeds can tell: differences to the baseline, seed by seed, and whether they are resolved.

The seeds of two rows are paired, since a seed fixes the initial weights, the order of the images and their
augmentation in both: what the draw gives to one it gives to the other, and the difference is free of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Up to so many pairs all 2^n choices of signs are counted; of more pairs, so many are drawn.
EXACT_PAIRS = 16
# Fewer pairs resolve nothing at 95 %: five of one sign come up by chance in 2 / 2^5 = 6 % of all cases, and
# no resampling of so few values knows their tails.
FEWEST = 6


@dataclass(frozen=True)
class Effect:
    """A paired difference, in the unit of the values.

    pairs : how many
    difference : mean of the differences
    low, high : 95 % bootstrap interval of the mean difference; NaN for fewer than ``FEWEST`` pairs
    p : exact two-sided sign-flip p of "no difference": the share of the 2^n choices of signs that give a mean
        at least as far from 0; never less than 2 / 2^n
    """

    pairs: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def resolved(self) -> bool:
        """Whether the interval keeps clear of 0. What is not resolved has no order."""
        return self.low > 0 or self.high < 0


def effect(values: Sequence[float], reference: Sequence[float]) -> Effect:
    """Compare a row with its reference, pair by pair.

    Parameters
    ----------
    values, reference : the same length n >= 1, the same seeds in the same order

    Returns
    -------
    Effect of values - reference

    Notes
    -----
    The plain percentile interval of six values is too short: the spread of resampled means is that of the
    values with n in the divisor where n - 1 belongs, and its tails are normal ones. Both are put right by
    asking the bootstrap for another quantile, Phi(-t sqrt(n / (n - 1))) with Student's t, the "expanded
    percentile interval" of T. Hesterberg, What Teachers Should Know About the Bootstrap (2015), section 5.
    """
    differences = np.asarray(values, float) - np.asarray(reference, float)
    n = len(differences)
    # Accuracies are counts: what is equal must not differ by the rounding of a subtraction.
    differences = differences.round(9)
    if n < 2:
        return Effect(n, float(differences.mean()), math.nan, math.nan, 1.0)
    low, high = _interval(differences) if n >= FEWEST else (math.nan, math.nan)
    flips = stats.permutation_test(
        (differences, np.zeros(n)),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",  # within each pair: the sign of its difference
        n_resamples=np.inf if n <= EXACT_PAIRS else RESAMPLES,
        rng=0,
        vectorized=True,
    )
    return Effect(n, float(differences.mean()), low, high, min(1.0, float(flips.pvalue)))


def _interval(differences: np.ndarray) -> tuple[float, float]:
    n = len(differences)
    if np.ptp(differences) == 0:  # nothing to resample
        return float(differences[0]), float(differences[0])
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * math.sqrt(n / (n - 1))
    found = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=1 - 2 * stats.norm.sf(quantile),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
