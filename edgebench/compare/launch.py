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

from edgebench.cli import BACKENDS, ExperimentError, Interrupted, is_installed, require
from edgebench.compare.runs import failures_in, read_new_run, warn

ROOT = Path(__file__).resolve().parents[2]
VIT = ROOT / "vit.py"
PEERS = {  # hand-written programs for the same training, with the packages they need, that of the backend first
    "native-jax": (ROOT / "peers" / "native_jax.py", ("jax", "optax")),
    "native-torch": (ROOT / "peers" / "native_torch.py", ("torch",)),
}
RESERVED_FLAGS = ("--keras-backend", "--results-dir", "--checkpoint-path")  # _run_once sets them
STOP_S = 10.0  # seconds that a run has to end after SIGTERM


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that reports wrong input in one line, without the usage."""

    def error(self, message: str):
        raise ExperimentError(f"{message} (see --help)")


def packages_of(backend: str) -> tuple[str, ...]:
    """Return the Python packages that a backend or a peer needs, that of the backend first."""
    return PEERS[backend][1] if backend in PEERS else (backend,)


def choose_backends(names: Sequence[str] | None) -> list[str]:
    """Return the named backends and peers, or by default all installed backends. Refuse any that cannot run."""
    known = (*BACKENDS, *PEERS)
    chosen = list(dict.fromkeys(names or filter(is_installed, BACKENDS)))
    require(bool(chosen), f"no backend is installed: pip install one of {', '.join(BACKENDS)}")
    for name in chosen:
        require(name in known, f"--backends: {name!r} is none of {', '.join(known)}")
        for package in packages_of(name):
            require(is_installed(package), f"--backends: {package} is not installed")
    return chosen


def complete_flags(flags: Sequence[str]) -> list[str]:
    """Return the user's flags for vit.py, with W&B turned off unless they mention it. Refuse reserved flags."""
    names = [flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")]
    for name in names:
        require(name not in RESERVED_FLAGS, f"{name} is set by benchmark.py; use --backends and --out")
    mentions_wandb = "--use-wandb" in names or "--no-use-wandb" in names
    return [*flags] if mentions_wandb else [*flags, "--no-use-wandb"]


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


def alternating(backends: Sequence[str], repeats: int) -> list[str]:
    """Return the order of the runs, reversed from round to round: A B, B A, A B."""
    rounds = (backends, backends[::-1])
    return [name for repeat in range(repeats) for name in rounds[repeat % 2]]


def run_all(backends: Sequence[str], repeats: int, flags: Sequence[str], out: Path) -> int:
    """Run everything and return how many runs succeeded. A failure is recorded in `out`; the next run starts anyway."""
    if "jax" in [packages_of(backend)[0] for backend in backends] and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        warn("JAX_COMPILATION_CACHE_DIR is set: JAX may load what it compiled before, and its compile time say nothing")
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
        except Interrupted as interruption:
            _record_failure(out, backend, f"stopped by {interruption}", log)
            raise
        seconds = time.perf_counter() - began
        run = read_new_run(out, known)
        if status or not run:
            reason = failure_reason(status, log) if status else "ended well, but left no results file"
            _record_failure(out, backend, reason, log)
            print(f"{label} failed after {seconds:.0f} s: {reason}", flush=True)
            continue
        succeeded += 1
        rate = run.number("time/train_images_per_s")
        throughput = "throughput unavailable" if rate is None else f"{rate:,.1f} images/s"
        print(f"{label} {seconds:.0f} s, {throughput}", flush=True)
    return succeeded


def _run_once(backend: str, flags: Sequence[str], out: Path, log: Path) -> int:
    """Run vit.py or a peer to its end and return its exit status. Its stdout goes to `log`, its stderr beside it."""
    log.parent.mkdir(exist_ok=True)
    package = packages_of(backend)[0]
    script = PEERS[backend][0] if backend in PEERS else VIT
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint-", dir=out) as scratch,
        log.open("wb") as stdout,
        stderr_log(log).open("wb") as stderr,
    ):
        # Without a cache, compile_s is the time of a compilation, not of loading an earlier one.
        command = [sys.executable, str(script), "--no-compile-cache", *flags, "--keras-backend", package]
        command += ["--results-dir", str(out), "--checkpoint-path", str(Path(scratch) / "best.weights.h5")]
        environment = {**os.environ, "KERAS_BACKEND": package}  # vit.py prefers the variable to the flag
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
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


def _record_failure(out: Path, backend: str, reason: str, log: Path) -> None:
    """Add a failure to out/failures.json, which --report reads as well."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    failure = {"backend": backend, "ended": now, "reason": reason, "log": f"{log.parent.name}/{log.name}"}
    path = out / "failures.json"
    path.write_text(json.dumps({"failures": [*failures_in(path), failure]}, indent=1) + "\n", encoding="utf-8")
