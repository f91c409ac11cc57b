"""Measure what each element of the modern recipe brings by itself, and both recipes on every backend.

    python studies/recipe.py CIFAR100.npz OUT                  # two hours on two cores; a second call goes on
    python studies/recipe.py CIFAR100.npz OUT --seeds 5 --tasks short
    python studies/recipe.py CIFAR100.npz OUT --report         # only the tables of what has been run

CIFAR100.npz holds x_train, y_train, x_test and y_test. A task is its first twenty classes, and trains on some of their training
images, a tenth of which is set apart to choose the epoch; the others join the test images. Seed k of every variant has the same
split and the same order of the images, so that variants are compared in pairs. Each run has a core of its own. The intervals are
not corrected for their number.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

import vit
from edgebench.cli import BACKENDS, flag, is_installed
from edgebench.compare.statistics import paired

CLASSES = 20
BASE, MODERN = "base", "modern"
ELEMENTS = {
    "weight decay": ("weight_decay",),
    "head: mean of the tokens": ("head", "mlp_head_units"),
    "stochastic depth": ("stochastic_depth",),
    "label smoothing": ("label_smoothing",),
    "average of the weights": ("ema",),
    "Mixup": ("mixup",),
    "CutMix": ("cutmix",),
    "random erasing": ("random_erasing",),
    "RandAugment (colours)": ("rand_augment",),
}
# Not in the recipe: with its peak at the constant rate it is far behind, and at three and five times as much no better.
COSINE = {"learning_rate": 0.002, "learning_rate_schedule": "cosine", "warmup_epochs": 3.0}


@dataclass(frozen=True)
class Task:
    """What is trained; its base is the published recipe with some flags, and every element is added to that.

    The model, below a million parameters, is the same in all variants but for its head. `own` are values of the modern recipe
    that depend on the length of the training.
    """

    images_per_class: int
    size: dict
    base: dict
    own: dict
    elements: tuple[str, ...] = tuple(ELEMENTS)
    has_recipes: bool = True  # runs the modern recipe as well, and both on every backend

    def variants(self) -> dict[str, dict]:
        """The flags of every variant by its name."""
        modern = {name: value for name, value in vit.RECIPES["modern"].items() if name not in self.size} | self.own
        alone = {name: self.base | {each: modern[each] for each in ELEMENTS[name]} for name in self.elements}
        if not self.has_recipes:
            return {BASE: self.base, **alone}
        cosine = "cosine, warm-up, twice the learning rate"
        scheduled = {cosine: self.base | COSINE, f"{MODERN} with {cosine}": modern | COSINE}
        started = {f"{MODERN} from glorot weights": modern | {"initial_weights": "glorot"}}
        return {BASE: self.base, MODERN: modern, **started, **alone, **scheduled}


def size(width: int, blocks: int, batch_size: int, epochs: int) -> dict:
    """The flags that all variants of a task have."""
    model = {"image_size": 32, "patch_size": 8, "projection_dim": width, "num_heads": 2, "transformer_layers": blocks}
    return model | {"batch_size": batch_size, "num_epochs": epochs}


TASKS = {
    # With the published head of 2048 and 1024 units, the head alone would have 10 million parameters.
    "short": Task(300, size(64, 4, 64, 30), base={"mlp_head_units": [128]}, own={"ema": 0.995}),
    # Without regularization the model learns most of its training images by heart; with it, stronger values pay.
    "overfitting": Task(
        125,
        size(48, 3, 32, 100),
        base={"head": "mean", "mlp_head_units": []},
        own={"mixup": 0.5, "cutmix": 0.5, "random_erasing": 0.25, "rand_augment": 5.0},
        elements=("stochastic depth", "label smoothing", "Mixup", "CutMix", "random erasing", "RandAugment (colours)"),
        has_recipes=False,
    ),
}


def prepare(source: Path, path: Path, images_per_class: int) -> None:
    """Write the images of a task to `path`."""
    with np.load(source) as data:
        x_train, y_train = data["x_train"], data["y_train"].ravel()
        x_test, y_test = data["x_test"], data["y_test"].ravel()
    is_trained_on = np.zeros(len(y_train), bool)
    for label in range(CLASSES):
        is_trained_on[np.flatnonzero(y_train == label)[:images_per_class]] = True
    others, test = ~is_trained_on & (y_train < CLASSES), y_test < CLASSES
    x_test = np.concatenate((x_test[test], x_train[others]))
    y_test = np.concatenate((y_test[test], y_train[others]))
    np.savez(path, x_train=x_train[is_trained_on], y_train=y_train[is_trained_on], x_test=x_test, y_test=y_test)


@dataclass(frozen=True)
class Job:
    """One run; its folder is below `out`."""

    out: Path
    task: str
    backend: str
    variant: str
    seed: int

    @property
    def images(self) -> Path:
        return self.out / _as_name(self.task) / "images.npz"

    @property
    def folder(self) -> Path:
        return self.images.parent / self.backend / _as_name(self.variant) / str(self.seed)

    @property
    def flags(self) -> dict:
        """What decides about the accuracy."""
        return {"initial_weights": "published"} | TASKS[self.task].size | TASKS[self.task].variants()[self.variant]

    def accuracy(self) -> float | None:
        """Of the test; None where no run is complete that had these flags: the recipe may have changed since."""
        for path in self.folder.glob("*.json"):
            results = json.loads(path.read_text())
            config = results["what"]["config"]
            if results["status"] == "complete" and all(config.get(name) == value for name, value in self.flags.items()):
                return results["quality"]["test"]["test_accuracy"]
        return None

    def run(self, core: int) -> None:
        """Run it on this core, unless it has been run."""
        if self.accuracy() is not None:
            return
        flags = self.flags | {"seed": self.seed, "device": "cpu", "measure_seconds": 0}
        flags |= {"keras_backend": self.backend, "dataset": self.images}
        flags |= {"results_dir": self.folder, "checkpoint_path": self.folder / "best.weights.h5"}
        words = [word for name, value in flags.items() for word in (flag(name), *_words(value))]
        command = ["taskset", "--cpu-list", str(core), sys.executable, vit.__file__, *words, "--no-use-wandb"]
        done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": self.backend}, capture_output=True, text=True)
        accuracy = self.accuracy()
        found = done.stderr[-500:] if accuracy is None else f"{accuracy:.1%}"
        print(f"{self.task}, {self.backend}, {self.variant}, seed {self.seed}: {found}", flush=True)


def _as_name(text: str) -> str:
    return re.sub("[^a-zA-Z]+", "-", text).strip("-")


def _words(value) -> list[str]:
    return list(map(str, value if isinstance(value, list) else [value]))


def jobs_of(out: Path, task: str, seeds: int) -> list[Job]:
    """All runs of a task, the first seed's first."""
    variants = [(BACKENDS[0], variant) for variant in TASKS[task].variants()]
    if TASKS[task].has_recipes:
        others = [backend for backend in BACKENDS[1:] if is_installed(backend)]
        variants += [(backend, variant) for backend in others for variant in (BASE, MODERN)]
    return [Job(out, task, *variant, seed) for seed in range(seeds) for variant in variants]


