"""Which Keras 3 backend trains and runs this model best on this device? Run vit.py on each, repeatedly, and compare.

    python benchmark.py                                              # every installed backend, 3 runs each
    python benchmark.py --backends jax torch --repeats 5 -- --dataset synthetic --num-epochs 2
    python benchmark.py --backends jax native-jax torch native-torch # what Keras costs: peers/ does the same without it
    python benchmark.py --report results-orin results-desktop        # no new runs: compare what is there
    python benchmark.py --help

Every run is a process of its own (nothing is warm, no memory is held over), and the order is reversed from round to
round (A B, B A, A B), so that a device which heats up or throttles does not favour the backend that comes first.

Three files tell the outcome: report.md (also on the console), report.csv (a row a run) and report.png (matplotlib).
Only runs that agree in number format, batch, model, data and training are put into one ratio, and a difference is
stated in words only where the ranges of the repeats do not overlap.

The file reads in the order of the work: results, runs, comparison, report, picture, command line.

Exit status: 0 a report is written; 1 no run succeeded; 2 wrong input; 130 or 143 stopped by Ctrl-C or SIGTERM (what
had finished by then is reported).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

VIT = Path(__file__).with_name("vit.py")
BACKENDS = ("jax", "torch", "tensorflow")  # a Keras backend and the Python package behind it have the same name
PEERS = {  # hand-written programs for the same training, to show what Keras costs, and the packages that they need
    "native-jax": (VIT.parent / "peers" / "native_jax.py", ("jax", "optax")),
    "native-torch": (VIT.parent / "peers" / "native_torch.py", ("torch",)),
}
OURS = ("--keras-backend", "--results-dir", "--checkpoint-path")  # the flags of vit.py that are set here
STOP_S = 10.0  # seconds that a run has to end after SIGTERM
SCHEMA_VERSION = 2
NONE = "–"  # a figure that could not be measured; never a 0


class BenchmarkError(Exception):
    """A failure that the user can mend: `main` turns it into one line and exit status 2."""


def _warn(message: str) -> None:
    print(f"benchmark.py: warning: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------
# Results: the JSON files that vit.py writes, one a run
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One results file. Paths into it are written `time/step_ms/p50`."""

    path: Path
    document: dict

    def get(self, path: str):
        """The value at `path`; None where it is null or absent."""
        value = self.document
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, path: str) -> float | None:
        """The finite number at `path`, else None."""
        value = self.get(path)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None

    @property
    def backend(self) -> str:
        return self.document["what"]["backend"]

    @property
    def device(self) -> tuple[str, str, str]:
        """Device, node and power mode: what has to be the same for two runs to have run on one device."""
        return tuple(_plain(self.get(f"what/{name}")) for name in ("device", "node", "power_mode"))


def read_results(folders: Iterable[Path]) -> list[Run]:
    """Every run below `folders`, oldest first. What is no results file is passed over; what is broken gets a warning."""
    runs: dict[str, Run] = {}
    for path in _json_files(folders):
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            _warn(f"{path} cannot be read ({error})")
            continue
        if not isinstance(document, dict) or not isinstance(document.get("what"), dict):
            continue
        if (version := document.get("schema_version")) != SCHEMA_VERSION:
            _warn(f"{path} has schema version {version!r}; this program reads {SCHEMA_VERSION}")
        elif document.get("status") != "complete":
            _warn(f"{path} is of a run that is not complete ({document.get('failure')})")
        elif not isinstance(document["what"].get("backend"), str):
            _warn(f"{path} names no backend")
        elif text in runs:  # a copy of a run is not another run, and would narrow the spread
            _warn(f"{path} is a copy of {runs[text].path} and counts once")
        else:
            runs[text] = Run(path, document)
    return sorted(runs.values(), key=lambda run: (_plain(run.get("what/started")), run.path))


def read_failures(folders: Iterable[Path]) -> list[dict]:
    """The runs that failed, from every failures.json below `folders`."""
    failures: list[dict] = []
    for path in _json_files(folders, "failures.json"):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # read_results has warned
        found = document.get("failures") if isinstance(document, dict) else None
        failures += [failure for failure in found or [] if isinstance(failure, dict)]
    return failures


def _json_files(folders: Iterable[Path], pattern: str = "*.json") -> list[Path]:
    return sorted({path.resolve() for folder in folders for path in folder.rglob(pattern)})


def _plain(value) -> str:
    """A value of a configuration as people write it."""
    if value is None:
        return NONE
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------------------
# Runs: vit.py as a process, once for each backend and repeat
# --------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM has come. No Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, signum: int, frame=None):
        self.signum = signum


def _on_signal(signum: int, frame) -> None:
    raise Stopped(signum)


def alternating(backends: Sequence[str], repeats: int) -> list[str]:
    """The order of the runs: A B, B A, A B, ..."""
    return [name for i in range(repeats) for name in (backends if i % 2 == 0 else reversed(backends))]


