"""The results of runs, read from their files and sorted into sets that may be compared."""

import json
import math
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SCHEMA_VERSION = 2
NONE = "–"  # stands for a value that could not be measured; such a value is never a 0
UNREADABLE = (OSError, ValueError, RecursionError)  # what reading a broken JSON file may raise
# Runs are compared only if these agree. `attention` and `jit_compile` are not among them: they are the backend's
# choice, hence part of what is compared.
MUST_AGREE = (
    *("dtype_policy", "augmentation", "image_shape", "num_classes", "num_parameters"),
    *("images/train", "images/validation", "images/test", "config/validation_split"),
    *("config/image_size", "config/patch_size", "config/projection_dim", "config/num_heads"),
    *("config/transformer_layers", "config/transformer_units", "config/mlp_head_units"),
    *("config/batch_size", "micro_batches", "config/num_epochs", "config/learning_rate", "config/weight_decay"),
)
# These may differ, and the report notes it.
NOTED = ("git_commit", "git_dirty", "versions/Python", "versions/Keras", "versions/CUDA", "config/measure_seconds")
NOTED_WITHIN_A_BACKEND = ("attention", "jit_compile", "config/use_wandb")


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"benchmark.py: warning: {message}", file=sys.stderr)


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

    def get(self, path: str):
        """Return the value at `path`, or None if it is null or absent."""
        value = self.document
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, path: str) -> float | None:
        """Return the value at `path` if it is a finite number, else None."""
        value = self.get(path)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None

    def text(self, path: str) -> str:
        """Return the value at `path` as the report shows it."""
        value = self.get(path)
        if isinstance(value, bool):
            return "on" if value else "off"
        return NONE if value is None else str(value)

    @property
    def backend(self) -> str:
        return self.document["what"]["backend"]

    @property
    def device(self) -> Device:
        return Device(*(self.text(f"what/{name}") for name in ("device", "node", "power_mode")))

    @property
    def commit(self) -> str:
        """The version of the code that ran, as in "commit 0123456789ab with uncommitted changes"."""
        commit = self.text("what/git_commit")[:12]
        changes = " with uncommitted changes" if self.get("what/git_dirty") else ""
        return f"commit {'unknown' if commit == NONE else commit}{changes}"


def distinct(runs: Iterable[Run], path: str) -> str:
    """Return the values at `path` in all `runs`, each once, separated by commas."""
    return ", ".join(dict.fromkeys(run.text(path) for run in runs))


def read_results(folders: Iterable[Path]) -> list[Run]:
    """Read every complete run below `folders`, oldest first. Warn about results that do not count."""
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
    return sorted(runs.values(), key=lambda run: (run.text("what/started"), run.path))


def read_new_run(folder: Path, known: Container[Path] = ()) -> Run | None:
    """Read the first results file in `folder` that is not among the `known` files; return None if there is none."""
    for path in sorted(folder.glob("*.json")):
        document = _read_object(path)
        if path not in known and isinstance(document.get("what"), dict):
            return Run(path, document)
    return None


def read_failures(folders: Iterable[Path]) -> list[dict]:
    """Read the failed runs from every failures.json below `folders`."""
    return [failure for path in _files(folders, "failures.json") for failure in failures_in(path)]


def failures_in(path: Path) -> list[dict]:
    """Read the failed runs from one failures.json; none if it is absent or broken."""
    failures = _read_object(path).get("failures")
    return [failure for failure in failures or [] if isinstance(failure, dict)]


def _files(folders: Iterable[Path], pattern: str) -> list[Path]:
    return sorted({path.resolve() for folder in folders for path in folder.rglob(pattern)})


def _read_object(path: Path) -> dict:
    """Return the JSON object in a file; empty if there is none or the file cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return document if isinstance(document, dict) else {}


def conditions(run: Run) -> dict[str, str]:
    """Return everything that has to agree, by name.

    A data file counts by its name, because its folder differs between devices. TF32 counts on GPUs only: a CPU
    multiplies float32 in full precision, as a GPU does without TF32.
    """
    values = {path.removeprefix("config/"): run.text(f"what/{path}") for path in MUST_AGREE}
    values["dataset"] = Path(run.text("what/config/dataset")).name
    values["tf32"] = run.text("what/tf32") if run.get("what/is_gpu") else "off"
    return values


def differences(a: Run, b: Run) -> str:
    """Say what forbids a comparison, as in "batch_size 64 against 32"; empty if nothing does."""
    a_values, b_values = conditions(a), conditions(b)
    names = [name for name in a_values if a_values[name] != b_values[name]]
    return ", ".join(f"{name} {a_values[name]} against {b_values[name]}" for name in names)


def by_device(runs: Sequence[Run]) -> dict[Device, list[list[Run]]]:
    """Sort the runs of each device into sets of comparable runs, the largest set first."""
    devices: dict[Device, dict[tuple, list[Run]]] = {}
    for run in runs:
        sets = devices.setdefault(run.device, {})
        sets.setdefault(tuple(conditions(run).items()), []).append(run)
    return {device: sorted(devices[device].values(), key=len, reverse=True) for device in sorted(devices)}


def by_backend(runs: Sequence[Run], baseline: str | None) -> dict[str, list[Run]]:
    """Sort the runs by backend: the baseline first, if it has runs, then by name."""
    names = sorted({run.backend for run in runs}, key=lambda name: (name != baseline, name))
    return {name: [run for run in runs if run.backend == name] for name in names}
