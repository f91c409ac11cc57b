"""What the tests share: real images, and a way to start `vit.py` as the process that a user starts."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

os.environ["KERAS_BACKEND"] = "jax"  # for the tests that import vit; the processes choose their own
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]

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
def run_vit(tmp_path, compiled_steps):
    """Start `python vit.py FLAGS` in an empty folder, without a network (every name fails to resolve), and wait."""

    def run(*flags: str, timeout: float = 300, environment: dict | None = None) -> Run:
        env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
        env |= {
            "KERAS_HOME": str(tmp_path / "keras"),
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "",
            "no_proxy": "",
        }
        env |= {"JAX_COMPILATION_CACHE_DIR": str(compiled_steps), **(environment or {})}
        command = [sys.executable, str(ROOT / "vit.py"), *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)
        return Run(done.returncode, done.stdout, done.stderr)

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
