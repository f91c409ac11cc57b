"""The long random campaigns behind tests/test_faults.py: make test-faults, or python studies/faults.py --help.

kills           runs killed with SIGKILL at random moments and resumed until done, two at a time
together        runs that share one checkpoint path at the same time, as runs with the default path do
command_lines   random command lines, valid and hostile, read in this process; `processes` of them run as processes
damaged         .npz and resume files cut short, with a bit flipped, or with wrong keys

The seed is printed. With it the same moments, command lines and damages are drawn again.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(Path(__file__).parent.parent))

import h5py
import keras
import numpy as np
import tyro

import vit
from edgebench import cli
from edgebench.cli import flag
from edgebench.record import resume

ROOT = Path(__file__).parent.parent
SMALLEST = "--image-size 8 --patch-size 4 --projection-dim 8 --num-heads 2 --transformer-layers 1 --mlp-head-units 16"
SMALLEST += " --batch-size 128 --measure-seconds 0 --no-use-wandb --keras-backend jax --device cpu"
EPOCHS = 4


@dataclass
class Campaigns:
    """How much of each campaign; 0 leaves it out."""

    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(2**32))
    kills: int = 100
    together: int = 4
    command_lines: int = 10_000
    processes: int = 50
    damaged: int = 500


def start(folder: Path, *flags: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    env |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / "vit.py"), *flags], cwd=folder, env=env, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def weights(path: Path) -> dict[str, bytes]:
    """Every array of a weights file. It is read in one go, as another run may replace it."""
    found: dict[str, bytes] = {}
    with h5py.File(io.BytesIO(path.read_bytes())) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    assert found, path
    return found


def require_whole(folder: Path) -> None:
    """The files of the runs in the folder can be read to the end."""
    with contextlib.suppress(FileNotFoundError):
        weights(folder / "a.weights.h5")
    for path in folder.glob("a.*.resume.npz"):
        with contextlib.suppress(FileNotFoundError), np.load(path) as archive:  # the run removes it at its end
            assert all(archive[name] is not None for name in archive)


def complete_in(folder: Path) -> list[dict]:
    results = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    return [each for each in results if each["status"] == "complete"]


def results_in(folder: Path) -> dict:
    complete = complete_in(folder)
    assert len(complete) == 1, f"{folder}: {len(complete)} complete results"
    return complete[0]


def figures(folder: Path) -> tuple:
    """Every figure of the training that is the same in a repeated run."""
    quality = results_in(folder)["quality"]
    return quality["epochs"], quality["best_epoch"], quality["test"]


def kills(count: int, rng: random.Random, folder: Path) -> None:
    flags = f"--dataset synthetic {SMALLEST} --num-epochs {EPOCHS} --checkpoint-path a.weights.h5 --resume".split()
    began = time.monotonic()
    reference = start(folder / "reference", *flags)
    for line in reference.stdout:
        if line.startswith("Epoch 1/"):
            break
    to_first_epoch_s = time.monotonic() - began
    assert finish(reference)[0] == 0
    training_s = time.monotonic() - began - to_first_epoch_s
    expected = weights(folder / "reference" / "a.weights.h5"), figures(folder / "reference")
    totals = {"killed": 0, "looks": 0, "scratch files left": 0}
    lock = threading.Lock()

    def one(number: int, rng: random.Random) -> None:
        place, killed, looks = folder / f"run{number}", 0, 0
        to_kill = rng.randint(1, 3)
        while True:
            process = start(place, *flags)
            began = time.monotonic()
            if killed < to_kill:
                if rng.random() < 0.75:  # in the training, where something can be torn
                    for line in process.stdout:
                        if line.startswith("Epoch "):
                            break
                    delay_s = rng.uniform(0, training_s * 0.8)
                else:
                    delay_s = rng.uniform(0, to_first_epoch_s)
                ends = time.monotonic() + delay_s
                while process.poll() is None and time.monotonic() < ends:
                    require_whole(place)
                    looks += 1
                    time.sleep(min(0.02, max(0.0, ends - time.monotonic())))
                process.kill()
            status, out, err = finish(process)
            require_whole(place)
            looks += 1
            assert status in (0, -9), f"run {number} ended with {status} after {time.monotonic() - began:.1f} s: {err}"
            over = status == 0 or bool(
                complete_in(place)
            )  # killed after its results were written, it has nothing left to do
            if over and killed == 0:  # it ended before the kill: start again from nothing
                for path in [*place.glob("results/*"), *place.glob("a.*")]:
                    path.unlink()
                continue
            if over:
                break
            killed += 1
        assert (weights(place / "a.weights.h5"), figures(place)) == expected, f"run {number} ended otherwise"
        with lock:
            totals["killed"] += killed
            totals["looks"] += looks
            totals["scratch files left"] += len(list(place.glob(".*a.*")))
            done = totals["runs"] = totals.get("runs", 0) + 1
        if done % 10 == 0:
            print(f"  {done} runs", flush=True)

    seeds = [random.Random(rng.random()) for _ in range(count)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(count), seeds))
    print(f"kills: {count} runs complete with the weights and figures of the uninterrupted one; {totals}", flush=True)


def together(count: int, rng: random.Random, folder: Path) -> None:
    """Each run's figures are those of its own weights, as in a run alone; the file of that one, loaded here, gives them again."""
    seeds = rng.sample(range(1000), count)

    def flags(seed: int, path: str) -> list[str]:
        return f"--dataset synthetic {SMALLEST} --num-epochs {EPOCHS} --seed {seed} --checkpoint-path {path}".split()

    shared = folder / "shared.weights.h5"
    at_once = {seed: start(folder / f"at_once{seed}", *flags(seed, str(shared))) for seed in seeds}
    for seed, process in at_once.items():
        assert (ended := finish(process))[0] == 0, (seed, ended)
    alone = {}
    data = vit.load_dataset("synthetic", validation_split=0.1, seed=0)
    for seed in seeds:
        place = folder / f"alone{seed}"
        assert (ended := finish(start(place, *flags(seed, "a.weights.h5"))))[0] == 0, (seed, ended)
        assert figures(folder / f"at_once{seed}") == figures(place), f"seed {seed}"
        alone[seed] = weights(place / "a.weights.h5")
        model = build(cli.parse(vit.ViTConfig, flags(seed, "a.weights.h5")), data)
        model.load_weights(place / "a.weights.h5")
        accuracy = np.mean(model.predict(data.x_test, verbose=0).argmax(-1) == data.y_test)
        assert abs(accuracy - figures(place)[2]["test_accuracy"]) < 0.003
    assert weights(shared) in alone.values()
    print(
        f"together: {count} runs with one path, each evaluated with its own weights; the file is whole, of one of them",
        flush=True,
    )


