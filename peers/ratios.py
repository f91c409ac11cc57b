"""What does Keras cost against code written by hand, and what does each fast path bring? One command, one table.

    python peers/ratios.py                       # the rows for the CPU, and those for a GPU where there is one
    python peers/ratios.py --devices cpu --runs 3
    python peers/ratios.py --small               # a small model, to see in minutes that everything runs
    python peers/ratios.py --rows jax-by-hand    # some rows only, by the names that --help lists
    python peers/ratios.py --out DIR             # more runs, where DIR has some
    python peers/ratios.py --report DIR          # no new runs: the table of what is there

The two sides of a row (a backend or a peer, with flags) live at the same time and take turns: while one trains an epoch
the other one is stopped, and who begins changes from epoch to epoch. So a machine whose speed drifts, as most do, slows
both. A pair is one epoch of each, one right after the other; a row's ratio is the median of its pairs' ratios, and the
quartiles of these say how far to trust it. The first two epochs do not count: the first compiles and then gives its memory
back, which the second gets anew. The images are random: they have CIFAR-100's shape, and nothing is learned from them.

Leave the machine alone while it measures. Exit status: 0 a table is written; 2 wrong input; 130 or 143 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np

from edgebench.cli import ExperimentError, Interrupted, is_installed, require
from edgebench.compare import items, launch
from edgebench.compare.metrics import format_number
from edgebench.compare.runs import NONE, Run, distinct, read_new_run
from edgebench.compare.tables import markdown_table

TURNS = items.ROOT / "peers" / "turns.py"
SMALL = "--image-size 32 --patch-size 8 --projection-dim 32 --transformer-layers 2 --mlp-head-units 128"
HELP_RUNS = 10
WARM_UP = 2  # epochs that do not count: see above
NOT_RUN = "open: not measured"


@dataclass(frozen=True)
class Side:
    """A backend or a peer with flags."""

    backend: str
    flags: str = ""

    def __str__(self) -> str:
        return f"{self.backend} {self.flags}".strip()


@dataclass(frozen=True)
class Row:
    """A row of the table: the speed of `a` relative to `b`."""

    name: str  # of its folder
    description: str
    bar: str
    a: Side
    b: Side


@dataclass(frozen=True)
class Suite:
    """The rows of a kind of device, and the epochs that are run for them."""

    device: str
    batch_size: int
    steps: int
    rows: tuple[Row, ...]


CPU = Suite(
    "cpu",
    batch_size=64,
    steps=4,
    rows=(
        # Keras does not compile its own augmentation on JAX, nor the model around it; vit.py does.
        Row(
            "jax-stock-as-keras",
            "JAX: fused against stock augmentation as Keras runs it",
            "≥ 1.6×",
            Side("jax"),
            Side("jax", "--augmentation stock --jit off"),
        ),
        Row(
            "jax-stock",
            "JAX: fused against stock augmentation, both compiled",
            "≥ 1.6×",
            Side("jax"),
            Side("jax", "--augmentation stock"),
        ),
        Row(
            "torch-eager",
            "torch: fused and compiled against stock and eager",
            "≥ 1.4×",
            Side("torch", "--jit on"),
            Side("torch", "--jit off --augmentation stock"),
        ),
        Row("jax-by-hand", "Keras on JAX against JAX by hand", "≥ 0.97×", Side("jax"), Side("native-jax")),
        Row(
            "torch-by-hand",
            "Keras on torch against torch by hand, both compiled",
            "≥ 0.97×",
            Side("torch", "--jit on"),
            Side("native-torch", "--jit on"),
        ),
    ),
)


def _gpu_rows() -> tuple[Row, ...]:
    rows = []
    for label, flags in (
        ("float32+TF32", "--dtype-policy float32 --tf32"),
        ("bfloat16", "--dtype-policy mixed_bfloat16"),
    ):
        torch, by_hand = Side("torch", f"{flags} --jit on"), Side("native-torch", f"{flags} --jit on")
        rows += [
            Row(
                f"jax-by-hand-{label}",
                f"Keras on JAX against JAX by hand, {label}",
                "≥ 0.95×",
                Side("jax", flags),
                Side("native-jax", flags),
            ),
            Row(f"torch-by-hand-{label}", f"Keras on torch against torch by hand, {label}", "≥ 0.95×", torch, by_hand),
            Row(
                f"torch-eager-{label}",
                f"Keras on torch: compiled against eager, {label}",
                "≥ 2×",
                torch,
                Side("torch", f"{flags} --jit off"),
            ),
        ]
    return tuple(rows)


GPU = Suite("gpu", batch_size=256, steps=175, rows=_gpu_rows())
MEMORY_ROW, MEMORY_BAR = "torch-by-hand-float32+TF32", "≤ 5 GB"


# --------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------


def has_gpu(package: str) -> bool:
    """Whether the backend of this name sees a GPU, asked in a process of its own, which lets go of it again."""
    code = {
        "jax": "import jax; assert any(device.platform == 'gpu' for device in jax.devices())",
        "torch": "import torch; assert torch.cuda.is_available()",
    }[package]
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def write_images(path: Path, batch_size: int, steps: int) -> None:
    """Whole steps of random training images, and a batch each for validation and test."""
    rng, count = np.random.default_rng(0), batch_size * (steps + 1)
    arrays = {"x_train": rng.integers(0, 256, (count, 32, 32, 3), np.uint8), "y_train": np.arange(count) % 100}
    np.savez(path, **arrays, x_test=arrays["x_train"][:batch_size], y_test=arrays["y_train"][:batch_size])


class Turns:
    """A process of peers/turns.py that runs an epoch at each `go_on` and leaves its files in `folder`."""

    def __init__(self, side: Side, device: str, flags: Sequence[str], folder: Path):
        folder.mkdir(parents=True)
        self.side, self.folder, self.log = side, folder, folder / "logs" / "run.log"
        self.log.parent.mkdir()
        package = items.packages_of(side.backend)[0]
        environment = {**os.environ, "KERAS_BACKEND": package, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"} if device == "cpu" else {}
        own_flags = ["--keras-backend", package, "--device", device, "--results-dir", str(folder)]
        own_flags += ["--checkpoint-path", str(folder / "best.weights.h5"), *side.flags.split()]
        with self.log.open("wb") as stdout, launch.stderr_log(self.log).open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(TURNS), side.backend, *flags, *own_flags],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    def wait(self) -> None:
        """Wait until the process has stopped itself, or has ended."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)

    def go_on(self) -> float:
        """Let it continue for an epoch, or to its end after the last one; return the seconds that this took."""
        began = time.perf_counter()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.wait()
        return time.perf_counter() - began

    def failure(self) -> str | None:
        """Why the process has ended without a result, if it has."""
        if self.process.returncode is None:
            return None
        if self.process.returncode:
            return launch.failure_reason(self.process.returncode, self.log)
        return None if read_new_run(self.folder) else "ended well, but left no results file"

    def end(self) -> None:
        """End the process, if it runs, and remove all that it left but results and logs."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        for path in self.folder.glob("best.*"):
            path.unlink()


def run_pair(row: Row, device: str, flags: Sequence[str], epochs: int, folder: Path) -> str | None:
    """Run both sides of a row, an epoch in turn, into folder/a and folder/b; return why there is no pair, or None."""
    with contextlib.ExitStack() as cleanup:
        sides = []
        for name, side in (("a", row.a), ("b", row.b)):
            sides.append(Turns(side, device, flags, folder / name))
            cleanup.callback(sides[-1].end)
            sides[-1].wait()  # for the end of its first epoch, in which it has compiled
            if failure := sides[-1].failure():
                return f"{side}: {failure}"
        a, b = sides
        for side in sides:
            for _ in range(WARM_UP - 1):
                side.go_on()
        wall_s: dict[str, list[float]] = {"a": [], "b": []}
        for epoch in range(epochs):
            for name, side in (("a", a), ("b", b)) if epoch % 2 == 0 else (("b", b), ("a", a)):
                wall_s[name].append(side.go_on())
        for side in sides:
            side.go_on()
            if failure := side.failure():
                return f"{side.side}: {failure}"
        (folder / "turns.json").write_text(json.dumps(wall_s))
    return None


def run_suite(suite: Suite, args: argparse.Namespace, out: Path) -> None:
    """Run every row, into out/DEVICE/ROW/NUMBER/{a,b}; runs that are there already stay."""
    steps, batch_size = args.steps or suite.steps, suite.batch_size
    images = out / f"{suite.device}-images.npz"
    write_images(images, batch_size, steps)
    flags = f"--batch-size {batch_size} --validation-split {1 / (steps + 1)} "
    flags += f"--num-epochs {WARM_UP + args.epochs} --measure-seconds 0 --no-compile-cache --no-use-wandb "
    flags += SMALL if args.small else ""
    try:
        for number in range(1, args.runs + 1):
            for row in suite.rows:
                if args.rows and row.name not in args.rows:
                    continue
                before = max((int(path.name) for path in out.glob(f"{suite.device}/{row.name}/*")), default=0)
                folder, began = out / suite.device / row.name / f"{before + 1:02}", time.perf_counter()
                failure = run_pair(row, suite.device, ["--dataset", str(images), *flags.split()], args.epochs, folder)
                outcome = f"failed: {failure}" if failure else row_cells(row, [read_pair(folder)])[0]
                seconds = time.perf_counter() - began
                print(
                    f"[{suite.device} {number}/{args.runs}] {row.description}: {outcome}, {seconds:.0f} s", flush=True
                )
    finally:
        images.unlink()


def measure_help(out: Path) -> None:
    """Write the seconds of `python vit.py --help` to out/help.json."""
    seconds = []
    for _ in range(HELP_RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, str(items.VIT), "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    (out / "help.json").write_text(json.dumps(seconds))


# --------------------------------------------------------------------------------------------------------------
# Table
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two runs that took turns, and the seconds of their turns: whole epochs, with validation and files."""

    a: Run
    b: Run
    turns_s: dict[str, list[float]]

    def train_s(self, name: str) -> list[float]:
        """Seconds of the training part of every epoch that counts: the last ones, as many as the turns that were timed."""
        return getattr(self, name).get("time/epoch_s")[-len(self.turns_s[name]) :]

    def images(self) -> int:
        return self.a.get("what/images/train")


