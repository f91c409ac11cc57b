"""The results of a run: one JSON file, and what happens to it however the run ends."""

import contextlib
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import keras

from edgebench import console
from edgebench.callbacks import StopSignals
from edgebench.cli import ExperimentError, Interrupted, one_line
from edgebench.compile_cache import CompileCache
from edgebench.device import Device
from edgebench.layers import attention_path
from edgebench.record import machine_and_code, write_results
from edgebench.schema import SCHEMA_VERSION
from edgebench.torch_graphs import is_compiled
from edgebench.tracking import finish_wandb, where_to_see


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

    `packages` are versions by name, `defaults` those of the configuration, `environment` the variables that the user has set
    for a backend.
    """
    versions = {"Python": platform.python_version(), **packages, "CUDA": device.cuda}
    console.print_start(versions, device.name, config, defaults)
    machine, missing = machine_and_code(config["node_name"], device.name, device.is_gpu, device.gpu_id)
    what = {
        **machine,
        "backend": backend,
        "versions": versions,
        "environment": environment,
        "config": config,
        **{name: config[name] for name in ("dtype_policy", "tf32", "augmentation")},
        "micro_batches": config["gradient_accumulation_steps"],
    }
    memory = dict.fromkeys(("inference_peak_device_bytes", "train_peak_device_bytes"))
    if not device.is_gpu:
        missing |= dict.fromkeys((f"memory/{name}" for name in memory), "the backend runs on the CPU")
    sections = {"time": {"import_s": import_s}, "memory": memory, "missing": missing}
    return {"schema_version": SCHEMA_VERSION, "status": "failed", "failure": None, "what": what, **sections}


def how_it_runs(model: keras.Model, shape: tuple[int, ...], dropout: float, cache: CompileCache) -> dict:
    """Whether the training step is compiled, why torch could not compile it, from which cache, and the path of attention.

    `shape` is that of attention's queries (images, heads, patches, width), `dropout` the share of its weights dropped.
    """
    compiled = is_compiled(model)
    attention = attention_path(shape, dropout, keras.config.dtype_policy().compute_dtype, compiled)
    mode = {"jit_compile": compiled, "jit_failure": getattr(model, "failure", None), "attention": attention}
    return mode | {"compile_cache": cache.describe(compiled)}


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
        path = write_results(folder, results)
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
