"""Runs of vit.py and of the hand-written peers, each in a process of its own."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from edgebench.cli import ExperimentError, Interrupted, one_line
from edgebench.compare.items import VIT, Item, varied_fields
from edgebench.compare.runs import BENCHMARK_FILE, Run, failures_in, read_benchmark, read_new_run, warn
from edgebench.files import replacing

STOP_S = 10.0  # seconds that a run has to end after SIGTERM


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that reports wrong input in one line, without the usage."""

    def error(self, message: str):
        takes_flags = self.prog == "benchmark.py" and message.startswith("unrecognized arguments")
        hint = "; flags for vit.py come after --" if takes_flags else ""
        raise ExperimentError(f"{message}{hint} (see --help)")


def folder(text: str) -> Path:
    """Return the folder that an argument names: a shell leaves the ~ of `--out=~/x` as it is."""
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGINT and SIGTERM inside the block. After it, either of them ends the process at once."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame) -> None:
        raise Interrupted(number)

    for number in signals:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def check_flags(items: Sequence[Item], flags: Sequence[str]) -> None:
    """Raise ExperimentError for flags that vit.py refuses, before anything runs. What else may fail is left to the runs."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    prefix = "vit.py: error: "
    for item in items:
        command = [sys.executable, str(VIT), *flags, *item.command[1:], "--keras-backend", item.package, "--check"]
        checked = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        errors = [line for line in checked.stderr.splitlines() if line.startswith(prefix)]
        if errors:
            raise ExperimentError(f"flags for vit.py: {errors[0].removeprefix(prefix)}")


def alternating(items: Sequence[Item], repeats: int) -> list[tuple[int, Item]]:
    """Return (round, item) in the order of the runs, reversed from round to round: A B, B A, A B."""
    rounds = (items, items[::-1])
    return [(repeat, item) for repeat in range(repeats) for item in rounds[repeat % 2]]


def run_all(items: Sequence[Item], repeats: int, seed: int, flags: Sequence[str], out: Path, baseline: str) -> int:
    """Run everything and return how many runs succeeded. A failure is recorded in `out`; the next run starts anyway.

    All runs of a round have the same seed, and every round another one. An item has compile caches of its own, empty at
    first: its first run compiles, the later ones load.
    """
    order = alternating(items, repeats)
    succeeded = 0
    _record_benchmark(out, items, baseline)
    with tempfile.TemporaryDirectory(prefix="compile-caches-", dir=out, ignore_cleanup_errors=True) as caches:
        for number, (repeat, item) in enumerate(order, start=1):
            label = f"[{number}/{len(order)}] {item.text}, seed {seed + repeat} ..."
            print(label, flush=True)
            known = set(out.glob("*.json"))
            began = time.perf_counter()
            log = out / "logs" / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{number}-{item.backend}.log"
            cache = Path(caches) / str(items.index(item))
            try:
                reason = _run_once(item, [*flags, "--seed", str(seed + repeat)], out, log, cache)
            except Interrupted as interruption:
                _record_failure(out, item, f"stopped by {interruption}", log)
                raise
            seconds = time.perf_counter() - began
            run = read_new_run(out, known)
            if reason or not run:
                reason = reason or "ended well, but left no results file"
                _record_failure(out, item, reason, log)
                print(f"{label} failed after {seconds:.0f} s: {reason}", flush=True)
                continue
            succeeded += 1
            _record_benchmark(out, items, baseline, run, item)
            rate = run.number("time/train_images_per_s")
            throughput = "throughput unavailable" if rate is None else f"{rate:,.1f} images/s"
            notes = "".join(f"; {problem}" for problem in run.instabilities)
            print(f"{label} {seconds:.0f} s, {throughput}{notes}", flush=True)
    return succeeded


def _run_once(item: Item, flags: Sequence[str], out: Path, log: Path, cache: Path) -> str:
    """Run vit.py or a peer to its end and return why it failed, if it did. Its stdout goes to `log`, its stderr beside it."""
    try:
        log.parent.mkdir(exist_ok=True)
        cache.mkdir(exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="checkpoint-", dir=out) as scratch,
            log.open("wb") as stdout,
            stderr_log(log).open("wb") as stderr,
        ):
            command = [sys.executable, item.command[0], *flags, *item.command[1:], "--keras-backend", item.package]
            command += ["--results-dir", str(out), "--checkpoint-path", str(Path(scratch) / "best.weights.h5")]
            # vit.py prefers KERAS_BACKEND to the flag, and these two variables to XDG_CACHE_HOME.
            environment = {**os.environ, "KERAS_BACKEND": item.package, "XDG_CACHE_HOME": str(cache.resolve())}
            for variable in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
                environment.pop(variable, None)
            status = _wait(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
            )
        return failure_reason(status, log) if status else ""
    except OSError as error:  # as on a full disk
        return one_line(error)


def _wait(process: subprocess.Popen) -> int:
    """Wait for the process and return its exit status. If it is interrupted, end the process first."""
    try:
        return process.wait()
    except Interrupted:
        process.terminate()
        try:
            process.wait(STOP_S)
        except (subprocess.TimeoutExpired, Interrupted):  # it hangs, or the user has interrupted again
            process.kill()
            process.wait()
        raise


def stderr_log(log: Path) -> Path:
    """Return the file for the stderr of a run whose stdout goes to `log`."""
    return log.with_suffix(".stderr.log")


def failure_reason(status: int, log: Path) -> str:
    """Say in one line why a run failed: the error of vit.py, else the last line on stderr, else how the process ended."""
    lines = stderr_log(log).read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("vit.py: error:")]
    if errors:
        return errors[-1]
    last = lines[-1] if lines else ""
    if status > 0:
        return last or f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    # A killed process, for example one out of memory, could not write why: its last line alone would mislead.
    return f"killed by {name} (last line: {last})" if last else f"killed by {name}"


def _record_failure(out: Path, item: Item, reason: str, log: Path) -> None:
    """Add a failure to out/failures.json, which --report reads as well."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    failure = {"backend": item.text, "ended": now, "reason": reason, "log": f"{log.parent.name}/{log.name}"}
    _write_json(out / "failures.json", {"failures": [*failures_in(out / "failures.json"), failure]})


def _record_benchmark(
    out: Path, items: Sequence[Item], baseline: str, run: Run | None = None, item: Item | None = None
) -> None:
    """Record in out/benchmark.json what is varied, and the item that a new run belongs to, beside what is there already."""
    known = read_benchmark(out / BENCHMARK_FILE)
    runs = known["runs"] | ({run.path.name: item.text} if run and item else {})
    varied = list(dict.fromkeys([*known["varied"], *varied_fields(items)]))
    _write_json(out / BENCHMARK_FILE, {"varied": varied, "baseline": baseline, "runs": runs})


def _write_json(path: Path, document: dict) -> None:
    """Write a file; a full disk costs it, and not the runs that are left."""
    try:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror or error})")
