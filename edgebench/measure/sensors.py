"""What can be read of the machine: power and energy, load, clocks, memory. Imports no Keras.

A sensor is read again and again during a span, such as the training part of an epoch (meters.py), and makes one record of
what it has read. What is not there, or cannot be read, is None and never 0.
"""

import contextlib
import itertools
import math
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgebench.nvml import Gpu

JETSON_RAILS = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}
POWER_INTERVAL_S, LOAD_INTERVAL_S = 0.2, 1.0


def cores(cpus: Sequence[int] | set[int], sysfs: Path = Path("/sys")) -> int:
    """Number of cores that the process may use: those it may run on, or the quota of its container where that is less."""
    with contextlib.suppress(OSError, ValueError):  # no control group of version 2, or no quota: "max"
        quota, period = (sysfs / "fs/cgroup/cpu.max").read_text().split()
        return min(len(cpus), math.ceil(int(quota) / int(period)))
    return len(cpus)


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Peak resident memory of this process; what the program before an exec used is not in it."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB; an exec inherits it


def _number_in(path: Path) -> int:
    return int(path.read_text())


def _attempt(read: Callable, *arguments):
    """What `read` returns, or None where it cannot be read: a container may lack any of these files, a full host the memory."""
    try:
        return read(*arguments)
    except (OSError, ValueError, IndexError, MemoryError, statistics.StatisticsError):
        return None


# ------------ Power and energy ------------


class Reading(NamedTuple):
    """One reading of a power sensor. `joules` is a counter that may wrap at `wraps_at`; without it, `watts` are integrated."""

    watts: float | None = None
    joules: float | None = None
    wraps_at: float = math.inf
    utilization_percent: float | None = None
    temperature_c: float | None = None


class Energy(msgspec.Struct, frozen=True):
    """What a power sensor, named `source`, has read in one span; `failure` says why there are no joules."""

    source: str
    seconds: float
    readings: int
    joules: float | None = None
    peak_w: float | None = None
    utilization_percent: float | None = None
    max_temperature_c: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class PowerSensor:
    """A sensor of power or energy; `read` raises where it is gone."""

    source: str
    read: Callable[[], Reading]
    interval_s: float = POWER_INTERVAL_S

    def record(self, samples: Sequence[tuple[float, Reading]], failure: str | None) -> Energy:
        """Sum up the readings of a span, each with its time in seconds; `failure` is that of the first that failed."""
        if failure or len(samples) < 2:
            return Energy(self.source, 0.0, len(samples), failure=failure or "read only once")
        joules = peak_w = 0.0
        for (then, last), (now, reading) in itertools.pairwise(samples):
            interval = now - then
            if reading.joules is None:
                spent, watts = interval * (last.watts + reading.watts) / 2, reading.watts
            else:
                spent = (reading.joules - last.joules) % reading.wraps_at
                # A counter moves in steps: over too short an interval it shows a peak that is none.
                watts = reading.watts or (spent / interval if interval > self.interval_s / 2 else 0.0)
            joules, peak_w = joules + spent, max(peak_w, watts)
        readings = [reading for _, reading in samples]
        loads = [each.utilization_percent for each in readings if each.utilization_percent is not None]
        temperatures = [each.temperature_c for each in readings if each.temperature_c is not None]
        return Energy(
            source=self.source,
            seconds=samples[-1][0] - samples[0][0],
            readings=len(samples),
            joules=joules,
            peak_w=peak_w or None,
            utilization_percent=statistics.fmean(loads) if loads else None,
            max_temperature_c=max(temperatures, default=None),
        )


def nvml_sensor(gpu_id: str | None) -> PowerSensor:
    """The NVIDIA GPU at this PCI address, through nvidia-ml-py."""
    gpu = Gpu(gpu_id)
    power = gpu.power()  # on a Jetson NVML starts, but answers NotSupported

    def read() -> Reading:
        watts, joules = power()
        return Reading(watts, joules, utilization_percent=gpu.utilization_percent(), temperature_c=gpu.temperature_c())

    return PowerSensor("NVML, the whole board", read)


