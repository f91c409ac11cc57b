"""Weights & Biases, which never prompts and never ends a run."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from edgebench.cli import ExperimentError, one_line, warn

# Seconds. A server that is gone at the end costs two minutes, not the run: what it did not get is on disk, for `wandb sync`.
TIMEOUTS = {"init_timeout": 30, "finish_timeout": 120}
BEST = ("val_accuracy", "val_top-5-accuracy")  # whose best value counts, not only the last
SHORT_FORMATS = {"float32": "fp32", "mixed_bfloat16": "bf16", "mixed_float16": "fp16"}


def start(config: Any, backend: str, is_gpu: bool, run_id: str | None):
    """Start the W&B run of a vit.ViTConfig, or continue the one with this id.

    None where it is turned off, or where W&B cannot even log offline (a full disk). Where it cannot be online it is offline,
    and a warning says why. Raises ExperimentError for settings that W&B refuses.
    """
    if not config.use_wandb:
        return None
    node = config.node_name
    tags = [*config.wandb_tags, backend, "gpu" if is_gpu else "cpu", node]
    options = {
        "project": config.wandb_project,
        "entity": config.wandb_entity,
        "name": config.wandb_run_name or run_name(node, backend, config.batch_size, config.dtype_policy),
        "tags": list(dict.fromkeys(tags)),
        "group": config.wandb_group or node,
        "job_type": config.wandb_job_type,
        "config": config.as_json() | {"num_patches": config.num_patches},
        "id": run_id,
    }
    import wandb

    try:
        mode, reason = wandb.setup().settings.mode, None
    except Exception as error:  # pydantic's, for a WANDB_... variable in the environment or .env
        raise ExperimentError(f"W&B does not take its settings: {error}") from error
    if mode in ("online", "shared"):
        try:
            if not wandb.login(prompt=False):
                reason = "no API key (set WANDB_API_KEY or run `wandb login`)"
        except wandb.errors.Error as error:  # a key that is malformed or rejected, a server out of reach
            reason = str(error)
    timeouts = {key: seconds for key, seconds in TIMEOUTS.items() if f"WANDB_{key.upper()}" not in os.environ}
    # Without its report at the end, as the console's own is shorter.
    quiet = {} if "WANDB_QUIET" in os.environ else {"quiet": True}
    options["settings"] = wandb.Settings(**timeouts, **quiet)
    if reason is None:
        try:
            return _with_metrics(wandb.init(mode=mode, resume="allow" if run_id else None, **options))
        except Exception as error:  # W&B's own, or the disk's
            reason = one_line(error)
    warn(f"W&B logs offline: {reason}; upload later with `wandb sync`")
    if os.environ.get("WANDB_SWEEP_ID"):
        warn("the SWEEP SEES NOTHING of this run: its search and early stopping need it online")
    try:
        return _with_metrics(wandb.init(mode="offline", **options))
    except Exception as error:
        warn(f"W&B logs nothing: {one_line(error)}")
        return None


def _with_metrics(run):
    """Draw everything over the epochs, and keep the best validation accuracy beside the last."""
    run.define_metric("epoch", hidden=True)
    run.define_metric("*", step_metric="epoch")
    for name in BEST:
        run.define_metric(name, step_metric="epoch", summary="max,last")
    return run


def run_name(node: str, backend: str, batch_size: int, dtype_policy: str) -> str:
    """What ran, as the name of a run: ook-torch-b256-bf16."""
    return f"{node}-{backend}-b{batch_size}-{SHORT_FORMATS[dtype_policy]}"


def describe(run, what: dict) -> None:
    """Add to the configuration what really runs: versions, device, compilation, number of parameters."""
    try:
        run.config.update({name: value for name, value in what.items() if name != "config"}, allow_val_change=True)
    except Exception as error:
        warn(f"W&B did not take the configuration ({one_line(error)})")


def where_to_see(run) -> str | None:
    """Where a run is to be seen, or how it is uploaded; None without one."""
    if run is None:
        return None
    if not run.offline:
        return f"see {run.url}"
    folder = Path(run.settings.sync_dir)
    if len(list(folder.parent.glob(f"*run-*-{run.id}"))) > 1:
        # W&B itself names only the last part of a resumed run, which would replace the others.
        return f"WANDB_RESUME=allow wandb sync {shlex.quote(str(folder.parent))}/offline-run-*-{run.id}"
    return f"wandb sync {shlex.quote(os.path.relpath(folder))}"


def finish(run, summary: dict, results: Path | None, weights: str | None, is_complete: bool) -> None:
    """Send the summary, the results file and, if there are any, the weights as an artifact, and end the run.

    It ends as failed unless it is complete; no error here is fatal.
    """
    try:
        run.summary.update({name: value for name, value in summary.items() if value is not None})
        if results:
            copy = shutil.copy(results, run.dir)  # W&B would make a link, and say so
            run.save(copy, base_path=run.dir, policy="now")
        if weights and is_complete:
            run.log_model(weights, name=f"weights-{run.id}")
        run.finish(exit_code=0 if is_complete else 1)
    except Exception as error:
        warn(f"W&B did not take the results ({one_line(error)}); `wandb sync` uploads what it has")
