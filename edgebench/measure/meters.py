"""One thread that reads all sensors during a span; and the figures of the results that the records of spans give.

Imports no Keras: a deployed file is measured by the same rules.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from edgebench.measure.sensors import Energy, Load, LoadSensor, PowerSensor, Sensors

ENERGY_FIGURES = (
    "joules_per_epoch",
    "joules_per_image",
    "mean_w",
    "peak_w",
    "utilization_percent",
    "max_temperature_c",
)
UNAVAILABLE = "unavailable: "  # begins a source that gives no figure
NO_EPOCH = "no epoch was measured but those that compile"
BUSY_SHARE = 0.1  # others that keep more than this share of the CPUs busy disturb a run
THROTTLED_SHARE = 0.1  # a GPU that was slowed in more than this share of the readings is not at its full clock
# A board at its power limit runs as its maker means it to: that is recorded, and no disturbance.
NORMAL_REASONS = {"SwPowerCap"}
MIN_SECONDS = 1.0  # the kernel counts CPU time in ticks of 10 ms on every core: below this, a few of them decide


class Sensor(Protocol):
    """What a meter reads: sensors.PowerSensor, sensors.LoadSensor."""

    @property
    def interval_s(self) -> float: ...

    def read(self) -> Any: ...

    def record(self, samples: Sequence[tuple[float, Any]], failure: str | None) -> Any: ...


class Meter:
    """Reads sensors from `begin` to `end`, which gives the record of each by its name."""

    FIRST_S = 0.1  # from the begin of a span to the first reading in it

    def __init__(self, sensors: Mapping[str, Sensor]):
        self.sensors = sensors

    def begin(self) -> None:
        self._samples: dict[str, list] = {name: [] for name in self.sensors}
        self._failures: dict[str, str] = {}
        for name in self.sensors:
            self._read(name)
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._read_until_the_end, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, Any]:
        self._has_ended.set()
        self._thread.join()
        for name in self.sensors:
            self._read(name)
        return {
            name: sensor.record(self._samples[name], self._failures.get(name)) for name, sensor in self.sensors.items()
        }

    def _read_until_the_end(self) -> None:
        due = dict.fromkeys(self.sensors, time.perf_counter() + self.FIRST_S)
        while due and not self._has_ended.wait(max(min(due.values()) - time.perf_counter(), 0.0)):
            for name, moment in due.items():
                if moment <= time.perf_counter():
                    self._read(name)
                    due[name] = time.perf_counter() + self.sensors[name].interval_s

    def _read(self, name: str) -> None:
        try:
            reading = self.sensors[name].read()
            self._samples[name].append((time.perf_counter(), reading))
        except Exception as error:  # the sensor is gone, and with it the joules since the last reading
            self._failures.setdefault(name, f"lost during the run ({error})")


def all_of(sensors: Sensors) -> dict[str, PowerSensor | LoadSensor]:
    """Every sensor of the machine by its name in the record of an epoch."""
    return {**sensors.power, "load": sensors.load}


def unavailable(reason: str) -> dict:
    """ENERGY_FIGURES, all None, and as their `source` why."""
    return {"source": UNAVAILABLE + reason, **dict.fromkeys(ENERGY_FIGURES)}


def energy_figures(records: Sequence[Energy], images: int) -> dict:
    """ENERGY_FIGURES and their `source` over spans of `images` images each."""
    known = [record for record in records if record.joules is not None]
    if not known:
        reasons = [record.failure for record in records if record.failure]
        return unavailable(reasons[0] if reasons else NO_EPOCH)
    joules, seconds = sum(record.joules for record in known), sum(record.seconds for record in known)
    loads = [(record.utilization_percent, record.readings) for record in known]
    loads = [(load, readings) for load, readings in loads if load is not None]
    return {
        "source": known[-1].source,
        "joules_per_epoch": joules / len(known),
        "joules_per_image": joules / len(known) / images,
        "mean_w": joules / seconds,
        "peak_w": _largest(record.peak_w for record in known),
        "utilization_percent": _mean(loads),
        "max_temperature_c": _largest(record.max_temperature_c for record in known),
    }


def _largest(values) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(weighted: Sequence[tuple[float, float]]) -> float | None:
    """The mean of values with their weights; None where there are none."""
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None


def inference_energy(sensors: Sensors, predict: Callable, images: int, min_s: float = 10.0) -> dict[str, dict]:
    """Sections of the results: joules per image by part of the machine, over a loop of `predict` of at least `min_s`.

    `predict` takes a batch of `images` images and waits for its result. What the machine draws when idle is included.
    Without a sensor nothing runs.
    """
    found: dict[str, dict] = {part: unavailable(reason) for part, reason in sensors.no_power.items()}
    if sensors.power:
        meter, batches = Meter(sensors.power), 0
        meter.begin()
        began = time.perf_counter()
        while time.perf_counter() - began < min_s:
            predict()
            batches += 1
        found |= {part: energy_figures([record], batches * images) for part, record in meter.end().items()}
    joules = {part: found[part]["joules_per_image"] for part in sorted(found)}
    missing = {
        f"energy/inference_joules_per_image/{part}": found[part]["source"].removeprefix(UNAVAILABLE)
        for part, value in joules.items()
        if value is None
    }
    return {"energy": {"inference_joules_per_image": joules}, "missing": missing}


def load_figures(
    sensor: LoadSensor, records: Sequence[Load], backend_threads: int | None
) -> tuple[dict, dict[str, str]]:
    """The section `load` of the results over spans, and why figures in it are None, by paths such as "load/gpu_mhz".

    Where no span counts, only the cores and the threads are numbers.
    """
    seconds = sum(record.seconds for record in records)

    def total(name: str) -> float | None:
        values = [getattr(record, name) for record in records]
        return None if not values or None in values else sum(values)

    def mean(name: str) -> float | None:
        pairs = [(getattr(record, name), record.seconds) for record in records]
        return _mean([(value, weight) for value, weight in pairs if value is not None])

    known_shares = [record for record in records if record.throttled_shares is not None]
    shares: dict[str, float] = {}
    for record in known_shares:
        for name, share in record.throttled_shares.items():
            shares[name] = shares.get(name, 0.0) + share * record.seconds / seconds
    own_s, cpu_s = total("own_cpu_s"), total("cpu_s")
    others = None
    if cpu_s is not None and own_s is not None and seconds >= MIN_SECONDS:
        others = max(cpu_s - own_s, 0.0) / seconds
    found = {
        "cores": sensor.cores,
        "backend_threads": backend_threads,
        "process_threads": records[-1].process_threads if records else threading.active_count(),
        "cpu_s_per_wall_s": own_s / seconds if own_s is not None else None,
        "others_cpu_cores": others,
        "runnable_tasks": mean("runnable_tasks"),
        "cpu_mhz": mean("cpu_mhz"),
        "gpu_mhz": mean("gpu_mhz"),
        "throttle_reasons": sorted(shares) if known_shares else None,
        "over_current_events": total("over_current_events"),
        "other_gpu_processes": _largest(record.other_gpu_processes for record in records),
    }
    reasons = dict.fromkeys(found, "not reported by this machine")
    reasons |= dict.fromkeys(("gpu_mhz", "throttle_reasons", "other_gpu_processes"), sensor.no_gpu)
    reasons["backend_threads"] = "not reported by the backend"
    reasons["over_current_events"] = "only a Jetson has these counters"
    if seconds < MIN_SECONDS:
        reasons["others_cpu_cores"] = f"what counts took less than {MIN_SECONDS:g} s"
    if not records:
        reasons |= dict.fromkeys(set(found) - {"backend_threads"}, NO_EPOCH)
    missing = {f"load/{name}": reasons[name] for name, value in found.items() if value is None}
    return found | {"problems": problems(found, len(sensor.cpus), shares)}, missing


def problems(found: dict, cpus: int, throttled_shares: dict[str, float]) -> list[str]:
    """What disturbed the run, one clause for each; the process' own threads do not, however many of them are runnable."""
    clauses = []
    others, runnable = found["others_cpu_cores"], found["runnable_tasks"]
    if others is not None and others > BUSY_SHARE * cpus:
        plural = "s" if cpus > 1 else ""
        tasks = "" if runnable is None else f"{runnable:.1f} runnable tasks on {cpus} core{plural}, and "
        clauses.append(f"the machine was busy: {tasks}others kept {others:.1f} of {cpus} core{plural} busy")
    for name, share in throttled_shares.items():
        if share > THROTTLED_SHARE and name not in NORMAL_REASONS:
            clauses.append(f"the GPU was slowed by {name} for {share:.0%} of the time")
    if found["over_current_events"]:
        clauses.append(f"the Jetson counted {found['over_current_events']} over-current events, which slow it down")
    if count := found["other_gpu_processes"]:
        clauses.append(f"the GPU was shared with {count} other process{'' if count == 1 else 'es'}")
    return clauses
