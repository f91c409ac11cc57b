"""Seconds: of the training epochs, of single steps, and of inference. `results.schema.json` explains every figure.

Nothing here runs inside a training step. Latency and step time are measured before the training, and epochs are timed as
wholes: a callback with batch hooks would make JAX and torch wait for the device in every step.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from edgebench.device import assign_copies, copy_values
from edgebench.energy import EnergyMeter

WARM_UP, MIN_STEPS = 10, 100  # fewer steps give no meaningful 99th percentile


@dataclass(frozen=True)
class Epoch:
    """A complete epoch: what Keras reported, seconds of its training part, and seconds from the start of the training to its end."""

    logs: dict
    train_s: float
    end_s: float


class EpochTimer(keras.callbacks.Callback):
    """Times the training part of every epoch, without validation, and switches the energy meters on for just that part.

    `epochs` are those of an interrupted run that this one continues. `wait` waits for the device, by default until Keras'
    last step is done. A loop without Keras calls the hooks itself.
    """

    def __init__(self, meters: Sequence[EnergyMeter], epochs: Sequence[Epoch] = (), wait: Callable | None = None):
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


class StepTimer(keras.callbacks.Callback):
    """Seconds of every step, each waited for, in a `fit` of its own, apart from the epochs; a step may have several batches."""

    def __init__(self, budget_s: float, batches_per_step: int):
        super().__init__()
        self.budget_s, self.batches_per_step = budget_s, batches_per_step
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch % self.batches_per_step == 0:
            self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.batches_per_step == 0:
            float(logs["loss"])  # waits for the device: the loss is read after the whole step has been launched
            self.seconds.append(time.perf_counter() - self._began)
            self.model.stop_training = enough_steps(self.seconds, self.budget_s)


def enough_steps(seconds: Sequence[float], budget_s: float) -> bool:
    """Whether there are enough steps behind the first one, which compiles, or so many would take longer than `budget_s`."""
    steady, needed = seconds[1:], WARM_UP + MIN_STEPS
    # One slow step does not end it, but a tenth of the budget is enough to notice that the steps are slow.
    is_too_slow = sum(steady) > budget_s / 10 and statistics.median(steady) * needed > budget_s
    return is_too_slow or len(steady) >= needed


def step_figures(seconds: Sequence[float]) -> dict:
    """`first_step_s`, `compile_s` and the percentiles of `step_ms`."""
    first, *steady = seconds
    compile_s = max(first - statistics.median(steady), 0.0)
    return {"first_step_s": first, "compile_s": compile_s, "step_ms": _percentiles_ms(steady)}


def _percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles without the first WARM_UP values; None where fewer than MIN_STEPS are left."""
    ms = 1e3 * np.array(seconds[WARM_UP:])
    if len(ms) < MIN_STEPS:
        return None
    return {**{f"p{q}": float(np.percentile(ms, q)) for q in (50, 90, 99)}, "n": len(ms)}


def _timed(function: Callable, *arguments) -> tuple:
    """What `function` returns, and the seconds it takes."""
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def measure_inference(predict: Callable, images: np.ndarray, batch_size: int, budget_s: float) -> dict:
    """Latency of one image and throughput of whole batches with `predict`, from NumPy array to NumPy array."""

    def seconds(batch: np.ndarray) -> list[float]:
        predict(batch)  # compiles
        times: list[float] = []
        while len(times) < WARM_UP + MIN_STEPS and sum(times) < budget_s / 2:
            times.append(_timed(predict, batch)[1])
        return times

    latency_ms, batch = _percentiles_ms(seconds(images[:1])), images[:batch_size]
    return {"latency_ms": latency_ms, "inference_images_per_s": len(batch) / statistics.median(seconds(batch))}


def measure_steps(
    model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int, batches_per_step: int, budget_s: float
) -> dict:
    """Time of the first step, which compiles, and of at least MIN_STEPS steady ones; the model is afterwards as before."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = copy_values(variables)
    batch_size = min(batch_size, len(x))
    batches_per_step = min(batches_per_step, len(x) // batch_size)
    step_size = batch_size * batches_per_step
    whole = len(x) // step_size * step_size  # a partial batch would be another shape, and compile again
    timer = StepTimer(budget_s, batches_per_step)
    while not enough_steps(timer.seconds, budget_s):
        model.fit(x[:whole], y[:whole], batch_size=batch_size, verbose=0, callbacks=[timer])
    if rest := len(x) % batch_size:  # compiled now, so that the first epoch is as steady as the others
        model.fit(x[:rest], y[:rest], batch_size=rest, verbose=0)
    assign_copies(variables, before)
    return step_figures(timer.seconds)


def measure_evaluation(evaluate: Callable[[], dict], images: int, budget_s: float) -> tuple[dict, dict]:
    """The metrics that `evaluate` returns, and `evaluation_images_per_s` of a second call, as the first may compile.

    There is no second call, and no figure, where the first takes longer than `budget_s`.
    """
    metrics, first_s = _timed(evaluate)
    return metrics, {"evaluation_images_per_s": images / _timed(evaluate)[1]} if first_s < budget_s else {}
