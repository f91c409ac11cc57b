"""The metrics of a comparison, and their values in the runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgebench.compare.runs import NONE, Run

# Runs that compile everything, and runs that load everything, by what/compile_cache/state. What no cache could hold is
# compiled in every run: such a run stands beside the cold and the warm ones of others.
CACHE_STATES = {"cold": ("cold", "off", "none"), "warm": ("warm", "none")}


@dataclass(frozen=True)
class Metric:
    """A column of the tables, with its path in the results file and one to fall back on."""

    title: str
    unit: str
    path: str
    fallback: str = ""
    scale: float = 1.0
    is_share: bool = False  # in percent, and compared by difference
    cache: str = ""  # "cold" or "warm": only runs whose compile cache was so
    is_compilation: bool = False  # compared only between runs that compile
    is_compared: bool = True
    of: str = "training"  # what has it: a "training", any "inference", which a deployed file does as well, or a deployed "file"
    subject: str = ""  # what it is called in a sentence; only metrics with one get sentences
    claim: str = ""  # the sentence on a supported difference

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}"

    def show(self, value: float) -> str:
        return f"{value:.2f}" if self.is_share else format_number(value)


def format_number(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point if there are more."""
    return f"{value:,.0f}" if 99.95 <= abs(value) < 1e15 else f"{value:#.3g}"


TRAINING = Metric(
    *("training", "images/s", "time/train_images_per_s"),
    subject="training throughput",
    claim="{a} trained {ratio} as fast as {b}",
)
STEP_P50 = Metric("step p50", "ms", "time/step_ms/p50")
STEP_P99 = Metric("step p99", "ms", "time/step_ms/p99")
EVALUATION = Metric("evaluation", "images/s", "time/evaluation_images_per_s")
CORES = Metric("CPU cores used", "mean", "load/cpu_s_per_wall_s", is_compared=False)
LATENCY = Metric(
    *("one image p50", "ms", "time/latency_ms/p50"),
    of="inference",
    subject="latency of one image",
    claim="{a} took {ratio} the time of {b} for one image",
)
LATENCY_P90 = Metric("p90", "ms", "time/latency_ms/p90", of="inference")
LATENCY_P99 = Metric("p99", "ms", "time/latency_ms/p99", of="inference")
BARE_LATENCY = Metric("bare p50", "ms", "time/bare_latency_ms/p50", of="inference")
INFERENCE = Metric("inference", "images/s", "time/inference_images_per_s", of="inference")
INFERENCE_MEMORY = Metric("memory", "MiB RSS", "memory/inference_peak_rss_bytes", scale=2**-20, of="inference")
FILE_SIZE = Metric("file", "MB", "what/deployed/file_bytes", scale=1e-6, is_compared=False, of="file")
INFERENCE_ENERGY = Metric(
    *("inference energy", "J/image", "energy/inference_joules_per_image/accelerator"),
    fallback="energy/inference_joules_per_image/cpu_package",
    of="inference",
)
COMPILE_COLD, COMPILE_WARM = (
    Metric(
        *(f"compile {cache}", "s", "time/compile_s/total"),
        cache=cache,
        is_compilation=True,
        subject=f"compile time, {cache}",
        claim="{a} took {ratio} the time of {b} to " + work,
    )
    for cache, work in (("cold", "compile everything"), ("warm", "load what had been compiled before"))
)
FIRST_STEP_COLD, FIRST_STEP_WARM = (
    Metric(f"first step {cache}", "s", "time/to_first_step_s", cache=cache) for cache in CACHE_STATES
)
FIRST_EPOCH_COLD, FIRST_EPOCH_WARM = (
    Metric(f"first epoch {cache}", "s", "time/to_first_epoch_s", cache=cache) for cache in CACHE_STATES
)
MEMORY = Metric(
    *("peak memory", "MiB", "memory/train_peak_device_bytes", "memory/peak_rss_bytes"),
    scale=2**-20,
    subject="peak memory",
    claim="{a} used {ratio} the memory of {b}",
)
ENERGY = Metric(
    *("energy", "J/image", "energy/accelerator/joules_per_image", "energy/cpu_package/joules_per_image"),
    subject="energy per image",
    claim="{a} used {ratio} the energy of {b} for a training image",
)
ACCURACY = Metric(
    *("test accuracy", "%", "quality/test/test_accuracy"),
    scale=100,
    is_share=True,
    of="inference",
    subject="test accuracy",
    claim="{a} reached a test accuracy {ratio} that of {b}",
)
TOP_5 = Metric("top-5", "%", "quality/test/test_top-5-accuracy", scale=100, is_share=True, of="inference")
BEST_EPOCH = Metric("best epoch after", "s", "quality/best_epoch_s")

