"""The picture of a comparison, or of a single run, narrow enough for a phone."""

import functools
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgebench.compare import bars, curves
from edgebench.compare.bars import GREY, INK
from edgebench.compare.metrics import (
    ACCURACY,
    ENERGY,
    FIRST_EPOCH_COLD,
    FIRST_EPOCH_WARM,
    FIRST_STEP_COLD,
    FIRST_STEP_WARM,
    LATENCY,
    MEMORY,
    TRAINING,
    Metric,
    measure,
    names_with,
    why_missing,
)
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
MORE, LESS = "more is better", "less is better"
BARS = {  # in the order in which a user asks; the waiting time follows after the accuracy
    TRAINING: ("Training speed, images/s", MORE),
    LATENCY: ("Latency of one image, ms", LESS),
    MEMORY: ("Peak memory{}, MiB", LESS),
    ENERGY: ("Energy{}, J per training image", LESS),
}
WAITS = {  # of these, the first that was measured
    FIRST_STEP_COLD: "Wait for the first step, nothing cached, s",
    FIRST_EPOCH_COLD: "Wait for the first epoch, nothing cached, s",
    FIRST_STEP_WARM: "Wait for the first step, cached, s",
    FIRST_EPOCH_WARM: "Wait for the first epoch, cached, s",
}
STYLE = {
    **{"font.size": 15, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False},
    "text.parse_math": False,  # a $ in a device's name is a $
}
WIDTH, LEFT, RIGHT = 8.0, 2.45, 0.25  # inches
LONGEST_REASON = 60  # characters; a longer one stands in the report only


class Panel(NamedTuple):
    """A part of the picture. The heights are in inches: of the axes, and of what stands below them."""

    title: str
    direction: str
    draw: Callable
    height: float
    below: float = 0.0
    left: float = LEFT


def draw(path: Path, runs: Sequence[Run], baseline: str | None) -> None:
    """Draw the largest set of comparable runs, or the learning curve if there is one run only. Needs matplotlib."""
    if len(runs) == 1:
        _save(path, *_single_run(runs[0]))
    else:
        _save(path, *_comparison(runs, baseline))


