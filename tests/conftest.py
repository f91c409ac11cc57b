"""What the tests share: real images, and a way to start `vit.py` as the process that a user starts."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

os.environ["KERAS_BACKEND"] = "jax"  # for the tests that import vit; the processes choose their own
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
# In the background SIGINT is ignored, also by what is started from there: a launcher could not trap a Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import vit

ROOT = Path(__file__).parent.parent
INSTALLED = [name for name in vit.BACKENDS if vit._is_installed(name)]
TINY = "--image-size 16 --patch-size 4 --projection-dim 32 --transformer-layers 1 --mlp-head-units 32 --batch-size 32 --measure-seconds 0"


@dataclass
class Run:
    """What a process left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def error_line(self) -> str:
        """The one line on stderr of a run that was refused with status 2."""
        lines = self.stderr.strip().splitlines()
        assert self.status == 2 and len(lines) == 1 and lines[0].startswith("vit.py: error: "), self
        return lines[0]


@pytest.fixture(scope="session")
def compiled_steps(tmp_path_factory) -> Path:
    """JAX's compiled steps, kept from one process to the next."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def start_vit(tmp_path, compiled_steps):
    """Start `python vit.py FLAGS` in an empty folder, without a network (every name fails to resolve)."""
    started = []

    def start(*flags: str, environment: dict | None = None, wrapper: tuple = (), **options) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
        env |= {
            "KERAS_HOME": str(tmp_path / "keras"),
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "",
            "no_proxy": "",
        }
        # On two cores torch's threads wait for each other, the more so beside another process: 350 ms a step against a few.
        env |= {"OMP_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": str(compiled_steps), **(environment or {})}
        command = [*wrapper, sys.executable, str(ROOT / "vit.py"), *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # of a test that has failed; it does nothing to one that has ended
        process.communicate()


@pytest.fixture
def run_vit(start_vit):
    """Start as `start_vit` does, and wait."""

    def run(*flags: str, timeout: float = 600, environment: dict | None = None, **options) -> Run:
        process = start_vit(*flags, environment=environment, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        return Run(process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1,797 real handwritten digits (8x8 grey) as an .npz: 1,437 for training, 360 for the test."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images, labels = (bundle.images * 15.9375).astype(np.uint8)[..., None], bundle.target
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images[order], labels[order]
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x_train=x[:1437], y_train=y[:1437], x_test=x[1437:], y_test=y[1437:])
    return path
