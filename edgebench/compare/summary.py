"""The paragraph with which a report begins: which backend to choose, as far as the runs decide it."""

from collections.abc import Mapping, Sequence

from edgebench.compare.metrics import ACCURACY, ENERGY, LATENCY, MEMORY, TRAINING, Figures, Metric, measure, names_with
from edgebench.compare.runs import Run, distinct
from edgebench.compare.sentences import size
from edgebench.compare.verdicts import MIN_EFFECT, Comparison, Decisions

QUESTIONS = {  # what a sentence on the best backend begins with
    TRAINING: "Fastest in training",
    LATENCY: "Fastest for one image",
    MEMORY: "If memory decides",
    ENERGY: "If energy decides",
}


def summary(names: Mapping[str, list[Run]], comparisons: Sequence[Comparison], decisions: Decisions) -> str:
    """Answer in a paragraph which backend trained fastest, answered fastest and used least, and whether accuracies differ."""
    group = [run for runs in names.values() for run in runs]
    start = f"On this device, for this model ({_model(group)}): "
    if len(names) == 1:
        return start + _alone(*next(iter(names.items())))
    answers = []
    for metric in (*QUESTIONS, ACCURACY):
        of_metric = [each for each in comparisons if each.metric is metric]
        answer = _accuracy if metric is ACCURACY else _best
        able = names_with(metric, names)
        if len(able) > 1 and next(iter(names)) in able:
            answers.append(answer(metric, able, of_metric, decisions))
    first, *others = answers
    return start + " ".join([first[0].lower() + first[1:], *others])


def _model(group: Sequence[Run]) -> str:
    """Name the model by what all of the runs have in common."""
    settings = (("num_parameters", "{:,.0f} parameters"), ("config/batch_size", "batch {}"))
    values = [(text, {run.number(f"what/{path}") for run in group}) for path, text in settings]
    known = [text.format(*numbers) for text, numbers in values if len(numbers) == 1 and None not in numbers]
    return ", ".join([*known, distinct(group, "what/config/dtype_policy")])


def _alone(name: str, runs: list[Run]) -> str:
    """Return the medians of the only name. Nothing is claimed about it."""
    metrics = [metric for metric in (*QUESTIONS, ACCURACY) if names_with(metric, {name: runs})]
    known = [measure(metric, runs) for metric in metrics]
    figures = [f"{each.metric.title} {_value(each)}" for each in known if each.values]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs, medians"
    unstable = _leaning(sum(bool(run.instabilities) for run in runs))
    listed = f" Its figures ({count}{unstable}): {', '.join(figures)}." if figures else ""
    missing = [each.metric.subject for each in known if not each.values]
    lacking = f" Not measured: {', '.join(missing)}." if missing else ""
    return f"only {name} has results here: there is nothing to compare it with.{listed}{lacking}"


def _best(metric: Metric, names: Mapping[str, list[Run]], comparisons: list[Comparison], decisions: Decisions) -> str:
    """Say which names can be the best in a metric.

    A name is ruled out if the decisions call it worse than the baseline; the baseline, if they call another better. The
    names that are left are not told apart: the report compares each with the baseline only.
    """
    figures = {name: measure(metric, runs) for name, runs in names.items()}
    if not any(each.values for each in figures.values()):
        return f"{_subject(metric)} was not measured."
    base = next(iter(names))
    compared = [each for each in comparisons if each.estimate and decisions.get(each)]
    without = [each.name for each in comparisons if each not in compared]
    if not compared:
        return f"{_subject(metric)}: {_obstacle(comparisons)}."
    sign = 1 if metric is TRAINING else -1
    different = [each for each in compared if decisions[each].is_different]
    better = [each.name for each in different if sign * decisions[each].estimate.mean > 0]
    worse = [each.name for each in different if each.name not in better]
    ruled_out = {*worse, *([base] if better else [])}
    left = [name for name in (base, *(each.name for each in compared)) if name not in ruled_out]
    left.sort(key=lambda name: -sign * figures[name].median)
    listed = " or ".join(f"{name} ({_value(figures[name])})" for name in left)
    text = f"{QUESTIONS[metric]}: {listed}"
    if len(left) == len(compared) + 1 > 2:
        text = f"{_subject(metric)}: {_undecided(left, base, compared, decisions)}"
    elif len(left) > 1:
        text += f"; {_undecided(left, base, compared, decisions)}"
    rest = f"; not compared: {', '.join(without)}" if without else ""
    return f"{text}{rest}{_leaning(_unstable(compared))}."


def _undecided(left: list[str], base: str, compared: list[Comparison], decisions: Decisions) -> str:
    """Say why the names that are left are not told apart."""
    others = [decisions[each] for each in compared if each.name in left]
    if base not in left:
        return f"which of them is not decided, as each is compared with {base} only"
    apart = "the two" if len(left) == 2 else f"them from {base}" if len(left) <= len(compared) else f"any from {base}"
    if all(decision.is_equal for decision in others):
        return (
            f"equal within {100 * MIN_EFFECT:g} %"
            if len(left) == 2
            else f"equal to {base} within {100 * MIN_EFFECT:g} %"
        )
    return f"{_rounds(compared)} cannot tell {apart}{' apart' if len(left) == 2 else ''}"


def _subject(metric: Metric) -> str:
    return metric.subject.removesuffix(" an image").capitalize()


def _accuracy(
    metric: Metric, names: Mapping[str, list[Run]], comparisons: list[Comparison], decisions: Decisions
) -> str:
    """Say which accuracies differ from the baseline's, and that the other differences are within noise."""
    base = next(iter(names))
    if not any(measure(metric, runs).values for runs in names.values()):
        return "Test accuracy was not measured."
    compared = [each for each in comparisons if each.estimate and decisions.get(each)]
    if not compared:
        return f"Test accuracy: {_obstacle(comparisons)}."
    without = [each.name for each in comparisons if each not in compared]
    rest = f"; not compared: {', '.join(without)}" if without else ""
    different = [each for each in compared if decisions[each].is_different]
    claims = [f"{each.name} {size(decisions[each], metric)} {base}" for each in different]
    if not claims:
        noun = "difference is" if len(compared) == 1 else f"differences from {base} are"
        return f"Test accuracy: the {noun} within noise{rest}."
    noise = "; all other differences from it are within noise" if len(different) < len(compared) else ""
    return f"Test accuracy: {', '.join(claims)}{noise}{rest}."


def _obstacle(comparisons: Sequence[Comparison]) -> str:
    """Say why nothing is compared in a metric."""
    obstacles = dict.fromkeys(each.obstacle for each in comparisons if each.obstacle)
    if all(each.obstacle for each in comparisons):
        return "; ".join(obstacles)
    return "too few runs to claim a difference, which has to be seen in 2 pairs at least"


def _rounds(compared: Sequence[Comparison]) -> str:
    counts = {each.n for each in compared}
    return f"{counts.pop()} runs of each" if len(counts) == 1 else "these runs"


def _unstable(compared: Sequence[Comparison]) -> int:
    """Count the unstable runs that any of the comparisons leans on, each once."""
    if not compared:
        return 0
    figures = {each.name: each.a for each in compared} | {compared[0].base: compared[0].b}
    return sum(bool(run.instabilities) for each in figures.values() for run, _ in each.by_run)


def _leaning(count: int) -> str:
    return f", leaning on {count} unstable run{'s' if count > 1 else ''}" if count else ""


def _value(figures: Figures) -> str:
    return f"{figures.metric.show(figures.median)} {figures.metric.unit} {figures.mark}".rstrip()
