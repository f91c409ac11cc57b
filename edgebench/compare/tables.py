"""The tables of a report: a row for each name, and one for its ratios to the first; and the CSV, with a row for each run."""

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence

from edgebench.compare.metrics import TABLES, Metric, measure, names_with, why_missing
from edgebench.compare.runs import Run, distinct
from edgebench.compare.sentences import cell
from edgebench.compare.verdicts import Comparison, Decisions

CONSOLE = 200  # columns; a table that would be wider is split


def markdown_table(rows: list[list[str]]) -> str:
    """Return a Markdown table, header first, whose columns line up on a console as well."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def result_tables(names: Mapping[str, list[Run]], comparisons: Sequence[Comparison], decisions: Decisions) -> list[str]:
    """Return the tables of a set of comparable runs, without columns that have no values, and what is said about those."""
    base = next(iter(names))
    by_place = {(each.name, each.metric): each for each in comparisons}
    parts = []
    for caption, metrics in TABLES.items():
        parts += _table(caption, metrics, base, names_with(metrics[0], names), by_place, decisions)
    return [*parts, *missing_figures(names)]


def _table(
    caption: str,
    metrics: Sequence[Metric],
    base: str,
    names: Mapping[str, list[Run]],
    by_place: Mapping[tuple[str, Metric], Comparison],
    decisions: Decisions,
) -> list[str]:
    """Return a table, in parts if it is too wide, under its caption; nothing if none of its metrics has a value."""
    others = [name for name in names if name != base and base in names]
    head = ["backend", *names, *(f"{name} / {base}" for name in others)]
    counts = ["n", *(_count(runs) for runs in names.values()), *("" for _ in others)]
    columns = [counts]
    if caption == "Training":
        attention = [distinct(runs, "what/attention") for runs in names.values()]
        columns.append(["attention", *attention, *("" for _ in others)])
    shown = [metric for metric in metrics if any(measure(metric, runs).values for runs in names.values())]
    for metric in shown:
        compared = [by_place.get((name, metric)) for name in others]
        ratios = [cell(each, decisions.get(each)) if each else "" for each in compared]
        columns.append([metric.heading, *(measure(metric, runs).cell() for runs in names.values()), *ratios])
    return [f"**{caption}**", *_split(head, columns)] if shown else []


def _count(runs: Sequence[Run]) -> str:
    """Return the number of runs, and with ! how many of them are unstable."""
    unstable = sum(bool(run.instabilities) for run in runs)
    return f"{len(runs)} ({unstable} !)" if unstable else str(len(runs))


def _split(head: list[str], columns: list[list[str]]) -> list[str]:
    """Return one table, or as many as it takes for none to be wider than a console. Each begins with the names."""
    tables, taken = [], [head]
    for column in columns:
        width = sum(max(map(len, each)) + 3 for each in [*taken, column]) + 1
        if width > CONSOLE and len(taken) > 1:
            tables.append(taken)
            taken = [head]
        taken = [*taken, column]
    return [markdown_table([list(row) for row in zip(*table, strict=True)]) for table in [*tables, taken]]


def missing_figures(names: Mapping[str, list[Run]]) -> list[str]:
    """Say of which metrics a name has no value, and why, each reason once."""
    gaps: dict[tuple[str, str], list[str]] = {}  # (names, reason): the metrics
    for metric in itertools.chain(*TABLES.values()):
        reasons: dict[str, list[str]] = {}
        able = names_with(metric, names)
        for name, runs in able.items():
            if not measure(metric, runs).values:
                reasons.setdefault(why_missing(metric, runs), []).append(name)
        for reason, without in reasons.items():
            everywhere = len(without) == len(able)
            gaps.setdefault(("" if everywhere else f" for {', '.join(without)}", reason), []).append(metric.title)
    lines = [f"- No {', '.join(titles)}{without}: {reason}." for (without, reason), titles in gaps.items()]
    return ["\n".join(lines)] if lines else []


def csv_text(runs: Sequence[Run]) -> str:
    """Return a row per run. Columns are the paths into the results file; a list is written as JSON, null as nothing."""
    rows = [
        {"file": run.path.name, "name": run.name, "unstable": "; ".join(run.instabilities), **_flatten(run.document)}
        for run in runs
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_csv_cell, columns))
    writer.writerows([_csv_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    """Return a cell that no spreadsheet takes as a formula."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


def _flatten(section: dict, prefix: str = "") -> dict[str, object]:
    cells: dict[str, object] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            cells |= _flatten(value, f"{prefix}{name}/")
        else:
            cells[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return cells