def read_pair(folder: Path) -> Pair | None:
    """The pair in a folder; None where one side has failed or was stopped."""
    runs = [read_new_run(folder / name) for name in ("a", "b")]
    turns = folder / "turns.json"
    return Pair(*runs, json.loads(turns.read_text())) if None not in runs and turns.exists() else None


def read_suite(suite: Suite, out: Path) -> dict[str, list[Pair]]:
    """The pairs that have been measured, by the row's name."""
    found = {}
    for row in suite.rows:
        pairs = [read_pair(folder) for folder in sorted(out.glob(f"{suite.device}/{row.name}/*"))]
        found[row.name] = [pair for pair in pairs if pair is not None]
    return found


def row_cells(row: Row, pairs: Sequence[Pair]) -> list[str]:
    """Ratio, images/s of both, seconds of an epoch beside its training, number of epochs."""
    rates = {name: [pair.images() / s for pair in pairs for s in pair.train_s(name)] for name in ("a", "b")}
    if not rates["a"]:
        return [NOT_RUN, NONE, NONE, "0"]
    ratios = [x / y for x, y in zip(rates["a"], rates["b"], strict=True)]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    a, b = statistics.median(rates["a"]), statistics.median(rates["b"])
    rest = [
        statistics.median(
            turn - train for pair in pairs for turn, train in zip(pair.turns_s[name], pair.train_s(name), strict=True)
        )
        for name in ("a", "b")
    ]
    return [
        f"{middle:.2f}× ({low:.2f}–{high:.2f})",
        f"{format_number(a)} / {format_number(b)}",
        f"{rest[0]:.1f} / {rest[1]:.1f}",
        f"{len(ratios)} in {len(pairs)} {'run' if len(pairs) == 1 else 'runs'}",
    ]


