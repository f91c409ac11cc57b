"""Reading what an interrupted run has left, and writing it after every epoch.

keras.callbacks.BackupAndRestore keeps weights, optimizer and epoch. It leaves out the best epoch so far, the seeds on the
device, everything that was measured, and whose state it is.
"""

import contextlib
import glob
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import keras
import numpy as np
import typeguard

from edgebench.averages import averages
from edgebench.cli import ExperimentError, flag, one_line, require, warn
from edgebench.device import assign_copies, build_optimizer, copy_values
from edgebench.energy import Meters, spans_as_json
from edgebench.files import replacing
from edgebench.flags import Flag
from edgebench.load import LoadMeter
from edgebench.timing import Epoch, EpochLog

CHECK_ALL = typeguard.CollectionCheckStrategy.ALL_ITEMS


@dataclass
class Progress:
    """How far a run has come; by default, nowhere."""

    epochs: list[Epoch] = field(default_factory=list)
    resumed_after_epochs: list[int] = field(default_factory=list)
    compiling_epochs: list[int] = field(default_factory=list)  # by index: those that a process compiled in
    wandb_id: str | None = None
    measured: dict[str, dict] = field(default_factory=dict)  # sections of the results, measured before the training
    energy_spans: dict[str, list[list[list[float | list[float | None]]]]] = field(default_factory=dict)
    load_spans: list[dict[str, Any] | None] = field(default_factory=list)
    best_epoch: int = 0
    best_accuracy: float = -math.inf
    variables: list[np.ndarray] = field(default_factory=list)
    best_weights: list[np.ndarray] = field(default_factory=list)  # none where they are the model's own


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


def read(path: Path, identity: dict, num_epochs: int) -> Progress:
    """What the run with this identity has left, interrupted or complete; nothing where there is no file.

    Raises ExperimentError for a damaged file, where more epochs than `num_epochs` are done, where a complete run has not kept
    its state, and where only a run with another identity was interrupted.
    """
    if not path.exists() and _of_complete_run(path).exists():
        path = _of_complete_run(path)
    if not path.exists():
        _require_no_other_run(path, identity)
        print(f"resume: nothing at {path}, starting anew")
        return Progress()
    try:
        with np.load(path, allow_pickle=False) as archive:
            state = json.loads(archive["progress"].tobytes())
            values = [archive[f"value_{i}"] for i in range(len(archive.files) - 1)]
        if state["identity"] != identity:
            raise ValueError("it belongs to another run")
        epochs, count = [Epoch(**epoch) for epoch in state["epochs"]], state["variables"]
        state |= {"epochs": epochs, "variables": values[:count], "best_weights": values[count:]}
        names = {field.name for field in fields(Progress)}
        if missing := names - state.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        progress = Progress(**{name: state[name] for name in names})
        for item in (progress, *progress.epochs):
            for name, kind in get_type_hints(type(item)).items():
                typeguard.check_type(getattr(item, name), kind, collection_check_strategy=CHECK_ALL)
    except Exception as error:  # zipfile, zlib, json and numpy raise a dozen types
        message = f"--resume: {path} is damaged ({one_line(error)}); remove it to start anew"
        raise ExperimentError(message) from error
    done = len(progress.epochs)
    require(done <= num_epochs, f"--resume: {done} epochs are done, more than --num-epochs {num_epochs}")
    anew = "without --resume it starts anew, and with it from the start on it can go on when it is complete"
    require(
        bool(progress.variables),
        f"--resume: this run is complete after {done} epochs, and kept nothing to go on with; {anew}",
    )
    progress.resumed_after_epochs.append(done)
    print(f"resume: {done} {'epoch is' if done == 1 else 'epochs are'} done")
    return progress


def finish(path: Path, keeps_state: bool) -> None:
    """Mark the run at `path` as complete. Its state is large, and is kept only where a longer run is to go on from it."""
    with contextlib.suppress(OSError):  # nothing was written, or nothing can be
        if keeps_state:
            os.replace(path, _of_complete_run(path))
            return
        with zipfile.ZipFile(path) as whole:
            progress = whole.read("progress.npy")
        with replacing(_of_complete_run(path)) as scratch, zipfile.ZipFile(scratch, "w") as archive:
            archive.writestr("progress.npy", progress)
        path.unlink()


def _require_no_other_run(path: Path, identity: dict) -> None:
    """Raise ExperimentError naming the flags that differ, if a run with another identity was interrupted beside `path`."""
    stem = glob.escape(path.name.rsplit(".", 3)[0])
    for other in path.parent.glob(f"{stem}.{'[0-9a-f]' * 8}.resume.npz"):
        try:
            with np.load(other, allow_pickle=False) as archive:
                theirs = json.loads(archive["progress"].tobytes())["identity"]
        except Exception:  # damaged, or just removed by its own run
            continue
        names = [name for name in identity if theirs.get(name) != identity[name] and name != "data"]
        flags = ", ".join(f"{flag(name)} {theirs.get(name)} (not {identity[name]})" for name in names)
        raise ExperimentError(f"--resume: the interrupted run {other} has {flags or 'other images'}; repeat its flags")


def restore(model: keras.Model, progress: Progress, path: Path) -> list[np.ndarray]:
    """Put weights, seeds and the optimizer's state that were read from `path` into the model; return the best weights so far.

    Nothing happens where there are none. Raises ExperimentError where they do not fit the model.
    """
    if not progress.variables:
        return []
    variables, values = _variables(model), [*progress.variables, *progress.best_weights]
    expected = [*variables, *(model.weights if progress.best_weights else [])]
    fits = [value.shape for value in values] == [tuple(variable.shape) for variable in expected]
    fits = fits and all(value.dtype.kind in "fiu" for value in values)
    require(fits, f"--resume: {path} does not fit the model of this version of Keras; remove it to start anew")
    assign_copies(variables, progress.variables)
    return progress.best_weights or copy_values(model.weights)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All that a training step reads and writes: weights, seeds, the optimizer's state."""
    build_optimizer(model)
    return [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]


class ResumeFile(keras.callbacks.Callback):
    """Writes all that continues the run after every complete epoch, as one file, atomically."""

    def __init__(
        self, path: Path, identity: dict, started: Progress, log: EpochLog, best, meters: Meters, load_meter: LoadMeter
    ):
        """`started` is how far the run had come when it was started; `log` and `best`, the vit.BestWeights, run before this."""
        super().__init__()
        self.path, self.log, self.best, self.meters, self.load_meter = path, log, best, meters, load_meter
        names = ("wandb_id", "measured", "resumed_after_epochs", "compiling_epochs")
        self.constant = {"identity": identity, **{name: getattr(started, name) for name in names}}

    def on_epoch_end(self, epoch, logs=None):
        variables = _variables(self.model)
        is_model = self.best.epoch == epoch + 1 and not averages(self.model)
        best_weights = [] if is_model else self.best.weights
        state = self.constant | {
            "variables": len(variables),
            "epochs": [asdict(epoch) for epoch in self.log.epochs],
            "best_epoch": self.best.epoch,
            "best_accuracy": self.best.accuracy,
            "energy_spans": spans_as_json(self.meters),
            "load_spans": self.load_meter.spans,
        }
        arrays = {"progress": np.frombuffer(json.dumps(state).encode(), np.uint8)}
        arrays |= {f"value_{i}": value for i, value in enumerate([*copy_values(variables), *best_weights])}
        try:
            # np.savez does the same, but on a full disk it leaves an archive open, which ends in a traceback.
            with replacing(self.path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
        except OSError as error:
            warn(f"the run cannot be resumed from here, {self.path} cannot be written ({one_line(error)})")
