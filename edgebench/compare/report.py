"""The report on a comparison, as Markdown, CSV and a picture."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from edgebench.cli import ExperimentError
from edgebench.compare import picture
from edgebench.compare.metrics import TRAINING, measure
from edgebench.compare.provenance import notes, provenance
from edgebench.compare.runs import NONE, Device, Run, distinct, plain, warn
from edgebench.compare.sentences import device_statement, statements
from edgebench.compare.sets import by_device, by_name, conditions, differences
from edgebench.compare.summary import summary
from edgebench.compare.tables import csv_text, markdown_table, result_tables
from edgebench.compare.verdicts import Comparison, Decisions, compare_all, compare_devices, decide_all
from edgebench.files import replacing

LISTED_SETS = 10  # sets of a device that are reported on; and those with one name only that are listed, in a line each
READING = f"""\
- A cell is the median of the runs, with their range (min–max). `{NONE}`: could not be measured, or not compared.
- Run k of each backend has the same seed, and these are a pair. A ratio is the geometric mean of the ratios of the pairs,
  a difference in accuracy the mean of their differences. Intervals are 95 % intervals by Student's t.
- A difference is claimed if it is at least 2 % (0.5 points of accuracy) and p < 0.05 after Holm's correction for all
  sentences of this report; other ratios in the tables are corrected among themselves. The interval is widened by the same
  correction: it excludes 1 (or 0 points) exactly where the corrected p is below 0.05. In brackets: no difference is claimed.
- "would tell": in 8 of 10 reports, if the true difference and its spread are those observed.
- An accuracy p from N test images has an error of its own: a pair's difference has at least the variance 2 p (1 - p) / N.
- `!`: unstable runs, whose longest epoch took over 1.5 times as long as the shortest, or on a busy or throttled machine.
- cold: all was compiled from scratch. warm: compiled code was loaded from an earlier run's cache. Modes that a cache cannot serve
  count as both. first step, first epoch: seconds from the start of the process to their end.
- one image: through `predict_on_batch`, as a user gets it; bare: the same computation without Keras' Python around it.
  p90, p99: of one image. memory: of the whole process after one image, before any batch or training.
- onnxruntime, LiteRT, TF SavedModel: files that export.py wrote from the weights of such runs, each alone in its
  runtime, without Keras. int8: with int8 weights. File: the model for one image.
- Memory is the peak that the backend's allocator held on the device while training; `RSS`: that of the whole process
  in main memory, where the device keeps no count. Energy is that of the accelerator (of the whole module on a
  Jetson); `CPU`: that of the CPU package, where there is no other.