HOSTILE = [
    "",
    "[",
    "[1",
    "[[1]]",
    "{}",
    "None",
    "True",
    "-",
    "--",
    "-1",
    "0",
    "1e999",
    "nan",
    "inf",
    "[" * 300,
    "9" * 5000,
]
HOSTILE += [
    "\0",
    "é\n",
    "2.5",
    "64.0",
    "[8, 4]",
    "a b",
    "../..",
    "/dev/null",
    "/proc/self/mem",
    "'",
    '"',
    "$(x)",
    "\ud800",
]
CONFIG = vit.ViTConfig()
KINDS = {name: kind for name, kind in get_type_hints(vit.ViTConfig).items() if kind is not Path}


def random_line(rng: random.Random) -> list[str]:
    def valid(name: str) -> list[str]:
        kind = KINDS[name]
        if kind is bool:
            return [rng.choice([flag(name), flag("no_" + name), f"--{name}={rng.choice([True, False])}"])]
        if get_origin(kind) is Literal:
            return [flag(name), rng.choice(get_args(kind))]
        if get_origin(kind) is list:
            return [f"--{name}={[rng.randrange(1, 65) for _ in range(rng.randrange(1, 4))]}"]
        if kind is int:
            return [f"--{name}={rng.choice([1, 2, 4, 8, 16.0, 32, 64, 72])}"]
        if kind is float:
            return [flag(name), str(rng.choice([0.0, 0.001, 0.5, rng.random()]))]
        return [f"{flag(name)}={rng.choice([getattr(CONFIG, name) or 'name', 'synthetic'])}"]

    def hostile() -> list[str]:
        value = rng.choice(
            [rng.choice(HOSTILE), "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(rng.randrange(9)))]
        )
        name = flag(rng.choice(list(KINDS)))
        return rng.choice(
            [[value], [f"--{value}"], [name, value], [f"{name}={value}"], [f"{name[:-1]}", value], [name]]
        )

    share = rng.choice([0.0, 0.2, 1.0])  # of hostile parts: a third of the lines has none
    parts = [hostile() if rng.random() < share else valid(rng.choice(list(KINDS))) for _ in range(rng.randrange(7))]
    return [word for part in parts for word in part]


def read_line(argv: list[str]) -> tuple[int, str]:
    """Status and error line of the command line in this process; 0 for one that would run."""
    environment, out, err = dict(os.environ), io.StringIO(), io.StringIO()
    os.environ.pop("KERAS_BACKEND", None)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), cli.errors_in_one_line():
            assert isinstance(vit.read_config(argv), vit.ViTConfig)
    except SystemExit as stop:
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("vit.py: warning: ")]
        if not stop.code:
            return 0, ""
        assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("vit.py: error: "), (argv, err.getvalue())
        return 2, lines[0]
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return 0, "runs"


