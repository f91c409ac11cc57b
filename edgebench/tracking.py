"""Weights & Biases, which never prompts and never ends a run."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from edgebench.cli import ExperimentError, one_line, warn

# Seconds. A server that is gone at the end costs two minutes, not the run: what it did not get is on disk, for `wandb sync`.
TIMEOUTS = {"init_timeout": 30, "finish_timeout": 120}


def start_wandb(
    project: str, entity: str | None, name: str | None, tags: Sequence[str], config: dict, run_id: str | None
):
    """Start a W&B run, or continue the one with this id; return None where W&B cannot even log offline (a full disk).

    Where it cannot be online it is offline, and a warning says why. Raises ExperimentError for settings that W&B refuses.
    """
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
    options = {"project": project, "entity": entity, "name": name, "tags": list(tags) or None, "config": config}
    options |= {"id": run_id, "settings": wandb.Settings(**timeouts)}
    if reason is None:
        try:
            return wandb.init(mode=mode, resume="allow" if run_id else None, **options)
        except Exception as error:  # W&B's own, or the disk's
            reason = one_line(error)
    warn(f"W&B logs offline: {reason}; upload later with `wandb sync`")
    if os.environ.get("WANDB_SWEEP_ID"):
        warn("the SWEEP SEES NOTHING of this run: its search and early stopping need it online")
    try:
        return wandb.init(mode="offline", **options)
    except Exception as error:
        warn(f"W&B logs nothing: {one_line(error)}")
        return None


def finish_wandb(run, summary: dict, is_complete: bool) -> None:
    """Send the summary and end the W&B run, as failed unless it is complete; no error here is fatal."""
    try:
        run.summary.update({name: value for name, value in summary.items() if value is not None})
        run.finish(exit_code=0 if is_complete else 1)
        if run.offline:
            _tell_how_to_upload_parts(Path(run.settings.sync_dir).parent, run.id)
    except Exception as error:
        warn(f"W&B did not take the results ({one_line(error)}); `wandb sync` uploads what it has")


def _tell_how_to_upload_parts(folder: Path, run_id: str) -> None:
    """Print the command that uploads a resumed run whole. W&B names only its last part, which would replace the others."""
    if len(list(folder.glob(f"*run-*-{run_id}"))) > 1:
        parts = f"{shlex.quote(str(folder))}/offline-run-*-{run_id}"
        print(f"this run was resumed; to upload all of it: WANDB_RESUME=allow wandb sync {parts}")