def run_all(backends: Sequence[str], repeats: int, flags: Sequence[str], out: Path) -> int:
    """Run everything and return how many runs succeeded. A failure is recorded in `out` and does not stop the others."""
    order = alternating(backends, repeats)
    succeeded = 0
    for number, backend in enumerate(order, start=1):
        label = f"[{number}/{len(order)}] {backend} ..."
        print(label, flush=True)
        known = set(out.glob("*.json"))
        began = time.perf_counter()
        log = out / "logs" / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{number}-{backend}.log"
        try:
            status = _run_once(backend, flags, out, log)
        except Stopped as stop:
            _record_failure(out, backend, f"stopped by {signal.Signals(stop.signum).name}", log)
            raise
        seconds = time.perf_counter() - began
        written = _read_new(out, known)
        if status or not written:
            reason = _reason(status, log) if status else "ended well, but left no results file"
            _record_failure(out, backend, reason, log)
            print(f"{label} failed after {seconds:.0f} s: {reason}", flush=True)
        else:
            succeeded += 1
            rate = written.number("time/train_images_per_s")
            told = "throughput unavailable" if rate is None else f"{rate:,.1f} images/s"
            print(f"{label} {seconds:.0f} s, {told}", flush=True)
    return succeeded


def _read_new(out: Path, known: set[Path]) -> Run | None:
    """The run whose results file has come into `out` since `known` was listed."""
    for path in set(out.glob("*.json")) - known:
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(document, dict) and isinstance(document.get("what"), dict):
                return Run(path, document)
    return None


