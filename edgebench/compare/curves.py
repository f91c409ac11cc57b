"""The curves of a picture: accuracy over time for several backends, and what a single run learned, epoch by epoch."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from edgebench.compare.bars import GREY, INK
from edgebench.compare.runs import Run, finite

MARKERS = "os^DvPX"
MOST_MARKERS = 12  # of a curve; more would hide it
Curve = list[tuple[float, float]]


def accuracies(runs: Iterable[Run]) -> list[Curve]:
    """Return (seconds of training, validation accuracy in percent) at the end of each epoch, for the runs that have it."""
    curves = []
    for run in runs:
        ends = run.get("quality/epoch_end_s")
        pairs = zip(
            map(finite, ends if isinstance(ends, list) else []), epoch_values(run, "val_accuracy"), strict=False
        )
        curves.append([(end, 100 * accuracy) for end, accuracy in pairs if end is not None and accuracy is not None])
    return [curve for curve in curves if curve]


def epoch_values(run: Run, name: str) -> list[float | None]:
    """Return what Keras reported as `name` in each epoch; None where it reported no number."""
    epochs = run.get("quality/epochs")
    return [Run(run.path, epoch).number(name) for epoch in (epochs if isinstance(epochs, list) else [])]


def draw_accuracy(axis, backends: Mapping[str, Sequence[Run]], colours: Mapping[str, str]) -> None:
    """Draw a thin line for each run, and a thick one through the median time and accuracy of each epoch.

    The medians decide what the axes show: one slow run, or one that learned nothing, does not squeeze the others.
    """
    medians = {}
    for name, runs in backends.items():
        if curves := accuracies(runs):
            by_epoch = list(zip(*curves, strict=False))  # as many epochs as all of its runs have
            medians[name] = [tuple(map(statistics.median, zip(*points, strict=True))) for points in by_epoch]
            for curve in curves if len(curves) > 1 else []:
                axis.plot(*zip(*curve, strict=True), color=colours[name], linewidth=1, alpha=0.5, zorder=1)
    for marker, (name, curve) in zip(MARKERS * len(medians), medians.items(), strict=False):
        _plot(axis, curve, marker, colours[name], name)
    points = [point for curve in medians.values() for point in curve]
    axis.set_xlim(0, 1.04 * max(seconds for seconds, _ in points) or 1)
    axis.set_ylim(*_around([percent for _, percent in points], least=0.5, most=100))
    _finish(axis, "seconds of training, with validation", legend_columns=2)


def draw_learning(axis, run: Run, metric: str, scale: float) -> None:
    """Draw a metric of a single run against the epochs, on the training and the validation images, and mark the best epoch."""
    shown = []
    for label, name, marker, colour in (
        ("training", metric, "s", "#E69F00"),
        ("validation", f"val_{metric}", "o", "#0072B2"),
    ):
        values = enumerate(epoch_values(run, name), start=1)
        curve = [(epoch, scale * value) for epoch, value in values if value is not None]
        if curve:
            _plot(axis, curve, marker, colour, label)
            shown.append(curve)
    last = max(epoch for curve in shown for epoch, _ in curve)
    axis.set_xlim(0.5, last + 0.5)
    axis.set_ylim(
        *_around(
            [value for curve in shown for _, value in curve],
            least=0.01 * scale,
            most=scale if scale == 100 else math.inf,
        )
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    best = run.number("quality/best_epoch")
    if best is not None and 1 <= best <= last:
        value = dict(shown[-1]).get(best)
        number = "" if value is None else f" ({value:.3g}{' %' if scale == 100 else ''})"
        axis.axvline(best, color=INK, linestyle=":", linewidth=1.8, zorder=1, label=f"best epoch {best:g}{number}")
    _finish(axis, "epoch", legend_columns=3)


def has_learning(run: Run, metric: str) -> bool:
    """Whether any epoch of the run has a number for the metric."""
    return any(value is not None for name in (metric, f"val_{metric}") for value in epoch_values(run, name))


def _plot(axis, curve: Curve, marker: str, colour: str, label: str) -> None:
    """Draw a curve with an edge, without which yellow is hard to see on white."""
    from matplotlib.patheffects import Normal, Stroke

    edge = [Stroke(linewidth=4.2, foreground=INK), Normal()]
    style = {"markersize": 9, "markeredgecolor": INK, "markevery": max(1, len(curve) // MOST_MARKERS)}
    axis.plot(*zip(*curve, strict=True), marker, color=colour, linestyle="none", label=label, zorder=3, **style)
    axis.plot(*zip(*curve, strict=True), color=colour, linewidth=2.8, path_effects=edge, zorder=2)


def _around(values: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Return the range of an axis around `values`: at least `least` wide, so that curves near 100 % can be told apart.

    It ends just above `most`, which no value exceeds.
    """
    low, high = min(values), max(values)
    width = max(high - low, least)
    top = min(high + 0.08 * width + (width - (high - low)) / 2, max(high, most) + 0.08 * width)
    return min(low - 0.08 * width, top - 1.16 * width), top


def _finish(axis, label: str, legend_columns: int) -> None:
    """Finish the axes, with the legend below them, where it hides no curve."""
    axis.set_xlabel(label, color=GREY, loc="right")
    axis.grid(alpha=0.25)
    axis.tick_params(length=0)
    axis.ticklabel_format(useOffset=False)
    below = -0.62 / (axis.get_position().height * axis.figure.get_figheight())  # 0.62 inches below the axes
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, below), "borderaxespad": 0}
    axis.legend(frameon=False, ncols=legend_columns, handletextpad=0.6, columnspacing=1.5, labelspacing=0.4, **place)