def memory_row(pairs: Sequence[Pair]) -> list[str]:
    peaks = [peak / 1e9 for pair in pairs if (peak := pair.a.number("memory/train_peak_device_bytes"))]
    cell = f"{max(peaks):.2f} GB at most" if peaks else NOT_RUN
    name = f"GPU: peak memory of training, torch compiled, batch {GPU.batch_size}"
    return [name, MEMORY_BAR, cell, NONE, NONE, f"{len(peaks)} runs"]


def help_row(out: Path) -> list[str]:
    path = out / "help.json"
    seconds = json.loads(path.read_text()) if path.exists() else []
    cell = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})" if seconds else NOT_RUN
    return ["`python vit.py --help`", "< 0.5 s", cell, NONE, NONE, f"{len(seconds)} runs"]


def side_rows(suite: Suite, found: dict[str, list[Pair]]) -> list[list[str]]:
    """Every side with the implementations that it ran."""
    runs: dict[Side, list[Run]] = {}
    for row in suite.rows:
        for pair in found[row.name]:
            runs.setdefault(row.a, []).append(pair.a)
            runs.setdefault(row.b, []).append(pair.b)
    paths = ("attention", "jit_compile", "augmentation", "dtype_policy", "tf32")
    return [[str(side), *(distinct(side_runs, f"what/{path}") for path in paths)] for side, side_runs in runs.items()]


