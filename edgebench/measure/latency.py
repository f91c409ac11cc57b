"""How long one call takes, and how many images go through in a second: repeated calls, percentiles, sections of the results.

Imports no Keras, so that what is deployed without Keras is measured by the same rules as what Keras runs.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from edgebench.measure.sensors import peak_rss_bytes

WARM_UP, ENOUGH = 10, 1000  # calls: the first are not counted, and more than so many tell nothing new
# Calls that a percentile needs. Below 400 the 95 % interval of the 99th reaches beyond the slowest call.
NEEDED = {"p50": 10, "p90": 100, "p99": 400, "p99_low": 400, "p99_high": 400}
Z_95 = 1.96
Sections = dict[str, dict]


def is_enough(seconds: Sequence[float], budget_s: float) -> bool:
    """Whether these calls suffice: where they are cheap there are ENOUGH; p90 may cost a quarter of the budget, p50 all of it."""
    spent_s = sum(seconds)
    carries_p90 = len(seconds) >= WARM_UP + NEEDED["p90"]
    return len(seconds) >= WARM_UP + ENOUGH or spent_s > (budget_s / 4 if carries_p90 else budget_s)


def percentiles(path: str, seconds: Sequence[float], budget_s: float) -> Sections:
    """The section of the figure at `path`, as in `time/step_ms`: percentiles in milliseconds, and the 95 % interval of p99.

    A percentile is None where there are too few calls for it. WARM_UP calls are left out, or a fifth where there are few.
    """
    ms = 1e3 * np.sort(seconds[min(WARM_UP, len(seconds) // 5) :])
    n = len(ms)
    figures = {
        name: float(np.percentile(ms, int(name[1:3]))) if n >= needed else None for name, needed in NEEDED.items()
    }
    if figures["p99"] is not None:  # the ranks of a binomial's 95 %, by its normal approximation
        middle, margin = 0.99 * n, Z_95 * math.sqrt(n * 0.99 * 0.01)
        ranks = math.floor(middle - margin), min(math.ceil(middle + margin), n)
        figures["p99_low"], figures["p99_high"] = (float(ms[rank - 1]) for rank in ranks)
    missing = {
        f"{path}/{name}": f"fewer than {NEEDED[name]} calls with --measure-seconds {budget_s:g}; raise it"
        for name, value in figures.items()
        if value is None
    }
    section, name = path.split("/")
    return {section: {name: {**figures, "n": n}}, "missing": missing}


def merge(*parts: Sections) -> Sections:
    """The sections of all parts together, and what is below them; of two values in the same place the later one counts."""
    merged: Sections = {}
    for part in parts:
        for name, value in part.items():
            known = merged.get(name)
            is_section = isinstance(known, dict) and isinstance(value, dict)
            merged[name] = merge(known, value) if is_section else value
    return merged


def timed(function: Callable, *arguments) -> tuple:
    """What `function` returns, and the seconds it takes."""
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def repeat(function: Callable, images: np.ndarray, budget_s: float) -> tuple[float, list[float]]:
    """Seconds of the first call of `function`, which compiles, and of steady ones."""
    first_s = timed(function, images)[1]
    seconds: list[float] = []
    while not is_enough(seconds, budget_s):
        seconds.append(timed(function, images)[1])
    return first_s, seconds


def compiling(first_s: float, steady_s: Sequence[float]) -> float:
    """Seconds by which a first call takes longer than the steady ones: what tracing and compiling take."""
    return max(first_s - statistics.median(steady_s), 0.0)


def one_image(predict: Callable, images: np.ndarray, budget_s: float) -> Sections:
    """Latency of one image with `predict`, from NumPy array to NumPy array, and the peak memory of the process until then."""
    first_s, seconds = repeat(predict, images[:1], budget_s)
    memory = {"memory": {"inference_peak_rss_bytes": peak_rss_bytes()}}
    compile_s = {"time": {"compile_s": {"predict_one": compiling(first_s, seconds)}}}
    return merge(percentiles("time/latency_ms", seconds, budget_s), memory, compile_s)


def batches(predict: Callable, batch: np.ndarray, budget_s: float) -> Sections:
    """Throughput of `predict` with one batch again and again, for a quarter of the budget."""
    first_s, seconds = repeat(predict, batch, budget_s / 4)
    rate = {"time": {"inference_images_per_s": len(batch) / statistics.median(seconds)}}
    return merge(rate, {"time": {"compile_s": {"predict_batch": compiling(first_s, seconds)}}})


def inference(predict: Callable, images: np.ndarray, batch_size: int, budget_s: float) -> Sections:
    """Latency of one image and throughput of batches."""
    return merge(one_image(predict, images, budget_s), batches(predict, images[:batch_size], budget_s))
