"""Joules, watts, load and temperature, from the sensors of an NVIDIA GPU, a Jetson AGX Orin or the CPU package."""

import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgebench import nvml

FIGURES = ("joules_per_epoch", "joules_per_image", "mean_w", "peak_w", "utilization_percent", "max_temperature_c")
UNAVAILABLE = "unavailable: "  # begins a source that gives no figure
JETSON_RAILS = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}


class Reading(NamedTuple):
    """One reading of a sensor. `joules` is a counter that may wrap at `wraps_at`; without it, `watts` are integrated."""

    watts: float | None = None
    joules: float | None = None
    wraps_at: float = math.inf
    utilization_percent: float | None = None
    temperature_c: float | None = None


Sensor = tuple[str, Callable[[], Reading]]  # what is read, and how
Spans = list[list[tuple[float, Reading]]]  # (seconds, reading) of every span that was measured


def nvml_sensor(gpu_id: str | None) -> Sensor:
    """The NVIDIA GPU at this PCI address, through nvidia-ml-py."""
    gpu = nvml.Gpu(gpu_id)
    power = gpu.power()  # on a Jetson NVML starts, but answers NotSupported

    def read() -> Reading:
        watts, joules = power()
        return Reading(watts, joules, utilization_percent=gpu.utilization_percent(), temperature_c=gpu.temperature_c())

    return "NVML, the whole board", read


def ina3221_sensor(sysfs: Path = Path("/sys")) -> Sensor:
    """The module of a Jetson AGX Orin: three rails of the INA3221 at 1-0040, in mV and mA, whose sum is its power."""
    labels = sorted(sysfs.glob("bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon*/in*_label"))
    rails = [label for label in labels if label.read_text().strip() in JETSON_RAILS]
    if len(rails) != len(JETSON_RAILS):
        raise FileNotFoundError("the INA3221 rails of a Jetson AGX Orin are not there")
    volts = [label.with_name(label.name.replace("_label", "_input")) for label in rails]
    amperes = [path.with_name(path.name.replace("in", "curr", 1)) for path in volts]
    loads = [path for name in ("platform/gpu.0/load", "gpu.0/load") if (path := sysfs / "devices" / name).exists()]
    types = sysfs.glob("class/thermal/thermal_zone*/type")
    zones = [path.with_name("temp") for path in types if "gpu" in path.read_text().lower()]

    def read() -> Reading:
        temperature_c = None
        with contextlib.suppress(OSError, IndexError):  # the GPU's zone cannot be read while the GPU sleeps
            temperature_c = _number_in(zones[0]) / 1e3
        watts = sum(_number_in(v) * _number_in(a) for v, a in zip(volts, amperes, strict=True)) / 1e6
        utilization_percent = _number_in(loads[0]) / 10 if loads else None
        return Reading(watts, utilization_percent=utilization_percent, temperature_c=temperature_c)

    read()
    return "INA3221, the module's rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", read


def rapl_sensor(sysfs: Path = Path("/sys")) -> Sensor:
    """The first CPU package, through RAPL, which on most systems root alone may read."""
    zone = sysfs / "class/powercap/intel-rapl:0"
    wraps_at = _number_in(zone / "max_energy_range_uj") / 1e6

    def read() -> Reading:
        return Reading(joules=_number_in(zone / "energy_uj") / 1e6, wraps_at=wraps_at)

    read()  # fails now rather than later where it cannot be read
    return "RAPL, CPU package 0", read


def _number_in(path: Path) -> int:
    return int(path.read_text())


