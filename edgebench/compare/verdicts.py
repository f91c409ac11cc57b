"""Which differences between backends the runs support; sentences.py says so."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgebench.compare.metrics import SENTENCES, SOURCES, TABLES, TRAINING, Figures, Metric, measure, names_with, pairs
from edgebench.compare.runs import Run
from edgebench.compare.statistics import Decision, Estimate, decide, paired, welch

MIN_EFFECT = 0.02  # the smallest relative difference worth a sentence
MIN_POINTS = 0.5  # the same for accuracy, in percentage points


@dataclass(frozen=True, eq=False)  # without eq, a comparison is a key of the decisions
class Comparison:
    """One metric of two names: what was measured, and the estimate of the difference, if there can be one."""

    metric: Metric
    name: str
    a: Figures
    base: str
    b: Figures
    n: int = 0  # pairs of runs
    estimate: Estimate | None = None
    obstacle: str = ""  # why the two are not compared at all

    @property
    def least_effect(self) -> float:
        return MIN_POINTS if self.metric.is_share else math.log1p(MIN_EFFECT)

    @property
    def medians(self) -> str:
        show = self.metric.show
        return f"median {show(self.a.median)} against {show(self.b.median)} {self.metric.unit}"

    @property
    def unstable_runs(self) -> int:
        """How many unstable runs the comparison leans on. Accuracy does not depend on how busy the machine was."""
        runs = [] if self.metric.is_share else [run for run, _ in (*self.a.by_run, *self.b.by_run)]
        return sum(bool(run.instabilities) for run in runs)


Decisions = Mapping[Comparison, Decision]


def compare(metric: Metric, name: str, runs: Sequence[Run], base: str, base_runs: Sequence[Run]) -> Comparison:
    """Compare two names in one metric, by pairs of runs with the same seed."""
    a, b = measure(metric, runs), measure(metric, base_runs)
    missing = [each for each, figures in ((base, b), (name, a)) if not figures.values]
    uncompiled = [each for each, group in ((base, base_runs), (name, runs)) if not group[0].is_compiled]
    matched = pairs(a, b)
    obstacle = ""
    if metric.is_compilation and uncompiled:
        verb = "does" if len(uncompiled) == 1 else "do"
        obstacle = f"not compared, {' and '.join(uncompiled)} {verb} not compile"
    elif missing:
        obstacle = f"unavailable for {' and '.join(missing)}"
    elif a.mark != b.mark:
        obstacle = f"not compared, {SOURCES[a.mark]} against {SOURCES[b.mark]}"
    elif not matched:
        obstacle = "not compared, no runs have the same seed"
    elif metric.is_share and not (base_runs[0].number("what/images/test") or 0) > 0:
        obstacle = "not compared, the number of test images is unknown"
    elif not metric.is_share and min(*a.values, *b.values) <= 0:
        obstacle = "not compared, there is no ratio to 0"
    if obstacle:
        return Comparison(metric, name, a, base, b, obstacle=obstacle)
    if metric.is_share:
        estimate = _points(matched, base_runs[0].number("what/images/test"))
    else:
        estimate = paired([math.log(x / y) for x, y in matched])
    return Comparison(metric, name, a, base, b, len(matched), estimate)


def _points(matched: Sequence[tuple[float, float]], images: float) -> Estimate | None:
    """Estimate a difference of accuracies, in percentage points.

    Each of two independent accuracies p from N test images has the variance p (1 - p) / N, however little the seeds vary.
    """
    p = min(1.0, max(0.0, statistics.fmean(value for pair in matched for value in pair) / 100))
    return paired([x - y for x, y in matched], least_variance=100**2 * 2 * p * (1 - p) / images)


def compare_devices(runs: Sequence[Run], other_runs: Sequence[Run]) -> Comparison:
    """Compare the training of one name on two devices. Their runs are not paired: no drift is common to them."""
    a, b = measure(TRAINING, runs), measure(TRAINING, other_runs)
    here, there = str(runs[0].device), str(other_runs[0].device)
    if a.values and b.values and a.median < b.median:  # a factor above 1 is easier to read
        here, there, a, b = there, here, b, a
    if not a.values or not b.values or min(*a.values, *b.values) <= 0:
        return Comparison(TRAINING, here, a, there, b, obstacle="unavailable")
    estimate = welch(*([math.log(value) for value in figures.values] for figures in (a, b)))
    return Comparison(TRAINING, here, a, there, b, min(len(a.values), len(b.values)), estimate)


def compare_all(names: Mapping[str, list[Run]]) -> list[Comparison]:
    """Compare each name with the first in all metrics that both can have, those of the sentences first."""
    (base, base_runs), *others = names.items()
    tabulated = [metric for table in TABLES.values() for metric in table if metric.is_compared]
    metrics = [*SENTENCES, *(metric for metric in tabulated if metric not in SENTENCES)]
    return [
        compare(metric, name, runs, base, base_runs)
        for name, runs in others
        for metric in metrics
        if len(names_with(metric, {base: base_runs, name: runs})) == 2
    ]


def decide_all(comparisons: Iterable[Comparison]) -> dict[Comparison, Decision]:
    """Decide on all comparisons of a report: on those with sentences together, and apart from these on all others.

    The other ratios stand in the tables only. Judged together with the sentences they would weaken each of them.
    """
    decisions: dict[Comparison, Decision] = {}
    measured = [comparison for comparison in comparisons if comparison.estimate]
    for has_sentence in (True, False):
        family = [comparison for comparison in measured if (comparison.metric in SENTENCES) is has_sentence]
        decided = decide([each.estimate for each in family], [each.least_effect for each in family])
        decisions |= zip(family, decided, strict=True)
    return decisions
