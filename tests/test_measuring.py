"""Promises about the times and FLOPs: each is right where the truth is known. test_machine.py tests energy, load and memory."""

import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TINY, only_results

import vit
from edgebench import datasets
from edgebench.cli import Interrupted
from edgebench.measure import costs, epochs, latency, meters, steps

COMPILE_S, STEP_S = 2.0, 0.04


def slow_layer() -> keras.layers.Layer:
    """A layer that takes `step_s` a training step, on JAX in the compiled, asynchronous step, and once COMPILE_S in Python."""
    from keras import backend

    class Slow(keras.layers.Layer):
        step_s, compiles_slowly, calls = 0.0, False, 0

        def call(self, x, training=False):
            if not training:
                return x
            self.calls += 1
            if self.compiles_slowly:
                self.compiles_slowly = False
                time.sleep(COMPILE_S)
            if backend.backend() == "jax":
                import jax

                def sleep():
                    time.sleep(self.step_s)
                    return np.float32(0)

                return x + jax.lax.stop_gradient(jax.pure_callback(sleep, jax.ShapeDtypeStruct((), np.float32)))
            time.sleep(self.step_s)
            return x

    return Slow()


def measured(step_s: float, small_batches: int = 1, compiles_slowly: bool = False, num_epochs: int = 0) -> dict:
    """The figures of a model whose step takes `step_s` more than its own time."""
    x, y = np.zeros((200, 4), "float32"), np.zeros(200, "int64")
    slow = slow_layer()
    model = keras.Sequential([keras.Input((4,)), slow, keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=small_batches if small_batches > 1 else None)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    slow.step_s, slow.compiles_slowly = step_s / small_batches, compiles_slowly
    before, batch_size = model.get_weights(), 20 // small_batches
    data = types.SimpleNamespace(x_train=x, y_train=y)
    workload = steps.Workload(model, data, datasets.ShuffledBatches, batch_size, small_batches)
    figures = steps.steps(workload, budget_s=60, raise_if_stopped=lambda: None)["time"]
    figures["compile_s"] = figures["compile_s"]["train_step"]
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True)), "the model has changed"
    assert int(optimizer.iterations) == 0
    if num_epochs:
        calls, slow.step_s = slow.calls, 5 * step_s  # ten such steps are long against what else an epoch spends time on
        recorder = epochs.EpochRecorder(meters.Meter({}))
        fit = {"batch_size": 20, "epochs": num_epochs, "verbose": 0, "validation_data": (x, y)}
        model.fit(x, y, callbacks=[recorder], **fit)
        assert keras.backend.backend() == "torch" or slow.calls == calls, "an epoch has compiled"
        figures["epoch_s"] = min(epoch.train_s for epoch in recorder.epochs)
    return figures


def timed_models() -> dict[str, dict]:
    return {
        "idle": measured(0.0, num_epochs=2),
        "slow": measured(STEP_S, num_epochs=2),
        "idle in two small batches": measured(0.0, small_batches=2),
        "slow in two small batches": measured(STEP_S, small_batches=2),
        "slow to compile": measured(0.0, compiles_slowly=True),
    }


@pytest.mark.alone
@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_times_come_out_right_on_a_model_whose_step_takes_a_known_time(backend, call_on):
    """A step that sleeps for a known time is compared with one that does not: Keras' own time drops out of the difference.

    A step of two small batches takes the time of both. Each time has three tries to be within 10 % of the truth, because a
    busy machine wakes sleepers late, sometimes in the one model and sometimes in the other.
    """
    truth = {"step_ms": 1e3 * STEP_S, "small_batches_ms": 1e3 * STEP_S, "epoch_s": 50 * STEP_S, "compile_s": COMPILE_S}
    found: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(3):
        figures = call_on(backend, timed_models).value
        idle, slow, idle_parts, slow_parts, compiling = figures.values()
        for step_ms in (slow["step_ms"], slow_parts["step_ms"]):
            assert step_ms["n"] >= 100 and step_ms["p50"] <= step_ms["p90"]
        found["step_ms"].append(slow["step_ms"]["p50"] - idle["step_ms"]["p50"])
        found["small_batches_ms"].append(slow_parts["step_ms"]["p50"] - idle_parts["step_ms"]["p50"])
        found["epoch_s"].append(slow["epoch_s"] - idle["epoch_s"])  # of ten steps: none is left on the device
        found["compile_s"].append(compiling["compile_s"] - idle["compile_s"])
        if all(any(one == pytest.approx(truth[name], rel=0.1) for one in tries) for name, tries in found.items()):
            return
    pytest.fail(f"not within 10 % of {truth}: {found}")


