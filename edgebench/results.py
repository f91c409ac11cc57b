"""The results of a run: one JSON file, and what happens to it however the run ends."""

import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import keras

from edgebench import console
from edgebench.callbacks import StopSignals
from edgebench.cli import ExperimentError, Interrupted, one_line, warn
from edgebench.compile_cache import CompileCache
from edgebench.costs import peak_flops
from edgebench.device import Device, backend_threads
from edgebench.energy import UNAVAILABLE, Meters, energy_figures
from edgebench.files import replacing
from edgebench.layers import attention_path
from edgebench.load import LoadMeter
from edgebench.schema import SCHEMA_VERSION
from edgebench.timing import Epoch
from edgebench.torch_graphs import is_compiled
from edgebench.tracking import finish_wandb, where_to_see

POWER_MODE = Path("/var/lib/nvpmodel/status")  # of a Jetson, as nvpmodel keeps it


def start_results(
    backend: str,
    packages: dict[str, str],
    device: Device,
    config: dict,
    defaults: dict,
    environment: dict[str, str],
    import_s: float,
) -> dict:
    """Print what is known of a run at its start and return it as its first results.

    `packages` are versions by name, `defaults` those of the configuration, `environment` the variables that the user has set for a backend.
    """
    versions = {"Python": platform.python_version(), **packages, "CUDA": device.cuda}
    console.print_start(versions, device.name, config, defaults)
    (commit, no_git), (status, _) = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    what = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "node": config["node_name"],
        "device": device.name,
        "is_gpu": device.is_gpu,
        "gpu_id": device.gpu_id,
        "power_mode": POWER_MODE.read_text().strip() if POWER_MODE.exists() else None,
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "backend": backend,
        "versions": versions,
        "environment": environment,
        "config": config,
        **{name: config[name] for name in ("dtype_policy", "tf32", "augmentation")},
        "micro_batches": config["gradient_accumulation_steps"],
    }
    memory = dict.fromkeys(("inference_peak_device_bytes", "train_peak_device_bytes"))
    missing = {} if commit else {"what/git_commit": no_git}
    if not device.is_gpu:
        missing |= dict.fromkeys((f"memory/{name}" for name in memory), "the backend runs on the CPU")
    sections = {"time": {"import_s": import_s}, "memory": memory, "missing": missing}
    return {"schema_version": SCHEMA_VERSION, "status": "failed", "failure": None, "what": what, **sections}


def training_sections(
    epochs: Sequence[Epoch],
    images: int,
    compiling_epochs: Collection[int],
    what: dict,
    meters: Meters,
    load_meter: LoadMeter,
) -> dict[str, dict]:
    """Sections on the complete epochs, `images` long each. Those that compile, by index, count only for the accuracy."""
    counted = [i for i in range(len(epochs)) if i not in compiling_epochs]
    counted_s = [epochs[i].train_s for i in counted]
    rate = images / statistics.median(counted_s) if counted else None
    peak = peak_flops(what["device"], what["dtype_policy"], what["tf32"])
    time_figures = {
        "epoch_s": [epoch.train_s for epoch in epochs],
        "train_images_per_s": rate,
        "epoch_spread": max(counted_s) / min(counted_s) if len(counted) > 1 else None,
        "model_flops_utilization": rate * what["train_flops_per_image"] / peak if rate and peak else None,
    }
    none = "no epoch is complete but those that compile"
    missing = {} if counted else {"time/train_images_per_s": none, "time/model_flops_utilization": none}
    if len(counted) < 2:
        missing["time/epoch_spread"] = "fewer than two epochs count"
    if not peak:
        missing["time/model_flops_utilization"] = "the peak of this device in this number format is not listed"
    energy = energy_figures(meters, images, counted)
    for part, figures in energy.items():
        if figures["joules_per_image"] is None:
            missing[f"energy/{part}/joules_per_image"] = figures["source"].removeprefix(UNAVAILABLE)
    load, load_missing = load_meter.figures(counted, backend_threads())
    return {
        "time": time_figures,
        "load": load,
        "energy": energy,
        "quality": {"epochs": [epoch.logs for epoch in epochs], "epoch_end_s": [epoch.end_s for epoch in epochs]},
        "missing": missing | load_missing,
    }


def how_it_runs(model: keras.Model, shape: tuple[int, ...], dropout: float, cache: CompileCache) -> dict:
    """Whether the training step is compiled, why torch could not compile it, from which cache, and the path of attention.

    `shape` is that of attention's queries (images, heads, patches, width), `dropout` the share of its weights dropped.
    """
    compiled = is_compiled(model)
    attention = attention_path(shape, dropout, keras.config.dtype_policy().compute_dtype, compiled)
    mode = {"jit_compile": compiled, "jit_failure": getattr(model, "failure", None), "attention": attention}
    return mode | {"compile_cache": cache.describe(compiled)}


def _git(*arguments: str) -> tuple[str | None, str]:
    """What git prints about the folder of the program, or None and the reason: there is no git, or this is no checkout."""
    folder = str(Path(__file__).parents[1])
    # In a container the folder usually belongs to another user, which git refuses by default.
    command = ["git", "-c", f"safe.directory={folder}", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return None, one_line(error)
    return (None, done.stderr.strip().partition("\n")[0]) if done.returncode else (done.stdout.strip(), "")


@contextlib.contextmanager
def recording(results: dict, folder: Path, signals: StopSignals, wandb_run=None) -> Iterator[None]:
    """Own how a run ends: set `status` and `failure`, write the file, print the result, end the W&B run, raise again."""
    try:
        yield
        results["status"] = "complete"
    except Interrupted as stop:
        results |= {"status": "interrupted", "failure": str(stop)}
        raise Interrupted(stop.number, _what_is_left(results)) from stop
    except BaseException as error:
        results["failure"] = one_line(error) if isinstance(error, ExperimentError) else repr(error)
        raise
    finally:
        signals.finish()
        path = _write(folder, results)
        console.print_summary(results, path, where_to_see(wandb_run))
        if path is None or results["what"]["config"]["verbose"]:
            console.print_all(results)
        if wandb_run is not None:  # last, as it may wait for a server
            weights = results.get("files", {}).get("weights") if results["what"]["config"]["wandb_artifact"] else None
            summary = {**console.figures(results), "failure": results["failure"]}
            finish_wandb(wandb_run, summary, path, weights, is_complete=results["status"] == "complete")


def _what_is_left(results: dict) -> str:
    """The weights that an interrupted run leaves, and the command that goes on with it."""
    files, command = results.get("files", {}), shlex.join(["python", *sys.argv])
    weights = f"; the best weights so far are in {files['weights']}" if files.get("weights") else ""
    resume = (
        f"; to go on: {command if '--resume' in sys.argv else command + ' --resume'}" if files.get("resume") else ""
    )
    return weights + resume


def _write(folder: Path, results: dict) -> Path | None:
    """Write the run's file and return its path; None on a full disk, which costs the file, not the result on the console."""
    what = results["what"]
    node = re.sub(r"[^A-Za-z0-9._-]", "_", what["node"])
    stamp = what["started"].replace(":", "").replace("-", "").partition("+")[0]
    path = folder / f"{stamp}-{node}-{what['backend']}-{os.urandom(4).hex()}.json"
    # JSON has no notation for a number that is not finite: it becomes null.
    finite = json.loads(json.dumps(results), parse_constant=lambda number: None)
    try:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        warn(f"the results cannot be written to {path} ({error}): what is printed here is all there is of them")
        return None
    return path