def build_table(out: Path) -> str:
    """The table as Markdown, and below it what ran where."""
    found = {suite.device: read_suite(suite, out) for suite in (CPU, GPU)}
    rest = "rest of an epoch (validation, files), s"
    rows = [["what", "bar", "median ratio of the pairs (quartiles)", "images/s", rest, "n"]]
    for suite in (CPU, GPU):
        for row in suite.rows:
            name = f"{suite.device.upper()}: {row.description}"
            rows.append([name, row.bar, *row_cells(row, found[suite.device][row.name])])
    rows += [memory_row(found["gpu"][MEMORY_ROW]), help_row(out)]
    parts = ["# Ratios", markdown_table(rows)]
    for suite in (CPU, GPU):
        pairs = [pair for row_pairs in found[suite.device].values() for pair in row_pairs]
        if not pairs:
            continue
        parts.append(f"## {suite.device.upper()}: what ran")
        parts.append("\n".join(f"- {line}" for line in provenance(pairs)))
        columns = ["side", "attention", "jit", "augmentation", "number format", "TF32"]
        parts.append(markdown_table([columns, *side_rows(suite, found[suite.device])]))
    return "\n\n".join(parts) + "\n"


def provenance(pairs: Sequence[Pair]) -> list[str]:
    runs = [run for pair in pairs for run in (pair.a, pair.b)]
    first = runs[0]
    names = dict.fromkeys(name for run in runs for name in run.get("what/versions"))
    versions = {name: {run.get(f"what/versions/{name}") for run in runs} - {None} for name in names}
    software = [f"{name} {' and '.join(sorted(map(str, values)))}" for name, values in versions.items() if values]
    images = ", ".join(dict.fromkeys(f"{pair.images():,}" for pair in pairs))
    return [
        f"Machine: {', '.join(dict.fromkeys(str(run.device) for run in runs))}",
        f"Software: {', '.join(software)}; {', '.join(dict.fromkeys(run.commit for run in runs))}",
        f"Model: {first.number('what/num_parameters'):,.0f} parameters, batch {first.get('what/config/batch_size')}; "
        f"epochs of {images} random images; both sides take turns, and the first epochs of each do not count",
    ]


# --------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = launch.OneLineParser(prog="ratios.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--devices", nargs="+", choices=("cpu", "gpu"), default=["cpu", "gpu"], help="default: both")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="pairs of processes a row (default: 2)")
    names = [row.name for suite in (CPU, GPU) for row in suite.rows]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="epochs that count in a run (default: 8)")
    default = f"steps an epoch (default: {CPU.steps} on a CPU, {GPU.steps} on a GPU)"
    parser.add_argument("--steps", type=int, metavar="N", help=default)
    parser.add_argument("--small", action="store_true", help="a small model instead of vit.py's default one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: benchmark-results/ratios-<UTC time>)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run nothing; make the table of what is in DIR")
    args = parser.parse_args(argv)
    for name in ("runs", "epochs", "steps"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} must be positive, not {value}")
    require(args.report is None or args.report.is_dir(), f"--report: there is no folder {args.report}")
    for package in ("jax", "torch", "optax"):
        require(args.report is not None or is_installed(package), f"{package} is not installed")
    return args


def measure(args: argparse.Namespace, out: Path) -> None:
    print(
        f"load average before the first run: {os.getloadavg()[0]:.2f}; anything else that runs here spoils the figures"
    )
    measure_help(out)
    if "cpu" in args.devices:
        run_suite(CPU, args, out)
    if "gpu" in args.devices:
        missing = [package for package in ("jax", "torch") if not has_gpu(package)]
        if missing:
            print(f"no GPU for {' and '.join(missing)}: those rows stay open")
        else:
            run_suite(GPU, args, out)


def main(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        new_folder = Path("benchmark-results") / f"ratios-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        out = args.report or args.out or new_folder
        status = 0
        if args.report:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        else:
            out.mkdir(parents=True, exist_ok=True)
            try:
                with launch.interruptible():
                    measure(args, out)
            except Interrupted as stop:
                status = stop.exit_status
        table = build_table(out)
        (out / "ratios.md").write_text(table, encoding="utf-8")
    except ExperimentError as error:
        print(f"ratios.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"\n{table}\nwritten: {out / 'ratios.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
