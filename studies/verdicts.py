"""Simulated reports: how often does one hold a false sentence, and how often is a true difference found?

    python studies/verdicts.py                  # the tables of docs/verdicts.md, in minutes

A report compares backends in six metrics. Its runs come in the order in which benchmark.py starts them. The session drifts
slowly (heat, neighbours), which all its runs share; each run deviates in each metric; and a few runs are slow as a whole.
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # the checkout, also where it is not installed

from edgebench.compare.items import Item
from edgebench.compare.launch import alternating
from edgebench.compare.metrics import TRAINING
from edgebench.compare.runs import Run
from edgebench.compare.verdicts import Comparison, Decisions, compare_all, decide_all

BACKENDS = ("jax", "torch", "tensorflow")
SLOW_SHARE, SLOW_FACTOR = 0.03, 1.3  # of the runs
ACCURACY, SEED_DEVIATION, TEST_IMAGES = 0.4, 0.007, 10_000
MEMORY_DEVIATION = 0.005


@dataclass(frozen=True)
class Spread:
    """Relative standard deviations: of the drift that the runs of a session share, and of each run for itself."""

    drift: float = 0.04
    run: float = 0.03  # together 5 %

    def __str__(self) -> str:
        return (
            f"{100 * math.hypot(self.drift, self.run):.0f} % ({100 * self.drift:.0f} drift, {100 * self.run:.0f} run)"
        )


def drifting(rng: random.Random, runs: int, deviation: float) -> list[float]:
    """Return the logarithm of the machine's slowness at each run of a session: a ramp, or up to a whole wave, of this deviation."""
    if rng.random() < 0.5:
        sign = rng.choice((-1, 1))
        course = [sign * i for i in range(runs)]
    else:
        phase, periods = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 1)
        course = [math.sin(phase + 2 * math.pi * periods * i / runs) for i in range(runs)]
    mean = sum(course) / runs
    scale = math.sqrt(sum((value - mean) ** 2 for value in course) / (runs - 1))
    return [deviation * (value - mean) / scale for value in course]


def simulated_runs(rng: random.Random, n: int, backends: int, spread: Spread, effect: float) -> dict[str, list[Run]]:
    """Return the runs of a session by name. The second backend trains faster than the others by the share `effect`."""
    order = alternating([Item(name, name) for name in BACKENDS[:backends]], n)
    names: dict[str, list[Run]] = {}
    for number, ((repeat, item), slowness) in enumerate(
        zip(order, drifting(rng, len(order), spread.drift), strict=True)
    ):
        if rng.random() < SLOW_SHARE:
            slowness += math.log(SLOW_FACTOR)

        def seconds(effect: float = 0.0, slowness: float = slowness) -> float:
            return math.exp(slowness + rng.gauss(0, spread.run)) / (1 + effect)

        document = {
            "what": {
                **{"backend": item.backend, "jit_compile": True, "compile_cache": {"state": "off"}},
                **{"config": {"seed": repeat}, "images": {"test": TEST_IMAGES}},
            },
            "time": {
                "train_images_per_s": 100 / seconds(effect if item.backend == BACKENDS[1] else 0.0),
                "latency_ms": {"p50": seconds()},
                "compile_s": {"total": seconds()},
            },
            "memory": {"peak_rss_bytes": 2**30 * math.exp(rng.gauss(0, MEMORY_DEVIATION))},
            "energy": {"accelerator": {"joules_per_image": seconds()}},
            "quality": {"test": {"test_accuracy": rng.gauss(ACCURACY, SEED_DEVIATION)}},
        }
        run = Run(Path(f"{number}.json"), document)
        names.setdefault(run.name, []).append(run)
    return names


def claims(names: dict[str, list[Run]]) -> tuple[list[Comparison], Decisions]:
    """Compare and decide as a report does, and return what its sentences claim to be different."""
    comparisons = [each for each in compare_all(names) if each.metric.claim]
    decisions = decide_all(comparisons)
    return [each for each in decisions if decisions[each].is_different], decisions


def claims_of_ranges(decisions: Decisions) -> list[Comparison]:
    """Return what the former rule claimed to be different: ranges that do not overlap."""

    def apart(comparison: Comparison) -> bool:
        a, b = comparison.a.values, comparison.b.values
        return min(a) > max(b) or min(b) > max(a)

    return [each for each in decisions if apart(each)]


@dataclass(frozen=True)
class Shares:
    """Shares of reports: with a false sentence, and those that found the true difference; by this rule and the former."""

    false: float
    found: float
    false_ranges: float
    found_ranges: float


def simulate(
    reports: int, n: int, backends: int = 2, spread: Spread = Spread(), effect: float = 0.0, seed: int = 0
) -> Shares:
    """Simulate reports with n runs of each backend. With an effect, a sentence on the training of torch and JAX is true."""
    rng = random.Random(f"{n} {backends} {spread} {effect} {seed}")
    counts = [0, 0, 0, 0]
    for _ in range(reports):
        by_rule, decisions = claims(simulated_runs(rng, n, backends, spread, effect))
        for place, claimed in ((0, by_rule), (2, claims_of_ranges(decisions))):
            true = [each for each in claimed if effect and each.metric == TRAINING and each.name.startswith("torch")]
            is_right = any(each.a.median > each.b.median for each in true)
            counts[place] += len(claimed) > len(true) or (bool(true) and not is_right)
            counts[place + 1] += is_right
    return Shares(*(count / reports for count in counts))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not i:
            print(f"|{' --- |' * len(row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=2000, metavar="N", help="simulated reports for each figure")
    reports = parser.parse_args().reports
    sizes = (4, 6, 10)
    print(f"{reports} simulated reports for each figure.\n")
    rows = [["backends, all equal", "spread", *(f"n = {n}" for n in sizes), *(f"former rule, n = {n}" for n in sizes)]]
    for backends, spread in ((2, Spread()), (3, Spread()), (2, Spread(0.0, 0.05)), (2, Spread(0.05, 0.01))):
        shares = [simulate(reports, n, backends, spread) for n in sizes]
        false = [percent(each.false) for each in shares] + [percent(each.false_ranges) for each in shares]
        rows.append([str(backends), str(spread), *false])
    print_table(rows)
    print()
    rows = [["true difference", "spread", *(f"n = {n}" for n in sizes), *(f"former rule, n = {n}" for n in sizes)]]
    for spread in (Spread(), Spread(0.0, 0.05), Spread(0.05, 0.02), Spread(0.05, 0.01)):
        for effect in (0.02, 0.05, 0.1, 0.2):
            shares = [simulate(reports, n, 2, spread, effect) for n in sizes]
            found = [percent(each.found) for each in shares] + [percent(each.found_ranges) for each in shares]
            rows.append([f"{100 * effect:.0f} %", str(spread), *found])
    print_table(rows)


if __name__ == "__main__":
    main()
