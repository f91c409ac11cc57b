"""The results of runs, read from their files; and what a run is called in a report."""

import json
import math
import re
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from edgebench.record.results import SCHEMA_VERSION

NONE = "–"  # stands for a value that could not be measured; such a value is never a 0
UNREADABLE = (OSError, ValueError, RecursionError)  # what reading a broken JSON file may raise
BENCHMARK_FILE = "benchmark.json"  # beside the results: what benchmark.py varied, and which run belongs to which item
UNSTABLE_SPREAD = 1.5  # the longest epoch over the shortest, from which a run is called unstable
TITLES = {"jax": "JAX", "tensorflow": "TensorFlow", "native-jax": "native JAX", "native-torch": "native torch"}
TITLES |= {"litert": "LiteRT", "saved_model": "TF SavedModel"}
# What Markdown would take as markup. `_` within a word and `[` without a link after it mean nothing to it.
MARKUP = re.compile(r"[\\`*<>]|~~|](?=[(\[])|(?<!\w)_|_(?!\w)")


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"benchmark.py: warning: {' '.join(message.split())}", file=sys.stderr)


def plain(value: object) -> str:
    """Return text from a file as one line that Markdown and a console show as it is written."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return MARKUP.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def as_text(value: object) -> str:
    """Return a value from a file as the report shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ", ".join(plain(f"{name}={each}") for name, each in value.items()) or "none"
    return NONE if value is None else plain(value)


