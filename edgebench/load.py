"""What the process used, what else the machine did, and how fast it was clocked, while the epochs ran."""

import contextlib
import math
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from edgebench.nvml import Gpu

BUSY_SHARE = 0.1  # others that keep more than this share of the CPUs busy disturb a run
THROTTLED_SHARE = 0.1  # a GPU that was slowed in more than this share of the samples is not at its full clock
# A board at its power limit runs as its maker means it to: that is recorded, and no disturbance.
NORMAL_REASONS = {"SwPowerCap"}
MIN_SECONDS = 1.0  # the kernel counts CPU time in ticks of 10 ms on every core: below this, a few of them decide


def cores(cpus: Collection[int], sysfs: Path = Path("/sys")) -> int:
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


def _attempt(read: Callable, *arguments):
    """What `read` returns, or None where it cannot be read: a container may lack any of these files, a full host the memory."""
    try:
        return read(*arguments)
    except (OSError, ValueError, IndexError, MemoryError, statistics.StatisticsError):
        return None


class LoadMeter:
    """The load and the clocks of the machine between `begin` and `end`, which enclose one span each; a thread samples them.

    A span is the training part of one epoch, and its index in `spans` is that of the epoch. A span is JSON, so that a run
    that is resumed can pass on those of the interrupted run; None is an epoch that was not measured. In a list of meters it
    comes last: the threads of the others have then ended when it counts the threads.
    """

    FIRST_S, INTERVAL_S = 0.1, 1.0  # from the begin of a span to its first sample, and from there to the next one

    def __init__(
        self,
        is_gpu: bool = False,
        gpu_id: str | None = None,
        spans: Sequence[dict | None] = (),
        epochs_done: int = 0,
        proc: Path = Path("/proc"),
        sysfs: Path = Path("/sys"),
    ):
        self.spans = [*[None] * (epochs_done - len(spans)), *spans]
        self.cpus = os.sched_getaffinity(0)
        self.cores, self.threads = cores(self.cpus, sysfs), threading.active_count()
        self.proc = proc
        clocks = [sysfs / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in self.cpus]
        self._clocks = [path for path in clocks if path.exists()]
        # L4T names the GPU 17000000.gpu on JetPack 6 and 17000000.ga10b on JetPack 5.
        devfreq = [path for name in ("gpu", "ga10b") for path in sysfs.glob(f"class/devfreq/*.{name}/cur_freq")]
        self._gpu_clocks = devfreq if is_gpu else []
        self._counters = list(sysfs.glob("class/hwmon/hwmon*/oc*_event_cnt"))  # of a Jetson's soctherm
        self._gpu, self._no_gpu = None, "the backend runs on the CPU"
        if is_gpu:
            try:
                self._gpu = Gpu(gpu_id)
            except Exception as error:  # no library, no driver, no such GPU
                self._no_gpu = str(error) or type(error).__name__

    def begin(self) -> None:
        self._samples: list[dict] = []
        self._before = self._counts()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_the_end, daemon=True)
        self._thread.start()

    def end(self) -> None:
        now = self._counts()
        self._has_ended.set()
        self._thread.join()
        pairs = {name: (now[name], before) for name, before in self._before.items()}
        span = {name: None if None in pair else pair[0] - pair[1] for name, pair in pairs.items()}
        for name in ("runnable_tasks", "cpu_mhz", "gpu_mhz", "other_gpu_processes"):
            values = [sample[name] for sample in self._samples if sample[name] is not None]
            reduce = max if name == "other_gpu_processes" else statistics.fmean
            span[name] = reduce(values) if values else None
        reasons = [sample["throttle_reasons"] for sample in self._samples if sample["throttle_reasons"] is not None]
        names = {name for sample in reasons for name in sample}
        shares = {name: sum(name in sample for sample in reasons) / len(reasons) for name in sorted(names)}
        self.spans.append(span | {"throttled_shares": shares if reasons else None})
        self.threads = _attempt(lambda: len(list((self.proc / "self/task").iterdir()))) or threading.active_count()

    def _counts(self) -> dict[str, float | None]:
        counters = [_attempt(lambda path=path: int(path.read_text())) for path in self._counters]
        return {
            "seconds": time.perf_counter(),
            "own_cpu_s": time.process_time(),  # of all threads
            "cpu_s": _attempt(self._cpu_s),
            "over_current_events": sum(counters) if counters and None not in counters else None,
        }

    def _stat(self) -> list[list[str]]:
        return [line.split() for line in (self.proc / "stat").read_text().splitlines()]

    def _cpu_s(self) -> float:
        """Seconds for which the cores that this process may use were busy, with what the hypervisor took from them."""
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
            return statistics.fmean(int(path.read_text()) for path in self._clocks) / 1e3
        lines = (self.proc / "cpuinfo").read_text().splitlines()
        return statistics.fmean(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))

    def _sample_until_the_end(self) -> None:
        pause = self.FIRST_S
        while not self._has_ended.wait(pause):
            pause, gpu = self.INTERVAL_S, self._gpu
            gpu_mhz = gpu.mhz() if gpu else None
            if gpu_mhz is None and self._gpu_clocks:
                gpu_mhz = _attempt(lambda: int(self._gpu_clocks[0].read_text()) / 1e6)
            sample = {"runnable_tasks": _attempt(self._runnable_tasks), "cpu_mhz": _attempt(self._cpu_mhz)}
            sample |= {"gpu_mhz": gpu_mhz, "throttle_reasons": gpu.throttle_reasons() if gpu else None}
            self._samples.append(sample | {"other_gpu_processes": gpu.other_processes() if gpu else None})

    def figures(self, counted: Collection[int], backend_threads: int | None) -> tuple[dict, dict[str, str]]:
        """The section `load` of the results, over the epochs with the indices `counted`, and why figures in it are None.

        The reasons stand under paths such as "load/gpu_mhz". Where no epoch counts, only the cores and threads are numbers.
        """
        spans = [span for i, span in enumerate(self.spans) if i in counted and span]
        seconds = sum(span["seconds"] for span in spans)

        def known(name: str) -> list:
            return [span[name] for span in spans if span[name] is not None]

        def total(name: str) -> float | None:
            return sum(known(name)) if spans and len(known(name)) == len(spans) else None

        def mean(name: str) -> float | None:
            weighted = [(span[name], span["seconds"]) for span in spans if span[name] is not None]
            total = sum(weight for _, weight in weighted)
            return sum(value * weight for value, weight in weighted) / total if total else None

        shares: dict[str, float] = {}
        for span in spans:
            for name, share in (span["throttled_shares"] or {}).items():
                shares[name] = shares.get(name, 0.0) + share * span["seconds"] / seconds
        own_s, cpu_s = sum(known("own_cpu_s")), total("cpu_s")
        found = {
            "cores": self.cores,
            "backend_threads": backend_threads,
            "process_threads": self.threads,
            "cpu_s_per_wall_s": own_s / seconds if spans else None,
            "others_cpu_cores": max(cpu_s - own_s, 0.0) / seconds
            if cpu_s is not None and seconds >= MIN_SECONDS
            else None,
            **{name: mean(name) for name in ("runnable_tasks", "cpu_mhz", "gpu_mhz")},
            "throttle_reasons": sorted(shares) if known("throttled_shares") else None,
            "over_current_events": total("over_current_events"),
            "other_gpu_processes": max(known("other_gpu_processes"), default=None),
        }
        reasons = dict.fromkeys(found, "this machine does not tell")
        gpu_reason = "NVML does not tell" if self._gpu else self._no_gpu
        reasons |= dict.fromkeys(("gpu_mhz", "throttle_reasons", "other_gpu_processes"), gpu_reason)
        reasons["backend_threads"] = "the backend does not tell"
        reasons["over_current_events"] = "only a Jetson has these counters"
        if seconds < MIN_SECONDS:
            reasons["others_cpu_cores"] = f"what counts took less than {MIN_SECONDS:g} s"
        if not spans:
            counts = set(found) - {"backend_threads"}
            reasons |= dict.fromkeys(counts, "no epoch was measured but those that compile")
        missing = {f"load/{name}": reasons[name] for name, value in found.items() if value is None}
        return found | {"problems": problems(found, len(self.cpus), shares)}, missing


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
