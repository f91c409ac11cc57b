"""The statistics of a comparison: Student's t, paired and Welch's, Holm's correction, and how many runs would tell."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05  # the chance that a report on equal backends holds any false sentence
POWER_QUANTILE = 0.84  # of the normal distribution at 80 %: as many of the reports with `more_runs` would tell
MOST_MORE_RUNS = 50


@functools.lru_cache(maxsize=4096)
def t_tail(t: float, df: int) -> float:
    """Return the probability that Student's t with `df` degrees of freedom lies beyond ±t.

    The sums for whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan2(abs(t), math.sqrt(df))
    sin, cos_squared = math.sin(theta), math.cos(theta) ** 2
    term = math.cos(theta) if df % 2 else 1.0
    total = 0.0
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cos_squared * (k - 1) / k
    inside = 2 / math.pi * (theta + sin * total) if df % 2 else sin * total
    return max(0.0, 1 - inside)


@functools.lru_cache(maxsize=4096)
def t_quantile(tail: float, df: int) -> float:
    """Return the t beyond which, on both sides together, lies the probability `tail`; found by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail and high < 1e9:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high


def normal_tail(z: float) -> float:
    """Return the probability that a normal deviate lies beyond ±z."""
    return math.erfc(abs(z) / math.sqrt(2))


def normal_quantile(tail: float) -> float:
    """Return the z beyond which, on both sides together, lies the probability `tail`."""
    return -statistics.NormalDist().inv_cdf(tail / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean difference (of logarithms for a ratio, else of percentage points) and how well `n` runs or pairs know it.

    A normal error of known size, `least_error`, may add to what the spread shows by Student's t. The larger p and the
    wider interval of the two count, so a claim is never easier than by Student's t alone.
    """

    mean: float
    standard_error: float
    df: int
    n: int
    least_error: float = 0.0

    @property
    def p(self) -> float:
        """The probability of a difference at least as large if there were none."""
        if not self.mean:
            return 1.0
        by_spread = t_tail(self.mean / self.standard_error, self.df) if self.standard_error else 0.0
        return max(by_spread, normal_tail(self.mean / self.least_error) if self.least_error else 0.0)

    def interval(self, tail: float) -> tuple[float, float]:
        """Return the interval that misses the true difference with at most the probability `tail`."""
        half = self.half_width(tail, self.n)
        return self.mean - half, self.mean + half

    def half_width(self, tail: float, n: int) -> float:
        """Return half the width of that interval if it came from `n` runs or pairs with this spread."""
        by_spread = t_quantile(tail, self.df + n - self.n) * self.standard_error if self.standard_error else 0.0
        return max(by_spread, normal_quantile(tail) * self.least_error) * math.sqrt(self.n / n)


def paired(differences: Sequence[float], least_variance: float = 0.0) -> Estimate | None:
    """Estimate a difference from pairs, None from fewer than two; `least_variance` is known of each of them."""
    n = len(differences)
    if n < 2:
        return None
    errors = [math.sqrt(variance / n) for variance in (statistics.variance(differences), least_variance)]
    return Estimate(statistics.fmean(differences), errors[0], n - 1, n, errors[1])


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Estimate the difference of two unpaired groups (Welch 1947; degrees of freedom rounded down); None if one has less than two."""
    if min(len(a), len(b)) < 2:
        return None
    parts = [statistics.variance(group) / len(group) for group in (a, b)]
    total = sum(parts)
    weights = [part**2 / (len(group) - 1) for part, group in zip(parts, (a, b), strict=True)]
    df = int(total**2 / sum(weights)) if total else len(a) + len(b) - 2
    return Estimate(statistics.fmean(a) - statistics.fmean(b), math.sqrt(total), max(1, df), min(len(a), len(b)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the factor by which Holm's method (1979) multiplies each p, so that all claims of a report hold at once.

    The smallest p is multiplied by their number, the next by one less, and so on; none may end below one before it.
    """
    factors = [1.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        remaining = len(p_values) - place
        largest = max(largest, remaining * p_values[i])
        factors[i] = largest / p_values[i] if p_values[i] else float(remaining)
    return factors


@dataclass(frozen=True)
class Decision:
    """What may be said about a difference, given all others of the report and the smallest one worth a sentence."""

    estimate: Estimate
    factor: float  # by which Holm's method multiplies p
    least_effect: float

    @property
    def is_different(self) -> bool:
        return self.factor * self.estimate.p < ALPHA and self.is_worth_a_sentence

    @property
    def is_worth_a_sentence(self) -> bool:
        return abs(self.estimate.mean) >= self.least_effect

    @property
    def interval(self) -> tuple[float, float]:
        """The interval as wide as Holm's method makes it: 0 lies outside exactly where the corrected p is below ALPHA."""
        return self.estimate.interval(ALPHA / self.factor)

    @property
    def is_equal(self) -> bool:
        """Whether all of the interval is smaller than what is worth a sentence."""
        return max(map(abs, self.interval)) < self.least_effect

    @property
    def more_runs(self) -> int | None:
        """How many more would show this difference in 8 of 10 reports, if it and its spread are as observed; None: over 50."""
        n = self.estimate.n
        error = max(self.estimate.standard_error, self.estimate.least_error)
        for more in range(1, MOST_MORE_RUNS + 1):
            half = self.estimate.half_width(ALPHA / self.factor, n + more)
            if abs(self.estimate.mean) >= half + POWER_QUANTILE * error * math.sqrt(n / (n + more)):
                return more
        return None


def decide(estimates: Sequence[Estimate], least_effects: Sequence[float]) -> list[Decision]:
    """Decide on all differences of a report together."""
    factors = holm([estimate.p for estimate in estimates])
    return [Decision(*each) for each in zip(estimates, factors, least_effects, strict=True)]
