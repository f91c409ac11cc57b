"""Measure what each element of the modern recipe brings by itself, and both recipes on every backend.

    python tests/campaign_recipe.py CIFAR100.npz OUT                  # hours on two cores; a second call goes on
    python tests/campaign_recipe.py CIFAR100.npz OUT --seeds 5
    python tests/campaign_recipe.py CIFAR100.npz OUT --report         # only the tables of what has been run

CIFAR100.npz holds x_train, y_train, x_test and y_test. The task is its first twenty classes: 10,000 training images, of which
a tenth is set apart to choose the epoch, and 2,000 test images. Seed k of every variant has the same split and the same order of the
images, so that variants are compared in pairs. Each run has a core of its own. The intervals are not corrected for their number.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

import vit
from edgebench.cli import BACKENDS, flag, is_installed
from edgebench.compare.statistics import paired

CLASSES = 20
# The model, the same in both recipes: below one million parameters with either head.
SIZE = "--image-size 32 --patch-size 8 --projection-dim 64 --num-heads 2 --transformer-layers 4 --batch-size 64"
PUBLISHED_HEAD = ["--mlp-head-units", "128"]  # with the published 2048 and 1024 the head alone has 10 million
SHORT = {"warmup_epochs": 3.0}  # a tenth of the run
ELEMENTS = {
    "learning rate: cosine, warm-up": ("learning_rate_schedule", "warmup_epochs"),
    "weight decay": ("weight_decay",),
    "head: mean of the tokens": ("head", "mlp_head_units"),
    "no attention dropout": ("attention_dropout",),
    "stochastic depth": ("stochastic_depth",),
    "label smoothing": ("label_smoothing",),
    "average of the weights": ("ema",),
    "Mixup": ("mixup",),
    "CutMix": ("cutmix",),
    "random erasing": ("random_erasing",),
    "RandAugment (colours)": ("rand_augment",),
}
MODERN = {name: value for name, value in vit.RECIPES["modern"].items() if flag(name) not in SIZE.split()} | SHORT
MODERN.pop("num_epochs")


def flags_of(values: dict) -> list[str]:
    """The flags that set these values."""
    texts = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [word for name, items in texts.items() for word in (flag(name), *map(str, items))]


def variants() -> dict[str, list[str]]:
    """The flags of every variant by its name."""
    single = {
        name: [
            *([] if "mlp_head_units" in names else PUBLISHED_HEAD),
            *flags_of({each: MODERN[each] for each in names}),
        ]
        for name, names in ELEMENTS.items()
    }
    return {"published": PUBLISHED_HEAD, **single, "modern": flags_of(MODERN)}


def prepare(source: Path, path: Path) -> None:
    """Write the images of the first classes of `source` to `path`."""
    arrays = {}
    with np.load(source) as data:
        for part in ("train", "test"):
            labels = data[f"y_{part}"].ravel()
            chosen = labels < CLASSES
            arrays |= {f"x_{part}": data[f"x_{part}"][chosen], f"y_{part}": labels[chosen]}
    np.savez(path, **arrays)


def folder_of(out: Path, backend: str, variant: str, epochs: int) -> Path:
    """Where the runs of a variant have their folders, one for each seed."""
    return out / f"{epochs}-epochs" / backend / re.sub("[^a-zA-Z]+", "-", variant).strip("-")


def accuracy(folder: Path) -> float | None:
    """The accuracy on the test images of the run that has its results in `folder`; None where it is not complete."""
    for path in folder.glob("*.json"):
        results = json.loads(path.read_text())
        if results["status"] == "complete":
            return results["quality"]["test"]["test_accuracy"]
    return None


def run(out: Path, backend: str, variant: str, seed: int, epochs: int, core: int) -> None:
    """Run one variant on one core, unless it has been run."""
    folder = folder_of(out, backend, variant, epochs) / str(seed)
    if accuracy(folder) is not None:
        return
    flags = [*SIZE.split(), *variants()[variant], "--num-epochs", str(epochs), "--seed", str(seed), "--device", "cpu"]
    flags += [
        "--keras-backend",
        backend,
        "--dataset",
        str(out / "images.npz"),
        "--no-use-wandb",
        "--measure-seconds",
        "0",
    ]
    flags += ["--results-dir", str(folder), "--checkpoint-path", str(folder / "best.weights.h5")]
    command = ["taskset", "--cpu-list", str(core), sys.executable, str(Path(vit.__file__)), *flags]
    done = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True)
    found = accuracy(folder)
    print(f"{backend}, {variant}, seed {seed}: {'failed' if found is None else f'{found:.1%}'}", flush=True)
    if found is None:
        print(done.stderr[-500:], flush=True)


def read(out: Path, seeds: int, epochs: int) -> dict[tuple[str, str], dict[int, float]]:
    """The accuracies that have been measured, by backend and variant, then by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for backend in BACKENDS:
        for variant in variants():
            folder = folder_of(out, backend, variant, epochs)
            all_seeds = {seed: accuracy(folder / str(seed)) for seed in range(seeds)}
            if values := {seed: value for seed, value in all_seeds.items() if value is not None}:
                found[backend, variant] = values
    return found


def difference(a: dict[int, float], b: dict[int, float]) -> str:
    """By how many points `b` is above `a`, over the seeds that both have, with the 95 % interval."""
    estimate = paired([100 * (b[seed] - a[seed]) for seed in sorted(a.keys() & b.keys())])
    if estimate is None:
        return "–"
    low, high = estimate.interval(0.05)
    return f"{estimate.mean:+.1f} ({low:+.1f} to {high:+.1f})"


def print_tables(found: dict[tuple[str, str], dict[int, float]]) -> None:
    """Print each element beside the published recipe, and both recipes on every backend."""

    def mean(values: Sequence[float]) -> str:
        return f"{100 * statistics.fmean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"

    print(
        "\n| backend | variant | test accuracy, % (each seed) | against the published recipe, points |\n| --- | --- | --- | --- |"
    )
    for (backend, variant), values in found.items():
        base = found.get((backend, "published"), {})
        against = "" if variant == "published" else difference(base, values)
        print(f"| {backend} | {variant} | {mean([*values.values()])} | {against} |")


def main() -> None:
    """Run all that is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        prepare(args.images, args.out / "images.npz")
        others = [backend for backend in BACKENDS[1:] if is_installed(backend)]
        jobs = [(BACKENDS[0], name, seed) for seed in range(args.seeds) for name in variants()]
        jobs += [
            (backend, name, seed)
            for seed in range(args.seeds)
            for backend in others
            for name in ("published", "modern")
        ]
        cores: SimpleQueue[int] = SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)):
            cores.put(core)

        def work(job: tuple[str, str, int]) -> None:
            core = cores.get()
            try:
                run(args.out, *job, args.epochs, core)
            finally:
                cores.put(core)

        with ThreadPoolExecutor(cores.qsize()) as pool:
            list(pool.map(work, jobs))
    print_tables(read(args.out, args.seeds, args.epochs))


if __name__ == "__main__":
    main()
