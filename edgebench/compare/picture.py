"""The picture of a comparison."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from edgebench.compare.metrics import COMPILE_COLD, ENERGY, MEMORY, TRAINING, Metric, measure
from edgebench.compare.runs import Run, distinct
from edgebench.compare.sets import by_device, by_name

# Okabe and Ito's colours, which people with any of the usual colour blindnesses can distinguish.
# A name has the same colour in every picture; names with varied flags take those that are left over.
COLOURS = {
    "JAX (compiled)": "#0072B2",
    "torch (eager)": "#D55E00",
    "torch (compiled)": "#E69F00",
    "TensorFlow (graph)": "#009E73",
    "TensorFlow (XLA)": "#F0E442",
    "native JAX (compiled)": "#56B4E9",
    "native torch (compiled)": "#CC79A7",
    "native torch (eager)": "#999999",
    "JAX (eager)": "#000000",
}
BARS = (
    (TRAINING, "Training, images/s (more is better)"),
    (COMPILE_COLD, "Compile time with a cold cache, s"),
    (MEMORY, "Peak memory, MiB"),
    (ENERGY, "Energy, J/training image"),
)
STYLE = {"font.size": 14, "axes.titlesize": 15, "axes.spines.top": False, "axes.spines.right": False}


def draw(path: Path, runs: Sequence[Run], baseline: str | None) -> None:
    """Draw the largest set of comparable runs, narrow enough for a phone. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sets = list(itertools.chain(*by_device(runs).values()))
    group = max(sets, key=lambda runs: (len(by_name(runs, None)), len(runs)))
    backends = by_name(group, baseline)
    free = itertools.cycle([colour for name, colour in COLOURS.items() if name not in backends] or COLOURS.values())
    colours = {name: COLOURS.get(name) or next(free) for name in backends}
    heights = [*[len(backends) + 1.2] * len(BARS), 5.5]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 14), layout="constrained")
        *bars, accuracy = figure.subplots(len(heights), height_ratios=heights)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(_title(group, len(sets), backends), fontsize=15)
        for axis, (metric, title) in zip(bars, BARS, strict=True):
            axis.set_title(title, loc="left")
            _draw_bars(axis, metric, backends, colours)
        accuracy.set_title("Validation accuracy, %, against training time, s", loc="left")
        _draw_accuracy(accuracy, backends, colours)
        figure.savefig(path, dpi=110)


def _title(group: list[Run], sets: int, backends: dict[str, list[Run]]) -> str:
    parameters = group[0].number("what/num_parameters")
    model = "unknown size" if parameters is None else f"{parameters:,.0f} parameters"
    lines = [
        *textwrap.wrap(str(group[0].device), 60),
        f"ViT of {model}, batch {distinct(group, 'what/config/batch_size')}, {distinct(group, 'what/config/dtype_policy')}",
        *textwrap.wrap("n: " + ", ".join(f"{len(runs)} {name}" for name, runs in backends.items()), 70),
        "bar: median; dots: runs; whiskers: lowest to highest run",
    ]
    if sets > 1:
        lines.append(f"the largest of {sets} sets of comparable runs")
    return "\n".join(lines)


def _draw_bars(axis, metric: Metric, backends: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """Draw a bar to the median, a whisker from the least to the greatest value, and a dot per run."""
    rows = {name: measure(metric, runs) for name, runs in backends.items()}
    labels = [textwrap.fill(f"{name} ({figures.mark})" if figures.mark else name, 22) for name, figures in rows.items()]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first backend on top
    axis.tick_params(axis="y", length=0)
    greatest = max((value for figures in rows.values() for value in figures.values), default=None)
    if greatest is None:  # no run has a value
        _draw_unavailable(axis)
        return
    axis.set_xlim(0, 1.3 * greatest or 1)  # leaves room for the number beside the whisker
    for row, (name, figures) in enumerate(rows.items()):
        if not figures.values or (metric.is_compilation and not backends[name][0].is_compiled):
            reason = "does not compile" if figures.values else "unavailable"
            axis.text(0.01, row, reason, color="grey", va="center", transform=axis.get_yaxis_transform())
            continue
        low, median, high = min(figures.values), figures.median, max(figures.values)
        axis.barh(row, median, height=0.62, color=colours[name], alpha=0.45)
        axis.errorbar(median, row, xerr=[[median - low], [high - median]], color="black", capsize=7, linewidth=1.5)
        n = len(figures.values)
        heights = [row + 0.36 * (i / (n - 1) - 0.5) for i in range(n)] if n > 1 else [row]
        axis.scatter(figures.values, heights, s=36, color=colours[name], edgecolor="black", linewidth=0.7, zorder=3)
        axis.text(high + 0.03 * greatest, row, metric.show(median), va="center")


def _draw_accuracy(axis, backends: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """Draw a line per run over the seconds since its training began."""
    for (name, runs), style in zip(backends.items(), itertools.cycle(("o-", "s--", "^:"))):
        curves = [curve for run in runs if (curve := _accuracy_over_time(run))]
        for i, curve in enumerate(curves):
            label = name if i == 0 else None
            axis.plot(*zip(*curve, strict=True), style, color=colours[name], label=label, markersize=6, alpha=0.8)
    if not axis.lines:
        _draw_unavailable(axis)
        axis.set_yticks([])
        return
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.06 * axis.get_ylim()[1])  # markers at 100 % stay whole
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")


def _accuracy_over_time(run: Run) -> list[tuple[float, float]]:
    """Return (seconds, percent) at the end of every epoch that was validated."""
    accuracies = [Run(run.path, epoch).number("val_accuracy") for epoch in run.get("quality/epochs") or []]
    pairs = zip(run.get("quality/epoch_end_s") or [], accuracies, strict=False)  # an epoch without both is not drawn
    return [(end, 100 * accuracy) for end, accuracy in pairs if end is not None and accuracy is not None]


def _draw_unavailable(axis) -> None:
    axis.set_xticks([])
    axis.text(0.5, 0.5, "unavailable", color="grey", ha="center", va="center", transform=axis.transAxes)