TABLES = {
    "Training": (TRAINING, STEP_P50, STEP_P99, EVALUATION, CORES),
    "Inference": (
        *(LATENCY, LATENCY_P90, LATENCY_P99, BARE_LATENCY, INFERENCE, INFERENCE_ENERGY, INFERENCE_MEMORY, FILE_SIZE),
        *(ACCURACY, TOP_5),
    ),
    "From the start of the process": (
        *(FIRST_STEP_COLD, FIRST_EPOCH_COLD, COMPILE_COLD),
        *(FIRST_STEP_WARM, FIRST_EPOCH_WARM, COMPILE_WARM),
    ),
    "Costs of the training": (MEMORY, ENERGY, BEST_EPOCH),
}
SENTENCES = tuple(metric for metrics in TABLES.values() for metric in metrics if metric.claim)
MARKS = {  # shown beside a value from this path
    MEMORY.fallback: "RSS",
    ENERGY.fallback: "CPU",
    INFERENCE_ENERGY.fallback: "CPU",
}
SOURCES = {"": "the device's own", "RSS": "memory of the process (RSS)", "CPU": "the CPU package's"}


@dataclass(frozen=True)
class Figures:
    """The values of one metric in the runs of one name, by run; empty if none could be measured."""

    metric: Metric
    by_run: list[tuple[Run, float]]
    mark: str
    runs: int

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.by_run]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def by_seed(self) -> dict[str, list[float]]:
        """The values by the seed of their runs, those of one seed in the order of their runs."""
        seeds: dict[str, list[float]] = {}
        for run, value in self.by_run:
            seeds.setdefault(run.seed, []).append(value)
        return seeds

    def cell(self) -> str:
        """Return `median (min–max)`, the mark of the source, and how many runs have a value if some have none."""
        if not self.by_run:
            return NONE
        text = self.metric.show(self.median)
        if len(self.values) > 1:
            text += f" ({self.metric.show(min(self.values))}–{self.metric.show(max(self.values))})"
        if self.mark:
            text += f" {self.mark}"
        if len(self.values) < self.runs:
            text += f" [{len(self.values)} of {self.runs}]"
        return text


def names_with(metric: Metric, names: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """Return the names that can have a metric: a deployed file has none of the training, and it alone has a size."""
    if metric.of == "inference":
        return dict(names)
    return {name: runs for name, runs in names.items() if runs[0].is_deployed == (metric.of == "file")}


def runs_for(metric: Metric, runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose compile cache was as the metric wants it."""
    if not metric.cache:
        return list(runs)
    return [run for run in runs if run.get("what/compile_cache/state") in CACHE_STATES[metric.cache]]


def measure(metric: Metric, runs: Sequence[Run]) -> Figures:
    """Collect a metric over `runs`, from its fallback only if no run has a value at its path."""
    measured = runs_for(metric, runs)
    for path in (metric.path, metric.fallback):
        values = [(run, value * metric.scale) for run in measured if (value := run.number(path)) is not None]
        if values:
            return Figures(metric, values, MARKS.get(path, ""), len(runs))
    return Figures(metric, [], "", len(runs))


def why_missing(metric: Metric, runs: Sequence[Run]) -> str:
    """Return why there is no value of a metric in any of the runs."""
    measured = runs_for(metric, runs)
    if not measured:
        states = ", ".join(dict.fromkeys(run.text("what/compile_cache/state") for run in runs))
        return f"no run had a {metric.cache} compile cache, but: {states}"
    paths = [path for path in (metric.path, metric.fallback) if path]
    reasons = [reason for path in paths for run in measured if (reason := run.reason_for_missing(path))]
    return "; ".join(dict.fromkeys(reasons)) or "the results do not say why"


def pairs(a: Figures, b: Figures) -> list[tuple[float, float]]:
    """Return the values of runs with the same seed. Several runs of one seed are paired in the order they were started.

    The accuracies of one seed are one draw however often it is repeated, so their means are paired.
    """
    a_seeds, b_seeds = a.by_seed, b.by_seed
    shared = [seed for seed in a_seeds if seed in b_seeds]
    if a.metric.is_share:
        return [(statistics.fmean(a_seeds[seed]), statistics.fmean(b_seeds[seed])) for seed in shared]
    return [pair for seed in shared for pair in zip(a_seeds[seed], b_seeds[seed], strict=False)]
