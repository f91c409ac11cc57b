"""One record per epoch: what Keras reported, how long it took, and what the sensors read meanwhile.

Nothing here runs inside a training step: a callback with batch hooks would make JAX and torch wait for the device in every
one. Epochs are timed as wholes; steps.py times single steps apart from them.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import keras
import msgspec
from keras import ops

from edgebench.measure.costs import peak_flops
from edgebench.measure.meters import UNAVAILABLE, Meter, energy_figures, load_figures, unavailable
from edgebench.measure.sensors import Energy, Load, Sensors


class Epoch(msgspec.Struct, frozen=True):
    """A complete epoch.

    `logs` are what Keras reported, `train_s` seconds of the training part, without validation, `end_s` seconds from the
    start of the training to the end of the epoch. `compiled` says that this epoch may have compiled: its speed counts for
    nothing. `energy` and `load` are what the sensors read in the training part, energy by part of the machine.
    """

    logs: dict[str, float]
    train_s: float
    end_s: float
    compiled: bool = False
    energy: dict[str, Energy] = {}
    load: Load | None = None


class EpochRecorder(keras.callbacks.Callback):
    """Makes a record of every epoch; `epochs` has them all, those of an interrupted run first.

    `meter` reads the sensors in the training part alone. `check` is called with the logs of an epoch and may end the run:
    the epoch is then no record. `compiles_first` says that the first epoch of this process compiles. `wait` waits for the
    device, by default until Keras' last step is done. A loop without Keras calls the hooks itself.

    Its place in the list of callbacks is before all that use a record.
    """

    def __init__(
        self,
        meter: Meter,
        epochs: Sequence[Epoch] = (),
        compiles_first: bool = False,
        check: Callable[[int, dict], None] = lambda epoch, logs: None,
        wait: Callable[[], object] | None = None,
    ):
        super().__init__()
        # One weight can be read once the last step is done, on every backend.
        self._wait = wait or (lambda: ops.convert_to_numpy(self.model.trainable_weights[-1].value))
        self._meter, self._check, self._compiles = meter, check, compiles_first
        self.epochs = list(epochs)
        self._is_training = False

    def on_train_begin(self, logs=None):
        earlier_s = self.epochs[-1].end_s if self.epochs else 0.0
        self._training_began = time.perf_counter() - earlier_s

    def on_epoch_begin(self, epoch, logs=None):
        self._meter.begin()
        self._is_training = True
        self._epoch_began = time.perf_counter()

    def on_test_begin(self, logs=None):
        self._wait()
        self._train_s = time.perf_counter() - self._epoch_began
        self._is_training = False
        self._read = self._meter.end()

    def on_epoch_end(self, epoch, logs=None):
        if self._is_training:  # there was no validation
            self.on_test_begin()
        end_s = time.perf_counter() - self._training_began
        self._check(epoch, logs or {})
        load = self._read.pop("load", None)
        self.epochs.append(Epoch(dict(logs or {}), self._train_s, end_s, self._compiles, self._read, load))
        self._compiles = False


def energy_of_epoch(epoch: Epoch, images: int) -> dict[str, float]:
    """Watts, and joules per image, of one epoch of `images` images: `accelerator_w`, `accelerator_j_per_image`."""
    found: dict[str, float | None] = {}
    for part, record in epoch.energy.items():
        figures = energy_figures([record], images)
        found |= {f"{part}_w": figures["mean_w"], f"{part}_j_per_image": figures["joules_per_image"]}
    return {name: value for name, value in found.items() if value is not None}


def training_figures(
    epochs: Sequence[Epoch], images: int, sensors: Sensors, what: dict, backend_threads: int | None
) -> dict[str, dict]:
    """Sections of the results on complete epochs of `images` images; those that compiled count only for the accuracy.

    `what` is the section of the results on what ran.
    """
    counted = [epoch for epoch in epochs if not epoch.compiled]
    seconds = [epoch.train_s for epoch in counted]
    rate = images / statistics.median(seconds) if counted else None
    peak = peak_flops(what["device"], what["dtype_policy"], what["tf32"])
    figures = {
        "epoch_s": [epoch.train_s for epoch in epochs],
        "train_images_per_s": rate,
        "epoch_spread": max(seconds) / min(seconds) if len(counted) > 1 else None,
        "model_flops_utilization": rate * what["train_flops_per_image"] / peak if rate and peak else None,
    }
    none = "no epoch is complete but those that compile"
    missing = {} if counted else {"time/train_images_per_s": none, "time/model_flops_utilization": none}
    if len(counted) < 2:
        missing["time/epoch_spread"] = "fewer than two epochs count"
    if not peak:
        missing["time/model_flops_utilization"] = "the peak of this device in this number format is not listed"
    energy = {part: unavailable(reason) for part, reason in sensors.no_power.items()}
    for part, sensor in sensors.power.items():
        records = [epoch.energy[part] for epoch in counted if part in epoch.energy]
        energy[part] = energy_figures([record for record in records if record.source == sensor.source], images)
    for part, found in energy.items():
        if found["joules_per_image"] is None:
            missing[f"energy/{part}/joules_per_image"] = found["source"].removeprefix(UNAVAILABLE)
    load, load_missing = load_figures(sensors.load, [epoch.load for epoch in counted if epoch.load], backend_threads)
    return {
        "time": figures,
        "load": load,
        "energy": energy,
        "quality": {"epochs": [epoch.logs for epoch in epochs], "epoch_end_s": [epoch.end_s for epoch in epochs]},
        "missing": missing | load_missing,
    }
