"""What the hand-written peers share: the run of vit.py, with its data, its measuring and its results file.

A peer brings the model and the step. The loop over an epoch is here, and does nothing but launch steps.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Iterator, Sequence

import h5py
import keras
import numpy as np

import vit
from edgebench import datasets, process
from edgebench.callbacks import require_finite
from edgebench.cli import ExperimentError, errors_in_one_line, flag, require
from edgebench.device import find_device, prepare
from edgebench.files import replacing
from edgebench.measure import latency, steps
from edgebench.measure.costs import vit_size
from edgebench.measure.latency import timed
from edgebench.measure.meters import inference_energy
from edgebench.measure.sensors import Sensors
from edgebench.record import console
from edgebench.record.recorder import Program, Recorder

# The flags on the model and the training that the peers have; of the others they have the default only.
HAVE = {"image_size", "patch_size", "projection_dim", "num_heads", "transformer_layers", "transformer_units"}
HAVE |= {"mlp_head_units", "attention_dropout", "recipe", "learning_rate", "weight_decay", "batch_size", "num_epochs"}
HAVE |= {"validation_split", "seed"}


def check(config: vit.ViTConfig) -> None:
    """Refuse the flags that the peers do not have."""
    defaults = vit.ViTConfig()
    for name, known in vit.FLAGS.items():
        value, default = getattr(config, name), getattr(defaults, name)
        if known.group in ("model", "training") and name not in HAVE and value != default:
            raise ExperimentError(f"the hand-written peers have no {flag(name)} {value}, only {default}")
    require(bool(config.mlp_head_units), "the hand-written peers need at least one of --mlp-head-units")


def run_experiment(native_class, config: vit.ViTConfig, callbacks: Sequence[keras.callbacks.Callback] = ()) -> dict:
    """Measure, train, evaluate and record as vit.run_experiment does; `callbacks` are called as Keras would, but not for batches."""
    machine = prepare(config.device, config.seed, config.dtype_policy, config.tf32)
    packages = {name: importlib.metadata.version(name) for name in native_class.packages}
    program = Program(native_class.name, packages, vit.ENVIRONMENT, vit.IMPORT_S)
    console.print_start(program.versions(machine), machine.name, config.as_json(), vit.ViTConfig().as_json())
    data, load_s = timed(vit.load_dataset, config.dataset, config.validation_split, config.seed)
    size = vit_size(config.as_json(), data.image_shape[2], data.num_classes)

    with Recorder(config, program, machine, size) as run:
        run.describe(**data.describe())
        native, build_s = timed(native_class, config, data, *normalization(data.moments))
        run.add({"time": {"load_s": load_s}})
        run.built(build_s, attention=native.attention, num_parameters=native.num_parameters)
        run.describe_compilation(native.is_compiled)
        print(f"model: {native.num_parameters:,} trainable parameters")
        run.measure(measure_native(native, data, config.batch_size, config.measure_seconds, run.sensors))

        # Train; train_epoch has waited for the device
        recorder = run.record_epochs(len(data.x_train), require_finite, wait=lambda: None)
        lines = console.EpochLines(len(data.x_train), recorder)
        lines.set_params({"epochs": config.num_epochs})
        best, best_epoch = train(native, config, data, [recorder, lines, *callbacks])
        run.add({"files": {"weights": str(config.checkpoint_path)}})

        # Evaluate
        def evaluate() -> dict:
            return means(native.evaluate(best, *native.on_device(data.x_test, data.y_test)), len(data.x_test))

        run.add(steps.evaluation(evaluate, len(data.x_test), config.measure_seconds))
        run.add({"quality": {"best_epoch": best_epoch, "best_epoch_s": recorder.epochs[best_epoch - 1].end_s}})
        run.describe_compilation(native.is_compiled)  # the caches have been read by now
    return run.results


def train(native, config: vit.ViTConfig, data: vit.Dataset, callbacks: Sequence[keras.callbacks.Callback]) -> tuple:
    """Train for all epochs -> the weights of the best one by validation accuracy, which are also written, and its number."""
    images = len(data.x_train)
    validation = native.on_device(data.x_val, data.y_val) if len(data.x_val) else None
    best, best_epoch, best_accuracy = None, 0, -math.inf
    for callback in callbacks:
        callback.on_train_begin()
    for epoch in range(config.num_epochs):
        for callback in callbacks:
            callback.on_epoch_begin(epoch)
        logs = means(train_epoch(native, config.seed, epoch, images, config.batch_size), images)
        for callback in callbacks:
            callback.on_test_begin()
        require_finite(epoch, logs)  # before its weights can be the best
        params = native.snapshot()
        if validation:
            logs |= means(native.evaluate(params, *validation), len(data.x_val), "val_")
        if not validation or logs["val_accuracy"] > best_accuracy:
            best, best_epoch, best_accuracy = params, epoch + 1, logs.get("val_accuracy", math.inf)
            with replacing(config.checkpoint_path) as scratch, h5py.File(scratch, "w") as file:
                for name, array in native.arrays(params).items():
                    file[name] = array
        for callback in callbacks:
            callback.on_epoch_end(epoch, logs)
    return best, best_epoch


def normalization(moments: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, in float32."""
    mean, variance = moments
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def train_epoch(native, seed: int, epoch: int, images: int, batch_size: int) -> np.ndarray:
    """A pass over the training images in vit.py's order -> the sums of its metrics, for which it waits."""
    native.begin_epoch(datasets.image_order(seed, epoch, images), (seed + epoch) % 2**31)
    for start in range(0, images, batch_size):
        native.train_step(start, min(batch_size, images - start))
    return native.totals()