def test_the_file_follows_its_schema_and_holds_what_the_console_shows(run_vit, digits, tmp_path):
    """Another seed gives other numbers. Steps are whole batches. A figure that is missing says why."""
    flags = f"--no-use-wandb {TINY} --num-epochs 2 --checkpoint-path a.weights.h5 --node-name a/b --dataset {digits}"
    runs, results = [], []
    for more in ("--measure-seconds 0", "--measure-seconds 15 --seed 1 --verbose"):
        runs.append(run_vit(*flags.split(), *more.split(), "--batch-size", "64", "--gradient-accumulation-steps", "2"))
        assert runs[-1].status == 0, runs[-1]
        results.append(only_results(tmp_path))
        shutil.rmtree(tmp_path / "results")
    lines = [re.findall(r"^Epoch .*", run.stdout, re.MULTILINE) for run in runs]
    assert lines[0] != lines[1] and len(lines[0]) == 2 and max(map(len, sum(lines, []))) <= 80, runs
    labels = re.findall(r"^(result|training|time|latency|memory|energy|files|next) +\S", runs[0].stdout, re.MULTILINE)
    assert labels == ["result", "training", "time", "latency", "memory", "energy", "files", "next"], runs[0]
    assert "unavailable" not in runs[0].stdout and "--measure-seconds 0" in runs[0].stdout
    off, on = results
    for each in results:
        assert each["energy"]["accelerator"]["joules_per_image"] is None and each["load"]["cpu_s_per_wall_s"] > 0
        assert each["what"]["node"] == "a/b" and len(each["what"]["git_commit"] or "x" * 40) == 40
        assert each["what"]["micro_batches"] == 2
        assert each["what"]["compile_cache"]["state"] in ("cold", "warm", "partly warm")
        assert each["time"]["to_first_epoch_s"] > each["time"]["import_s"] + each["time"]["epoch_s"][0]
    assert "step_ms" not in off["time"]
    times = on["time"]
    assert times["step_ms"]["n"] >= 100 and times["latency_ms"]["p50"] >= times["bare_latency_ms"]["p50"]
    assert times["to_first_epoch_s"] > times["to_first_step_s"] > times["first_step_s"]
    parts = {name: seconds for name, seconds in times["compile_s"].items() if name != "total"}
    assert times["compile_s"]["total"] == pytest.approx(sum(parts.values())) and min(parts.values()) > 0
    shown = dict(re.findall(r"^  (\S+/\S+) +(\S.*)$", runs[1].stdout, re.MULTILINE))
    rate = times["train_images_per_s"]
    assert float(shown["time/train_images_per_s"].replace(",", "")) == pytest.approx(rate, rel=1e-3)
    gaps = dict(re.findall(r"^  unavailable \((.+)\): (.+)$", runs[1].stdout, re.MULTILINE))
    assert "energy/accelerator/joules_per_image" in gaps["the backend runs on the CPU"].split(", ")
    assert all(path in gaps[reason].split(", ") for path, reason in on["missing"].items())