def command_lines(count: int, processes: int, rng: random.Random, folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    paths = ["--checkpoint-path=a.weights.h5"]
    refused, runs, slowest_s = [], 0, 0.0
    for _ in range(count):
        argv = random_line(rng)
        began = time.monotonic()
        try:
            status, line = read_line([*argv, *paths])
        except Exception as error:
            raise AssertionError(f"{argv} was not refused in one line") from error
        slowest_s = max(slowest_s, time.monotonic() - began)
        runs += line == "runs"
        # What no process can be given, and --debug, which shows the traceback besides.
        if status == 2 and not any("\0" in word or "\ud800" in word or "debug" in word for word in argv):
            refused.append((argv, line))
    left = [str(path) for path in folder.rglob("*") if path.is_file()]
    assert not left, left
    print(f"command_lines: {count} read, {runs} would run, {slowest_s:.2f} s at most", flush=True)
    started = [(argv, line) for argv, line in rng.sample(refused, min(processes - processes // 5, len(refused)))]
    for argv, line in started:
        status, out, err = finish(start(folder, *argv, *paths))
        lines = [each for each in err.splitlines() if not each.startswith("vit.py: warning: ")]
        assert status == 2 and len(lines) == 1, (argv, status, err)
        # The same words; tyro's box may have been of another width.
        assert "".join(lines[0].split()) == "".join(line.split()), (argv, line)
    for number in range(processes // 5):
        sizes = {"image-size": (8, 9, 16), "patch-size": (4, 5), "projection-dim": (4, 8), "num-heads": (1, 2)}
        sizes |= {"batch-size": (128, 500, 5000), "attention-dropout": (0, 0.1), "validation-split": (0, 0.1)}
        sizes |= {"augmentation": ("fused", "stock"), "jit": ("auto", "on", "off"), "seed": range(1000)}
        drawn = [word for name, values in sizes.items() for word in (f"--{name}", str(rng.choice(values)))]
        place = folder / f"valid{number}"
        status, out, err = finish(
            start(place, *SMALLEST.split(), *drawn, "--dataset=synthetic", "--num-epochs=1", *paths)
        )
        assert (status, results_in(place)["status"]) == (0, "complete"), (drawn, err)
    print(f"processes: {len(started)} refused with the same line, {processes // 5} valid ones complete", flush=True)


def damaged(count: int, rng: random.Random, folder: Path) -> None:
    """In this process, and one in a hundred as a process."""
    folder.mkdir()
    os.chdir(folder)
    numbers = np.random.default_rng(rng.randrange(2**32))
    arrays = {"x_train": numbers.integers(0, 256, (64, 8, 8, 1), np.uint8), "y_train": np.arange(64) % 4}
    arrays |= {"x_test": numbers.integers(0, 256, (32, 8, 8, 1), np.uint8), "y_test": np.arange(32) % 4}
    np.savez_compressed("good.npz", **arrays)
    flags = f"--dataset good.npz {SMALLEST} --checkpoint-path a.weights.h5 --resume".split()
    process = start(folder, *flags, "--num-epochs=1000")
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            break
    process.kill()
    finish(process)
    [resume_file] = folder.glob("a.*.resume.npz")
    config = cli.parse(vit.ViTConfig, flags)
    data = load(config)
    assert resume.path_of(
        config.checkpoint_path, resume.identity(config.as_json(), data.x_train, data.y_train)
    ) == resume_file.relative_to(folder)
    model = build(config, data)
    vit.compile_model(model, config, data.num_classes, 1)
    good = {"data": Path("good.npz").read_bytes(), "resume": resume_file.read_bytes()}
    tallies = {f"{target} {end}": 0 for target in good for end in ("refused", "read")}

    def damage(content: bytes) -> bytes:
        kind = rng.choice(["cut", "flip", "keys"])
        if kind == "cut":
            return content[: rng.randrange(len(content))]
        if kind == "flip":
            flipped = bytearray(content)
            flipped[rng.choice([rng.randrange(len(content)), rng.randrange(-600, 0)])] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        with np.load(io.BytesIO(content)) as archive:
            members = dict(archive)
        victim = rng.choice(list(members))
        value = members.pop(victim)
        if rng.random() < 0.7:
            members[rng.choice([victim, victim + "_", "x_train", "progress", "value_0"])] = rng.choice(
                [
                    np.zeros(0),
                    np.zeros(3),
                    np.frombuffer(b"{}", np.uint8),
                    np.atleast_1d(value)[..., :1],
                    np.array("text"),
                    np.float32(1),
                ]
            )
        file = io.BytesIO()
        np.savez(file, **members)
        return file.getvalue()

    for number in range(count):
        target = rng.choice(list(good))
        Path("good.npz").write_bytes(damage(good["data"]) if target == "data" else good["data"])
        resume_file.write_bytes(damage(good["resume"]) if target == "resume" else good["resume"])
        began = time.monotonic()
        try:
            if target == "data":
                load(config)
            else:
                progress = resume.read(
                    resume_file, resume.identity(config.as_json(), data.x_train, data.y_train), EPOCHS
                )
                resume.restore(model, progress, resume_file)
        except cli.ExperimentError as error:
            tallies[f"{target} refused"] += 1
            assert "\n" not in str(error)
            expected = error.exit_status
        else:
            tallies[f"{target} read"] += 1
            expected = 0
        assert time.monotonic() - began < 30, "a damaged file takes too long"
        if number % 100 == 0:
            before = sorted(folder.glob("**/*"))
            status, _, err = finish(start(folder, *flags, "--num-epochs=4"))
            refused = status == expected != 0 and len(err.splitlines()) == 1 and sorted(folder.glob("**/*")) == before
            other_data = (
                target == "data" and "other images" in err and status == 2
            )  # the file is intact, but no longer that of the run
            assert refused or status == 0 == expected or other_data, (number, target, status, err)
    print(f"damaged: {count} files, none read but whole: {tallies}", flush=True)


def load(config: vit.ViTConfig) -> vit.Dataset:
    return vit.load_dataset(config.dataset, config.validation_split, config.seed)


def build(config: vit.ViTConfig, data: vit.Dataset) -> keras.Model:
    augmentation = vit.create_data_augmentation(config.augmentation, config.image_size, data.moments)
    return vit.create_vit_classifier(config, data.image_shape, data.num_classes, augmentation)


def main(sizes: Campaigns) -> None:
    print(f"seed {sizes.seed}", flush=True)
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kills", "together", "command_lines", "damaged"):
            if count := getattr(sizes, name):
                began = time.monotonic()
                extra = [sizes.processes] if name == "command_lines" else []
                os.chdir(home)
                globals()[name](count, *extra, random.Random(f"{sizes.seed} {name}"), Path(folder, name))
                print(f"  {name} took {time.monotonic() - began:.0f} s", flush=True)
        os.chdir(home)


if __name__ == "__main__":
    main(tyro.cli(Campaigns))
