"""The report on a comparison, as Markdown, CSV and a picture."""

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from edgebench.cli import ExperimentError
from edgebench.compare import launch, picture, verdicts
from edgebench.compare.runs import (
    NONE,
    NOTED,
    NOTED_WITHIN_A_BACKEND,
    Device,
    Run,
    by_backend,
    by_device,
    conditions,
    differences,
    distinct,
    warn,
)

MODEL = ("image_size", "patch_size", "projection_dim", "num_heads", "transformer_layers", "mlp_head_units")
MODES = {"attention": "what/attention", "jit": "what/jit_compile"}  # columns of the first table
READING = f"""\
- A cell is the median of the repeats, with their range (min–max). `{NONE}`: could not be measured.
- A ratio is that of the medians. In brackets: the spread does not support it, because the ranges of the repeats
  overlap or there is one run only.
- Ranges of backends that do not differ lie apart by chance in 1 of 3 comparisons with 2 runs each, 1 of 10 with 3,
  1 of 35 with 4 and 1 of 126 with 5.
- Memory is the peak that the backend's allocator held on the device while training; `RSS`: that of the whole process
  in main memory, where the device keeps no count. Energy is that of the accelerator (of the whole module on a
  Jetson); `CPU`: that of the CPU package, where there is no other.
- Training throughput leaves out validation; the time to the best epoch includes it."""


def write_report(out: Path, runs: Sequence[Run], failures: Sequence[dict], baseline: str | None) -> None:
    """Write report.md, report.csv and report.png to `out`, and the Markdown to the console."""
    report = build_report(runs, failures, baseline)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(report, encoding="utf-8")
        if runs:
            _write_csv(out / "report.csv", runs)
            picture.draw(out / "report.png", runs, baseline)
    except ModuleNotFoundError:
        warn("report.png is not drawn: pip install matplotlib")
    except OSError as error:
        raise ExperimentError(f"the report cannot be written to {out} ({error.strerror or error})") from error
    print("\n" + report)
    print("written: " + ", ".join(str(path) for path in sorted(out.glob("report.*"))))


def build_report(runs: Sequence[Run], failures: Sequence[dict], baseline: str | None = None) -> str:
    """Return the whole report as Markdown."""
    parts = ["# Keras backends compared"]
    devices = by_device(runs)
    for device, sets in devices.items():
        parts.append(f"## {device}")
        for index in range(len(sets)):
            parts += _set_report(sets, index, baseline)
    if len(devices) > 1:
        parts += ["## Across devices", *_across_devices(devices)]
    if runs:
        parts += ["## How to read this", READING]
    else:
        parts.append("No run has finished: there is nothing to compare.")
    if failures:
        lines = [f"{run.get('backend')}: {run.get('reason')} (log: {run.get('log')})" for run in failures]
        parts += ["## Runs that failed", _bullets(lines)]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _set_report(sets: list[list[Run]], index: int, baseline: str | None) -> list[str]:
    """Report on one set of comparable runs: where its numbers come from, what was found, and the tables."""
    group = sets[index]
    backends = by_backend(group, baseline)
    parts = []
    if len(sets) > 1:
        parts.append(f"### Set {index + 1} of {len(sets)}: {', '.join(backends)}")
    for number, other in enumerate(sets[:index], start=1):
        names = ", ".join(by_backend(other, baseline))
        parts.append(f"Not compared with {names} (set {number}): {differences(group[0], other[0])}.")
    parts.append(_bullets([*_provenance(group, backends), *_notes(group, backends)]))
    parts += ["**What was found**", _bullets(verdicts.statements(backends))]
    parts += [_table(backends, verdicts.SPEED, MODES), _table(backends, verdicts.COSTS_AND_QUALITY, {})]
    return parts