def run_all(jobs: list[Job]) -> None:
    """Run the jobs, one on each core at a time."""
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def work(job: Job) -> None:
        core = cores.get()
        try:
            job.run(core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(work, jobs))


def print_table(jobs: list[Job]) -> None:
    """Print every variant's accuracy, and by how many points it is above the base on its backend."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for job in jobs:
        if (accuracy := job.accuracy()) is not None:
            found.setdefault((job.backend, job.variant), {})[job.seed] = 100 * accuracy
    print(
        "\n| backend | variant | test accuracy, % (each seed) | above the base, points (95 % interval) |\n| --- | --- | --- | --- |"
    )
    for (backend, variant), values in found.items():
        base = found.get((backend, BASE), {})
        estimate = paired([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
        above = ""
        if estimate and variant != BASE:
            above = "{:+.1f} ({:+.1f} to {:+.1f})".format(estimate.mean, *estimate.interval(0.05))
        each = ", ".join(f"{value:.1f}" for value in values.values())
        print(f"| {backend} | {variant} | {statistics.fmean(values.values()):.1f} ({each}) | {above} |")


def main() -> None:
    """Run all that is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    for task in args.tasks:
        jobs = [job for job in jobs_of(args.out, task, args.seeds) if job.backend in args.backends]
        jobs = [job for job in jobs if not args.variants or job.variant in args.variants]
        if not args.report:
            jobs[0].images.parent.mkdir(parents=True, exist_ok=True)
            prepare(args.images, jobs[0].images, TASKS[task].images_per_class)
            run_all(jobs)
        print_table(jobs)


if __name__ == "__main__":
    main()