def _comparison(runs: Sequence[Run], baseline: str | None) -> tuple[list[str], list[Panel], list[str]]:
    """Return the header, the panels and the footer of a comparison."""
    sets = list(itertools.chain(*by_device(runs).values()))
    group = max(sets, key=lambda runs: (len(by_name(runs, None)), len(runs)))
    backends = by_name(group, baseline)
    free = itertools.cycle([colour for name, colour in COLOURS.items() if name not in backends] or COLOURS.values())
    colours = {name: COLOURS.get(name) or next(free) for name in backends}
    panels, missing = [], []
    for metric, (title, direction) in BARS.items():
        able = names_with(metric, backends)
        if any(measure(metric, runs).values for runs in able.values()):
            panels.append(_bars(metric, title, direction, able, colours))
        else:
            missing.append(_not_measured(metric, group))
    if curves.accuracies(group):
        trained = {name: runs for name, runs in backends.items() if not runs[0].is_deployed}
        draw_accuracy = functools.partial(curves.draw_accuracy, backends=trained, colours=colours)
        legend = 0.6 + 0.3 * ((len(trained) + 1) // 2)
        panels.append(Panel("Validation accuracy over time, %", MORE, draw_accuracy, 2.9, legend, left=0.85))
    else:
        missing.append("validation accuracy")
    waits = [metric for metric in WAITS if measure(metric, [run for run in group if not run.is_deployed]).values]
    if waits:
        panels.append(_bars(waits[0], WAITS[waits[0]], LESS, names_with(waits[0], backends), colours))
    else:
        missing.append("waiting time")
    counts = {len(runs) for runs in backends.values()}
    n = f"{counts.pop()} of each" if len(counts) == 1 else ", ".join(f"{len(r)} {name}" for name, r in backends.items())
    header = [*_header(group), f"runs: {n}" if len(backends) > 1 else f"{len(group)} runs of {group[0].name}"]
    footer = ["Bar and number: median. Dots: runs. ▸: a run beyond the edge."]
    if len(backends) > 1:
        footer.append(f"On top: {next(iter(backends))}, with which the report compares the others.")
    if len(sets) > 1:
        footer.append(f"This is the largest of {len(sets)} sets of comparable runs.")
    return header, panels, [*footer, *_missing_line(missing)]


def _single_run(run: Run) -> tuple[list[str], list[Panel], list[str]]:
    """Return the header, the panels and the footer of the learning curve of a run."""
    known = []
    for metric in (TRAINING, LATENCY, MEMORY, ACCURACY):
        if (figures := measure(metric, [run])).values:
            text = f"{metric.title} {metric.show(figures.median)} {metric.unit} {figures.mark}".rstrip()
            known.append(text.replace(" ", "\xa0"))  # stays on one line
    panels, missing = [], []
    for title, name, direction, scale in (("Accuracy, %", "accuracy", MORE, 100), ("Loss", "loss", LESS, 1)):
        if curves.has_learning(run, name):
            draw_learning = functools.partial(curves.draw_learning, run=run, metric=name, scale=scale)
            panels.append(Panel(title, direction, draw_learning, 3.2, 0.95, left=0.95))
        else:
            missing.append(name)
    header = [*_header([run]), f"{run.name}, seed {run.seed}", " · ".join(known)]
    validated = any(value is not None for value in curves.epoch_values(run, "val_accuracy"))
    rule = "Best epoch: by validation accuracy." if validated else "No validation: the last epoch counts as the best."
    return header, panels, [rule, *_missing_line(missing)]


def _header(group: Sequence[Run]) -> list[str]:
    parameters = group[0].number("what/num_parameters")
    model = "unknown size" if parameters is None else f"{parameters:,.0f} parameters"
    settings = f"batch {distinct(group, 'what/config/batch_size')}, {distinct(group, 'what/config/dtype_policy')}"
    return [str(group[0].device), f"ViT of {model}, {settings}"]


def _not_measured(metric: Metric, group: Sequence[Run]) -> str:
    reason = why_missing(metric, group)
    return metric.subject.replace(" an image", "") + (f" ({reason})" if len(reason) <= LONGEST_REASON else "")


def _missing_line(missing: Sequence[str]) -> list[str]:
    return [f"Not measured: {', '.join(missing)}."] if missing else []


def _bars(metric: Metric, title: str, direction: str, backends: Mapping[str, list[Run]], colours: dict) -> Panel:
    """Return a panel of bars. A source that all values have in common stands in its title, else beside the numbers."""
    rows = {name: measure(metric, runs) for name, runs in backends.items()}
    marks = {figures.mark for figures in rows.values() if figures.values}
    common = f" ({mark})" if len(marks) == 1 and (mark := next(iter(marks))) else ""
    draw_bars = functools.partial(bars.draw_bars, rows=rows, colours=colours, with_marks=not common)
    return Panel(title.format(common), direction, draw_bars, bars.height(rows))


def _save(path: Path, header: Sequence[str], panels: Sequence[Panel], footer: Sequence[str]) -> None:
    """Lay out the panels below each other, each as high as it needs to be, and write the picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    device, *others = [line for text in header for line in textwrap.wrap(text, 66)]
    small = [line for text in footer for line in textwrap.wrap(text, 78)]
    title, line = 0.62, 0.29  # inches
    heights = sum(title + panel.height + panel.below for panel in panels)
    height = 0.6 + line * (len(others) + len(small)) + heights + 0.35
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def write(top: float, text: str, x: float = 0.2, **style) -> None:
            figure.text(x / WIDTH, 1 - top / height, text, va="top", **style)

        write(0.2, device, fontsize=18, weight="bold")
        top = 0.6
        for text in others:
            write(top, text, color=GREY)
            top += line
        for panel in panels:
            write(top + 0.26, panel.title, fontsize=16, weight="bold")
            write(top + 0.28, panel.direction, WIDTH - RIGHT, ha="right", color=GREY)
            top += title + panel.height
            width = WIDTH - RIGHT - panel.left
            axis = figure.add_axes((panel.left / WIDTH, 1 - top / height, width / WIDTH, panel.height / height))
            panel.draw(axis)
            top += panel.below
        for text in small:
            top += line
            write(top - 0.1, text, color=GREY, fontsize=13)
        figure.savefig(path, dpi=110)
