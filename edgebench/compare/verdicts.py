"""The metrics of a comparison, and which of their differences the spread of the repeats supports."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edgebench.compare.runs import NONE, Run, differences


@dataclass(frozen=True)
class Metric:
    """A column of the tables, with its path in the results file and one to fall back on."""

    title: str
    unit: str
    path: str
    fallback: str = ""
    scale: float = 1.0
    is_share: bool = False  # in percent, and compared by difference

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}"

    def show(self, value: float) -> str:
        return f"{value:.2f}" if self.is_share else format_number(value)


def format_number(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point if there are more."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


TRAINING = Metric("training", "images/s", "time/train_images_per_s")
STEP_P50 = Metric("step p50", "ms", "time/step_ms/p50")
STEP_P99 = Metric("step p99", "ms", "time/step_ms/p99")
COMPILE = Metric("compile", "s", "time/compile_s")
EVALUATION = Metric("evaluation", "images/s", "time/evaluation_images_per_s")
LATENCY = Metric("one image p50", "ms", "time/latency_ms/p50")
INFERENCE = Metric("inference", "images/s", "time/inference_images_per_s")
MEMORY = Metric("peak memory", "MiB", "memory/train_peak_device_bytes", "memory/peak_rss_bytes", scale=2**-20)
ENERGY = Metric("energy", "J/image", "energy/accelerator/joules_per_image", "energy/cpu_package/joules_per_image")
ACCURACY = Metric("test accuracy", "%", "quality/test/test_accuracy", scale=100, is_share=True)
TOP_5 = Metric("top-5", "%", "quality/test/test_top-5-accuracy", scale=100, is_share=True)
BEST_EPOCH = Metric("best epoch after", "s", "quality/best_epoch_s")

SPEED = (TRAINING, STEP_P50, STEP_P99, COMPILE, EVALUATION, LATENCY, INFERENCE)
COSTS_AND_QUALITY = (MEMORY, ENERGY, ACCURACY, TOP_5, BEST_EPOCH)
SENTENCES = {  # what a metric is called in a sentence, and the sentence on a supported difference
    TRAINING: ("training throughput", "{a} trained {ratio} as fast as {b}"),
    COMPILE: ("compile time", "{a} took {ratio} the time of {b} to compile"),
    LATENCY: ("latency of one image", "{a} took {ratio} the time of {b} for one image"),
    MEMORY: ("peak memory", "{a} used {ratio} the memory of {b}"),
    ENERGY: ("energy an image", "{a} used {ratio} the energy of {b} for a training image"),
    ACCURACY: ("test accuracy", "{a} reached a test accuracy {ratio} that of {b}"),
}
MARKS = {MEMORY.fallback: "RSS", ENERGY.fallback: "CPU"}  # shown beside a value from this path
SOURCES = {"": "the device's own", "RSS": "memory of the process (RSS)", "CPU": "the CPU package's"}


@dataclass(frozen=True)
class Figures:
    """The values of one metric over the repeats of one backend; empty if none could be measured."""

    metric: Metric
    values: list[float]
    mark: str
    runs: int

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def cell(self) -> str:
        """Return `median (min–max)`, the mark of the source, and how many runs have a value if some have none."""
        if not self.values:
            return NONE
        text = self.metric.show(self.median)
        if len(self.values) > 1:
            text += f" ({self.metric.show(min(self.values))}–{self.metric.show(max(self.values))})"
        if self.mark:
            text += f" {self.mark}"
        if len(self.values) < self.runs:
            text += f" [{len(self.values)} of {self.runs}]"
        return text


def measure(metric: Metric, runs: Sequence[Run]) -> Figures:
    """Collect a metric over `runs`, from its fallback only if no run has a value at its path."""
    for path in (metric.path, metric.fallback):
        values = [value * metric.scale for run in runs if (value := run.number(path)) is not None]
        if values:
            return Figures(metric, values, MARKS.get(path, ""), len(runs))
    return Figures(metric, [], "", len(runs))


@dataclass(frozen=True)
class Verdict:
    """The ratio of two medians, or their difference in points, and whether the spread supports it."""

    text: str
    supported: bool
    why: str

    def cell(self) -> str:
        """Return the text as the tables show it: in brackets unless it is supported."""
        return self.text if self.supported or self.text == NONE else f"({self.text})"


def judge(a: Figures, b: Figures, test_images: float | None) -> Verdict:
    """Compare two backends in one metric. Supported: at least two runs each, and ranges that do not overlap."""
    if not a.values or not b.values:
        return Verdict(NONE, False, "unavailable")
    if a.mark != b.mark:
        return Verdict(NONE, False, f"not the same thing: {SOURCES[a.mark]} against {SOURCES[b.mark]}")
    text = f"{a.median - b.median:+.2f} points" if a.metric.is_share else _ratio(a.median, b.median)
    n_a, n_b = len(a.values), len(b.values)
    if min(n_a, n_b) < 2:
        return Verdict(text, False, "measured in one run only")
    if min(a.values) <= max(b.values) and min(b.values) <= max(a.values):
        return Verdict(text, False, "ranges overlap")
    why = "ranges do not overlap, n = " + (f"{n_a} each" if n_a == n_b else f"{n_a} and {n_b}")
    if a.metric.is_share and (len(set(a.values)) == 1 or len(set(b.values)) == 1):
        return _judge_equal_repeats(a, b, text, why, test_images)
    return Verdict(text, True, why)


def _judge_equal_repeats(a: Figures, b: Figures, text: str, why: str, test_images: float | None) -> Verdict:
    """Compare by the size of the test set: repeats with one seed may be equal to the last digit and have no spread.

    A share p of n images has a standard error of sqrt(p (1 - p) / n). The difference has to exceed two of them.
    """
    margin, limit = math.inf, "unknown"
    if test_images:
        p = (a.median + b.median) / 200
        margin = 200 * math.sqrt(p * (1 - p) / test_images)
        limit = f"{margin:.2f} points, two standard errors of {test_images:,.0f} test images"
    if abs(a.median - b.median) > margin:
        return Verdict(text, True, f"{why}; repeats are equal, and the difference exceeds {limit}")
    return Verdict(text, False, f"repeats are equal, so that the margin is that of the test set: {limit}")


def _ratio(a: float, b: float) -> str:
    if not b:  # a compile time of 0 s
        return NONE
    if 0.995 <= a / b < 1.005 and a != b:  # 1.003× rather than 1.00×, which would show no difference
        return f"{a / b:.4f}×"
    return f"{format_number(a / b)}×"


def statement(name: str, a: Figures, base: str, b: Figures, test_images: float | None) -> str:
    """Compare `name` with `base` in one sentence, which claims a difference only if the spread supports it."""
    metric, verdict = a.metric, judge(a, b, test_images)
    subject, sentence = SENTENCES[metric]
    if not a.values or not b.values:
        missing = " and ".join(backend for backend, figures in ((base, b), (name, a)) if not figures.values)
        return f"{subject}: unavailable for {missing}."
    if a.mark != b.mark:
        return f"{subject}: not compared, {verdict.why}."
    evidence = f"median {metric.show(a.median)} against {metric.show(b.median)} {metric.unit}; {verdict.why}"
    if not verdict.supported:
        return f"{subject}: no difference between {name} and {base} that the spread supports ({evidence})."
    ratio = verdict.text
    if metric.is_share:
        ratio = f"{abs(a.median - b.median):.2f} points {'above' if a.median > b.median else 'below'}"
    elif ratio == NONE or min(a.median, b.median) < 0.01 * max(a.median, b.median):
        # A ratio to almost nothing, as the compile time of a backend that compiles nothing, says less than the medians.
        return f"{subject}: {name} and {base} differ ({evidence})."
    return f"{sentence.format(a=name, ratio=ratio, b=base)} ({evidence})."


def statements(backends: dict[str, list[Run]]) -> list[str]:
    """Compare each backend with the first, in one sentence per metric."""
    (base, base_runs), *others = backends.items()
    if not others:
        return [f"Only {base} has results here: there is nothing to compare it with."]
    test_images = base_runs[0].number("what/images/test")
    sentences = []
    for name, runs in others:
        single = [backend for backend in (name, base) if len(backends[backend]) == 1]
        if single:
            count = "one run each" if len(single) == 2 else f"one run of {single[0]}"
            sentences.append(f"{name} and {base}: {count}: no statement is supported; run with --repeats 3.")
            continue
        for metric in SENTENCES:
            a, b = measure(metric, runs), measure(metric, base_runs)
            sentences.append(statement(name, a, base, b, test_images))
    return sentences


def across_devices(runs: list[Run], other_runs: list[Run]) -> str:
    """Compare the training of one backend on two devices in one sentence."""
    name, here, there = runs[0].backend, runs[0].device, other_runs[0].device
    if reason := differences(runs[0], other_runs[0]):
        return f"{name} on {here} is not compared with that on {there}: {reason}."
    a, b = measure(TRAINING, runs), measure(TRAINING, other_runs)
    if a.values and b.values and a.median < b.median:  # a factor above 1 is easier to read
        here, there, a, b = there, here, b, a
    verdict = judge(a, b, None)
    if not verdict.supported:
        return f"{name} on {here} and on {there}: no difference that the spread supports ({verdict.why})."
    return f"{name} on {here} trains {verdict.text} as fast as on {there} ({verdict.why})."
