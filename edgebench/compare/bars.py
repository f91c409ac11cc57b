"""The bars of a picture: one for each backend, to the median of its runs."""

import textwrap
from collections.abc import Mapping

from edgebench.compare.metrics import Figures

INK, GREY = "#222222", "#666666"
LONGEST_NAME = 23  # characters on a line


def height(rows: Mapping[str, Figures]) -> float:
    """Return how high the bars have to be, in inches."""
    lines = max(len(textwrap.wrap(name, LONGEST_NAME)) for name in rows)
    return len(rows) * max(0.46, 0.06 + 0.26 * lines)


def draw_bars(axis, rows: Mapping[str, Figures], colours: Mapping[str, str], with_marks: bool) -> None:
    """Draw the bars from top to bottom. The medians decide where the axis ends: one slow run does not squeeze the rest."""
    axis.set_yticks(range(len(rows)), [textwrap.fill(name, LONGEST_NAME) for name in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first backend on top
    axis.tick_params(length=0)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    edge = 1.25 * max(figures.median for figures in rows.values() if figures.values) or 1  # leaves room for the number
    axis.set_xlim(0, edge)
    for row, (name, figures) in enumerate(rows.items()):
        if figures.values:
            _draw_bar(axis, row, figures, edge, colours[name], figures.mark if with_marks else "")
        else:
            axis.text(0.01 * edge, row, "not measured", color=GREY, va="center")


def _draw_bar(axis, row: int, figures: Figures, edge: float, colour: str, mark: str) -> None:
    """Draw a bar to the median with its number and, below it, where no number hides them, a dot for each run.

    A run beyond the edge is a number at the edge.
    """
    show, median, values = figures.metric.show, figures.median, figures.values
    axis.barh(row - 0.09, median, height=0.5, color=colour, edgecolor=INK, linewidth=0.8)
    axis.text(median + 0.01 * edge, row - 0.09, f"{show(median)} {mark}".rstrip(), va="center", weight="bold")
    if len(values) == 1:
        return
    level = row + 0.31
    shown = sorted(value for value in values if value <= edge)
    beyond = sorted(value for value in values if value > edge)
    if shown:
        axis.plot([shown[0], shown[-1]], [level, level], color=INK, linewidth=1.2, zorder=2)
    axis.scatter(shown, [level] * len(shown), s=34, color=colour, edgecolor=INK, linewidth=0.8, zorder=3, clip_on=False)
    if beyond:
        axis.plot([max([median, *shown]), edge], [level, level], ":", color=INK, linewidth=1.2, zorder=1)
        style = {
            "ha": "right",
            "va": "center",
            "fontsize": 12.5,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
        }
        axis.text(edge, level, f"{', '.join(map(show, beyond))} ▸", **style)