- Training throughput leaves out validation; the time to the best epoch includes it."""


def folder_for(place: Path) -> Path:
    """Return where a report belongs: into the folder of the results, but that of one file into a folder of its own.

    Beside the file may stand the report on all runs of its folder.
    """
    return place.with_name(f"{place.stem}-report") if place.is_file() else place


def write_report(out: Path, runs: Sequence[Run], failures: Sequence[dict], baseline: str | None) -> None:
    """Print the report, and write report.md, report.csv and report.png to `out`. What cannot be written stops no other."""
    report = build_report(runs, failures, baseline)
    problems = []
    writers: dict[str, Callable[[Path], object]] = {"report.md": lambda path: path.write_text(report, encoding="utf-8")}
    if runs:
        writers["report.csv"] = lambda path: path.write_text(csv_text(runs), encoding="utf-8", newline="")
        writers["report.png"] = lambda path: picture.draw(path, runs, baseline)
    for name, write in writers.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / name) as scratch:
                write(scratch)
        except ModuleNotFoundError:
            warn(f"{name} is not drawn: pip install matplotlib")
        except OSError as error:
            problems.append(f"{name} cannot be written to {out} ({error.strerror or error})")
        except Exception as error:
            if name != "report.png":
                raise
            warn(f"{name} cannot be drawn ({type(error).__name__}: {error})")
    print("\n" + report)
    print("written: " + ", ".join(str(path) for path in sorted(out.glob("report.*"))), flush=True)
    if problems:
        raise ExperimentError("; ".join(problems))


def build_report(runs: Sequence[Run], failures: Sequence[dict], baseline: str | None = None) -> str:
    """Return the whole report as Markdown. All its differences are decided together."""
    devices = by_device(runs)
    compared = {
        (device, index): compare_all(by_name(group, baseline))
        for device, sets in devices.items()
        for index, group in enumerate(sets[:LISTED_SETS])
    }
    across = _across_devices(devices)
    decisions = decide_all(itertools.chain(*compared.values(), [each for _, each in across]))
    parts = ["# Keras backends compared"]
    for device, sets in devices.items():
        parts.append(f"## {device}")
        count = sum(len(by_name(group, None)) > 1 for group in sets) or 1
        for index in range(min(count, LISTED_SETS)):
            parts += _set_report(sets, index, baseline, compared[device, index], decisions)
        if count > LISTED_SETS:
            parts.append(f"{count - LISTED_SETS} more sets of comparable runs are left to report.csv.")
        parts += _other_sets(sets, count)
    if len(devices) > 1:
        sentences = [device_statement(name, each, decisions.get(each)) for name, each in across]
        parts += ["## Across devices", _device_table(devices)]
        parts.append(_bullets(sentences) or "No backend has run on two of them under the same conditions.")
    if runs:
        parts += ["## How to read this", READING]
    else:
        parts.append("No run has finished: there is nothing to compare.")
    if failures:
        lines = [
            "{}: {} (log: {})".format(*(plain(run.get(key)) for key in ("backend", "reason", "log")))
            for run in failures
        ]
        parts += ["## Runs that failed", _bullets(lines)]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _set_report(
    sets: list[list[Run]], index: int, baseline: str | None, comparisons: Sequence[Comparison], decisions: Decisions
) -> list[str]:
    """Report on one set of comparable runs: the answer in a paragraph, the tables, what was found, the small print."""
    names = by_name(sets[index], baseline)
    parts = [f"### Set {index + 1} of {len(sets)}: {', '.join(names)}"] if len(sets) > 1 else []
    if index:
        parts.append(f"Not compared with set 1: {differences(sets[index][0], sets[0][0])}.")
    parts.append(summary(names, comparisons, decisions))
    parts += result_tables(names, comparisons, decisions)
    if found := statements(names, comparisons, decisions):
        parts += ["**What was found**", _bullets(found)]
    return [*parts, "**What was run**", _bullets([*provenance(sets[index], names), *notes(sets[index], names)])]


def _other_sets(sets: list[list[Run]], shown: int) -> list[str]:
    """List the sets with nothing to compare within: their training, and why they are not compared with the first set."""
    if not (others := sets[shown:]):
        return []
    lines = []
    for group in others[:LISTED_SETS]:
        rate = f"{TRAINING.title} {measure(TRAINING, group).cell()} {TRAINING.unit}, n = {len(group)}"
        first = ", ".join(by_name(sets[0], None))
        lines.append(
            f"{group[0].name}: {rate}. Not compared with {first} (set 1): {differences(group[0], sets[0][0])}."
        )
    if len(others) > LISTED_SETS:
        lines.append(f"and {len(others) - LISTED_SETS} more, in report.csv")
    return ["**Configurations that one backend only has run**", _bullets(lines)]


def _across_devices(devices: dict[Device, list[list[Run]]]) -> list[tuple[str, Comparison]]:
    """Compare each name on any two devices, under the conditions that both have run it in."""
    groups = [runs for group in itertools.chain(*devices.values()) for runs in by_name(group, None).values()]
    by_conditions: dict[tuple, list[list[Run]]] = {}
    for runs in groups:
        by_conditions.setdefault((runs[0].name, *conditions(runs[0]).items()), []).append(runs)
    alike = [pair for each in by_conditions.values() for pair in itertools.combinations(each, 2)]
    return [(a[0].name, compare_devices(a, b)) for a, b in alike if a[0].device != b[0].device]


def _device_table(devices: dict[Device, list[list[Run]]]) -> str:
    """Return a table of the training throughput on every device, in the sets of each that have the most names."""
    rows = [["device", "backend", "n", "number format", "batch", TRAINING.heading]]
    for group in itertools.chain(*(sets[:LISTED_SETS] for sets in devices.values())):
        for name, runs in by_name(group, None).items():
            tf32 = "+tf32" if runs[0].get("what/is_gpu") and runs[0].get("what/config/tf32") else ""
            number_format = distinct(runs, "what/config/dtype_policy") + tf32
            cells = [
                str(len(runs)),
                number_format,
                distinct(runs, "what/config/batch_size"),
                measure(TRAINING, runs).cell(),
            ]
            rows.append([str(runs[0].device), name, *cells])
    return markdown_table(rows)
