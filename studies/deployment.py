"""Measure inference: predict of every backend beside the files that export.py writes, for a small model and the default one.

    python studies/deployment.py IMAGES.npz OUT --repeats 4    # with --seconds 8, a quarter of an hour a round on two cores
    python studies/deployment.py IMAGES.npz OUT --repeats 1 --models small --seconds 5

IMAGES.npz should be small, as 480 training and 500 test images of CIFAR-100: every file predicts the test images one by one.
Round k trains every backend with seed k for one epoch on IMAGES.npz, which decides the accuracy and not the speed, and
exports the weights of each to ONNX, those of the first backend to every other format as well. The report of OUT/MODEL has
the table; it marks the runs that something else disturbed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from edgebench.cli import BACKENDS, is_installed

ROOT = Path(__file__).parents[1]
SMALL = "--image-size 32 --patch-size 8 --projection-dim 32 --transformer-layers 1 --mlp-head-units 128"
MODELS = {"small": SMALL.split(), "default": []}
FROM_EVERY_BACKEND = [["onnx"]]
FROM_THE_FIRST = [["onnx", "--int8"], ["litert"], ["litert", "--int8"], ["saved_model"]]


def run(*command: str, **environment: str) -> None:
    """Run a program of this checkout; a failure is printed, and the rest goes on."""
    print("+", *command, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], env={**os.environ, **environment})
    if done.returncode:
        print(f"exit status {done.returncode}", flush=True)


def newest(folder: Path, backend: str) -> Path:
    """The results file of the last run of a backend."""
    named = [path for path in folder.glob("*.json") if json.loads(path.read_text())["what"]["backend"] == backend]
    return max(named, key=lambda path: path.stat().st_mtime)


def main() -> None:
    """Train, export and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", default="20", help="--measure-seconds of every run")
    parser.add_argument("--batch", default="64")
    args = parser.parse_args()
    backends = [backend for backend in BACKENDS if is_installed(backend)]
    for model in args.models:
        folder = args.out / model
        for seed in range(args.repeats):
            for backend in backends[:: -1 if seed % 2 else 1]:
                flags = [
                    "--dataset",
                    str(args.images),
                    "--num-epochs",
                    "1",
                    "--batch-size",
                    args.batch,
                    "--no-use-wandb",
                ]
                flags += ["--measure-seconds", args.seconds, "--seed", str(seed), "--results-dir", str(folder)]
                weights = folder / f"{backend}-{seed}.weights.h5"
                flags += ["--checkpoint-path", str(weights)]
                run("vit.py", *flags, *MODELS[model], KERAS_BACKEND=backend)
                formats = [*FROM_EVERY_BACKEND, *(FROM_THE_FIRST if backend == backends[0] else [])]
                for form in formats:
                    run("export.py", str(newest(folder, backend)), "--format", *form)
        run("benchmark.py", "--report", str(folder))


if __name__ == "__main__":
    main()