def finite(value: object) -> float | None:
    """Return a value from a file if it is a finite number, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond any float
        return None


class Device(NamedTuple):
    """Where a run ran. Two runs used the same device only if all three parts agree."""

    name: str
    node: str
    power_mode: str

    def __str__(self) -> str:
        mode = "" if self.power_mode == NONE else f", power mode {self.power_mode}"
        return f"{self.name}, node {self.node}{mode}"


@dataclass(frozen=True)
class Run:
    """One results file. A path into it is written `time/step_ms/p50`."""

    path: Path
    document: dict
    varied: tuple[str, ...] = ()  # flags that benchmark.py varied between its backends, which the name then shows

    def get(self, path: str):
        """Return the value at `path`, or None if it is null or absent."""
        value = self.document
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, path: str) -> float | None:
        """Return the value at `path` if it is a finite number, else None."""
        return finite(self.get(path))

    def text(self, path: str) -> str:
        """Return the value at `path` as the report shows it."""
        return as_text(self.get(path))

    @property
    def backend(self) -> str:
        return self.document["what"]["backend"]

    @property
    def is_deployed(self) -> bool:
        """Whether this is a file that export.py has written, which is not trained."""
        return isinstance(self.get("what/deployed"), dict)

    @property
    def is_compiled(self) -> bool:
        """Whether the step was compiled. torch that was asked to compile and could not has run eagerly."""
        return self.get("what/jit_compile") is True and not self.get("what/jit_failure")

    @property
    def name(self) -> str:
        """The backend with its mode and the flags that were varied: "JAX (compiled, dtype_policy mixed_bfloat16)".

        A runtime has what it computes with instead of a mode: "onnxruntime (CPU)", "onnxruntime (int8)".
        """
        modes = ("graph", "XLA") if self.backend == "tensorflow" else ("eager", "compiled")
        mode = modes[self.is_compiled]
        if self.is_deployed:
            mode = "int8" if self.get("what/deployed/int8") else self.text("what/deployed/processor")
        flags = [f"{field} {self.text(f'what/config/{field}')}" for field in self.varied]
        return f"{title(self.backend)} ({', '.join([mode, *flags])})"

    @property
    def inference_batch(self) -> str:
        """Images at a time for which inference_images_per_s holds, if they are not as many as in the training."""
        whole, parts = (self.number(f"what/config/{name}") for name in ("batch_size", "gradient_accumulation_steps"))
        batch = self.number("what/deployed/batch_size")
        is_alike = None in (batch, whole, parts) or batch * parts == whole
        return "as in the training" if is_alike else f"{batch:g}"

    @property
    def seed(self) -> str:
        return self.text("what/config/seed")

    @property
    def device(self) -> Device:
        return Device(*(self.text(f"what/{name}") for name in ("device", "node", "power_mode")))

    @property
    def commit(self) -> str:
        """The version of the code that ran, as in "commit 0123456789ab with uncommitted changes"."""
        commit = self.text("what/git_commit")[:12]
        changes = " with uncommitted changes" if self.get("what/git_dirty") else ""
        return f"commit {'unknown' if commit == NONE else commit}{changes}"

    @property
    def instabilities(self) -> list[str]:
        """Why the speed of this run is not to be trusted; empty for a steady run on a quiet machine."""
        spread = self.number("time/epoch_spread")
        reasons = []
        if spread is not None and spread > UNSTABLE_SPREAD:
            reasons.append(f"its longest epoch took {spread:.2f}× as long as its shortest")
        problems = self.get("load/problems")
        return [*reasons, *map(plain, problems if isinstance(problems, list) else [])]

    def reason_for_missing(self, path: str) -> str:
        """Say why there is no value at `path`, in the words of the run itself; empty if it does not say."""
        reasons = self.get("missing")
        parts = path.split("/")
        names = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        known = [reasons[name] for name in names if isinstance(reasons, dict) and name in reasons]
        return plain(known[0]) if known else ""


def title(backend: str) -> str:
    """Return a backend as people write it."""
    return TITLES.get(backend) or plain(backend)


def distinct(runs: Iterable[Run], path: str) -> str:
    """Return the values at `path` in all `runs`, each once, separated by commas."""
    return ", ".join(dict.fromkeys(run.text(path) for run in runs))


def read_results(folders: Sequence[Path]) -> list[Run]:
    """Read every complete run below `folders`, some of which may be files, oldest first. Warn about what does not count."""
    runs: dict[str, Run] = {}  # by the text of their files
    for path in _files(folders, "*.json"):
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text)
        except UNREADABLE as error:
            warn(f"{path} cannot be read ({error})")
            continue
        if not isinstance(document, dict) or not isinstance(document.get("what"), dict):
            continue  # another kind of file
        if (version := document.get("schema_version")) != SCHEMA_VERSION:
            warn(f"{path} has schema version {version!r}; this program reads {SCHEMA_VERSION}")
        elif document.get("status") != "complete":
            warn(f"{path} is of a run that is not complete ({document.get('failure')})")
        elif not isinstance(document["what"].get("backend"), str):
            warn(f"{path} names no backend")
        elif text in runs:  # counting a copy as another run would narrow the spread
            warn(f"{path} is a copy of {runs[text].path} and counts once")
        else:
            runs[text] = Run(path, document)
    benchmarks = read_benchmarks(folders)
    varied = tuple(dict.fromkeys(field for benchmark in benchmarks for field in benchmark["varied"]))
    complete = [replace(run, varied=varied) for run in runs.values()]
    return sorted(complete, key=lambda run: (run.text("what/started"), run.path))


def read_new_run(folder: Path, known: Container[Path] = ()) -> Run | None:
    """Read the first results file in `folder` that is not among the `known` files; return None if there is none."""
    for path in sorted(folder.glob("*.json")):
        document = read_object(path)
        if path not in known and isinstance(document.get("what"), dict):
            return Run(path, document)
    return None


def read_benchmarks(folders: Iterable[Path]) -> list[dict]:
    """Read every benchmark.json below `folders`."""
    return [read_benchmark(path) for path in _files(folders, BENCHMARK_FILE)]


def read_benchmark(path: Path) -> dict:
    """Read a benchmark.json: the flags `varied`, the item of --backends of each file in `runs`, and the `baseline`."""
    document = read_object(path)
    varied, runs, baseline = (document.get(name) for name in ("varied", "runs", "baseline"))
    fields = [field for field in varied if isinstance(field, str)] if isinstance(varied, list) else []
    items = {str(file): str(item) for file, item in runs.items()} if isinstance(runs, dict) else {}
    return {"varied": fields, "runs": items, "baseline": baseline if isinstance(baseline, str) else None}


def read_failures(folders: Iterable[Path]) -> list[dict]:
    """Read the failed runs from every failures.json below `folders`."""
    return [failure for path in _files(folders, "failures.json") for failure in failures_in(path)]


def failures_in(path: Path) -> list[dict]:
    """Read the failed runs from one failures.json; none if it is absent or broken."""
    failures = read_object(path).get("failures")
    return [failure for failure in failures if isinstance(failure, dict)] if isinstance(failures, list) else []


def read_object(path: Path) -> dict:
    """Return the JSON object in a file; empty if there is none or the file cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return document if isinstance(document, dict) else {}


def _files(places: Iterable[Path], pattern: str) -> list[Path]:
    """Return the files below folders, and beside a single results file the benchmark.json that says what was varied."""
    files: set[Path] = set()
    for place in places:
        if not place.is_file():
            files.update(place.rglob(pattern))
        elif pattern == "*.json":
            files.add(place)
        elif pattern == BENCHMARK_FILE:
            files.update(place.parent.glob(pattern))
    return sorted({path.resolve() for path in files})
