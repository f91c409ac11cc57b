"""Reading what an interrupted run has left, and writing it after every epoch.

keras.callbacks.BackupAndRestore keeps weights, optimizer and epoch. It leaves out the best epoch so far, the seeds on the
device, everything that was measured, and whose state it is.
"""

import contextlib
import glob
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np

from edgebench.averages import averages
from edgebench.cli import ExperimentError, flag, one_line, warn
from edgebench.device import assign_copies, build_optimizer, copy_values
from edgebench.files import replacing
from edgebench.flags import Flag
from edgebench.measure.epochs import Epoch, EpochRecorder
from edgebench.record import console


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a run has come, as it is in its resume file beside the arrays."""

    epochs: list[Epoch]
    resumed_after_epochs: list[int]
    wandb_id: str | None
    measured: dict[str, dict[str, Any]]  # sections of the results, measured before the training
    best_epoch: int
    best_accuracy: float | None  # None without validation images


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON part of a resume file; the first `variables` arrays are the model's, the others the best weights."""

    identity: dict[str, Any]
    variables: int
    progress: Progress


@dataclass(frozen=True)
class Resumed:
    """What an interrupted run has left; by default nothing. There are no `best_weights` where they are the model's own."""

    progress: Progress = Progress([], [], None, {}, 0, None)
    variables: Sequence[np.ndarray] = ()
    best_weights: Sequence[np.ndarray] = ()


def identity(settings: dict, flags: Mapping[str, Flag], x_train: np.ndarray, y_train: np.ndarray) -> dict:
    """All that decides what is learned: it has to be the same for an interrupted run to be resumed.

    `settings` are the configuration as JSON. A schedule of the learning rate ends with the run, so its length decides as well.
    """
    fixed = {name: value for name, value in settings.items() if not flags[name].may_change}
    if settings["learning_rate_schedule"] != "constant":
        fixed["num_epochs"] = settings["num_epochs"]
    return fixed | {"data": zlib.crc32(y_train, zlib.crc32(np.ascontiguousarray(x_train)))}


def path_of(checkpoint_path: Path, identity: dict) -> Path:
    """The file of the run with this identity, beside the checkpoint, so that runs which share a checkpoint keep their own."""
    digest = zlib.crc32(json.dumps(identity, sort_keys=True).encode())
    stem = checkpoint_path.name.removesuffix(".weights.h5")
    return checkpoint_path.with_name(f"{stem}.{digest:08x}.resume.npz")


def _of_complete_run(path: Path) -> Path:
    """The file that a complete run leaves in place of `path`."""
    return path.with_name(path.name.replace(".resume.npz", ".complete.npz"))


def read(path: Path, identity: dict, num_epochs: int) -> Resumed:
    """What the run with this identity has left, interrupted or complete; nothing where there is no file.

    Raises ExperimentError for a damaged file, where more epochs than `num_epochs` are done, where a complete run has not kept
    its state, and where only a run with another identity was interrupted.
    """
    if not path.exists() and _of_complete_run(path).exists():
        path = _of_complete_run(path)
    if not path.exists():
        _require_no_other_run(path, identity)
        return Resumed()
    try:
        with np.load(path, allow_pickle=False) as archive:
            state = _state_in(archive)
            values = [archive[f"value_{i}"] for i in range(len(archive.files) - 1)]
        if state.identity != identity:
            raise ValueError("it belongs to another run")
    except Exception as error:  # zipfile, zlib, msgspec and numpy raise a dozen types
        message = f"--resume: {path} is damaged ({one_line(error)}); remove it to start from scratch"
        raise ExperimentError(message) from error
    done = len(state.progress.epochs)
    if done > num_epochs:
        raise ExperimentError(f"--resume: {done} epochs are done, more than --num-epochs {num_epochs}")
    if not values:
        raise ExperimentError(
            f"--resume: this run is complete after {done} epochs, and its training state was not kept. Start it with "
            "--resume next time to be able to extend it; without --resume it starts over"
        )
    progress = msgspec.structs.replace(
        state.progress, resumed_after_epochs=[*state.progress.resumed_after_epochs, done]
    )
    return Resumed(progress, values[: state.variables], values[state.variables :])


def _state_in(archive: Mapping[str, np.ndarray]) -> _State:
    return msgspec.json.decode(archive["progress"].tobytes(), type=_State)


def _require_no_other_run(path: Path, identity: dict) -> None:
    """Raise ExperimentError naming the flags that differ, if a run with another identity was interrupted beside `path`."""
    stem = glob.escape(path.name.rsplit(".", 3)[0])
    for other in path.parent.glob(f"{stem}.{'[0-9a-f]' * 8}.resume.npz"):
        try:
            with np.load(other, allow_pickle=False) as archive:
                theirs = _state_in(archive).identity
        except Exception:  # damaged, or just removed by its own run
            continue
        names = [name for name in identity if theirs.get(name) != identity[name] and name != "data"]
        flags = ", ".join(f"{flag(name)} {theirs.get(name)} (not {identity[name]})" for name in names)
        raise ExperimentError(f"--resume: the interrupted run {other} has {flags or 'other images'}; repeat its flags")


