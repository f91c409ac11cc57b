"""What the hand-written peers share: the run of vit.py, with its data, its meters and its results file.

A peer brings the model and the step. All that is measured, and the order and the way in which it is, stands in vit.py and
here, once for both peers; the loop over an epoch is here as well, and does nothing but launch steps.
"""

from __future__ import annotations

import importlib.metadata
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace

import h5py
import numpy as np

import vit


class EpochMeter(vit.EpochMeter):
    """vit.py's, for a device that has been waited for when the training part of an epoch is over."""

    def _end_training_part(self):
        self.train_s.append(time.perf_counter() - self._epoch_began)
        for meter in self.meters:
            meter.end()


class Peer:
    """A peer as vit.py's measuring code takes it, plus the loops that both have."""

    stop_training = False  # vit.StepTimer sets it

    def __init__(self, native, data: vit.Dataset, config: vit.ViTConfig):
        self.native, self.config, self.count = native, config, len(data.x_train)
        self.rng = np.random.default_rng(config.seed)
        self.predict_on_batch = native.predict

    def train_epoch(self) -> np.ndarray:
        """A pass over the training images in a new order -> the sums of its metrics, for which it waits."""
        self.native.begin_epoch(self.rng.permutation(self.count), int(self.rng.integers(2**31)))
        for start in range(0, self.count, self.config.batch_size):
            self.native.train_step(start, min(self.config.batch_size, self.count - start))
        return self.native.totals()

    def measure_steps(self, budget_s: float) -> dict:
        """vit._measure_steps: the first step, which compiles, and steady ones, each waited for."""
        native, size = self.native, min(self.config.batch_size, self.count)
        before, timer, step = native.snapshot(), vit.StepTimer(budget_s), 0
        native.begin_epoch(np.arange(self.count), self.config.seed)
        timer.set_model(self)
        while not self.stop_training:
            start = step % (self.count // size) * size
            timer.on_train_batch_begin(step)
            timer.on_train_batch_end(step, {"loss": native.train_step(start, size)})
            step += 1
        if rest := self.count % size:  # compiled now, so that the first epoch is as steady as the others
            native.train_step(0, rest)
        native.totals()
        native.set_params(before)
        first, *steady = timer.seconds
        return {
            "first_step_s": first,
            "compile_s": max(first - statistics.median(steady), 0.0),
            "step_ms": vit._percentiles_ms(steady),
        }


def check(config: vit.ViTConfig) -> None:
    """Refuse what the peers do not have."""
    vit._require(config.augmentation == "fused", "the hand-written peers have --augmentation fused only")
    vit._require(not config.resume, "the hand-written peers have no --resume")
    vit._require(not config.fit_batch, "the hand-written peers have no --fit-batch")


def run(native_class, config: vit.ViTConfig) -> dict:
    """Measure, train, evaluate and write the results, as vit.run_experiment does."""
    vit._set_tf32(config.tf32)
    vit._require_working_device(config.device)
    results = {"schema_version": vit.SCHEMA_VERSION, "status": "complete", "failure": None}
    what = results["what"] = vit._what_runs(config)
    packages = {name: importlib.metadata.version(name) for name in native_class.packages}
    versions = {"Python": what["versions"]["Python"], **packages, "CUDA": what["versions"]["CUDA"]}
    what |= {"backend": native_class.name, "versions": versions, "dtype_policy": config.dtype_policy}
    what |= {"micro_batches": 1, "resumed_after_epochs": []}
    timing = results["time"] = {"import_s": time.perf_counter() - vit._STARTED}
    print(f"{native_class.name} on {what['device']}, node {config.node_name}, {packages}")

    began = time.perf_counter()
    data = vit.load_dataset(config)
    timing["load_s"] = time.perf_counter() - began
    what["images"] = {"train": len(data.x_train), "validation": len(data.x_val), "test": len(data.x_test)}
    what["image_shape"], what["num_classes"] = list(data.image_shape), data.num_classes

    began = time.perf_counter()
    native = native_class(config, data, *channel_moments(data.x_train))
    peer = Peer(native, data, config)
    timing["build_s"] = time.perf_counter() - began
    what |= {"attention": native.attention, "num_parameters": native.num_parameters}
    what |= {"jit_compile": native.is_compiled, "jit_failure": None}
    what["train_flops_per_image"] = vit._train_flops_per_image(config, data.image_shape[2], data.num_classes)
    print(f"model: {what['num_parameters']:,} trainable parameters")
    train_and_measure(config, data, peer, results)
    vit._print_table(results)
    vit._write_results(config.results_dir, results)
    return results


def channel_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, in float32."""
    axes = (0, 1, 2)
    return images.mean(axes, dtype=np.float64).astype(np.float32), images.std(axes, dtype=np.float64).astype(np.float32)


def train_and_measure(config: vit.ViTConfig, data: vit.Dataset, peer: Peer, results: dict) -> None:
    """vit._train_and_measure, for a peer."""
    native, timing, budget_s = peer.native, results["time"], config.measure_seconds
    memory = results["memory"] = {"inference_peak_device_bytes": None}
    meters = dict.fromkeys(("accelerator", "cpu_package"), "not measured")
    if budget_s:
        timing |= vit._measure_inference(peer, data.x_test, config.batch_size, budget_s)
        memory["inference_peak_device_bytes"] = vit._device()["peak_bytes"]
        timing |= peer.measure_steps(budget_s)
        meters = vit._start_meters(results["what"]["is_gpu"])

    validation = native.on_device(data.x_val, data.y_val) if len(data.x_val) else None
    epochs = EpochMeter([meter for meter in meters.values() if isinstance(meter, vit.EnergyMeter)])
    history, best, best_epoch, best_accuracy = [], None, 0, -math.inf
    epochs.on_train_begin()
    for epoch in range(config.num_epochs):
        epochs.on_epoch_begin(epoch)
        totals = peer.train_epoch()
        epochs.on_test_begin()
        logs = figures(totals, len(data.x_train))
        if not math.isfinite(logs["loss"]):
            raise vit.Diverged(f"the loss is not a finite number in epoch {epoch + 1}; lower --learning-rate")
        params = native.snapshot()
        if validation:
            logs |= figures(native.evaluate(params, *validation), len(data.x_val), "val_")
        accuracy = logs.get("val_accuracy", math.inf)
        if accuracy > best_accuracy or not validation:
            best, best_epoch, best_accuracy = params, epoch + 1, accuracy
            with vit._replacing(config.checkpoint_path) as scratch, h5py.File(scratch, "w") as file:
                for name, array in native.arrays(params).items():
                    file[name] = array
        history.append(logs)
        epochs.on_epoch_end(epoch)
        told = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        print(f"epoch {epoch + 1}/{config.num_epochs}: {epochs.train_s[-1]:.1f} s, {told}", flush=True)

    vit._record_training(
        results,
        len(data.x_train),
        epochs,
        SimpleNamespace(progress={"epochs": history, "resumed_after_epochs": []}),
    )
    results["energy"] = {
        part: vit._no_energy(meter) if isinstance(meter, str) else meter.summary(len(data.x_train))
        for part, meter in meters.items()
    }
    seconds = []
    while len(seconds) < 2:  # the first time may compile
        began = time.perf_counter()
        totals = native.evaluate(best, *native.on_device(data.x_test, data.y_test))
        seconds.append(time.perf_counter() - began)
        if seconds[0] >= budget_s:
            break
    else:
        timing["evaluation_images_per_s"] = len(data.x_test) / seconds[1]
    results["quality"] |= {
        "best_epoch": best_epoch,
        "best_epoch_s": epochs.wall_s[best_epoch - 1],
        "test": figures(totals, len(data.x_test), "test_"),
    }
    memory["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def figures(totals: Sequence[float], count: int, prefix: str = "") -> dict[str, float]:
    """Means under the names that Keras gives them in vit.py."""
    names = ("loss", "accuracy", "top-5-accuracy")
    return {prefix + name: float(total) / count for name, total in zip(names, totals, strict=True)}


def main(native_class, argv: Sequence[str]) -> None:
    with vit._errors_in_one_line("--debug" in argv):
        config = vit._set_backend_from_env_or_cli(argv)
        check(config)
        native_class.configure()
        run(native_class, config)


if __name__ == "__main__":
    sys.exit("python peers/native_jax.py or python peers/native_torch.py")
