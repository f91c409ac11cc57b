"""What was found, in words: a sentence claims a difference only if verdicts.py has decided that there is one."""

import math
from collections.abc import Mapping, Sequence

from edgebench.compare.metrics import SENTENCES, TRAINING, Metric, format_number
from edgebench.compare.runs import NONE, Run
from edgebench.compare.statistics import ALPHA, MOST_MORE_RUNS, Decision
from edgebench.compare.verdicts import MIN_EFFECT, MIN_POINTS, Comparison, Decisions

DEFAULT_REPEATS = 4


def statements(names: Mapping[str, list[Run]], comparisons: Sequence[Comparison], decisions: Decisions) -> list[str]:
    """Say what was found, in one sentence for each name and metric."""
    base, *others = names
    sentences = []
    for name in others:
        of_name = [each for each in comparisons if each.name == name and each.metric in SENTENCES]
        of_name = [each for each in of_name if each.a.values or each.b.values]  # what neither has, the tables explain
        if not any(each.n > 1 for each in of_name) and any(each.n for each in of_name):
            medians = [f"{each.metric.subject} {each.medians}" for each in of_name if each.n]
            sentences.append(
                f"{name} and {base}: one pair of runs has no spread, so that no statement is supported; run at least "
                f"{DEFAULT_REPEATS - 1} more of each (--repeats {DEFAULT_REPEATS}). {'; '.join(medians)}."
            )
        else:
            sentences += [statement(each, decisions.get(each)) for each in of_name]
    return sentences


def statement(comparison: Comparison, decision: Decision | None) -> str:
    """Say in one sentence what was found in one metric. It claims a difference only if the decision does."""
    metric, name, base = comparison.metric, comparison.name, comparison.base
    subject = metric.subject
    if comparison.obstacle:
        return f"{subject}: {comparison.obstacle}."
    evidence = f"{comparison.medians}; {leaning(comparison, decision)}"
    if decision and decision.is_different:
        return f"{metric.claim.format(a=name, b=base, ratio=size(decision, metric))} ({evidence})."
    return f"{subject}: {undecided(decision, metric, f'{name} and {base}')} ({evidence})."


def undecided(decision: Decision | None, metric: Metric, names: str) -> str:
    """Say that no difference is claimed, why, and how many more runs would tell."""
    least = f"{MIN_POINTS:g} points" if metric.is_share else f"{MIN_EFFECT:.0%}".replace("%", " %")
    if not decision:
        anew = " (--cold: all compile from scratch)" if metric.cache == "cold" else ""
        return f"too few runs to compare {names}, it takes 2 pairs at least{anew}"
    if decision.is_equal:
        return f"{names} are equal within {least}"
    if not decision.is_worth_a_sentence:
        return f"no difference of {least} or more between {names}"
    more = decision.more_runs
    count = f"more than {MOST_MORE_RUNS}" if more is None else f"about {more}"
    return f"no difference between {names} that the spread supports, {count} more runs of each would tell"


def leaning(comparison: Comparison, decision: Decision | None) -> str:
    """Return what a sentence leans on: the ratio or difference with its interval, the pairs, and unstable runs."""
    unit = "seeds" if comparison.metric.is_share else "pairs"
    parts = [f"n = {comparison.n} {unit if comparison.n != 1 else unit[:-1]}"]
    if decision:
        ratio = "" if decision.is_different else f"{ratio_text(decision, comparison.metric)}, "
        parts.insert(0, f"{ratio}{1 - ALPHA:.0%} interval ".replace("%", " %") + interval(decision, comparison.metric))
    if count := comparison.unstable_runs:
        parts.append(f"leans on {count} unstable run{'s' if count > 1 else ''}")
    return ", ".join(parts)


def device_statement(name: str, comparison: Comparison, decision: Decision | None) -> str:
    """Compare the training of one name on two devices in one sentence."""
    if comparison.obstacle:
        return f"{name}: training throughput is {comparison.obstacle} on one of the devices."
    here, there = f"{name} on {comparison.name}", comparison.base
    evidence = leaning(comparison, decision).replace(" pair", " unpaired run")
    if decision and decision.is_different:
        return f"{here} trains {ratio_text(decision, TRAINING)} as fast as on {there} ({evidence})."
    return f"{here} and on {there}: {undecided(decision, TRAINING, 'the two')} ({evidence})."


def size(decision: Decision, metric: Metric) -> str:
    """Return the size of a claimed difference, as a sentence says it."""
    if not metric.is_share:
        return ratio_text(decision, metric)
    return f"{abs(decision.estimate.mean):.2f} points {'above' if decision.estimate.mean > 0 else 'below'}"


def ratio_text(decision: Decision, metric: Metric) -> str:
    """Return the mean ratio of the pairs, or their mean difference in points."""
    mean = decision.estimate.mean
    return f"{mean:+.2f} points" if metric.is_share else f"{ratio(mean)}×"


def interval(decision: Decision, metric: Metric) -> str:
    low, high = decision.interval
    return f"{low:+.2f} to {high:+.2f}" if metric.is_share else f"{ratio(low)}–{ratio(high)}"


def ratio(logarithm: float) -> str:
    """Return a ratio with three digits; near 1 with four, as 1.00 would show no difference."""
    if abs(logarithm) > math.log(1000):
        return ">1,000" if logarithm > 0 else "<0.001"
    value = math.exp(logarithm)
    return f"{value:.4f}" if 0.995 <= value < 1.005 and logarithm else format_number(value)


def cell(comparison: Comparison, decision: Decision | None) -> str:
    """Return a ratio with its interval as the tables show it: in brackets unless a difference is supported."""
    if comparison.obstacle:
        return NONE
    if not decision:
        a, b = comparison.a.median, comparison.b.median
        return f"({a - b:+.2f} points)" if comparison.metric.is_share else f"({format_number(a / b)}×)"
    text = f"{ratio_text(decision, comparison.metric)} [{interval(decision, comparison.metric)}]"
    return text if decision.is_different else f"({text})"