def restore(model: keras.Model, resumed: Resumed, path: Path) -> Sequence[np.ndarray]:
    """Put weights, seeds and the optimizer's state that were read from `path` into the model; return the best weights so far.

    Nothing happens where there are none. Raises ExperimentError where they do not fit the model.
    """
    if not resumed.variables:
        return []
    variables, values = _variables(model), [*resumed.variables, *resumed.best_weights]
    expected = [*variables, *(model.weights if resumed.best_weights else [])]
    fits = [value.shape for value in values] == [tuple(variable.shape) for variable in expected]
    if not fits or any(value.dtype.kind not in "fiu" for value in values):
        raise ExperimentError(
            f"--resume: {path} does not fit the model of this version of Keras; remove it to start from scratch"
        )
    assign_copies(variables, resumed.variables)
    return resumed.best_weights or copy_values(model.weights)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All that a training step reads and writes: weights, seeds, the optimizer's state."""
    build_optimizer(model)
    return [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]


class ResumeFile(keras.callbacks.Callback):
    """Writes all that continues the run after every complete epoch, as one file, atomically."""

    def __init__(self, path: Path, identity: dict, started: Progress, recorder: EpochRecorder, best):
        """`started` is how far the run had come when it was started; `recorder` and `best`, the vit.BestWeights, run before this."""
        super().__init__()
        self.path, self.identity, self.started, self.recorder, self.best = path, identity, started, recorder, best

    def on_epoch_end(self, epoch, logs=None):
        variables = _variables(self.model)
        is_model = self.best.epoch == epoch + 1 and not averages(self.model)
        progress = msgspec.structs.replace(
            self.started,
            epochs=self.recorder.epochs,
            best_epoch=self.best.epoch,
            best_accuracy=self.best.accuracy,
        )
        state = msgspec.json.encode(_State(self.identity, len(variables), progress))
        values = [*copy_values(variables), *([] if is_model else self.best.weights)]
        arrays = {"progress": np.frombuffer(state, np.uint8)} | {f"value_{i}": value for i, value in enumerate(values)}
        try:
            # np.savez does the same, but on a full disk it leaves an archive open, which ends in a traceback.
            with replacing(self.path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
        except OSError as error:
            warn(f"the run cannot be resumed from here, {self.path} cannot be written ({one_line(error)})")


class ResumableRun:
    """The file that continues a run, beside its checkpoint, and what it held when the run was started."""

    def __init__(self, config: Any, flags: Mapping[str, Flag], x_train: np.ndarray, y_train: np.ndarray):
        """`config` is a vit.ViTConfig with these `flags`. Raises ExperimentError where --resume finds a file of no use."""
        self.identity = identity(config.as_json(), flags, x_train, y_train)
        # Nobody resumes a sweep's trials, and they would fill the disk.
        self.is_kept = not os.environ.get("WANDB_SWEEP_ID")
        self.path = path_of(config.checkpoint_path, self.identity)
        self._keeps_state = config.resume and config.learning_rate_schedule == "constant"
        self._resumed = Resumed()
        if config.resume:
            self._resumed = read(self.path, self.identity, config.num_epochs)
            console.print_resumed(self.path, len(self.progress.epochs))
        if self.is_kept and self.path.exists() and not config.resume:
            warn(f"replacing the interrupted run of this configuration, {self.path}; --resume would continue it")

    @property
    def progress(self) -> Progress:
        """How far the run had come when it was started."""
        return self._resumed.progress

    @property
    def current(self) -> str | None:
        """The path, if the run keeps a file and has written it."""
        return str(self.path) if self.is_kept and self.path.exists() else None

    def restore(self, model: keras.Model) -> Sequence[np.ndarray]:
        """As `restore` does."""
        return restore(model, self._resumed, self.path)

    def callbacks(self, recorder: EpochRecorder, best, measured: dict, wandb_id: str | None) -> list[ResumeFile]:
        """What keeps the file: a ResumeFile, or nothing. `measured` are sections of the results, from before the training."""
        started = msgspec.structs.replace(self.progress, wandb_id=wandb_id, measured=measured)
        return [ResumeFile(self.path, self.identity, started, recorder, best)] if self.is_kept else []

    def finish(self) -> None:
        """Mark the run as complete. Its state is large, and is kept only where a longer run is to continue from it."""
        with contextlib.suppress(OSError):  # nothing was written, or nothing can be
            if self._keeps_state:
                os.replace(self.path, _of_complete_run(self.path))
                return
            with zipfile.ZipFile(self.path) as whole:
                progress = whole.read("progress.npy")
            with replacing(_of_complete_run(self.path)) as scratch, zipfile.ZipFile(scratch, "w") as archive:
                archive.writestr("progress.npy", progress)
            self.path.unlink()