def measure_native(
    native, data: vit.Dataset, batch_size: int, budget_s: float, sensors: Sensors
) -> Iterator[latency.Sections]:
    """steps.before_training for a peer: inference, steps, each waited for, and what compiles for the first time."""
    yield latency.inference(native.predict, data.x_test, batch_size, budget_s)
    yield {"memory": {"inference_peak_device_bytes": find_device().peak_memory_bytes}}
    batch = data.x_test[:batch_size]
    yield inference_energy(sensors, lambda: native.predict(batch), len(batch))
    yield steps.bare_latency(None, "there is no Keras around the peer's own call", data.x_test, budget_s)
    images = len(data.x_train)
    size, before = min(batch_size, images), native.snapshot()
    native.begin_epoch(np.arange(images), 0)

    def step(start: int, size: int) -> float:
        return float(native.train_step(start, size))  # waits for the device

    seconds: list[float] = []
    while not latency.is_enough(seconds[1:], budget_s):
        start = len(seconds) % (images // size) * size
        seconds.append(timed(step, start, size)[1])
    partial_s = 0.0
    if rest := images % size:  # compiled now, so that the first epoch is as steady as the others
        first_s, second_s = (timed(step, 0, rest)[1] for _ in range(2))
        partial_s = latency.compiling(first_s, [second_s])
    native.totals()
    native.set_params(before)
    yield steps.step_sections(seconds, budget_s)
    yield {"time": {"compile_s": {"partial_batch": partial_s}}}

    def evaluate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return native.evaluate(before, *native.on_device(x, y))

    yield steps.compiling_evaluation(evaluate, data.x_test, data.y_test, size)


def means(totals: Sequence[float], count: int, prefix: str = "") -> dict[str, float]:
    """Means under the names that Keras gives them in vit.py."""
    names = ("loss", "accuracy", "top-5-accuracy")
    return {prefix + name: float(total) / count for name, total in zip(names, totals, strict=True)}


def main(native_class, argv: Sequence[str], callbacks: Sequence[keras.callbacks.Callback] = ()) -> None:
    """Run a peer with the flags of vit.py; an expected failure becomes one line and an exit status."""
    with errors_in_one_line("--debug" in argv):
        config = vit.read_config(argv)
        check(config)
        vit.require_places(config)
        process.set_environment(config.device, config.compile_cache)
        native_class.configure()
        run_experiment(native_class, config, callbacks)


if __name__ == "__main__":
    sys.exit("python peers/native_jax.py or python peers/native_torch.py")