def ina3221_sensor(sysfs: Path = Path("/sys")) -> PowerSensor:
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
    return PowerSensor("INA3221, the module's rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", read)


def rapl_sensor(sysfs: Path = Path("/sys")) -> PowerSensor:
    """The first CPU package, through RAPL, which on most systems root alone may read."""
    zone = sysfs / "class/powercap/intel-rapl:0"
    wraps_at = _number_in(zone / "max_energy_range_uj") / 1e6

    def read() -> Reading:
        return Reading(joules=_number_in(zone / "energy_uj") / 1e6, wraps_at=wraps_at)

    read()  # fails now rather than later where it cannot be read
    return PowerSensor("RAPL, CPU package 0", read)


# ------------ Load and clocks ------------


class Load(msgspec.Struct, frozen=True):
    """What the process used in one span of `seconds`, what else the machine did, and how fast it was clocked.

    `cpu_s` are seconds for which the cores that this process may use were busy, with what the hypervisor took from them.
    """

    seconds: float
    own_cpu_s: float
    process_threads: int
    cpu_s: float | None = None
    over_current_events: int | None = None
    runnable_tasks: float | None = None
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    other_gpu_processes: int | None = None
    throttled_shares: dict[str, float] | None = None  # by reason: the share of the readings in which it slowed the GPU


class LoadSensor:
    """The load and the clocks of the machine."""

    interval_s = LOAD_INTERVAL_S

    def __init__(
        self,
        is_gpu: bool = False,
        gpu_id: str | None = None,
        proc: Path = Path("/proc"),
        sysfs: Path = Path("/sys"),
    ):
        self.cpus = os.sched_getaffinity(0)
        self.cores = cores(self.cpus, sysfs)
        self._proc = proc
        clocks = [sysfs / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in self.cpus]
        self._clocks = [path for path in clocks if path.exists()]
        # L4T names the GPU 17000000.gpu on JetPack 6 and 17000000.ga10b on JetPack 5.
        devfreq = [path for name in ("gpu", "ga10b") for path in sysfs.glob(f"class/devfreq/*.{name}/cur_freq")]
        self._gpu_clocks = devfreq if is_gpu else []
        self._counters = list(sysfs.glob("class/hwmon/hwmon*/oc*_event_cnt"))  # of a Jetson's soctherm
        self._gpu, self.no_gpu = None, "the backend runs on the CPU"
        if is_gpu:
            try:
                self._gpu, self.no_gpu = Gpu(gpu_id), "NVML does not report it"
            except Exception as error:  # no library, no driver, no such GPU
                self.no_gpu = str(error) or type(error).__name__

    def read(self) -> dict[str, Any]:
        """Counters, which only differences of mean something, and what holds at this moment."""
        counters = [_attempt(_number_in, path) for path in self._counters]
        return {
            "own_cpu_s": time.process_time(),  # of all threads
            "cpu_s": _attempt(self._cpu_s),
            "over_current_events": sum(counters) if counters and None not in counters else None,
            "runnable_tasks": _attempt(self._runnable_tasks),
            "cpu_mhz": _attempt(self._cpu_mhz),
            "gpu_mhz": self._gpu_mhz(),
            "throttle_reasons": self._gpu.throttle_reasons() if self._gpu else None,
            "other_gpu_processes": self._gpu.other_processes() if self._gpu else None,
        }

    def record(self, samples: Sequence[tuple[float, dict[str, Any]]], failure: str | None) -> Load | None:
        """Sum up the readings of a span, each with its time in seconds; None where there are not two."""
        if len(samples) < 2:
            return None
        (began, first), (ended, last) = samples[0], samples[-1]
        during = [reading for _, reading in samples[1:-1]]  # at both ends the training stands still

        def spent(name: str):
            return None if None in (first[name], last[name]) else last[name] - first[name]

        def values(name: str) -> list:
            return [reading[name] for reading in during if reading[name] is not None]

        def mean(name: str) -> float | None:
            return statistics.fmean(values(name)) if values(name) else None

        reasons = values("throttle_reasons")
        names = {name for each in reasons for name in each}
        threads = _attempt(lambda: len(list((self._proc / "self/task").iterdir())))
        return Load(
            seconds=ended - began,
            own_cpu_s=spent("own_cpu_s"),
            process_threads=threads or threading.active_count(),
            cpu_s=spent("cpu_s"),
            over_current_events=spent("over_current_events"),
            runnable_tasks=mean("runnable_tasks"),
            cpu_mhz=mean("cpu_mhz"),
            gpu_mhz=mean("gpu_mhz"),
            other_gpu_processes=max(values("other_gpu_processes"), default=None),
            throttled_shares={name: sum(name in each for each in reasons) / len(reasons) for name in sorted(names)}
            if reasons
            else None,
        )

    def _stat(self) -> list[list[str]]:
        return [line.split() for line in (self._proc / "stat").read_text().splitlines()]

    def _cpu_s(self) -> float:
        names = {f"cpu{cpu}" for cpu in self.cpus}
        rows = [list(map(int, fields[1:9])) for fields in self._stat() if fields[0] in names]
        if len(rows) != len(names):
            raise ValueError("not all cores are listed")
        ticks = sum(sum(row) - row[3] - row[4] for row in rows)  # all but idle and waiting for I/O
        return ticks / os.sysconf("SC_CLK_TCK")

    def _runnable_tasks(self) -> int:
        (count,) = [int(fields[1]) for fields in self._stat() if fields[0] == "procs_running"]
        return max(count - 1, 0)  # without the thread that is reading this

    def _cpu_mhz(self) -> float:
        if self._clocks:
            return statistics.fmean(map(_number_in, self._clocks)) / 1e3
        lines = (self._proc / "cpuinfo").read_text().splitlines()
        return statistics.fmean(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))

    def _gpu_mhz(self) -> float | None:
        mhz = self._gpu.mhz() if self._gpu else None
        if mhz is None and self._gpu_clocks:
            return _attempt(lambda: _number_in(self._gpu_clocks[0]) / 1e6)
        return mhz


