"""What is measured outside of the epochs: compiling, single steps, inference. `results.schema.json` explains every figure.

Every function returns sections of the results. `missing` names the figures that could not be measured, with the reason.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import keras
import numpy as np

from edgebench.averages import averages
from edgebench.bare import NOTHING_COMPILED, bare_predict
from edgebench.datasets import ShuffledBatches
from edgebench.device import assign_copies, build_optimizer, copy_values, find_device
from edgebench.measure.epochs import Epoch
from edgebench.measure.latency import Sections, compiling, inference, is_enough, merge, percentiles, repeat, timed
from edgebench.measure.meters import inference_energy
from edgebench.measure.sensors import Sensors

EVALUATIONS = 5  # one of a small model takes 50 ms, and a single stall would count in full


class StepTimer(keras.callbacks.Callback):
    """Seconds of every step, each waited for, in a `fit` of its own, apart from the epochs; a step may have several batches."""

    def __init__(self, budget_s: float, batches_per_step: int, raise_if_stopped: Callable[[], None]):
        super().__init__()
        self.budget_s, self.batches_per_step, self.raise_if_stopped = budget_s, batches_per_step, raise_if_stopped
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        self.raise_if_stopped()
        if batch % self.batches_per_step == 0:
            self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.batches_per_step == 0:
            float(logs["loss"])  # waits for the device: the loss is read after the whole step has been launched
            self.seconds.append(time.perf_counter() - self._began)
            self.model.stop_training = is_enough(self.seconds[1:], self.budget_s)


def bare_latency(predict: Callable | None, why_not: str, images: np.ndarray, budget_s: float) -> Sections:
    """Latency of one image with `predict`, which has no Keras around it; where there is no such function, `why_not` says why."""
    if predict is None:
        return {"time": {"bare_latency_ms": None}, "missing": {"time/bare_latency_ms": why_not}}
    return percentiles("time/bare_latency_ms", repeat(predict, images[:1], budget_s)[1], budget_s)


def step_sections(seconds: Sequence[float], budget_s: float) -> Sections:
    """The sections of a training step, of which the first compiles."""
    first_s, *steady_s = seconds
    first = {"first_step_s": first_s, "compile_s": {"train_step": compiling(first_s, steady_s)}}
    return merge(percentiles("time/step_ms", steady_s, budget_s), {"time": first})


class Images(Protocol):
    """Images and labels as vit.Dataset has them."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Workload:
    """A compiled model and what it is trained on.

    `make_batches` makes the batches of the training from images, labels and a batch size: TensorFlow compiles again for
    another source of data. `micro_batch_size` images go through the model at a time, and a step of the optimizer takes
    `micro_batches` of them.
    """

    model: keras.Model
    data: Images
    make_batches: Callable[[np.ndarray, np.ndarray, int], ShuffledBatches]
    micro_batch_size: int
    micro_batches: int = 1


