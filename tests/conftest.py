"""What the tests share: real images, and three ways to run the program.

- `start_vit` starts `python vit.py FLAGS`, the process that a user starts: for signals, streams, limits and exit statuses.
- `run_vit` runs a command line of vit.py in a worker, a process that has imported its backend already (worker.py).
- `call_on` calls a function of a test module in such a worker: for what has to be tried on every backend.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgebench.cli import BACKENDS, is_installed

# Tests should train this model where they can: JAX compiles it once for all of them, which takes longer than most runs.
ROOT = Path(__file__).parent.parent
INSTALLED = [name for name in BACKENDS if is_installed(name)]
# All backends, for tests whose run on TensorFlow is left to `make test-slow`.
TENSORFLOW_SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "tensorflow" else name for name in INSTALLED]
TINY = "--image-size 16 --patch-size 4 --projection-dim 32 --transformer-layers 1 --mlp-head-units 128 --batch-size 32 --measure-seconds 0"


def pytest_configure(config) -> None:
    """Set the environment before any test module imports Keras. pytest-xdist's processes inherit it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["KERAS_BACKEND"] = "jax"  # for the tests that import vit; runs choose their own
    # In the background SIGINT is ignored, also by what is started from there: a launcher could not trap a Ctrl-C.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not hasattr(config, "workerinput"):  # not in a process of pytest-xdist
        # What JAX and torch compile in one process serves the next.
        cache = tempfile.TemporaryDirectory(prefix="vit-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache.name, "jax")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache.name, "torch")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # Optimizing the code of so small models takes XLA longer than running it does.
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"


def pytest_collection_modifyitems(items) -> None:
    """Let one process of pytest-xdist run all tests that need a worker for torch, and one all for TensorFlow."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend in ("torch", "tensorflow") and {"run_vit", "call_on"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(backend))


@dataclass
class Run:
    """What a run left behind; `value` is what a function returned."""

    status: int
    stdout: str
    stderr: str
    value: object = None

    @property
    def error_line(self) -> str:
        """The one line on stderr of a run that was refused with status 2."""
        lines = self.stderr.strip().splitlines()
        assert self.status == 2 and len(lines) == 1 and lines[0].startswith("vit.py: error: "), self
        return lines[0]


def environment_in(folder: Path) -> dict[str, str]:
    """Variables for a run in `folder`: a CIFAR cache of its own, and no network, as no name is resolved."""
    proxies = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "", "no_proxy": ""}
    return {"KERAS_HOME": str(folder / "keras"), **proxies}


def environment_of_processes() -> dict[str, str]:
    """The environment without a backend, and with one thread for torch.

    On two cores its threads wait for each other, the more so beside another process: 350 ms a step instead of a few.
    """
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return env | {"OMP_NUM_THREADS": "1"}


class Worker:
    """A process of worker.py."""

    def __init__(self, backend: str):
        command = [sys.executable, str(ROOT / "tests" / "worker.py")]
        env = environment_of_processes() | {"KERAS_BACKEND": backend}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def ask(self, timeout: float = 600, **request) -> Run:
        watchdog = threading.Timer(timeout, self.process.kill)
        watchdog.start()
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"the worker has ended during {request}"
        return Run(**json.loads(line))


@pytest.fixture(scope="session")
def worker_of():
    """The worker of a backend, which is started when it is first needed."""
    workers: dict[str, Worker] = {}

    def worker_of(backend: str) -> Worker:
        if backend not in workers or workers[backend].process.poll() is not None:
            workers[backend] = Worker(backend)
        return workers[backend]

    yield worker_of
    for worker in workers.values():
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def run_vit(worker_of, tmp_path):
    """Run a command line of vit.py in the worker of its backend, in an empty folder, without a network."""

    def run(*flags: str, environment: dict | None = None) -> Run:
        backend = flags[flags.index("--keras-backend") + 1] if "--keras-backend" in flags else "jax"
        env = {**environment_in(tmp_path), **(environment or {})}
        return worker_of(backend).ask(folder=str(tmp_path), environment=env, flags=flags)

    return run


@pytest.fixture
def call_on(worker_of, tmp_path):
    """Call a function of a test module in the worker of a backend; arguments and result are JSON."""

    def call(backend: str, function: Callable, *arguments) -> Run:
        called = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
        run = worker_of(backend).ask(folder=str(tmp_path), environment=environment_in(tmp_path), **called)
        assert run.status == 0, run.stderr
        return run

    return call


@pytest.fixture
def start_vit(tmp_path):
    """Start `python vit.py FLAGS` in an empty folder, without a network."""
    started = []

    def start(*flags: str, environment: dict | None = None, wrapper: tuple = (), **options) -> subprocess.Popen:
        env = environment_of_processes() | environment_in(tmp_path) | {"PYTHONUNBUFFERED": "1"} | (environment or {})
        command = [*wrapper, sys.executable, str(ROOT / "vit.py"), *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # of a test that has failed; it does nothing to one that has ended
        process.communicate()


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    """Wait until the process prints `text`: `Epoch 3/9:` is printed as that epoch ends."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen) + process.stderr.read())


def finish(process: subprocess.Popen, timeout: float = 300) -> Run:
    """Wait for the end of a process."""
    stdout, stderr = process.communicate(timeout=timeout)
    return Run(process.returncode, stdout, stderr)


def weights_in(path: Path) -> dict[str, np.ndarray]:
    """Every array of a weights file; it cannot be read unless it is whole."""
    import h5py

    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    assert found
    return found


def only_results(folder: Path) -> dict:
    """The one result file of a folder, which follows its schema."""
    import jsonschema

    (path,) = (folder / "results").iterdir()
    results = json.loads(path.read_text())
    jsonschema.validate(results, json.loads((ROOT / "results.schema.json").read_text()))
    return results


@pytest.fixture(scope="session")
def compiled_steps() -> Path:
    """What JAX has compiled, kept from one process to the next."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1,797 real handwritten digits (8x8 grey) as an .npz: 1,437 for training, 360 for the test."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent  # importing it takes seconds
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images, labels = (table[:, :-1] * 15.9375).astype(np.uint8).reshape(-1, 8, 8, 1), table[:, -1].astype(int)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images[order], labels[order]
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x_train=x[:1437], y_train=y[:1437], x_test=x[1437:], y_test=y[1437:])
    return path