def _run_once(backend: str, flags: Sequence[str], out: Path, log: Path) -> int:
    """Run vit.py, or a peer, to its end and return its exit status. Stdout goes to `log`, stderr to its neighbour."""
    log.parent.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint-", dir=out) as scratch,
        log.open("wb") as stdout,
        _stderr_log(log).open("wb") as stderr,
    ):
        checkpoint = Path(scratch) / "best.weights.h5"
        script = PEERS[backend][0] if backend in PEERS else VIT
        ours = ["--keras-backend", _package(backend), "--results-dir", str(out), "--checkpoint-path", str(checkpoint)]
        child = subprocess.Popen(
            # compile_s is to be the time of a compilation, not of reading what an earlier run has kept
            [sys.executable, str(script), "--no-compile-cache", *flags, *ours],
            env={**os.environ, "KERAS_BACKEND": _package(backend)},  # the variable wins over the flag
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            return child.wait()
        except Stopped:
            child.terminate()
            try:
                child.wait(STOP_S)
            except (subprocess.TimeoutExpired, Stopped):  # it hangs, or the user is in a hurry
                child.kill()
                child.wait()
            raise


def _package(backend: str) -> str:
    """The Python package behind a backend or a peer."""
    return PEERS[backend][1][0] if backend in PEERS else backend


def _stderr_log(log: Path) -> Path:
    return log.with_suffix(".stderr.log")


def _reason(status: int, log: Path) -> str:
    """Why a run failed, in one line: what vit.py says, else the last line on stderr, else how the process ended."""
    lines = _stderr_log(log).read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if told := [line for line in lines if line.startswith("vit.py: error:")]:
        return told[-1]
    last = lines[-1] if lines else ""
    if status > 0:
        return last or f"exit status {status}"
    try:  # a process that was killed, for want of memory say, had no time to write why: its last line misleads
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (f" (last line: {last})" if last else "")


def _record_failure(out: Path, backend: str, reason: str, log: Path) -> None:
    """Add a failure to out/failures.json, where --report finds it."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    failure = {"backend": backend, "ended": now, "reason": reason, "log": f"{log.parent.name}/{log.name}"}
    path = out / "failures.json"
    failures = [*(read_failures([out]) if path.exists() else []), failure]
    path.write_text(json.dumps({"failures": failures}, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------
# Comparison: which runs may be compared, and what their spread supports
# --------------------------------------------------------------------------------------------------------------

# What has to agree between two runs before a ratio of them says something of their backends. `attention` and
# `jit_compile` are not here: they are what a backend does, hence part of what is compared.
MUST_AGREE = (
    *("dtype_policy", "augmentation", "image_shape", "num_classes", "num_parameters"),
    *("images/train", "images/validation", "images/test", "config/validation_split"),
    *("config/image_size", "config/patch_size", "config/projection_dim", "config/num_heads"),
    *("config/transformer_layers", "config/transformer_units", "config/mlp_head_units"),
    *("config/batch_size", "config/num_epochs", "config/learning_rate", "config/weight_decay"),
)
# What may differ, but not unnoticed.
NOTED = ("git_commit", "git_dirty", "versions/Python", "versions/Keras", "versions/CUDA", "config/measure_seconds")
NOTED_WITHIN_A_BACKEND = ("attention", "jit_compile", "config/use_wandb")


def conditions(run: Run) -> dict[str, str]:
    """Everything that has to agree, by name.

    Data in a file goes by the file's name, as the folder differs between devices; the counts tell the rest. TF32
    counts on a GPU alone: a CPU multiplies float32 in full, as a GPU does without TF32.
    """
    told = {path.rpartition("config/")[2]: _plain(run.get(f"what/{path}")) for path in MUST_AGREE}
    told["dataset"] = Path(_plain(run.get("what/config/dataset"))).name
    told["tf32"] = _plain(run.get("what/tf32") if run.get("what/is_gpu") else False)
    return told


def differences(a: Run, b: Run) -> str:
    """What keeps `a` from being compared with `b`: "batch_size 64 against 32"; empty if nothing does."""
    of_a, of_b = conditions(a), conditions(b)
    return ", ".join(f"{name} {of_a[name]} against {of_b[name]}" for name in of_a if of_a[name] != of_b[name])


def by_device(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[list[Run]]]:
    """The runs of each device, as sets of comparable runs, the largest set first."""
    devices: dict[tuple[str, str, str], list[list[Run]]] = {}
    for run in runs:
        sets = devices.setdefault(run.device, [])
        home = next((group for group in sets if not differences(run, group[0])), None)
        if home is None:
            sets.append([run])
        else:
            home.append(run)
    return {device: sorted(devices[device], key=len, reverse=True) for device in sorted(devices)}


def by_backend(runs: Sequence[Run], baseline: str | None) -> dict[str, list[Run]]:
    """The runs of each backend: the baseline first (the first by name, if it has no run here), then by name."""
    names = sorted({run.backend for run in runs}, key=lambda name: (name != baseline, name))
    return {name: [run for run in runs if run.backend == name] for name in names}


@dataclass(frozen=True)
class Metric:
    """A figure of the tables. `sources` are (path, mark): the first that was measured counts, and its mark is shown."""

    title: str
    unit: str
    sources: tuple[tuple[str, str], ...]
    scale: float = 1.0
    name: str = ""  # in a sentence; without it, the figure stands in the table only
    sentence: str = ""  # {a}, {ratio}, {b}
    is_share: bool = False  # in percent, compared by difference

    def show(self, value: float) -> str:
        return f"{value:.2f}" if self.is_share else _significant(value)


MIB = 2**-20
TRAINING = Metric(
    "training",
    "images/s",
    (("time/train_images_per_s", ""),),
    name="training throughput",
    sentence="{a} trained {ratio} as fast as {b}",
)
COMPILE = Metric(
    "compile",
    "s",
    (("time/compile_s", ""),),
    name="compile time",
    sentence="{a} took {ratio} the time of {b} to compile",
)
LATENCY = Metric(
    "one image p50",
    "ms",
    (("time/latency_ms/p50", ""),),
    name="latency of one image",
    sentence="{a} took {ratio} the time of {b} for one image",
)
MEMORY = Metric(
    "peak memory",
    "MiB",
    (("memory/train_peak_device_bytes", ""), ("memory/peak_rss_bytes", "RSS")),
    MIB,
    name="peak memory",
    sentence="{a} used {ratio} the memory of {b}",
)
ENERGY = Metric(
    "energy",
    "J/image",
    (("energy/accelerator/joules_per_image", ""), ("energy/cpu_package/joules_per_image", "CPU")),
    name="energy an image",
    sentence="{a} used {ratio} the energy of {b} for a training image",
)
ACCURACY = Metric(
    "test accuracy",
    "%",
    (("quality/test/test_accuracy", ""),),
    100.0,
    name="test accuracy",
    sentence="{a} reached a test accuracy {ratio} that of {b}",
    is_share=True,
)
SPEED = (
    TRAINING,
    Metric("step p50", "ms", (("time/step_ms/p50", ""),)),
    Metric("step p99", "ms", (("time/step_ms/p99", ""),)),
    COMPILE,
    Metric("evaluation", "images/s", (("time/evaluation_images_per_s", ""),)),
    LATENCY,
    Metric("inference", "images/s", (("time/inference_images_per_s", ""),)),
)
REST = (
    MEMORY,
    ENERGY,
    ACCURACY,
    Metric("top-5", "%", (("quality/test/test_top-5-accuracy", ""),), 100.0, is_share=True),
    Metric("best epoch after", "s", (("quality/best_epoch_s", ""),)),
)


def _significant(value: float) -> str:
    """Three significant digits, and no fraction of a number that has three before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


@dataclass(frozen=True)
class Figures:
    """What the repeats of one backend show of one metric; `values` is empty where none could be measured."""

    metric: Metric
    values: list[float]
    mark: str
    runs: int

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def cell(self) -> str:
        """`median (min–max)`, with the mark of its source and, if some run lacks it, of how many runs it is."""
        if not self.values:
            return NONE
        text = self.metric.show(self.median)
        if len(self.values) > 1:
            text += f" ({self.metric.show(min(self.values))}–{self.metric.show(max(self.values))})"
        missing = f"[{len(self.values)} of {self.runs}]" if len(self.values) < self.runs else ""
        return " ".join(filter(None, [text, self.mark, missing]))


def measure(metric: Metric, runs: Sequence[Run]) -> Figures:
    """The figures of `runs`, all from the first source that any of them has."""
    for path, mark in metric.sources:
        values = [value * metric.scale for run in runs if (value := run.number(path)) is not None]
        if values:
            return Figures(metric, values, mark, len(runs))
    return Figures(metric, [], "", len(runs))


@dataclass(frozen=True)
class Verdict:
    """How `a` stands to `b`: the ratio (or the difference in points) of their medians, and whether the spread bears it."""

    text: str
    supported: bool
    why: str

    def cell(self) -> str:
        return self.text if self.supported or self.text == NONE else f"({self.text})"


def judge(a: Figures, b: Figures, test_images: float | None) -> Verdict:
    """Compare two backends in one metric. Supported: at least two runs each, and ranges that do not overlap."""
    if not a.values or not b.values:
        return Verdict(NONE, False, "unavailable")
    if a.mark != b.mark:
        return Verdict(NONE, False, f"not the same thing: {_source(a)} against {_source(b)}")
    text = _share_difference(a, b) if a.metric.is_share else _ratio(a.median, b.median)
    counts = len(a.values), len(b.values)
    if min(counts) < 2:
        return Verdict(text, False, "measured in one run only")
    if min(a.values) <= max(b.values) and min(b.values) <= max(a.values):
        return Verdict(text, False, "ranges overlap")
    why = "ranges do not overlap, n = " + (
        f"{counts[0]} each" if counts[0] == counts[1] else "{} and {}".format(*counts)
    )
    if a.metric.is_share and 0.0 in (max(a.values) - min(a.values), max(b.values) - min(b.values)):
        return _beyond_the_test_set(a, b, text, why, test_images)
    return Verdict(text, True, why)


def _beyond_the_test_set(a: Figures, b: Figures, text: str, why: str, test_images: float | None) -> Verdict:
    """Repeats with one seed may be equal to the last digit, and then have no spread: the size of the test set is left.

    A share p of n images has a standard error of sqrt(p (1 - p) / n); a difference has to exceed two of them.
    """
    p = (a.median + b.median) / 200
    margin = 200 * math.sqrt(p * (1 - p) / test_images) if test_images else math.inf
    limit = f"{margin:.2f} points, two standard errors of {test_images:,.0f} test images" if test_images else "unknown"
    if abs(a.median - b.median) > margin:
        return Verdict(text, True, f"{why}; repeats are equal, and the difference exceeds {limit}")
    return Verdict(text, False, f"repeats are equal, so that the margin is that of the test set: {limit}")


def _source(figures: Figures) -> str:
    return {"": "the device's own", "RSS": "memory of the process (RSS)", "CPU": "the CPU package's"}[figures.mark]


def _ratio(a: float, b: float) -> str:
    if not b:  # a compile time of 0 s
        return NONE
    ratio = a / b
    is_close = 0.995 <= ratio < 1.005 and a != b  # 1.003×: no sentence shall say that 1.00× is a difference
    return (f"{ratio:.4f}" if is_close else _significant(ratio)) + "×"


def _share_difference(a: Figures, b: Figures) -> str:
    return f"{a.median - b.median:+.2f} points"


def statement(name: str, a: Figures, base: str, b: Figures, test_images: float | None) -> str:
    """One sentence on `name` against `base` in one metric; it claims a difference only where the spread supports it."""
    metric, verdict = a.metric, judge(a, b, test_images)
    if not a.values or not b.values:
        without = " and ".join(who for who, figures in ((base, b), (name, a)) if not figures.values)
        return f"{metric.name}: unavailable for {without}."
    if a.mark != b.mark:
        return f"{metric.name}: not compared, {verdict.why}."
    medians = f"median {metric.show(a.median)} against {metric.show(b.median)} {metric.unit}"
    if not verdict.supported:
        return f"{metric.name}: no difference between {name} and {base} that the spread supports ({medians}; {verdict.why})."
    if metric.is_share:
        size = f"{abs(a.median - b.median):.2f} points {'above' if a.median > b.median else 'below'}"
    elif verdict.text == NONE or min(a.median, b.median) < 0.01 * max(a.median, b.median):
        # A ratio to next to nothing, as the compile time of a backend that compiles nothing, tells less than the medians.
        return f"{metric.name}: {name} and {base} differ ({medians}; {verdict.why})."
    else:
        size = verdict.text
    return f"{metric.sentence.format(a=name, ratio=size, b=base)} ({medians}; {verdict.why})."


def statements(backends: dict[str, list[Run]]) -> list[str]:
    """What was found, each backend against the first."""
    (base, base_runs), *others = backends.items()
    if not others:
        return [f"Only {base} has results here: there is nothing to compare it with."]
    told = []
    for name, runs in others:
        if len(runs) == len(base_runs) == 1:
            told.append(f"{name} and {base}: one run each: no statement is supported; run with --repeats 3.")
            continue
        if min(len(runs), len(base_runs)) == 1:
            alone = name if len(runs) == 1 else base
            told.append(f"{name} and {base}: one run of {alone}: no statement is supported; run with --repeats 3.")
            continue
        test_images = base_runs[0].number("what/images/test")
        for metric in (TRAINING, COMPILE, LATENCY, MEMORY, ENERGY, ACCURACY):
            told.append(statement(name, measure(metric, runs), base, measure(metric, base_runs), test_images))
    return told


# --------------------------------------------------------------------------------------------------------------
# Report: Markdown and CSV
# --------------------------------------------------------------------------------------------------------------


def build_report(runs: Sequence[Run], failures: Sequence[dict], baseline: str | None = None) -> str:
    """The whole report as Markdown."""
    parts = ["# Keras backends compared"]
    devices = by_device(runs)
    for device, sets in devices.items():
        parts.append(f"## {_device_name(device)}")
        for i, group in enumerate(sets):
            parts += _set_report(group, sets, i, baseline)
    if len(devices) > 1:
        parts += ["## Across devices", *_cross_device(devices)]
    if runs:
        parts += ["## How to read this", READING]
    else:
        parts.append("No run has finished: there is nothing to compare.")
    if failures:
        parts += ["## Runs that failed", "\n".join(_failure_line(failure) for failure in failures)]
    return "\n\n".join(parts) + "\n"


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


def _device_name(device: tuple[str, str, str]) -> str:
    name, node, mode = device
    return f"{name}, node {node}" + (f", power mode {mode}" if mode != NONE else "")


def _failure_line(failure: dict) -> str:
    return f"- {failure.get('backend')}: {failure.get('reason')} (log: {failure.get('log')})"


def _set_report(group: list[Run], sets: list[list[Run]], i: int, baseline: str | None) -> list[str]:
    """The part of the report on one set of comparable runs: how its numbers came about, what was found, the tables."""
    backends = by_backend(group, baseline)
    parts = []
    if len(sets) > 1:
        parts.append(f"### Set {i + 1} of {len(sets)}: {', '.join(backends)}")
    for number, other in enumerate(sets[:i], start=1):
        names = ", ".join(by_backend(other, baseline))
        parts.append(f"Not compared with {names} (set {number}): {differences(group[0], other[0])}.")
    parts.append("\n".join(f"- {line}" for line in _provenance(group, backends)))
    parts.append("**What was found**")
    parts.append("\n".join(f"- {sentence}" for sentence in statements(backends)))
    parts.append(_table(backends, SPEED, with_mode=True))
    parts.append(_table(backends, REST))
    return parts


def _distinct(runs: Sequence[Run], path: str) -> str:
    return ", ".join(dict.fromkeys(_plain(run.get(path)) for run in runs))


def _provenance(group: list[Run], backends: dict[str, list[Run]]) -> list[str]:
    """How the numbers of a set came about, and what a reader should know before trusting them."""
    first = group[0]

    def of(path: str) -> str:
        return _plain(first.get(f"what/{path}"))

    def count(path: str) -> str:
        return NONE if (value := first.number(f"what/{path}")) is None else f"{value:,.0f}"

    device, node, mode = first.device
    packages = [f"{name} {_distinct(runs, f'what/versions/{_package(name)}')}" for name, runs in backends.items()]
    common = [
        f"{name} {_distinct(_with(name, group), f'what/versions/{name}')}" for name in ("Python", "Keras", "CUDA")
    ]
    commits = dict.fromkeys(_commit(run) for run in group)
    config = {name: of(f"config/{name}") for name in first.get("what/config") or {}}
    model = [f"{name} {config.get(name, NONE)}" for name in ("image_size", "patch_size", "projection_dim", "num_heads")]
    model += [f"{name} {config.get(name, NONE)}" for name in ("transformer_layers", "mlp_head_units")]
    images = ", ".join(f"{count(f'images/{part}')} {part}" for part in ("train", "validation", "test"))
    tf32 = f", TF32 {of('tf32')}" if first.get("what/is_gpu") else ""
    dates = sorted(_plain(run.get("what/started")) for run in group)
    lines = [
        f"Device: {device}; node {node}; power mode {mode}",
        f"Software: {', '.join([*common, *packages])}",
        f"Number format: {of('dtype_policy')}{tf32}",
        f"Model: {count('num_parameters')} parameters; {', '.join(model)}",
        f"Data: {conditions(first)['dataset']}; images: {images}; shape {of('image_shape')}, {of('num_classes')} classes",
        f"Training: batch {config.get('batch_size', NONE)}, {config.get('num_epochs', NONE)} epochs, learning rate "
        f"{config.get('learning_rate', NONE)}, weight decay {config.get('weight_decay', NONE)}, augmentation "
        f"{of('augmentation')}, seed {_distinct(group, 'what/config/seed')}",
        f"Code: {', '.join(commits)}",
        f"Runs: {len(group)} ({', '.join(f'{len(runs)} {name}' for name, runs in backends.items())}), "
        + (f"{dates[0]} to {dates[-1]}" if dates[0] != dates[-1] else dates[0]),
    ]
    return lines + _notes(group, backends)


def _with(name: str, runs: Sequence[Run]) -> Sequence[Run]:
    """The runs for which a version means something: a peer has no Keras."""
    return [run for run in runs if run.backend not in PEERS] if name == "Keras" else runs


def _commit(run: Run) -> str:
    commit = _plain(run.get("what/git_commit"))[:12]
    return ("commit " + commit if commit != NONE else "commit unknown") + (
        " with uncommitted changes" if run.get("what/git_dirty") else ""
    )


def _notes(group: list[Run], backends: dict[str, list[Run]]) -> list[str]:
    """What differs between runs that are compared all the same."""
    notes = []
    for path in NOTED:
        told = {name: _distinct(runs, f"what/{path}") for name, runs in backends.items()}
        meant = _with(path.rpartition("/")[2], group)
        if len({_plain(run.get(f"what/{path}")) for run in meant}) > 1:
            by_name = "; ".join(f"{name} {value}" for name, value in told.items())
            notes.append(f"Note: the runs differ in {path.rpartition('/')[2]}: {by_name}")
    for name, runs in backends.items():
        for path in (*NOTED_WITHIN_A_BACKEND, f"versions/{_package(name)}"):
            values = _distinct(runs, f"what/{path}")
            if len({_plain(run.get(f"what/{path}")) for run in runs}) > 1:
                notes.append(
                    f"Note: runs of {name} are put together that differ in {path.rpartition('/')[2]}: {values}"
                )
    return notes


def _table(backends: dict[str, list[Run]], metrics: Sequence[Metric], with_mode: bool = False) -> str:
    """A row a backend, then a row of ratios for each backend but the first."""
    head = ["backend", "n", *(["attention", "jit"] if with_mode else [])]
    rows = [head + [f"{metric.title}, {metric.unit}" for metric in metrics]]
    found = {name: [measure(metric, runs) for metric in metrics] for name, runs in backends.items()}
    for name, runs in backends.items():
        mode = [_distinct(runs, "what/attention"), _distinct(runs, "what/jit_compile")] if with_mode else []
        rows.append([name, str(len(runs)), *mode, *(figures.cell() for figures in found[name])])
    base, *others = found
    for name in others:
        test_images = backends[base][0].number("what/images/test")
        cells = [judge(a, b, test_images).cell() for a, b in zip(found[name], found[base], strict=True)]
        rows.append([f"{name} / {base}", *[""] * (len(head) - 1), *cells])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    """A table whose columns line up on a console as well."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def _cross_device(devices: dict[tuple[str, str, str], list[list[Run]]]) -> list[str]:
    """Training throughput on every device, and what may be said of one backend on two of them."""
    rows = [["device", "backend", "n", "number format", "batch", f"{TRAINING.title}, {TRAINING.unit}"]]
    entries = []  # (backend, device, its runs)
    for device, sets in devices.items():
        for group in sets:
            told = conditions(group[0])
            number_format = told["dtype_policy"] + ("+tf32" if told["tf32"] == "on" else "")
            for name, runs in by_backend(group, None).items():
                cell = measure(TRAINING, runs).cell()
                rows.append([_device_name(device), name, str(len(runs)), number_format, told["batch_size"], cell])
                entries.append((name, device, runs))
    sentences = [
        _across(name, device, runs, other_device, other_runs)
        for (name, device, runs), (other, other_device, other_runs) in itertools.combinations(entries, 2)
        if name == other and device != other_device
    ]
    return [
        _markdown(rows),
        "\n".join(f"- {sentence}" for sentence in sentences) or "No backend has run on two of them.",
    ]


def _across(name: str, device, runs: list[Run], other_device, other_runs: list[Run]) -> str:
    """One sentence on one backend on two devices."""
    here, there = _device_name(device), _device_name(other_device)
    if reason := differences(runs[0], other_runs[0]):
        return f"{name} on {here} is not compared with that on {there}: {reason}."
    a, b = measure(TRAINING, runs), measure(TRAINING, other_runs)
    if a.values and b.values and a.median < b.median:  # a factor above 1 reads more easily
        here, there, a, b = there, here, b, a
    verdict = judge(a, b, None)
    if not verdict.supported:
        return f"{name} on {here} and on {there}: no difference that the spread supports ({verdict.why})."
    return f"{name} on {here} trains {verdict.text} as fast as on {there} ({verdict.why})."


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """One row a run; the columns are the JSON's names joined by `/`, a list is JSON, and null is an empty cell."""
    rows = [{"file": run.path.name, **_flat(run.document)} for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(value: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = json.dumps(inner) if isinstance(inner, list) else inner
    return flat


# --------------------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which people with any of the usual colour-blindnesses tell apart.
COLOURS = {"jax": "#0072B2", "torch": "#D55E00", "tensorflow": "#009E73"}
COLOURS |= {"native-jax": "#56B4E9", "native-torch": "#E69F00"}
OTHER_COLOURS = ("#CC79A7", "#F0E442", "#000000")


def draw(path: Path, runs: Sequence[Run], baseline: str | None) -> None:
    """Draw the largest set of comparable runs, for a screen as narrow as a phone's. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = [group for groups in by_device(runs).values() for group in groups]
    group = max(sets, key=len)
    backends = by_backend(group, baseline)
    spare = itertools.cycle(OTHER_COLOURS)
    colours = {name: COLOURS.get(name) or next(spare) for name in backends}
    with plt.rc_context({"font.size": 14, "axes.titlesize": 15, "axes.spines.top": False, "axes.spines.right": False}):
        heights = [len(backends) + 1.2] * 4 + [5.5]
        figure, axes = plt.subplots(5, 1, figsize=(8, 14), layout="constrained", gridspec_kw={"height_ratios": heights})
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(_picture_title(group, sets, backends), fontsize=15)
        for axis, metric, title in zip(
            axes,
            (TRAINING, COMPILE, MEMORY, ENERGY),
            ("Training, images/s (more is better)", "Compile time, s", "Peak memory, MiB", "Energy, J/training image"),
            strict=False,
        ):
            _draw_bars(axis, metric, title, backends, colours)
        _draw_accuracy(axes[4], backends, colours)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _picture_title(group: list[Run], sets: list[list[Run]], backends: dict[str, list[Run]]) -> str:
    told = conditions(group[0])
    parameters = group[0].number("what/num_parameters")
    model = "unknown size" if parameters is None else f"{parameters:,.0f} parameters"
    n = ", ".join(f"{len(runs)} {name}" for name, runs in backends.items())
    parts = [
        *textwrap.wrap(_device_name(group[0].device), 60),
        f"ViT of {model}, batch {told['batch_size']}, {told['dtype_policy']}",
        f"n: {n}",
    ]
    if len(sets) > 1:
        parts.append(f"the largest of {len(sets)} sets of comparable runs")
    return "\n".join(parts)


def _draw_bars(axis, metric: Metric, title: str, backends: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """A bar for the median, a whisker from the least to the most, and a dot for every run."""
    found = {name: measure(metric, runs) for name, runs in backends.items()}
    labels = [f"{name}\n({figures.mark})" if figures.mark else name for name, figures in found.items()]
    axis.set_title(title, loc="left")
    axis.set_yticks(range(len(found)), labels)
    axis.set_ylim(len(found) - 0.4, -0.6)  # the first backend on top
    axis.tick_params(axis="y", length=0)
    if not any(figures.values for figures in found.values()):
        _unavailable(axis)
        return
    most = max(max(figures.values) for figures in found.values() if figures.values)
    axis.set_xlim(0, 1.3 * most or 1)  # room for the figure beside the whisker
    for row, (name, figures) in enumerate(found.items()):
        if not figures.values:
            axis.text(0.01, row, "unavailable", color="grey", va="center", transform=axis.get_yaxis_transform())
            continue
        low, high = min(figures.values), max(figures.values)
        axis.barh(row, figures.median, height=0.62, color=colours[name], alpha=0.45)
        axis.errorbar(
            figures.median,
            row,
            xerr=[[figures.median - low], [high - figures.median]],
            color="black",
            capsize=7,
            linewidth=1.5,
        )
        middle = (len(figures.values) - 1) / 2
        heights = [row + (i - middle) * 0.36 / max(middle * 2, 1) for i in range(len(figures.values))]
        axis.scatter(figures.values, heights, s=36, color=colours[name], edgecolor="black", linewidth=0.7, zorder=3)
        axis.text(high + 0.03 * most, row, metric.show(figures.median), va="center")


def _draw_accuracy(axis, backends: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """Validation accuracy against the seconds since the training began, a line a run."""
    axis.set_title("Validation accuracy, %, against training time, s", loc="left")
    drawn = False
    for (name, runs), style in zip(backends.items(), itertools.cycle(("o-", "s--", "^:"))):
        label = name
        for run in runs:
            points = _accuracy_over_time(run)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colours[name], label=label, markersize=6, alpha=0.8)
                label, drawn = None, True
    if not drawn:
        _unavailable(axis)
        axis.set_yticks([])
        return
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")


def _accuracy_over_time(run: Run) -> list[tuple[float, float]]:
    """(seconds, percent) at the end of every epoch that was validated."""
    epochs, ends = run.get("quality/epochs"), run.get("quality/epoch_end_s")
    if not isinstance(epochs, list) or not isinstance(ends, list):
        return []
    accuracies = [Run(run.path, epoch).number("val_accuracy") for epoch in epochs]
    pairs = zip(ends, accuracies, strict=False)  # what one of them lacks cannot be drawn
    return [(end, 100 * accuracy) for end, accuracy in pairs if end is not None and accuracy is not None]


def _unavailable(axis) -> None:
    axis.set_xticks([])
    axis.text(0.5, 0.5, "unavailable", color="grey", ha="center", va="center", transform=axis.transAxes)


# --------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------


def write_report(out: Path, runs: Sequence[Run], failures: Sequence[dict], baseline: str | None) -> None:
    """Write report.md, report.csv and report.png to `out`, and the Markdown to the console."""
    report = build_report(runs, failures, baseline)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(report, encoding="utf-8")
        if runs:
            write_csv(out / "report.csv", runs)
    except OSError as error:
        raise BenchmarkError(f"the report cannot be written to {out} ({error.strerror or error})") from error
    if runs:
        try:
            draw(out / "report.png", runs, baseline)
        except ModuleNotFoundError:
            _warn("report.png is not drawn: pip install matplotlib")
    print("\n" + report)
    print("written: " + ", ".join(str(path) for path in sorted(out.glob("report.*"))))


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose refusals are one line, without the usage."""

    def error(self, message: str):
        raise BenchmarkError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, checked, and the flags for vit.py, which stand behind `--`."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser(
        prog="benchmark.py",
        description="Run vit.py on several Keras backends, repeatedly, and compare them; or report on earlier runs.",
        epilog="Everything behind -- goes to vit.py unchanged (python vit.py --help). benchmark.py adds "
        f"{', '.join(OURS)}, and --no-use-wandb unless your flags say --use-wandb or --no-use-wandb: logging to W&B "
        "is part of no measurement.",
        usage="%(prog)s [options] [-- FLAGS FOR vit.py]\n       %(prog)s --report DIR [DIR ...] [--baseline NAME] [--out DIR]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="jax, torch, tensorflow (default: those that are installed), native-jax, native-torch",
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="runs of each backend (default: 3); words need 2 or more"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="backend that the others are compared with (default: the first)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results and report (default: benchmark-results/<UTC time>, with --report its first DIR); "
        "runs that are there already count in the report",
    )
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="DIR", help="run nothing; report on the results below DIR"
    )
    args = parser.parse_args(argv[:split])
    flags = argv[split + 1 :]
    if args.report:
        if flags or args.backends or args.repeats is not None:
            raise BenchmarkError("--report runs nothing: it goes with --baseline and --out only")
        return args, []
    _check_for_running(args)
    return args, _flags_for_vit(flags)


def _check_for_running(args: argparse.Namespace) -> None:
    """Fill in the defaults of a benchmark and refuse what cannot run."""
    args.repeats = 3 if args.repeats is None else args.repeats
    if args.repeats < 1:
        raise BenchmarkError(f"--repeats must be positive, not {args.repeats}")
    args.backends = list(dict.fromkeys(args.backends or filter(_is_installed, BACKENDS)))
    if not args.backends:
        raise BenchmarkError(f"no backend is installed: pip install one of {', '.join(BACKENDS)}")
    for name in args.backends:
        if name not in (*BACKENDS, *PEERS):
            raise BenchmarkError(f"--backends: {name!r} is none of {', '.join((*BACKENDS, *PEERS))}")
        for package in PEERS[name][1] if name in PEERS else [name]:
            if not _is_installed(package):
                raise BenchmarkError(f"--backends: {package} is not installed")
    args.baseline = args.baseline or args.backends[0]
    if args.baseline not in args.backends:
        raise BenchmarkError(f"--baseline: {args.baseline!r} is none of the backends {', '.join(args.backends)}")


def _is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it. A mere folder of that name cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _flags_for_vit(flags: list[str]) -> list[str]:
    """The user's flags, with W&B off unless they speak of it; refuse those that are set here."""
    names = [flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")]
    for name in names:
        if name in OURS:
            raise BenchmarkError(f"{name} is set by benchmark.py; use --backends and --out")
    return flags if {"--use-wandb", "--no-use-wandb"} & set(names) else [*flags, "--no-use-wandb"]


def report_on(args: argparse.Namespace) -> int:
    """Report on results that are there."""
    runs, failures = read_results(args.report), read_failures(args.report)
    if not runs:
        raise BenchmarkError(f"no results of vit.py below {', '.join(map(str, args.report))}")
    names = sorted({run.backend for run in runs})
    if args.baseline and args.baseline not in names:
        raise BenchmarkError(f"--baseline: {args.baseline!r} has no results; there are {', '.join(names)}")
    write_report(args.out or args.report[0], runs, failures, args.baseline)
    return 0


def benchmark(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run, then report; return the exit status."""
    out = args.out or Path("benchmark-results") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise BenchmarkError(f"--out: the folder {out} cannot be written ({error.strerror or error})") from error
    if {"jax", "native-jax"} & set(args.backends) and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _warn(
            "JAX_COMPILATION_CACHE_DIR is set: JAX may load what it compiled before, and its compile time say nothing"
        )
    signals = (signal.SIGINT, signal.SIGTERM)
    for signum in signals:
        signal.signal(signum, _on_signal)
    try:
        status = 0 if run_all(args.backends, args.repeats, flags, out) else 1
    except Stopped as stop:
        status = 128 + stop.signum
    for signum in signals:
        signal.signal(signum, signal.SIG_DFL)  # a second Ctrl-C, while the report is written, ends at once
    write_report(out, read_results([out]), read_failures([out]), args.baseline)
    return status


def main(argv: Sequence[str]) -> int:
    sys.stdout.reconfigure(errors="replace")  # a console that knows no × shows a ?
    try:
        args, flags = parse(argv)
        if args.report:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
            return report_on(args)
        return benchmark(args, flags)
    except BenchmarkError as error:
        print(f"benchmark.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