def _provenance(group: list[Run], backends: dict[str, list[Run]]) -> list[str]:
    """List what a reader should know about the runs before trusting their numbers."""
    run = group[0]

    def value(path: str) -> str:
        return run.text(f"what/{path}")

    def count(path: str) -> str:
        number = run.number(f"what/{path}")
        return NONE if number is None else f"{number:,.0f}"

    common = ("Python", "Keras", "CUDA")
    software = [f"{name} {distinct(_with(name, group), f'what/versions/{name}')}" for name in common]
    for name, runs in backends.items():
        software.append(f"{name} {distinct(runs, f'what/versions/{launch.packages_of(name)[0]}')}")
    tf32 = f", TF32 {value('tf32')}" if run.get("what/is_gpu") else ""
    model = ", ".join(f"{name} {value(f'config/{name}')}" for name in MODEL)
    images = ", ".join(f"{count(f'images/{part}')} {part}" for part in ("train", "validation", "test"))
    counts = ", ".join(f"{len(runs)} {name}" for name, runs in backends.items())
    dates = sorted({run.text("what/started") for run in group})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return [
        f"Device: {run.device.name}; node {run.device.node}; power mode {run.device.power_mode}",
        f"Software: {', '.join(software)}",
        f"Number format: {value('dtype_policy')}{tf32}",
        f"Model: {count('num_parameters')} parameters; {model}",
        f"Data: {conditions(run)['dataset']}; images: {images}; shape {value('image_shape')}, "
        f"{value('num_classes')} classes",
        f"Training: batch {value('config/batch_size')}, {value('config/num_epochs')} epochs, learning rate "
        f"{value('config/learning_rate')}, weight decay {value('config/weight_decay')}, augmentation "
        f"{value('augmentation')}, seed {distinct(group, 'what/config/seed')}",
        f"Code: {', '.join(dict.fromkeys(run.commit for run in group))}",
        f"Runs: {len(group)} ({counts}), {period}",
    ]


def _with(software: str, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have a version of `software`: peers have none of Keras."""
    return [run for run in runs if software != "Keras" or run.backend not in launch.PEERS]


def _notes(group: list[Run], backends: dict[str, list[Run]]) -> list[str]:
    """List what differs between runs that are compared nevertheless."""
    notes = []
    for path in NOTED:
        name = path.rpartition("/")[2]
        if len({run.text(f"what/{path}") for run in _with(name, group)}) > 1:
            values = [f"{backend} {distinct(runs, f'what/{path}')}" for backend, runs in backends.items()]
            notes.append(f"Note: the runs differ in {name}: {'; '.join(values)}")
    for backend, runs in backends.items():
        for path in (*NOTED_WITHIN_A_BACKEND, f"versions/{launch.packages_of(backend)[0]}"):
            if len({run.text(f"what/{path}") for run in runs}) > 1:
                name, values = path.rpartition("/")[2], distinct(runs, f"what/{path}")
                notes.append(f"Note: runs of {backend} are put together that differ in {name}: {values}")
    return notes


def _table(backends: dict[str, list[Run]], metrics: Sequence[verdicts.Metric], modes: dict[str, str]) -> str:
    """Return a table with a row per backend and a row of ratios for each backend but the first."""
    rows = [["backend", "n", *modes, *(metric.heading for metric in metrics)]]
    measured = {name: [verdicts.measure(metric, runs) for metric in metrics] for name, runs in backends.items()}
    for name, runs in backends.items():
        mode = [distinct(runs, path) for path in modes.values()]
        rows.append([name, str(len(runs)), *mode, *(figures.cell() for figures in measured[name])])
    base, *others = backends
    test_images = backends[base][0].number("what/images/test")
    for name in others:
        pairs = zip(measured[name], measured[base], strict=True)
        ratios = [verdicts.judge(a, b, test_images).cell() for a, b in pairs]
        rows.append([f"{name} / {base}", "", *("" for _ in modes), *ratios])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """Return a Markdown table, header first, whose columns line up on a console as well."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _across_devices(devices: dict[Device, list[list[Run]]]) -> list[str]:
    """Return a table of the training throughput on every device, and sentences on a backend that ran on several."""
    rows = [["device", "backend", "n", "number format", "batch", verdicts.TRAINING.heading]]
    compared: list[list[Run]] = []  # the runs of one backend in one set
    for group in itertools.chain(*devices.values()):
        compared += by_backend(group, None).values()
    for runs in compared:
        values = conditions(runs[0])
        number_format = values["dtype_policy"] + ("+tf32" if values["tf32"] == "on" else "")
        cells = [str(len(runs)), number_format, values["batch_size"], verdicts.measure(verdicts.TRAINING, runs).cell()]
        rows.append([str(runs[0].device), runs[0].backend, *cells])
    sentences = [
        verdicts.across_devices(a, b)
        for a, b in itertools.combinations(compared, 2)
        if a[0].backend == b[0].backend and a[0].device != b[0].device
    ]
    return [markdown_table(rows), _bullets(sentences) or "No backend has run on two of them."]


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Write a row per run. Columns are the paths into the results file; a list is written as JSON, null as nothing."""
    rows = [{"file": run.path.name, **_flatten(run.document)} for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flatten(section: dict, prefix: str = "") -> dict[str, object]:
    cells: dict[str, object] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            cells |= _flatten(value, f"{prefix}{name}/")
        else:
            cells[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return cells
