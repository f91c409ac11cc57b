"""Promises about the figures: each is right where the truth is known, and absent, not 0, where it cannot be had."""

import json
import os
import re
import subprocess
import sys
import time
import types

import jsonschema
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TINY

import vit

SCHEMA = json.loads((ROOT / "results.schema.json").read_text())


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def orin(sysfs) -> None:
    """The sensors of a Jetson AGX Orin as files: 10 V * 2 A + 5 V * 1 A + 5 V * 3 A = 40 W, and a rail that must not count."""
    chip = sysfs / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4"
    for number, (label, mv, ma) in enumerate(
        [
            ("VDD_GPU_SOC", 10_000, 2_000),
            ("VDD_CPU_CV", 5_000, 1_000),
            ("VIN_SYS_5V0", 5_000, 3_000),
            ("NC", 9_000, 9_000),
        ],
        1,
    ):
        write(chip / f"in{number}_label", label)
        write(chip / f"in{number}_input", mv)
        write(chip / f"curr{number}_input", ma)
    write(sysfs / "devices/platform/gpu.0/load", 873)
    write(sysfs / "class/thermal/thermal_zone0/type", "cpu-thermal")
    write(sysfs / "class/thermal/thermal_zone0/temp", 99_000)
    write(sysfs / "class/thermal/thermal_zone1/type", "gpu-thermal")
    write(sysfs / "class/thermal/thermal_zone1/temp", 51_500)


def test_joules_of_a_jetson_are_watts_times_seconds(tmp_path):
    orin(tmp_path)
    meter = vit.EnergyMeter(*vit._ina3221_sensor(tmp_path))
    seconds = 0.0
    for _ in range(2):  # two epochs, and a pause between them that must not count
        began = time.perf_counter()
        meter.begin()
        time.sleep(0.5)
        meter.end()
        seconds += time.perf_counter() - began
        time.sleep(0.3)
    figures = meter.summary(images=50)
    assert figures["joules_per_epoch"] == pytest.approx(40 * seconds / 2, rel=0.1)  # a busy machine; the pause is 0.3
    assert figures["joules_per_image"] == pytest.approx(figures["joules_per_epoch"] * 2 / 100)
    assert figures["mean_w"] == pytest.approx(40) and figures["peak_w"] == pytest.approx(40)
    assert (figures["utilization_percent"], figures["max_temperature_c"]) == (pytest.approx(87.3), 51.5)
    assert len(meter.spans[0]) >= 3  # more than 1 Hz


def test_a_sensor_that_vanishes_during_the_run_gives_no_figure(tmp_path):
    orin(tmp_path)
    meter = vit.EnergyMeter(*vit._ina3221_sensor(tmp_path))
    meter.begin()
    next(tmp_path.glob("bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4/curr1_input")).unlink()
    meter.end()
    figures = meter.summary(1)
    assert figures.pop("source").startswith("unavailable: lost during the run") and set(figures.values()) == {None}


def test_a_counter_that_wraps_loses_nothing(tmp_path):
    zone = tmp_path / "class/powercap/intel-rapl:0"
    write(zone / "max_energy_range_uj", 262_143_000_000)
    write(zone / "energy_uj", 262_142_000_000)
    meter = vit.EnergyMeter(*vit._rapl_sensor(tmp_path))
    meter.begin()
    write(zone / "energy_uj", 5_000_000)
    meter.end()
    write(zone / "energy_uj", 900_000_000)  # spent between the epochs
    meter.begin()
    write(zone / "energy_uj", 901_500_000)
    meter.end()
    assert meter.summary(1)["joules_per_epoch"] == pytest.approx((1 + 5 + 1.5) / 2)


