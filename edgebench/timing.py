"""Seconds of the training epochs. `results.schema.json` explains every figure.

Nothing here runs inside a training step: a callback with batch hooks would make JAX and torch wait for the device in every
one. Epochs are timed as wholes; measure.py times single steps apart from them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import keras
from keras import ops


@dataclass(frozen=True)
class Epoch:
    """A complete epoch: what Keras reported, seconds of its training part, and seconds from the start of the training to its end."""

    logs: dict
    train_s: float
    end_s: float


class Meter(Protocol):
    """What measures the training part of every epoch, besides its time: energy.EnergyMeter, load.LoadMeter."""

    def begin(self) -> None: ...

    def end(self) -> None: ...


class EpochTimer(keras.callbacks.Callback):
    """Times the training part of every epoch, without validation, and switches meters on for just that part.

    `epochs` are those of an interrupted run that this one continues. `wait` waits for the device, by default until Keras'
    last step is done. A loop without Keras calls the hooks itself.
    """

    def __init__(self, meters: Sequence[Meter], epochs: Sequence[Epoch] = (), wait: Callable | None = None):
        super().__init__()
        # One weight can be read once the last step is done, on every backend.
        self.wait = wait or (lambda: ops.convert_to_numpy(self.model.trainable_weights[-1].value))
        self.meters, self._is_training = meters, False
        self.train_s, self.end_s = 0.0, epochs[-1].end_s if epochs else 0.0  # of the latest epoch, as in `Epoch`

    def on_train_begin(self, logs=None):
        self._training_began = time.perf_counter() - self.end_s

    def on_epoch_begin(self, epoch, logs=None):
        for meter in self.meters:
            meter.begin()
        self._is_training, self._epoch_began = True, time.perf_counter()

    def on_test_begin(self, logs=None):
        self.wait()
        self.train_s, self._is_training = time.perf_counter() - self._epoch_began, False
        for meter in self.meters:
            meter.end()

    def on_epoch_end(self, epoch, logs=None):
        if self._is_training:  # there was no validation
            self.on_test_begin()
        self.end_s = time.perf_counter() - self._training_began


class EpochLog(keras.callbacks.Callback):
    """Lists the complete epochs. It comes after the callbacks that may end the run in an epoch, which then does not count."""

    def __init__(self, timer: EpochTimer, epochs: Sequence[Epoch] = ()):
        super().__init__()
        self.timer, self.epochs = timer, list(epochs)

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(Epoch(dict(logs or {}), self.timer.train_s, self.timer.end_s))
