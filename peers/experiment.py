"""What the hand-written peers share: the run of vit.py, with its data, its measuring and its results file.

A peer brings the model and the step. The loop over an epoch is here, and does nothing but launch steps.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import time
from collections.abc import Sequence

import h5py
import keras
import numpy as np

import vit
from edgebench import datasets, process
from edgebench.callbacks import StopSignals, require_finite
from edgebench.cli import ExperimentError, errors_in_one_line, flag, require
from edgebench.compile_cache import CompileCache
from edgebench.console import EpochLines
from edgebench.device import backend_threads, find_device, prepare
from edgebench.files import replacing
from edgebench.measure import latency, meters, steps
from edgebench.measure.costs import vit_size
from edgebench.measure.epochs import EpochRecorder, training_figures
from edgebench.measure.sensors import Sensors, find_sensors, peak_rss_bytes
from edgebench.results import recording, start_results

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
    results = start_results(
        native_class.name, packages, machine, config.as_json(), vit.ViTConfig().as_json(), vit.ENVIRONMENT, vit.IMPORT_S
    )
    what, budget_s, cache = results["what"], config.measure_seconds, CompileCache()

    # Load
    began = time.perf_counter()
    data = vit.load_dataset(config.dataset, config.validation_split, config.seed)
    results["time"]["load_s"] = time.perf_counter() - began
    size = vit_size(config.as_json(), data.image_shape[2], data.num_classes)
    what |= data.describe() | {"resumed_after_epochs": [], "train_flops_per_image": size.train_flops_per_image}

    with StopSignals() as signals, recording(results, config.results_dir, signals):
        # Build
        began = time.perf_counter()
        native = native_class(config, data, *normalization(data.moments))
        results["time"]["build_s"] = build_s = time.perf_counter() - began
        ready_s = process.age_s()
        what |= {"attention": native.attention, "num_parameters": native.num_parameters}
        what |= {"jit_compile": native.is_compiled, "jit_failure": None}
        print(f"model: {what['num_parameters']:,} trainable parameters")

        # Measure
        sensors = find_sensors(machine.is_gpu, machine.gpu_id)
        measured: latency.Sections = {}
        if budget_s:
            sections = measure_native(native, data, config.batch_size, budget_s, sensors)
            measured = steps.finish(sections, build_s, ready_s)

        # Train
        recorder = EpochRecorder(
            meters.Meter(meters.all_of(sensors)),
            compiles_first=not budget_s,
            check=require_finite,
            wait=lambda: None,  # train_epoch has waited
        )
        lines = EpochLines(len(data.x_train), recorder)
        lines.set_params({"epochs": config.num_epochs})
        best, best_epoch = train(native, config, data, [recorder, lines, *callbacks])
        results["files"] = {"weights": str(config.checkpoint_path), "resume": None}

        # Evaluate and record
        def evaluate() -> dict:
            return means(native.evaluate(best, *native.on_device(data.x_test, data.y_test)), len(data.x_test), "test_")

        training = training_figures(recorder.epochs, len(data.x_train), sensors, what, backend_threads())
        waiting = steps.to_first_epoch(recorder.epochs, ready_s, measured)
        for section, figures in latency.merge(measured, training, waiting).items():
            results[section] = results.get(section, {}) | figures
        what["compile_cache"] = cache.describe(native.is_compiled)
        test, evaluation = steps.evaluation(evaluate, len(data.x_test), budget_s)
        for section, figures in evaluation.items():
            results[section] |= figures
        results["memory"]["train_peak_device_bytes"] = find_device().peak_memory_bytes
        results["memory"]["peak_rss_bytes"] = peak_rss_bytes()
        results["quality"] |= {
            "best_epoch": best_epoch,
            "best_epoch_s": recorder.epochs[best_epoch - 1].end_s,
            "test": test,
        }
    return results


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


def measure_native(native, data: vit.Dataset, batch_size: int, budget_s: float, sensors: Sensors) -> latency.Sections:
    """steps.before_training for a peer: inference, steps, each waited for, and what compiles for the first time."""
    predicting = latency.inference(native.predict, data.x_test, batch_size, budget_s)
    memory = {"memory": {"inference_peak_device_bytes": find_device().peak_memory_bytes}}
    batch = data.x_test[:batch_size]
    joules = meters.inference_energy(sensors, lambda: native.predict(batch), len(batch))
    images = len(data.x_train)
    size, before = min(batch_size, images), native.snapshot()
    native.begin_epoch(np.arange(images), 0)

    def step(start: int, size: int) -> float:
        return float(native.train_step(start, size))  # waits for the device

    seconds: list[float] = []
    while not latency.is_enough(seconds[1:], budget_s):
        start = len(seconds) % (images // size) * size
        seconds.append(latency.timed(step, start, size)[1])
    partial_s = 0.0
    if rest := images % size:  # compiled now, so that the first epoch is as steady as the others
        first_s, second_s = (latency.timed(step, 0, rest)[1] for _ in range(2))
        partial_s = latency.compiling(first_s, [second_s])
    native.totals()
    native.set_params(before)

    def evaluate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return native.evaluate(before, *native.on_device(x, y))

    evaluating = steps.compiling_evaluation(evaluate, data.x_test, data.y_test, size)
    no_bare_call = steps.bare_latency(None, "there is no Keras around the peer's own call", data.x_test, budget_s)
    parts = steps.step_sections(seconds, budget_s), {"compile_s": {"partial_batch": partial_s}}, evaluating
    return latency.merge(predicting, memory, joules, no_bare_call, *parts)


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
