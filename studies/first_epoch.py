"""Measure what attention's initial weights cost in the first epochs of the complete CIFAR-100.

    python studies/first_epoch.py CIFAR100.npz OUT               # hours; a second call continues with what is missing
    python studies/first_epoch.py CIFAR100.npz OUT --report      # only the table of what has been run

The default model with --weight-decay 0.1, as keras.io's log of 2021 had, from both ranges of --initial-weights, on JAX and compiled
torch. Each run has a core of its own, on which an epoch takes most of an hour. docs/initial-weights.md has the results.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints

sys.path[:0] = [str(Path(__file__).parents[1])]

import vit
from studies.recipe import run_all

BACKENDS = ("torch", "jax")


@dataclass(frozen=True)
class Job:
    """One run; its results are in a folder below `out`."""

    images: Path
    out: Path
    epochs: int
    backend: str
    initial_weights: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / f"{self.backend}-{self.initial_weights}-{self.seed}"

    def logs(self) -> list[dict]:
        """What Keras reported for each epoch; empty where the run is not complete."""
        documents = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        complete = [each for each in documents if each["status"] == "complete"]
        return complete[-1]["quality"]["epochs"] if complete else []

    def run(self, core: int) -> None:
        """Run it on this core, unless it has been run, from where it was interrupted."""
        if len(self.logs()) >= self.epochs:
            return
        flags = f"--dataset {self.images} --weight-decay 0.1 --num-epochs {self.epochs} --keras-backend {self.backend} --jit on"
        flags += (
            f" --gradient-accumulation-steps 4 --seed {self.seed} --initial-weights {self.initial_weights} --device cpu"
        )
        flags += f" --measure-seconds 0 --no-use-wandb --resume --results-dir {self.folder}"
        flags += f" --checkpoint-path {self.folder / 'best.weights.h5'}"
        env = os.environ | {"KERAS_BACKEND": self.backend, "OMP_NUM_THREADS": "1"}
        command = ["taskset", "--cpu-list", str(core), sys.executable, vit.__file__, *flags.split()]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        print(f"{self.folder.name}: {self.logs() or done.stderr[-500:]}", flush=True)


def print_table(jobs: list[Job]) -> None:
    """Print loss, accuracy and validation accuracy of every epoch of every run."""
    print(
        "\n| backend | initial weights | seed | loss / accuracy / validation accuracy, %, by epoch |\n| --- | --- | --- | --- |"
    )
    for job in jobs:
        figures = [f"{e['loss']:.3f} / {100 * e['accuracy']:.1f} / {100 * e['val_accuracy']:.1f}" for e in job.logs()]
        print(f"| {job.backend} | {job.initial_weights} | {job.seed} | {', '.join(figures) or 'not run'} |")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    starts = get_args(get_type_hints(vit.ViTConfig)["initial_weights"])
    jobs = [
        Job(args.images.resolve(), args.out.resolve(), args.epochs, backend, start, seed)
        for seed, backend, start in product(range(args.seeds), BACKENDS, starts)
    ]
    if not args.report:
        run_all(jobs)
    print_table(jobs)


if __name__ == "__main__":
    main()