class EnergyMeter:
    """Energy between `begin` and `end`, which enclose one span each; a thread reads the sensor meanwhile.

    A span is the training part of one epoch, and its index in `spans` is that of the epoch. Those of an interrupted run that
    is continued come first.
    """

    INTERVAL_S = 0.2

    def __init__(self, source: str, read: Callable[[], Reading], spans: Spans = ()):
        self.source, self.read, self.spans, self.failure = source, read, list(spans), None

    def begin(self) -> None:
        self.spans.append([])
        self._sample()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_the_end, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._has_ended.set()
        self._thread.join()
        self._sample()

    def _sample_until_the_end(self) -> None:
        while not self._has_ended.wait(self.INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        try:
            reading = self.read()
            self.spans[-1].append((time.perf_counter(), reading))
        except Exception as error:  # the sensor is gone, and with it the joules since the last reading
            self.failure = self.failure or f"lost during the run ({error})"

    def figures(self, images: int, counted: Collection[int]) -> dict:
        """FIGURES and their `source`, over the epochs with the indices `counted`, each of `images` images.

        An epoch that the sensor has not seen, because an interrupted run had another one, does not count.
        """
        spans = [span for i, span in enumerate(self.spans) if i in counted and len(span) > 1]
        if self.failure or not spans:
            return unavailable(self.failure or "no epoch was measured but those that compile")
        joules = seconds = peak_w = 0.0
        for span in spans:
            for (then, last), (now, reading) in itertools.pairwise(span):
                interval = now - then
                if reading.joules is None:
                    spent, watts = interval * (last.watts + reading.watts) / 2, reading.watts
                else:
                    spent = (reading.joules - last.joules) % reading.wraps_at
                    # A counter moves in steps: over too short an interval it shows a peak that is none.
                    watts = reading.watts or (spent / interval if interval > self.INTERVAL_S / 2 else 0.0)
                joules, seconds, peak_w = joules + spent, seconds + interval, max(peak_w, watts)
        readings = [reading for span in spans for _, reading in span]
        loads = [reading.utilization_percent for reading in readings if reading.utilization_percent is not None]
        temperatures = [reading.temperature_c for reading in readings if reading.temperature_c is not None]
        return {
            "source": self.source,
            "joules_per_epoch": joules / len(spans),
            "joules_per_image": joules / len(spans) / images,
            "mean_w": joules / seconds,
            "peak_w": peak_w or None,
            "utilization_percent": statistics.fmean(loads) if loads else None,
            "max_temperature_c": max(temperatures, default=None),
        }


def unavailable(reason: str) -> dict:
    """FIGURES, all None, and as their `source` why."""
    return {"source": UNAVAILABLE + reason, **dict.fromkeys(FIGURES)}


Meters = dict[str, EnergyMeter | str]  # by part of the machine: its meter, or the reason why there is none
NOT_MEASURED: Meters = {"accelerator": "--measure-seconds 0", "cpu_package": "--measure-seconds 0"}


def start_meters(is_gpu: bool, gpu_id: str | None, spans: Mapping[str, list], epochs_done: int = 0) -> Meters:
    """Meters for the accelerator (on a Jetson the whole module) and the CPU package.

    `epochs_done` is the number of epochs of an interrupted run that goes on. The meters continue its `spans`, as
    `spans_as_json` gave them, where the sensor is the same.
    """
    gpu_sensors = [lambda: nvml_sensor(gpu_id), ina3221_sensor]
    accelerator = _first_working(gpu_sensors, spans, epochs_done) if is_gpu else "the backend runs on the CPU"
    return {"accelerator": accelerator, "cpu_package": _first_working([rapl_sensor], spans, epochs_done)}


def _first_working(sensors: Sequence[Callable], spans: Mapping[str, list], epochs_done: int) -> EnergyMeter | str:
    reasons = []
    for sensor in sensors:
        try:
            source, read = sensor()
        except OSError as error:  # no such file, no permission
            reasons.append(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        except Exception as error:  # no library, no driver: all mean no sensor
            reasons.append(str(error) or type(error).__name__)
        else:
            earlier = [[(seconds, Reading(*reading)) for seconds, reading in span] for span in spans.get(source, [])]
            not_seen = [[] for _ in range(epochs_done - len(earlier))]
            return EnergyMeter(source, read, [*not_seen, *earlier])
    return "; ".join(reasons)


def running(meters: Meters) -> list[EnergyMeter]:
    """The meters that there are."""
    return [meter for meter in meters.values() if isinstance(meter, EnergyMeter)]


def energy_figures(meters: Meters, images: int, counted: Collection[int]) -> dict[str, dict]:
    """The section of the results on energy, over the epochs with the indices `counted`, each of `images` images."""
    return {name: unavailable(m) if isinstance(m, str) else m.figures(images, counted) for name, m in meters.items()}


def of_epoch(meters: Meters, images: int, epoch: int) -> dict[str, float]:
    """Watts, and joules an image, in the training part of one epoch by its index: `accelerator_w`, `accelerator_j_per_image`."""
    found = {}
    for part, figures in energy_figures(meters, images, [epoch]).items():
        found |= {f"{part}_w": figures["mean_w"], f"{part}_j_per_image": figures["joules_per_image"]}
    return {name: value for name, value in found.items() if value is not None}


def inference_energy(meters: Meters, predict: Callable, images: int, min_s: float = 10.0) -> dict[str, dict]:
    """Sections of the results: joules an image by part of the machine, over a loop of `predict` of at least `min_s`.

    `predict` takes a batch of `images` images and waits for its result. What the machine draws when idle is included.
    Without a sensor nothing runs.
    """
    loop = {name: EnergyMeter(meter.source, meter.read) for name, meter in meters.items() if not isinstance(meter, str)}
    for meter in loop.values():
        meter.begin()
    began, batches = time.perf_counter(), 0
    while loop and time.perf_counter() - began < min_s:
        predict()
        batches += 1
    for meter in loop.values():
        meter.end()
    joules, missing = {}, {}
    for name, meter in meters.items():
        figures = unavailable(meter) if isinstance(meter, str) else loop[name].figures(batches * images, [0])
        joules[name] = figures["joules_per_image"]
        if joules[name] is None:
            missing[f"energy/inference_joules_per_image/{name}"] = figures["source"].removeprefix(UNAVAILABLE)
    return {"energy": {"inference_joules_per_image": joules}, "missing": missing}


def spans_as_json(meters: Meters) -> dict[str, Spans]:
    """Every span that was measured, by source; a reading becomes a list in JSON."""
    return {meter.source: meter.spans for meter in running(meters)}