@pytest.mark.parametrize("has_counter", [True, False])
def test_joules_of_an_nvidia_gpu_come_from_its_counter_else_from_its_watts(has_counter, monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_TEMPERATURE_GPU = type("NVMLError", (Exception,), {}), 0
    counter_mj = iter(range(1_000_000, 10**9, 7_000))

    def energy(_):
        if not has_counter:
            raise nvml.NVMLError("NotSupported")
        return next(counter_mj)

    nvml.nvmlInit, nvml.nvmlDeviceGetHandleByIndex = lambda: None, lambda index: index
    nvml.nvmlDeviceGetTotalEnergyConsumption = energy
    nvml.nvmlDeviceGetPowerUsage = lambda _: 80_000
    nvml.nvmlDeviceGetUtilizationRates = lambda _: types.SimpleNamespace(gpu=95)
    nvml.nvmlDeviceGetTemperature = lambda *_: 70
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = vit.EnergyMeter(*vit._nvml_sensor())
    meter.begin()
    time.sleep(0.45)
    meter.end()
    (span,), figures = meter.spans, meter.summary(1)
    expected = 7 * (len(span) - 1) if has_counter else 80 * (span[-1][0] - span[0][0])
    assert figures["joules_per_epoch"] == pytest.approx(expected)
    assert (figures["peak_w"], figures["utilization_percent"], figures["max_temperature_c"]) == (80, 95, 70)


def test_sensors_that_are_not_there_say_why():
    meters = vit._start_meters(is_gpu=False)
    assert meters["accelerator"] == "the backend runs on the CPU"
    figures = vit._no_energy(meters["accelerator"])
    assert figures.pop("source") == "unavailable: the backend runs on the CPU" and set(figures.values()) == {None}


TIMED = """
import json, sys, time
sys.path.insert(0, ROOT)
import keras, numpy as np, vit
from keras import layers, ops

COMPILE_S = 3.0

class Slow(layers.Layer):
    '''Takes `step_s` a training step, on JAX inside the compiled and asynchronous step, and once COMPILE_S in Python.'''
    step_s, armed, called = 0.0, False, 0
    def call(self, x, training=False):
        Slow.called += training
        if training and Slow.armed:
            Slow.armed = False
            time.sleep(COMPILE_S)
        if not training:
            return x
        if keras.backend.backend() == "jax":
            import jax
            def sleep():
                time.sleep(Slow.step_s)
                return np.float32(0)
            return x + jax.lax.stop_gradient(jax.pure_callback(sleep, jax.ShapeDtypeStruct((), np.float32)))
        time.sleep(Slow.step_s)
        return x

def measure(step_s, armed):
    model = keras.Sequential([keras.Input((4,)), Slow(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    Slow.step_s, Slow.armed = step_s, armed
    before = model.get_weights()
    figures = vit._measure_steps(model, x, y, 20, budget_s=60)
    assert all((a == b).all() for a, b in zip(before, model.get_weights())), "the model has changed"
    assert int(model.optimizer.iterations) == 0
    if armed:
        return figures
    called = Slow.called
    Slow.step_s = 5 * step_s  # ten such steps are long against what else an epoch spends its time on
    epochs = vit.EpochMeter([])
    model.fit(x, y, batch_size=20, epochs=3, verbose=0, callbacks=[epochs], validation_data=(x, y))
    assert keras.backend.backend() == "torch" or Slow.called == called, "an epoch has compiled"
    return {**figures, "epoch_s": min(epochs.train_s)}

x, y = np.zeros((200, 4), "float32"), np.zeros(200, "int64")
print(json.dumps([measure(0.0, armed=False), measure(0.06, armed=False), measure(0.06, armed=True)]))
"""


@pytest.mark.alone
@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_times_come_out_right_on_a_model_whose_step_takes_a_known_time(backend, tmp_path):
    """A step that sleeps for a known time against the same one that does not: Keras' own time, whatever it is here, drops out.

    Each time has three tries to be within 10 % of the truth, as a machine that does other things at the same time wakes
    sleepers late, and now in the one run, now in the other.
    """
    command = [sys.executable, "-c", TIMED.replace("ROOT", repr(str(ROOT)))]
    env = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    truth = {"step_ms": 60, "epoch_s": 3, "compile_s": 3}
    found = {name: [] for name in truth}
    for _ in range(3):
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        idle, slow, compiling = json.loads(done.stdout.splitlines()[-1])
        assert slow["step_ms"]["n"] >= 100
        assert slow["step_ms"]["p50"] <= slow["step_ms"]["p90"] <= slow["step_ms"]["p99"]
        found["step_ms"].append(slow["step_ms"]["p50"] - idle["step_ms"]["p50"])
        found["epoch_s"].append(slow["epoch_s"] - idle["epoch_s"])  # of ten steps: none is left on the device
        found["compile_s"].append(compiling["compile_s"] - slow["compile_s"])
        if all(any(one == pytest.approx(truth[name], rel=0.1) for one in tries) for name, tries in found.items()):
            return
    pytest.fail(f"not within 10 % of {truth}: {found}")


def test_measuring_changes_nothing_and_everything_is_recorded(run_vit, digits, tmp_path):
    """The same numbers with and without it; the file follows its schema, and holds what the console shows."""
    flags = f"--no-use-wandb {TINY} --num-epochs 2 --checkpoint-path a.weights.h5 --node-name a/b".split()
    runs = [run_vit(*flags, "--dataset", str(digits), "--measure-seconds", seconds) for seconds in ("0", "20")]
    lines = [re.findall(r"(?:loss|accuracy): ([\d.]+)", run.stdout) for run in runs]
    assert runs[0].status == runs[1].status == 0 and lines[0] == lines[1] and len(lines[0]) == 12, runs
    off, on = sorted(
        map(json.loads, (path.read_text() for path in (tmp_path / "results").iterdir())), key=lambda r: len(r["time"])
    )
    for results in (off, on):
        jsonschema.validate(results, SCHEMA)
        assert results["energy"]["accelerator"]["joules_per_image"] is None
        assert results["what"]["node"] == "a/b" and len(results["what"]["git_commit"] or "x" * 40) == 40
    assert "step_ms" not in off["time"] and on["time"]["step_ms"]["n"] == on["time"]["latency_ms"]["n"] == 100
    assert off["quality"]["test"] == on["quality"]["test"]
    shown = dict(re.findall(r"^  (\S+/\S+) +(\S+)$", runs[1].stdout, re.MULTILINE))
    assert float(shown["time/train_images_per_s"].replace(",", "")) == pytest.approx(
        on["time"]["train_images_per_s"], rel=1e-3
    )
    assert shown["energy/accelerator/joules_per_image"] == "unavailable"


def test_flops_agree_with_what_the_compiler_counts():
    """XLA's own count of the forward pass; it also counts additions, so it may lie a little above."""
    import jax

    config = vit.ViTConfig(image_size=32, patch_size=4, projection_dim=32, transformer_layers=2, mlp_head_units=[64])
    images = np.zeros((1, 32, 32, 3), "float32")
    model = vit.create_vit_classifier(config, (32, 32, 3), 10, vit.create_data_augmentation(config, images))
    state = [variable.value for variable in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    cost = jax.jit(lambda x: model.stateless_call(*state, x)[0]).lower(images).compile().cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
    assert counted * 0.85 < vit._train_flops_per_image(config, 3, 10) / 3 <= counted
    assert vit._train_flops_per_image(vit.ViTConfig(), 3, 100) == pytest.approx(1.2e9, rel=0.1)