def trained(jit: str, dataset: str) -> list[list[dict]]:
    """The epochs, of three steps, of one configuration: by itself, with measuring, and interrupted after its first epoch and resumed."""
    common = dict(image_size=16, patch_size=4, projection_dim=32, transformer_layers=1, mlp_head_units=[128])
    common |= dict(batch_size=431, num_epochs=2, dataset=dataset, use_wandb=False, jit=jit)
    config = vit.ViTConfig(**common, checkpoint_path=Path("a.weights.h5"), measure_seconds=0.0)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise Interrupted(signal.SIGTERM)

    def epochs(**changes) -> list[dict]:
        keras.utils.clear_session()
        return vit.run_experiment(replace(config, **changes))["quality"]["epochs"]

    histories = [epochs(), epochs(measure_seconds=1.0)]
    try:
        vit.run_experiment(replace(config, measure_seconds=0.0), callbacks=[Stop()])
    except Interrupted:
        histories.append(epochs(resume=True))
    return histories


# JAX op by op would take minutes.
MODES = [("jax", "on"), ("torch", "off"), ("torch", "on"), ("tensorflow", "off"), ("tensorflow", "on")]


@pytest.mark.parametrize(
    ("backend", "jit"),
    [
        mode if mode[0] == "jax" else pytest.param(*mode, marks=pytest.mark.slow)
        for mode in MODES
        if mode[0] in INSTALLED
    ],
)
def test_neither_measuring_nor_resuming_changes_what_is_learned(backend, jit, call_on, digits):
    """Number for number, on every backend and in every mode: tracing, too, leaves the random numbers alone."""
    plain, measured, resumed = call_on(backend, trained, jit, str(digits)).value
    assert plain == measured, "measured"
    assert plain == resumed, "resumed"


@pytest.mark.parametrize(("n", "known"), [(9, ()), (60, ("p50",)), (150, ("p50", "p90")), (700, ("p50", "p90", "p99"))])
def test_a_percentile_is_given_only_with_enough_calls(n, known):
    """Otherwise it says why. The interval of the 99th holds the truth."""
    seconds = np.random.default_rng(0).exponential(0.01, n).tolist()
    sections = latency.percentiles("time/step_ms", seconds, budget_s=60)
    figures = sections["time"]["step_ms"]
    assert [name for name in ("p50", "p90", "p99") if figures[name] is not None] == [*known]
    assert {path.split("/")[2] for path in sections["missing"]} == {
        name for name in latency.NEEDED if figures[name] is None
    }
    if "p99" in known:
        assert figures["p99_low"] < figures["p99"] < figures["p99_high"]
        assert figures["p99_low"] < 10 * np.log(100) < figures["p99_high"]


def test_the_age_of_a_process_counts_from_its_start():
    """The shell waits before it becomes Python, so that Python's own clock would miss that."""
    code = "from edgebench import process; print(process.age_s())"
    command = ["sh", "-c", f"sleep 0.5; exec {sys.executable} -c '{code}'"]
    began = time.perf_counter()
    age_s = float(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    assert 0.5 <= age_s <= time.perf_counter() - began + 0.02


def test_flops_agree_with_what_the_compiler_counts():
    """XLA's own count of the forward pass. It includes additions, so it may be a little higher."""
    import jax

    config = vit.ViTConfig(image_size=32, patch_size=4, projection_dim=32, transformer_layers=2, mlp_head_units=[64])
    images = np.zeros((1, 32, 32, 3), "float32")
    augmentation = vit.create_data_augmentation("fused", 32, datasets.channel_moments(images))
    model = vit.create_vit_classifier(config, (32, 32, 3), 10, augmentation)
    state = [variable.value for variable in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    cost = jax.jit(lambda x: model.stateless_call(*state, x)[0]).lower(images).compile().cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
    size, patches = (
        costs.vit_size(config.as_json(), 3, 10),
        2 * 64 * 48 * 32,
    )  # the projection of 64 patches of 48 values to 32
    forward = (size.train_flops_per_image + patches) / 3  # backward, the patches need no gradient
    assert counted * 0.85 < forward <= counted
    assert costs.vit_size(vit.ViTConfig().as_json(), 3, 100).train_flops_per_image == pytest.approx(1.2e9, rel=0.1)