def steps(workload: Workload, budget_s: float, raise_if_stopped: Callable[[], None]) -> Sections:
    """Time of the first training step, which compiles, and of steady ones; leaves the model unchanged.

    The partial batch at the end of an epoch is compiled here, too, so that no epoch compiles.
    """
    model, x, y = workload.model, workload.data.x_train, workload.data.y_train
    build_optimizer(model)
    variables = [*model.variables, *model.optimizer.variables]
    before = copy_values(variables)
    batch_size = min(workload.micro_batch_size, len(x))
    batches_per_step = min(workload.micro_batches, len(x) // batch_size)
    step_size = batch_size * batches_per_step
    whole = len(x) // step_size * step_size

    def fit(count: int, timer: Sequence[StepTimer] = ()) -> None:
        batches = workload.make_batches(x[:count], y[:count], min(batch_size, count))
        try:
            model.fit(batches, shuffle=False, verbose=0, callbacks=[*timer])
        except Exception:  # with an average of the weights, Keras on JAX hides a signal behind an error of its own
            raise_if_stopped()
            raise
        # `fit` ends with the averages in the weights: on JAX in the same memory, which a next step takes over twice.
        if averages(model):
            assign_copies(variables, before)

    timer = StepTimer(budget_s, batches_per_step, raise_if_stopped)
    while not is_enough(timer.seconds[1:], budget_s):
        fit(whole, [timer])
    partial_s = 0.0
    if rest := len(x) % batch_size:
        partial_s = compiling(timed(fit, rest)[1], [timed(fit, rest)[1]])
    assign_copies(variables, before)
    return merge(step_sections(timer.seconds, budget_s), {"time": {"compile_s": {"partial_batch": partial_s}}})


def compiling_evaluation(evaluate: Callable, x: np.ndarray, y: np.ndarray, batch_size: int) -> Sections:
    """Compile time of evaluating a whole batch and the partial one at the end."""
    count = min(len(x), batch_size + len(x) % batch_size)
    first_s, second_s = (timed(evaluate, x[:count], y[:count])[1] for _ in range(2))
    return {"time": {"compile_s": {"evaluation": compiling(first_s, [second_s])}}}


def before_training(
    workload: Workload, budget_s: float, sensors: Sensors, raise_if_stopped: Callable[[], None]
) -> Iterator[Sections]:
    """Latency, throughput and energy of inference, step time and compile times, one after the other; leaves the model unchanged.

    `raise_if_stopped` is called again and again, and ends the measurement with its exception.
    """
    model, data, batch_size = workload.model, workload.data, workload.micro_batch_size

    def interruptible(function: Callable) -> Callable:
        def call(*arguments):
            raise_if_stopped()
            return function(*arguments)

        return call

    def evaluate(x: np.ndarray, y: np.ndarray) -> None:
        model.evaluate(x, y, batch_size, verbose=0)

    predict, bare = interruptible(model.predict_on_batch), bare_predict(model, data.x_test[:1])
    yield inference(predict, data.x_test, batch_size, budget_s)
    # The peak cannot be reset, and training holds more.
    yield {"memory": {"inference_peak_device_bytes": find_device().peak_memory_bytes}}
    batch = data.x_test[:batch_size]
    yield inference_energy(sensors, lambda: predict(batch), len(batch))
    yield bare_latency(bare and interruptible(bare), NOTHING_COMPILED, data.x_test, budget_s)
    yield steps(workload, budget_s, raise_if_stopped)
    yield compiling_evaluation(interruptible(evaluate), data.x_test, data.y_test, batch_size)


def waits(measured: Sections, build_s: float, ready_s: float) -> Sections:
    """What follows from what was `measured`: the total of compiling, and the wait until the first step.

    Building the model, in `build_s`, compiles many small programs on JAX; `ready_s` is the age of the process after it.
    """
    compile_s = {"build": build_s, **measured["time"]["compile_s"]}
    compile_s["total"] = sum(compile_s.values())
    return {"time": {"compile_s": compile_s, "to_first_step_s": ready_s + measured["time"]["first_step_s"]}}


def to_first_epoch(epochs: Sequence[Epoch], ready_s: float | None, measured: Sections) -> Sections:
    """The wait from the start of the process to the end of the first epoch, as if nothing had been measured in between.

    The process was `ready_s` old when the model was built; None where the run was resumed. What was compiled while `measured`
    was measured would otherwise have been compiled in the epoch.
    """
    if ready_s is None or not epochs:
        reason = "the run was resumed" if epochs else "no epoch is complete"
        return {"time": {"to_first_epoch_s": None}, "missing": {"time/to_first_epoch_s": reason}}
    compile_s = measured.get("time", {}).get("compile_s", {})
    earlier_s = sum(compile_s.get(part, 0.0) for part in ("train_step", "partial_batch", "evaluation"))
    return {"time": {"to_first_epoch_s": ready_s + earlier_s + epochs[0].end_s}}


def evaluation(evaluate: Callable[[], dict], images: int, budget_s: float) -> Sections:
    """The metrics that `evaluate` returns, and `evaluation_images_per_s`: the median of up to EVALUATIONS more calls.

    The first call may compile, and is left out. There is no second one, and no figure, where it takes longer than `budget_s`.
    """
    metrics, first_s = timed(evaluate)
    quality = {"quality": {"test": {f"test_{name}": value for name, value in metrics.items()}}}
    if first_s >= budget_s:
        reason = "--measure-seconds 0"
        if budget_s:
            reason = f"one evaluation takes longer than --measure-seconds {budget_s:g}"
        path = "time/evaluation_images_per_s"
        return merge(quality, {"time": {"evaluation_images_per_s": None}, "missing": {path: reason}})
    seconds: list[float] = []
    while not seconds or (len(seconds) < EVALUATIONS and first_s + sum(seconds) < budget_s):
        seconds.append(timed(evaluate)[1])
    return merge(quality, {"time": {"evaluation_images_per_s": images / statistics.median(seconds)}})