# ------------ Those of this machine ------------


@dataclass(frozen=True)
class Sensors:
    """The sensors of this machine. `power` has them by part of the machine; `no_power` says why a part has none."""

    power: dict[str, PowerSensor]
    no_power: dict[str, str]
    load: LoadSensor


def find_sensors(is_gpu: bool, gpu_id: str | None) -> Sensors:
    """The sensors of the accelerator (on a Jetson of the whole module), the CPU package, and the load."""
    power: dict[str, PowerSensor] = {}
    no_power = {"accelerator": "the backend runs on the CPU"}
    candidates: dict[str, list[Callable[[], PowerSensor]]] = {"cpu_package": [rapl_sensor]}
    if is_gpu:
        candidates["accelerator"] = [lambda: nvml_sensor(gpu_id), ina3221_sensor]
    for part, sensors in candidates.items():
        try:
            power[part] = _first_working(sensors)
            no_power.pop(part, None)
        except LookupError as error:
            no_power[part] = str(error)
    return Sensors(power, no_power, LoadSensor(is_gpu, gpu_id))


def _first_working(sensors: Sequence[Callable[[], PowerSensor]]) -> PowerSensor:
    """The first sensor that is there; raises LookupError with the reasons why none is."""
    reasons = []
    for sensor in sensors:
        try:
            return sensor()
        except OSError as error:  # no such file, no permission
            reasons.append(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        except Exception as error:  # no library, no driver: all mean no sensor
            reasons.append(str(error) or type(error).__name__)
    raise LookupError("; ".join(reasons))
