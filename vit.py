"""Train a Vision Transformer on CIFAR-100 with Keras 3, on the backend asked for.

    python vit.py                                          # CIFAR-100, JAX, 10 epochs
    python vit.py --keras-backend torch --num-epochs 50    # the same on PyTorch
    python vit.py --dataset synthetic --no-use-wandb       # no network, no account
    python vit.py --dataset my_images.npz                  # x_train, y_train, x_test, y_test
    python vit.py --help                                   # every flag, its unit and its effect

The model, its defaults and its augmentation are those of the keras.io example "Image classification with
Vision Transformer" (Khalid Salama, 2021, https://keras.io/examples/vision/image_classification_with_vision_transformer/),
which reports 53 % top-1 and 80 % top-5 on CIFAR-100 after 50 epochs.

The file reads in the order of the run: configuration, backend, data, augmentation and model, training step, measuring, W&B,
interruptions, experiment, main. Every figure that a run measures is explained in results.schema.json.

Exit status: 0 the run is complete; 1 an unexpected error, with its traceback; 2 wrong input or nothing to run on (a flag,
the data, a folder that cannot be written, a device that does not work); 3 out of memory; 4 the loss is not a finite
number; 130 and 143 stopped by SIGINT (Ctrl-C) and SIGTERM. One line says what is wrong; --debug shows where.
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import ast
import contextlib
import ctypes
import difflib
import gc
import glob
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import tyro
from dotenv import load_dotenv

# --------------------------------------------------------------------------------------------------------------
# Configuration and command line
# --------------------------------------------------------------------------------------------------------------

BACKENDS = ("jax", "torch", "tensorflow")  # a Keras backend and the Python package behind it have the same name
CIFAR = ("cifar10", "cifar100")


class ExperimentError(Exception):
    """A failure to be expected, with a message for people: `_errors_in_one_line` makes it one line and an exit status."""

    exit_status = 2


class OutOfMemory(ExperimentError):
    """The device or the host has too little memory for the run."""

    exit_status = 3


class Diverged(ExperimentError):
    """The loss is NaN or infinite."""

    exit_status = 4


@dataclass
class ViTConfig:
    """Train and evaluate a Vision Transformer with Keras 3 on the backend asked for."""

    # Model
    image_size: int = 72
    """Side in pixels to which images are resized before they are cut into patches."""
    patch_size: int = 6
    """Side of a square patch in pixels; what is left over at the right and lower edge is cut off."""
    projection_dim: int = 64
    """Width of the token embedding, and of each attention head."""
    num_heads: int = 4
    """Attention heads in each transformer block."""
    transformer_layers: int = 8
    """Number of transformer blocks."""
    transformer_units: list[int] = field(default_factory=list)
    """Widths of the MLP in each block; the last one equals projection_dim. Empty: 2 * projection_dim, projection_dim."""
    mlp_head_units: list[int] = field(default_factory=lambda: [2048, 1024])
    """Widths of the hidden layers of the classifier head."""
    attention_dropout: float = 0.1
    """Share of the attention weights dropped in training. Above 0, JAX and TensorFlow cannot take their fused attention."""

    # Training
    learning_rate: float = 0.001
    """AdamW's learning rate, constant over the run."""
    weight_decay: float = 0.0001
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """Images in a training step, and in a step of evaluation."""
    num_epochs: int = 10
    """Passes over the training images."""
    augmentation: Literal["fused", "stock"] = "fused"
    """fused: flip, rotation, zoom and resizing in one gather; stock: Keras' own layers, the same geometry, slower."""
    validation_split: float = 0.1
    """Share of the training images set apart for validation, drawn evenly from every class; 0 for none."""
    fit_batch: bool = False
    """Where a batch does not fit into memory, sum the gradients of its halves, quarters, ... : the same steps, in less memory."""
    resume: bool = False
    """Continue the run with this configuration and checkpoint_path after its last complete epoch, or start it if there is none."""
    seed: int = 0
    """Seed of the split, the weights, the order of the images, augmentation and dropout."""

    # Device
    device: Literal["auto", "gpu", "cpu"] = field(default_factory=lambda: os.environ.get("VIT_DEVICE") or "auto")  # type: ignore
    """gpu: end at once where there is none that works. Default: the environment variable VIT_DEVICE, else auto, what there is."""
    jit: Literal["auto", "on", "off"] = "auto"
    """Compile the training step. auto: JAX always, TensorFlow and torch on a GPU (torch compiles for a minute or two on a CPU)."""
    compile_cache: bool = True
    """Keep what JAX and torch compile for the next run, in ~/.cache/vit (XDG_CACHE_HOME)."""
    dtype_policy: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Number format of the computation; weights stay float32. mixed_float16 scales the loss."""
    tf32: bool = True
    """Let NVIDIA GPUs multiply float32 matrices in TensorFloat-32; set alike on every backend."""

    # Measuring
    measure_seconds: float = 60.0
    """Longest time in seconds for each measurement outside the epochs (step time, latency, evaluation); 0 measures nothing."""

    # Where things come from and go to
    dataset: str = "cifar100"
    """cifar100, cifar10, synthetic (made in memory, needs no network), or the path of an .npz file with x_train, y_train, x_test and y_test."""
    keras_backend: str = field(default_factory=lambda: os.environ.get("KERAS_BACKEND") or "jax")
    """jax, torch or tensorflow. The environment variable KERAS_BACKEND wins over this flag."""
    checkpoint_path: Path = Path("/tmp/checkpoint.weights.h5")
    """File for the weights of the best epoch by validation accuracy; ends in .weights.h5."""
    results_dir: Path = Path("results")
    """Folder for the run's results, one JSON file a run; results.schema.json explains every figure."""
    debug: bool = False
    """Show the traceback of a failure that is otherwise one line."""
    node_name: str = field(default_factory=platform.node)
    """Name of this machine in everything that is recorded. Default: the host's name."""

    # Weights & Biases
    use_wandb: bool = True
    """Log to Weights & Biases; without an API key the run is logged offline, for `wandb sync`."""
    wandb_project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT") or "keras3_edge_baseline")
    """W&B project. Default: the environment variable WANDB_PROJECT, else keras3_edge_baseline."""
    wandb_entity: str | None = field(default_factory=lambda: os.environ.get("WANDB_ENTITY") or None)
    """W&B user or team. Default: the environment variable WANDB_ENTITY, else the account's own."""
    wandb_run_name: str | None = None
    """Name of the run in W&B. Default: one that W&B makes up."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B."""

    def __post_init__(self) -> None:
        if not self.transformer_units:
            self.transformer_units = [2 * self.projection_dim, self.projection_dim]

    @property
    def num_patches(self) -> int:
        """Patches, hence tokens, an image."""
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        """Raise ExperimentError for the first value that cannot work, without importing Keras or loading data."""
        for f in fields(self):
            value = getattr(self, f.name)
            sizes = {"int": [value], "list[int]": value}.get(f.type, []) if f.name != "seed" else []
            _require(all(size > 0 for size in sizes), f"{_flag(f.name)} must be positive, not {value}")
        _require(
            self.patch_size <= self.image_size,
            f"--patch-size {self.patch_size} is larger than --image-size {self.image_size}",
        )
        _require(
            self.transformer_units[-1] == self.projection_dim,
            f"--transformer-units must end in --projection-dim {self.projection_dim}, as a block adds its output to its "
            f"input, not in {self.transformer_units[-1]}",
        )
        lr, decay, split = self.learning_rate, self.weight_decay, self.validation_split
        _require(
            0 <= self.attention_dropout < 1, f"--attention-dropout must lie in [0, 1), not {self.attention_dropout}"
        )
        _require(0 < lr < math.inf, f"--learning-rate must be positive and finite, not {lr}")
        _require(0 <= decay < math.inf, f"--weight-decay must be finite and not negative, not {decay}")
        _require(0 <= split < 1, f"--validation-split must lie in [0, 1), not {split}")
        _require(
            0 <= self.measure_seconds < math.inf,
            f"--measure-seconds must be finite and not negative, not {self.measure_seconds}",
        )
        _require(self.device in ("auto", "gpu", "cpu"), f"VIT_DEVICE must be auto, gpu or cpu, not {self.device!r}")
        _require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2**32), not {self.seed}")
        if self.dataset not in (*CIFAR, "synthetic"):
            known = "cifar100, cifar10, synthetic or the path of an .npz file"
            _require(self.dataset.endswith(".npz"), f"--dataset must be {known}, not {self.dataset!r}")
            _require(_is_file(self.dataset), f"--dataset {self.dataset!r}: there is no such file")
        backend = self.keras_backend
        _require(
            _is_installed(backend), f"the backend {backend} is not installed: pip install -c constraints.txt {backend}"
        )
        _require(
            not self.use_wandb or _is_installed("wandb"),
            "W&B is not installed: pip install wandb, or run with --no-use-wandb",
        )
        for tag in self.wandb_tags:
            _require(1 <= len(tag) <= 64, f"--wandb-tags must have 1 to 64 characters each, not {len(tag)}")
        path = self.checkpoint_path
        _require(path.name.endswith(".weights.h5"), f"--checkpoint-path must end in .weights.h5, not {str(path)!r}")
        _require(not path.is_dir(), f"--checkpoint-path {str(path)!r} is a folder")
        _require_writable_folder(path.parent, "--checkpoint-path")
        _require_writable_folder(self.results_dir, "--results-dir")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ExperimentError(message)


def _flag(name: str) -> str:
    """The command-line flag of a field of ViTConfig."""
    return "--" + name.replace("_", "-")


def _is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it. A folder of that name (./wandb, of offline runs) cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _is_file(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        return Path(path).is_file()
    return False


def _require_writable_folder(folder: Path, flag: str) -> None:
    """Make `folder` if need be and prove by a scratch file that it can be written (permission bits do not tell for root)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as scratch:
            scratch.write(b"\0")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(f"{flag}: the folder {str(folder)!r} cannot be written ({reason})") from error


def _parse_command_line(argv: Sequence[str]) -> ViTConfig:
    """Parse flags into a ViTConfig, unchecked; raise ExperimentError with one line where tyro would print a box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                ViTConfig, args=_as_typed_by_people(argv), prog="vit.py", config=(tyro.conf.HelptextFromCommentsOff,)
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        rows = [line.strip("│ ").strip("╭─╮╰╯-") for line in box.getvalue().splitlines()[1:]]  # below the box's title
        message = itertools.takewhile(bool, itertools.dropwhile(operator.not_, rows))  # from one rule to the next
        raise ExperimentError(" ".join(message) + " (see --help)") from None


def _as_typed_by_people(argv: Sequence[str]) -> list[str]:
    """Rewrite the spellings of a W&B agent into those that tyro reads.

    `--use_wandb=False` becomes `--no-use-wandb`, `--mlp_head_units=[8, 4]` becomes `--mlp-head-units 8 4`, and
    `--batch_size=64.0` becomes `--batch-size=64`. Raises ExperimentError for a flag that does not exist.
    """
    kinds = {f.name: f.type for f in fields(ViTConfig)}  # the annotations, as text
    tokens: list[str] = []
    name = kind = None
    for token in argv:
        if token.startswith("--") and not token.startswith(("--help", "--tyro-")):
            spelling, equals, value = token.partition("=")
            name = spelling[2:].replace("-", "_")
            if name.startswith("no_") and kinds.get(name[3:]) == "bool" and not equals:
                tokens.append(_flag(name))
                continue
            if name not in kinds:
                close = difflib.get_close_matches(name.rpartition(".")[2], kinds, n=1)
                hint = f"; did you mean {_flag(close[0])}?" if close else " (see --help)"
                raise ExperimentError(f"unknown flag {spelling!r}{hint}")
            kind = kinds[name]
            tokens.append(_flag(name))
            if not equals:
                continue
        else:
            value, equals = token, ""
        if kind == "bool" and tokens[-1] == _flag(name):
            if value.lower() not in ("true", "false"):
                raise ExperimentError(f"{_flag(name)} takes True or False, not {value!r}")
            if value.lower() == "false":
                tokens[-1] = _flag("no_" + name)
        elif kind in ("list[int]", "list[str]"):
            items = _list_items(name, value)
            tokens += map(_whole, items) if kind == "list[int]" else items
        else:
            value = _whole(value) if kind == "int" else value
            if equals:  # one token, as a value may begin with a dash
                tokens[-1] += "=" + value
            else:
                tokens.append(value)
    return tokens


def _whole(text: str) -> str:
    """`64.0` as `64`; whatever is no whole number as it is."""
    with contextlib.suppress(ValueError, OverflowError):
        if not text.isdecimal() and float(text).is_integer():
            return str(int(float(text)))
    return text


def _list_items(name: str, value: str) -> list[str]:
    """The items of a list given as one JSON or Python literal, or the value itself."""
    if not value.startswith("["):
        return [value]
    try:
        return [str(item) for item in ast.literal_eval(value)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ExperimentError(f"{_flag(name)}: {value!r} is not a list") from None


@contextlib.contextmanager
def _errors_in_one_line(debug: bool = False) -> Iterator[None]:
    """The one place where an expected failure becomes a line for people and an exit status."""
    try:
        yield
    except ExperimentError as error:
        if debug:
            traceback.print_exception(error)
        print(f"vit.py: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"vit.py: stopped by {_one_line(stop)}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except MemoryError as error:  # outside of the training, which says more
        if debug:
            traceback.print_exception(error)
        print(f"vit.py: error: out of memory: the data need too much ({_one_line(error)})", file=sys.stderr)
        sys.exit(OutOfMemory.exit_status)
    except KeyboardInterrupt:  # before the training, when there is nothing to finish
        sys.exit(128 + signal.SIGINT)


class Interrupted(BaseException):
    """SIGINT or SIGTERM has come. Not an Exception, so that nothing that survives errors survives it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class SteadyStream:
    """A stream that lets lines go where they cannot be written (a log on a full disk, a pipe whose reader has left)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: str) -> None:
    print(f"vit.py: warning: {' '.join(message.split())}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------
# Backend: KERAS_BACKEND wins over the flag, the flag over the default. Keras reads the variable when it is imported.
# --------------------------------------------------------------------------------------------------------------


def _set_backend_from_env_or_cli(argv: Sequence[str]) -> ViTConfig:
    """Parse and check `argv`, set KERAS_BACKEND, and return the configuration with the backend that really runs.

    Reads `.env` in the current folder first; it never overrides the real environment. Raises ExperimentError for
    any wrong flag or value.
    """
    try:
        load_dotenv(Path(".env"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f".env cannot be read ({error})") from error
    config = _parse_command_line(argv)
    backend = os.environ.get("KERAS_BACKEND") or config.keras_backend
    for name in (config.keras_backend, backend):
        _require(name in BACKENDS, f"the backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if backend != config.keras_backend:
        _warn(f"KERAS_BACKEND={backend} wins over --keras-backend {config.keras_backend}")
    config = replace(config, keras_backend=backend)
    config.check()
    os.environ["KERAS_BACKEND"] = backend
    _set_device_and_caches(config)
    return config


def _set_device_and_caches(config: ViTConfig) -> None:
    """What the backends read from the environment when they are imported."""
    if config.device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    elif config.device == "gpu":
        os.environ["JAX_PLATFORMS"] = "cuda"  # with "cuda,cpu", or nothing set, JAX would take the CPU without a word
    if config.device != "auto":
        os.environ.pop("JAX_PLATFORM_NAME", None)  # an older spelling, which would win
    has_nvidia_driver = Path("/dev/nvidiactl").exists() or Path("/dev/nvmap").exists()  # the latter on a Jetson
    if config.device == "cpu" or not has_nvidia_driver:
        _keep_freed_memory()
    if config.compile_cache:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
        # JAX keeps what took a second or more: of the hundreds of small ones that build the model, nothing.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    else:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def _keep_freed_memory() -> None:
    """Have glibc keep what a training step on a CPU frees, for the next one.

    As it is, it gives every large block back to the kernel and gets it again page by page, zeroed: a third of a step's
    time (docs/performance.md). It has to be set before the first thread allocates.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def _give_back_freed_memory() -> None:
    """The exception: once something that stays lies in the midst of a step's block, the next step needs another one."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


if __name__ == "__main__":
    sys.stdout, sys.stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    with _errors_in_one_line("--debug" in sys.argv):
        _config = _set_backend_from_env_or_cli(sys.argv[1:])
else:  # imported by a test or a notebook, whose command line is not ours
    os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up chatter; must be set before the import

# A Ctrl-C in these seconds has nothing to finish; SIG_IGN is what a shell gives to what runs in the background.
_handles_sigint = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
if _handles_sigint:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import keras
import numpy as np
from keras import layers, ops

if _handles_sigint:
    signal.signal(signal.SIGINT, signal.default_int_handler)

keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says
_IMPORT_S = time.perf_counter() - _STARTED


# The functions that speak to a backend itself; beside them only the training step does, everything else goes through Keras.


def _seed_everything(seed: int) -> None:
    """As keras.utils.set_random_seed, but that imports TensorFlow, for seconds, wherever it is installed."""
    random.seed(seed)  # Keras' layers and initializers draw their seeds from it
    np.random.seed(seed)  # the order of the images
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.random.set_seed(seed)


def _set_tf32(allowed: bool) -> None:
    """JAX's and TensorFlow's default is TF32, torch's is not: unless it is set, a comparison compares number formats."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if allowed else "highest")
    elif backend == "torch":
        import torch

        torch.set_float32_matmul_precision("high" if allowed else "highest")
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(allowed)


def _device() -> dict:
    """The device on which the backend computes by default, and the most bytes its own allocator has held at once so far."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        if (device := jax.devices()[0]).platform != "cpu":
            cuda = " ".join(device.client.platform_version.split())
            peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
            return {"name": device.device_kind, "is_gpu": True, "cuda": cuda, "peak_bytes": peak}
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
            return {"name": name, "is_gpu": True, "cuda": torch.version.cuda, "peak_bytes": peak}
    else:
        import tensorflow as tf

        if gpus := tf.config.list_physical_devices("GPU"):
            name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
            cuda = tf.sysconfig.get_build_info().get("cuda_version")
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            return {"name": name, "is_gpu": True, "cuda": cuda, "peak_bytes": peak}
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in cpus if line.startswith("model name")), platform.machine())
    return {"name": name, "is_gpu": False, "cuda": None, "peak_bytes": None}


def _require_working_device(wanted: str) -> None:
    """Run one real operation, as a GPU can be listed and still be of no use; raise ExperimentError with the likely cause."""
    backend = keras.backend.backend()
    try:
        is_gpu = _device()["is_gpu"]
        product = ops.matmul(ops.ones((64, 64)), ops.ones((64, 64)))
        _require(float(product[0, 0]) == 64.0, f"{backend}: the device multiplies two matrices wrongly")
    except ExperimentError:
        raise
    except Exception as error:  # each backend has types of its own for this
        said = _one_line(error)
        causes = {
            "no kernel image": f"this build of {backend} was not made for this GPU (an AGX Orin needs sm_87)",
            "driver": f"the NVIDIA driver is older than the CUDA of this build of {backend}",
            "out of memory": "another process holds the device's memory",
            "RESOURCE_EXHAUSTED": "another process holds the device's memory",
        }
        cause = next((cause for sign, cause in causes.items() if sign in said), NO_GPU)
        raise ExperimentError(f"{backend} cannot compute on its device: {cause} ({said[:200]})") from error
    _require(is_gpu or wanted != "gpu", f"{backend} sees no GPU: {NO_GPU}")


NO_GPU = (
    "is a GPU there (nvidia-smi), does the container have it (--gpus all, on a Jetson --runtime nvidia), "
    "is this a CUDA build? To run on the CPU on purpose: --device cpu, or VIT_DEVICE=cpu"
)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not give the memory asked for; every backend says so in words of its own."""
    signs = (
        "resource_exhausted",
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "oom when",
        "bad_alloc",
    )
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def _uniform(shape: tuple, like, seed: keras.random.SeedGenerator):
    """Numbers in [-1, 1), on the device of `like`. Keras' own on torch would wait for the device at every draw."""
    if keras.backend.backend() == "torch":
        import torch

        return 2 * torch.rand(shape, device=like.device) - 1
    return keras.random.uniform(shape, -1, 1, seed=seed)


def _random_words(like, seed: keras.random.SeedGenerator):
    """Two random 32-bit integers, of torch's own generator on torch, as `_uniform`."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=like.device)
    return keras.random.randint((2,), -(2**31), 2**31 - 1, "int32", seed=seed)


# --------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Images (N, height, width, channels), uint8 or float, and labels (N,), integers below `num_classes`.

    With a validation split of 0, `x_val` and `y_val` have length 0.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image as it is stored, before any resizing."""
        return self.x_train.shape[1:]


def load_dataset(config: ViTConfig) -> Dataset:
    """Load `config.dataset` and set apart the validation part; raise ExperimentError if it cannot be used."""
    if config.dataset == "synthetic":
        arrays = _synthetic_arrays()
    elif config.dataset in CIFAR:
        arrays = _cifar_arrays(config.dataset)
    else:
        arrays = _read_npz(Path(config.dataset))
    x, y, x_test, y_test = (arrays[name] for name in ARRAY_NAMES)
    train, val = _stratified_split(y, config.validation_split, config.seed)
    _require(
        len(train) > 0, f"--validation-split {config.validation_split} leaves none of the {len(y)} images for training"
    )
    num_classes = int(max(y.max(), y_test.max())) + 1
    return Dataset(x[train], y[train], x[val], y[val], x_test, y_test, num_classes)


ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")


def _stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training and the validation part; each class gives its share, give or take one image."""
    count = round(len(labels) * share)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    evenly_spaced = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(int)
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_class[evenly_spaced]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def _synthetic_arrays() -> dict[str, np.ndarray]:
    """2,048 training and 512 test images shaped as CIFAR-100's (32x32 RGB, 100 classes), the same on every machine.

    Every class has a random mosaic of 4x4 colours, symmetric so that a flip keeps the class; an image is its class's
    mosaic under strong noise. So the model has CIFAR-100's size, and its accuracy rises within a few epochs.
    """
    rng = np.random.default_rng(0)  # integers only: floats may differ in the last bit between machines
    mosaics = rng.integers(0, 256, (100, 4, 2, 3))
    mosaics = np.concatenate([mosaics, mosaics[:, :, ::-1]], axis=2)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(count) % 100
        images = mosaics[labels].repeat(8, axis=1).repeat(8, axis=2)
        noisy = images + rng.integers(-110, 111, images.shape)
        return noisy.clip(0, 255).astype(np.uint8), labels

    return dict(zip(ARRAY_NAMES, (*draw(2048), *draw(512)), strict=True))


def _cifar_arrays(name: str) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 from a cache of ours, or once through keras.datasets.

    keras.datasets hashes and unpacks the archive at every call, into a folder that all processes share: that takes
    seconds, and a second process can read half-written files. So the arrays are kept as one uncompressed .npz that
    appears whole, and only one process at a time goes through Keras.
    """
    import fcntl
    import socket

    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    cache = folder / f"vit-{name}.npz"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written: no lock and no cache, but still the data
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f".vit-{name}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.exists():
            with contextlib.suppress(ExperimentError):  # damaged: made anew below
                return _read_npz(cache)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte, so that a download that stalls ends
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a bare Exception when a download fails
            archive = {"cifar10": "cifar-10-batches-py-target_archive", "cifar100": "cifar-100-python-target_archive"}[
                name
            ]
            url = f"https://www.cs.toronto.edu/~kriz/{name.replace('cifar', 'cifar-')}-python.tar.gz"
            raise ExperimentError(
                f"{name} could not be loaded ({error}); without a network, put {url} at {folder / archive}, "
                "or run with --dataset synthetic"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        arrays = dict(zip(ARRAY_NAMES, (x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)), strict=True))
        with contextlib.suppress(OSError), _replacing(cache) as scratch:
            np.savez(scratch, **arrays)
        return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz, labels flattened to (N,); raise ExperimentError with the first thing that is wrong."""
    _require(zipfile.is_zipfile(path), f"{path} is not an .npz file, a zip archive of NumPy arrays, or is cut short")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAY_NAMES if name not in archive]
            arrays = {} if missing else {name: archive[name] for name in ARRAY_NAMES}
    except MemoryError as error:
        raise OutOfMemory(f"{path} is too large for this machine's memory, or damaged ({error})") from error
    except Exception as error:  # zipfile, zlib and numpy between them raise a dozen types for a damaged file
        raise ExperimentError(f"{path} cannot be read as an .npz file ({error or type(error).__name__})") from error

    _require(not missing, f"{path}: {' and '.join(missing)} missing; needed are {', '.join(ARRAY_NAMES)}")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        images, labels = f"{path}: x_{part}", f"{path}: y_{part}"
        _require(x.ndim == 4, f"{images} must have the shape (images, height, width, channels), not {x.shape}")
        _require(x.size > 0, f"{images} is empty, of shape {x.shape}")
        _require(x.dtype.kind in "uif", f"{images} must hold numbers, not {x.dtype}")
        _require(x.dtype.kind != "f" or bool(np.isfinite(x).all()), f"{images} holds values that are not finite")
        _require(y.dtype.kind in "ui", f"{labels} must hold integers, not {y.dtype}")
        _require(y.shape in ((len(x),), (len(x), 1)), f"{labels} must hold one label an image, {len(x)}, not {y.shape}")
        _require(y.min() >= 0, f"{labels} holds negative labels")
        arrays[f"y_{part}"] = y.reshape(-1).astype(np.int64)
    train, test = arrays["x_train"].shape, arrays["x_test"].shape
    _require(train[1:] == test[1:], f"{path}: images differ in shape: x_train {train}, x_test {test}")
    label = max(arrays["y_train"].max(), arrays["y_test"].max())
    _require(label < train[0], f"{path}: labels go up to {label}, but there are only {train[0]} training images")
    return arrays


def _modified(path: Path) -> float:
    """When the file was written, in seconds; 0 if another process has just removed it."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place once the block has ended without an error.

    So whatever stands at `path` is whole, old or new, at every instant; nothing is left behind after a failure, and what
    a kill has left goes an hour later. (A process number would not do as the scratch's name: in a container it is always 1.)
    """
    for left in path.parent.glob(f".????????-{glob.escape(path.name)}"):
        if time.time() - _modified(left) > 3600:
            with contextlib.suppress(OSError):
                left.unlink()
    scratch = path.with_name(f".{os.urandom(4).hex()}-{path.name}")
    try:
        yield scratch
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------
# Augmentation and model
# --------------------------------------------------------------------------------------------------------------


def create_data_augmentation(config: ViTConfig, x_train: np.ndarray) -> keras.Sequential:
    """Images (B, H, W, C) as stored -> (B, image_size, image_size, C), normalized with the mean and variance of `x_train`.

    In training also flipped, rotated by up to 0.02 turns and zoomed by up to 20 %, at random.
    """
    size, rotation, zoom = config.image_size, 0.02, 0.2
    mean, variance = _channel_statistics(x_train)
    normalization = layers.Normalization(mean=mean, variance=variance)
    if config.augmentation == "fused":
        return keras.Sequential([normalization, FusedAugmentation(size, rotation, zoom)], name="data_augmentation")
    stock = [
        layers.Resizing(size, size),
        layers.RandomFlip("horizontal"),
        layers.RandomRotation(rotation),
        layers.RandomZoom(zoom, zoom),
    ]
    # Keras marks rotation and zoom as not compilable, for the sake of TensorFlow's XLA. One such layer makes it run the
    # whole model uncompiled, op by op, although JAX compiles both (a step of a small ViT on a CPU: 0.07 s against 0.5 s).
    if keras.backend.backend() == "jax":
        for layer in stock:
            layer.supports_jit = True
    return keras.Sequential([normalization, *stock], name="data_augmentation")


def _channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and variance of every channel of (N, H, W, C), as Normalization.adapt has them, which takes seconds on JAX."""
    count = images[..., 0].size
    total = square = 0.0
    for start in range(0, len(images), 1024):  # as float64 all images at once would be a gigabyte
        part = images[start : start + 1024].astype(np.float64)
        total, square = total + part.sum((0, 1, 2)), square + np.square(part).sum((0, 1, 2))
    mean = total / count
    return mean.tolist(), np.maximum(square / count - mean**2, 0).tolist()


@keras.saving.register_keras_serializable(package="vit")
class FusedAugmentation(layers.Layer):
    """Resize, flip, rotate and zoom images (B, H, W, C) -> (B, size, size, C) by one bilinear gather from the small source.

    The geometry of Resizing, RandomFlip("horizontal"), RandomRotation(rotation) and RandomZoom(zoom, zoom), which
    resample the enlarged image three times over: for every output pixel, go back through zoom, rotation, flip and
    resizing to where it comes from, reflecting at the edges. Outside training it resizes, no more.
    """

    def __init__(self, size: int, rotation: float, zoom: float, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.rotation, self.zoom, self.seed = size, rotation, zoom, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        if not training:
            return ops.image.resize(images, (self.size, self.size), interpolation="bilinear")
        return self.transform(images, _uniform((4, ops.shape(images)[0], 1, 1), images, self.seed_generator))

    def transform(self, images, draws):
        """Apply `draws` (4, B, 1, 1) in [-1, 1): flip if negative, shares of the largest rotation and of the zooms."""
        flip, turn, zoom_y, zoom_x = ops.unstack(draws)
        center = (self.size - 1) / 2
        pixel = ops.arange(self.size, dtype="float32") - center
        y = self._reflect(ops.reshape(pixel, (1, -1, 1)) * (1 + self.zoom * zoom_y) + center) - center
        x = self._reflect(ops.reshape(pixel, (1, 1, -1)) * (1 + self.zoom * zoom_x) + center) - center
        angle = 2 * math.pi * self.rotation * turn
        cos, sin = ops.cos(angle), ops.sin(angle)
        x, y = self._reflect(cos * x - sin * y + center), self._reflect(sin * x + cos * y + center)
        x = ops.where(flip < 0, self.size - 1 - x, x)
        return self._gather(images, y, x)

    def _reflect(self, coordinate):
        """Fold a pixel coordinate back into the image, whose edges lie half a pixel beyond the outermost centers."""
        around = ops.mod(coordinate + 0.5, 2 * self.size)
        return ops.minimum(around, 2 * self.size - around) - 0.5

    def _gather(self, images, y, x):
        """Pixels of `images` (B, H, W, C) at output coordinates y, x (B, size, size), interpolated between four neighbours."""
        _, height, width, channels = images.shape
        y = ops.clip((y + 0.5) * (height / self.size) - 0.5, 0, height - 1)
        x = ops.clip((x + 0.5) * (width / self.size) - 0.5, 0, width - 1)
        top, left = ops.floor(y), ops.floor(x)
        down, right = ops.cast(y - top, images.dtype)[..., None], ops.cast(x - left, images.dtype)[..., None]
        top, left = ops.cast(top, "int32"), ops.cast(left, "int32")
        bottom, next_left = ops.minimum(top + 1, height - 1), ops.minimum(left + 1, width - 1)
        first = ops.reshape(ops.arange(ops.shape(images)[0], dtype="int32"), (-1, 1, 1)) * height  # row of each image
        pixels = ops.reshape(images, (-1, channels))

        def at(row, column):
            return ops.take(pixels, (first + row) * width + column, axis=0)

        upper = at(top, left) * (1 - right) + at(top, next_left) * right
        lower = at(bottom, left) * (1 - right) + at(bottom, next_left) * right
        return upper * (1 - down) + lower * down

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size, self.size, input_shape[3])

    def get_config(self):
        return {
            **super().get_config(),
            "size": self.size,
            "rotation": self.rotation,
            "zoom": self.zoom,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="vit")
class Patches(layers.Layer):
    """Cut images (B, H, W, C) into patches (B, H//p * W//p, p * p * C), row by row; the rest at the edges is dropped."""

    def __init__(self, patch_size: int, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        _, height, width, channels = images.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        images = images[:, : rows * p, : columns * p]
        patches = ops.reshape(images, (-1, rows, p, columns, p, channels))
        patches = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
        return ops.reshape(patches, (-1, rows * columns, p * p * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable(package="vit")
class PatchEncoder(layers.Layer):
    """Patches (B, N, P) -> tokens (B, N, D): a linear projection plus a learned embedding of the position."""

    def __init__(self, num_patches: int, projection_dim: int, **kwargs):
        super().__init__(**kwargs)
        self.num_patches = num_patches
        self.projection_dim = projection_dim
        self.projection = layers.Dense(projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def build(self, input_shape):
        self.projection.build(input_shape)
        self.position_embedding.build((self.num_patches,))

    def call(self, patches):
        return self.projection(patches) + self.position_embedding(ops.arange(self.num_patches))

    def get_config(self):
        return {**super().get_config(), "num_patches": self.num_patches, "projection_dim": self.projection_dim}


def _hashes_dropout(tensor) -> bool:
    """Where a hash is faster than the backend's own random bits: on JAX, and in what torch compiles for a CPU."""
    backend = keras.backend.backend()
    return backend == "jax" or (backend == "torch" and TorchGraphs.is_tracing and tensor.device.type == "cpu")


@keras.saving.register_keras_serializable(package="vit")
class Dropout(layers.Dropout):
    """Keras' own, but where it is faster an element is kept or dropped by a hash of its number (Wellons' lowbias32).

    The compiler computes the hash in the loop that uses it, where random bits are made, written and read: on a CPU that was
    a quarter of a step. Two random words a call make the hash another one. The integers are signed, as torch has no others:
    a shift to the right needs its mask, and a constant may have to be negative.
    """

    def call(self, inputs, training=False):
        if not training or not self.rate or not _hashes_dropout(inputs):
            return super().call(inputs, training=training)
        first, second = _random_words(inputs, self.seed_generator)
        shape = ops.shape(inputs)
        bits = ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape) ^ first
        bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D + second
        bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
        bits = bits ^ ((bits >> 16) & 0xFFFF)
        return ops.where(bits >= int(self.rate * 2**32) - 2**31, inputs / (1 - self.rate), 0.0)


def _is_float16_on_cpu(compute_dtype: str) -> bool:
    """Which XLA does not have in its fused attention."""
    return compute_dtype == "float16" and not _device()["is_gpu"]


@keras.saving.register_keras_serializable(package="vit")
class Attention(layers.MultiHeadAttention):
    """Keras' attention, but with dropout torch keeps its fused kernel, which takes the dropout itself.

    Keras goes from its fused `dot_product_attention` to explicit einsums, and their memory, as soon as there is dropout.
    """

    def _build_attention(self, rank):
        super()._build_attention(rank)
        self._dropout_layer = Dropout(self._dropout, dtype=self.dtype_policy, seed=self.seed)

    def _compute_attention(self, query, key, value, attention_mask=None, training=None, scores=False, **options):
        backend = keras.backend.backend()
        drops = training and self._dropout > 0
        # torch has no kernel with dropout for a CPU.
        by_hand = attention_mask is not None or (drops and _hashes_dropout(query))
        if backend == "torch" and not by_hand:
            from torch.nn.functional import scaled_dot_product_attention

            output = scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                dropout_p=self._dropout if training else 0.0,
                scale=self._inverse_sqrt_key_dim,
            )
            return output.transpose(1, 2), None
        # Asked for the scores, Keras takes the explicit form.
        scores = scores or (backend == "jax" and _is_float16_on_cpu(self.compute_dtype))
        return super()._compute_attention(query, key, value, attention_mask, training, scores, **options)


def _mlp(x, hidden_units: Sequence[int], dropout_rate: float):
    for units in hidden_units:
        x = layers.Dense(units, activation=keras.activations.gelu)(x)
        x = Dropout(dropout_rate)(x)
    return x


def create_vit_classifier(
    config: ViTConfig, image_shape: tuple[int, int, int], num_classes: int, data_augmentation: keras.Sequential
) -> keras.Model:
    """Images (B, *image_shape) as stored -> logits (B, num_classes). The keras.io ViT: see the head of the file."""
    inputs = keras.Input(shape=image_shape)
    tokens = Patches(config.patch_size)(data_augmentation(inputs))
    tokens = PatchEncoder(config.num_patches, config.projection_dim)(tokens)
    for _ in range(config.transformer_layers):
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        attention = Attention(config.num_heads, key_dim=config.projection_dim, dropout=config.attention_dropout)
        tokens = layers.Add()([attention(normed, normed), tokens])
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        tokens = layers.Add()([_mlp(normed, config.transformer_units, dropout_rate=0.1), tokens])
    features = layers.LayerNormalization(epsilon=1e-6)(tokens)
    features = Dropout(0.5)(layers.Flatten()(features))
    features = _mlp(features, config.mlp_head_units, dropout_rate=0.5)
    logits = layers.Dense(num_classes, dtype="float32")(features)  # the softmax of the loss needs the precision
    return VisionTransformer(inputs, logits, name="vit")


# --------------------------------------------------------------------------------------------------------------
# Training step. Keras' own, which JAX and TensorFlow compile as a whole, except for two things: torch, which Keras runs
# eagerly, op by op from Python, and batches that do not fit into memory.
# --------------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="vit")
class VisionTransformer(keras.Model):
    """A functional model that can take a batch in parts (`micro_batches`) and, on torch, run as compiled graphs (`graphs`).

    A part's loss counts by its share of the batch, so that the sum of the parts' gradients is the gradient of the batch,
    and the optimizer's steps are the same.
    """

    micro_batches = 1
    graphs: TorchGraphs | None = None

    def train_step(self, *arguments):
        backend = keras.backend.backend()
        if backend == "torch":
            return self._torch_step(*arguments)
        if self.micro_batches == 1:
            return super().train_step(*arguments)
        return self._jax_step(*arguments) if backend == "jax" else self._tensorflow_step(*arguments)

    def _loss(self, x, y):
        """Images and labels of a batch, or a part of one -> its loss; counted in the metrics on the way."""
        logits = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=logits, training=True)
        self._loss_tracker.update_state(loss, sample_weight=ops.shape(x)[0])
        self.compute_metrics(x, y, logits)
        return loss

    def _stateless_loss(self, x, y, trainable, others):
        """`_loss` as a pure function: values of the variables in, loss and new values of `_others` out."""
        mapping = [*zip(self.trainable_variables, trainable), *zip(self._others, others)]  # noqa: B905
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss = self._loss(x, y)
        return loss, [ops.stop_gradient(scope.get_current_value(variable)) for variable in self._others]

    @property
    def _others(self) -> list[keras.Variable]:
        return [*self.non_trainable_variables, *self.metrics_variables]

    def _parts(self, x, y) -> Iterator[tuple]:
        """The parts of a batch, each with its share of it. The last batch of an epoch may be too small for all parts."""
        size = -(-len(x) // self.micro_batches)
        for start in range(0, len(x), size):
            part = x[start : start + size]
            yield part, y[start : start + size], len(part) / len(x)

    def _torch_step(self, data):
        import torch

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        weights = self.trainable_variables
        for variable in weights:
            variable.value.grad = None
        for x_part, y_part, share in self._parts(x, y):
            self._torch_backward(x_part, y_part, share)
        with torch.no_grad():
            self.optimizer.apply([variable.value.grad for variable in weights], weights)
        return self.get_metrics_result()

    def _torch_backward(self, x, y, share: float) -> None:
        """Add the gradients of a part of a batch to those that are there."""
        graphs = self.graphs
        if graphs and graphs.covers(x):
            trainable = [variable.value for variable in self.trainable_variables]
            others = [variable.value for variable in self._others]
            try:
                loss, others = graphs.run(self._stateless_loss, x, y, trainable, others)
                self.optimizer.scale_loss(loss * share).backward()
            except Exception as error:
                graphs.give_up(error)
                for value in trainable:
                    value.grad = None  # a graph fails at its first call, if at all: there are no other parts' to lose
            else:
                _assign(self._others, others)
                return
        self.optimizer.scale_loss(self._loss(x, y) * share).backward()

    def predict_step(self, *arguments):
        if not self.graphs:
            return super().predict_step(*arguments)
        x, *_ = keras.utils.unpack_x_y_sample_weight(*arguments)
        return self._torch_logits(ops.convert_to_tensor(x))  # an array would become a constant of the graph

    def test_step(self, *arguments):
        if not self.graphs:
            return super().test_step(*arguments)
        x, y, _ = keras.utils.unpack_x_y_sample_weight(*arguments)
        logits = self._torch_logits(x)
        self._loss_tracker.update_state(self.compute_loss(x, y, logits, training=False), sample_weight=len(x))
        return self.compute_metrics(x, y, logits)

    def _torch_logits(self, x):
        if not self.graphs.covers(x):
            return self(x, training=False)
        values = [variable.value for variable in [*self.trainable_variables, *self.non_trainable_variables]]
        try:
            return self.graphs.run(self._stateless_logits, x, values)
        except Exception as error:
            self.graphs.give_up(error)
            return self(x, training=False)

    def _stateless_logits(self, x, values):
        mapping = zip([*self.trainable_variables, *self.non_trainable_variables], values)  # noqa: B905
        with keras.StatelessScope(state_mapping=mapping):
            return self(x, training=False)

    def _jax_step(self, state, data):
        import jax

        trainable, non_trainable, optimizer, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        count = len(x)
        size = -(-count // self.micro_batches)
        whole = count // size * size

        def scaled_loss(trainable, others, x, y):
            loss, others = self._stateless_loss(x, y, trainable, others)
            with keras.StatelessScope(state_mapping=list(zip(self.optimizer.variables, optimizer))):  # noqa: B905
                return self.optimizer.scale_loss(loss * (len(x) / count)), others

        def add(total, part):
            gradients, others = total
            new, others = jax.grad(scaled_loss, has_aux=True)(trainable, others, *part)
            return ([a + b for a, b in zip(gradients, new, strict=True)], others), None

        total = [ops.zeros_like(weight) for weight in trainable], [*non_trainable, *metrics]
        # A loop of XLA's, in the memory of one part. Written out one after the other, XLA keeps what all of them need.
        parts = [array[:whole].reshape(-1, size, *array.shape[1:]) for array in (x, y)]
        total, _ = jax.lax.scan(add, total, parts)
        if whole < count:  # what is left of a batch that the parts do not divide
            total, _ = add(total, (x[whole:], y[whole:]))
        gradients, others = total
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        non_trainable, metrics = others[: len(non_trainable)], others[len(non_trainable) :]
        with keras.StatelessScope(state_mapping=list(zip(self.metrics_variables, metrics))):  # noqa: B905
            logs = self.get_metrics_result()
        return logs, (trainable, non_trainable, optimizer, metrics)

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        count = tf.shape(x)[0]
        size = -(-count // self.micro_batches)
        weights = self.trainable_variables

        def gradients(x, y):
            with tf.GradientTape() as tape:
                share = tf.cast(tf.shape(x)[0], "float32") / tf.cast(count, "float32")
                loss = self.optimizer.scale_loss(self._loss(x, y) * share)
            # An embedding's gradient comes as rows, which have no place in tf.cond and in a sum.
            return [*map(tf.convert_to_tensor, tape.gradient(loss, [variable.value for variable in weights]))]

        total = [tf.zeros(variable.shape) for variable in weights]
        for part in range(self.micro_batches):
            rows = slice(part * size, (part + 1) * size)
            x_part, y_part = x[rows], y[rows]
            with tf.control_dependencies(total):  # one part after the other
                new = tf.cond(
                    tf.shape(x_part)[0] > 0,
                    lambda x=x_part, y=y_part: gradients(x, y),
                    lambda: [tf.zeros(variable.shape) for variable in weights],
                )
            total = [a + b for a, b in zip(total, new, strict=True)]
        self.optimizer.apply_gradients(zip(total, weights, strict=True))
        return self.get_metrics_result()


@keras.saving.register_keras_serializable(package="vit")
class FusedAdamW(keras.optimizers.AdamW):
    """AdamW by torch's fused kernel: one pass over all weights, where Keras' own makes a dozen (5 to 10 times the time).

    As in PyTorch, epsilon is added after the correction of the bias, in Keras before; 1e-7 as it is, only the first
    steps of weights with next to no gradient can tell.
    """

    def _apply_weight_decay(self, variables):
        pass  # the kernel does

    def _backend_update_step(self, grads, variables, learning_rate):
        import torch

        positions = [self._get_variable_index(variable) for variable in variables]
        step = self.iterations.value.float() + 1
        torch._fused_adamw_(
            [variable.value for variable in variables],
            list(grads),
            [self._momentums[i].value for i in positions],
            [self._velocities[i].value for i in positions],
            [],
            [step] * len(positions),
            lr=ops.convert_to_tensor(learning_rate),
            beta1=self.beta_1,
            beta2=self.beta_2,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            amsgrad=False,
            maximize=False,
        )


class TorchGraphs:
    """Compiled graphs of a model's pure functions, one for each function and shape, on torch.

    `torch.compile` of Keras' step recompiles step after step (keras issue 21851), and of the model breaks into many graphs;
    `make_fx` runs the function once, past all Python, and gives one flat graph to compile. `sizes` are the numbers of
    images that are worth a compilation; the partial batch at the end of an epoch runs eagerly.
    """

    is_tracing = False

    def __init__(self, sizes: set[int]):
        self.sizes, self.failure, self.compiled = sizes, None, {}

    def covers(self, images) -> bool:
        return not self.failure and len(images) in self.sizes

    def run(self, function: Callable, images, *arguments):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        key = function.__name__, images.dtype, tuple(images.shape)
        if key not in self.compiled:
            # pre_dispatch: traced before dropout and attention are taken apart, which inductor compiles better (and, of
            # dropout on a CPU, correctly: torch 2.13 gives NaN for its parts, empty_like and bernoulli_).
            TorchGraphs.is_tracing = True
            try:
                graph = make_fx(lambda *values: function(*values), pre_dispatch=True)(images, *arguments)
            finally:
                TorchGraphs.is_tracing = False
            self.compiled[key] = torch.compile(graph)
        return self.compiled[key](images, *arguments)

    def give_up(self, error: Exception) -> None:
        """Go on without graphs, and say so once, unless there is too little memory."""
        if _is_out_of_memory(error) or self.failure:
            raise error
        self.failure = f"{type(error).__name__}: {_one_line(error)[:200]}"
        _warn(f"torch could not compile the model and runs eagerly ({self.failure})")


def _assign(variables: Sequence[keras.Variable], values: Sequence) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# --------------------------------------------------------------------------------------------------------------
# Measuring. Nothing here runs inside a training step: latency and step time are measured before the training, the
# epochs are timed as wholes, and energy is read by a thread of its own. `results.schema.json` explains every figure.
# --------------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 2
WARM_UP, MIN_STEPS = 10, 100  # fewer steps give no 99th percentile worth its name

# Peak dense TFLOP/s by device and number format, from NVIDIA's specifications at the highest power and clock that the maker
# allows. A Jetson calls itself "Orin", which is several modules of different speed: no entry rather than a guess.
PEAK_TFLOPS = {
    # AD107: 2 x 2560 CUDA cores x 2.37 GHz at 115 W; its 80 tensor cores give twice that with float32 accumulation.
    "NVIDIA GeForce RTX 4050 Laptop GPU": {
        "float32": 12.1,
        "float32+tf32": 12.1,
        "mixed_bfloat16": 24.3,
        "mixed_float16": 24.3,
    },
}


def _train_flops_per_image(config: ViTConfig, channels: int, num_classes: int) -> int:
    """Floating-point operations to train on one image: 2 a multiply-add in every matrix product, forward and twice that back."""
    n, d, inner = config.num_patches, config.projection_dim, config.num_heads * config.projection_dim

    def dense(widths: Sequence[int]) -> int:
        return sum(a * b for a, b in itertools.pairwise(widths))

    block = n * 4 * d * inner + 2 * n * n * inner + n * dense([d, *config.transformer_units])
    head = dense([n * d, *config.mlp_head_units, num_classes])
    return 3 * 2 * (n * config.patch_size**2 * channels * d + config.transformer_layers * block + head)


def train_memory_bytes(config: ViTConfig, channels: int = 3, num_classes: int = 100, micro_batches: int = 1) -> int:
    """An estimate of the device memory of training: weights, gradients, AdamW's two moments, and the activations of a batch.

    Counted are the tensors that the backward pass needs, as the einsums of explicit attention leave them; a compiler
    keeps fewer, a backend's workspace comes on top.
    """
    n, d, inner = config.num_patches, config.projection_dim, config.num_heads * config.projection_dim
    pixels = config.patch_size**2 * channels

    def dense(*widths: int) -> int:
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))

    block = 3 * dense(d, inner) + dense(inner, d) + dense(d, *config.transformer_units) + 4 * d
    head = dense(n * d, *config.mlp_head_units, num_classes)
    parameters = dense(pixels, d) + n * d + config.transformer_layers * block + 2 * d + head
    scores = 3 * config.num_heads * n * n  # before and after softmax and dropout
    block = n * (4 * d + 5 * inner) + scores + 3 * n * sum(config.transformer_units)
    image = 4 * config.image_size**2 * channels + 2 * n * pixels
    activations = image + config.transformer_layers * block + 3 * (n * d + sum(config.mlp_head_units))
    number = 4 if config.dtype_policy == "float32" else 2
    batch = -(-config.batch_size // micro_batches)
    return 16 * parameters + batch * activations * number


def _git(*arguments: str) -> str | None:
    """What git says of the folder of this file; None without git or outside a checkout."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


@dataclass(frozen=True)
class Reading:
    """One look at a power sensor. `joules` is a counter that may wrap at `wraps_at`; without it, `watts` are integrated."""

    watts: float | None = None
    joules: float | None = None
    wraps_at: float = math.inf
    utilization_percent: float | None = None
    temperature_c: float | None = None


Sensor = tuple[str, Callable[[], Reading]]  # what is read, and how


def _nvml_sensor() -> Sensor:
    """The first visible NVIDIA GPU, through nvidia-ml-py."""
    import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    gpu = pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdecimal() else 0)
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        has_counter = True
    except pynvml.NVMLError:  # before Volta
        has_counter = False

    def read() -> Reading:
        return Reading(
            watts=pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            joules=pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3 if has_counter else None,
            utilization_percent=pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            temperature_c=pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        )

    read()  # on a Jetson NVML starts, but answers NotSupported
    return "NVML, the whole board", read


def _ina3221_sensor(sysfs: Path = Path("/sys")) -> Sensor:
    """The module of a Jetson AGX Orin: three rails of the INA3221 at 1-0040, in mV and mA, whose sum is its power."""
    rails = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}
    labels = sorted(sysfs.glob("bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon*/in*_label"))
    channels = [label for label in labels if label.read_text().strip() in rails]
    if len(channels) != len(rails):
        raise FileNotFoundError("the INA3221 rails of a Jetson AGX Orin are not there")
    volts = [label.with_name(label.name.replace("_label", "_input")) for label in channels]
    amperes = [path.with_name(path.name.replace("in", "curr", 1)) for path in volts]
    loads = [sysfs / "devices/platform/gpu.0/load", sysfs / "devices/gpu.0/load"]
    load = next((path for path in loads if path.exists()), None)
    types = sysfs.glob("class/thermal/thermal_zone*/type")
    zones = [path.with_name("temp") for path in types if "gpu" in path.read_text().lower()]

    def number(path: Path) -> int:
        return int(path.read_text())

    def read() -> Reading:
        temperature_c = None
        with contextlib.suppress(OSError, IndexError):  # the GPU's zone cannot be read while the GPU sleeps
            temperature_c = number(zones[0]) / 1e3
        watts = sum(number(v) * number(a) for v, a in zip(volts, amperes, strict=True)) / 1e6
        return Reading(watts, utilization_percent=number(load) / 10 if load else None, temperature_c=temperature_c)

    read()
    return "INA3221, the module's rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", read


def _rapl_sensor(sysfs: Path = Path("/sys")) -> Sensor:
    """The first CPU package, through RAPL; readable by root alone on most systems."""
    zone = sysfs / "class/powercap/intel-rapl:0"
    wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6

    def read() -> Reading:
        return Reading(joules=int((zone / "energy_uj").read_text()) / 1e6, wraps_at=wraps_at)

    read()  # fails now rather than later where it cannot be read
    return "RAPL, CPU package 0", read


class EnergyMeter:
    """Energy between `begin` and `end`, summed over all such spans; a thread reads the sensor five times a second."""

    INTERVAL_S = 0.2

    def __init__(self, source: str, read: Callable[[], Reading]):
        self.source, self.read, self.lock, self.active, self.failure = source, read, threading.Lock(), False, None
        self.spans: list[list[tuple[float, Reading]]] = []
        threading.Thread(target=self._loop, daemon=True).start()

    def begin(self) -> None:
        with self.lock:
            self.active = True
            self.spans.append([])
            self._sample()

    def end(self) -> None:
        with self.lock:
            self._sample()
            self.active = False

    def _loop(self) -> None:
        while True:
            time.sleep(self.INTERVAL_S)
            with self.lock:
                if self.active:
                    self._sample()

    def _sample(self) -> None:
        try:
            reading = self.read()
            self.spans[-1].append((time.perf_counter(), reading))
        except Exception as error:  # the sensor is gone, and with it the joules since the last look
            self.failure = self.failure or f"lost during the run ({error})"

    def summary(self, images: int) -> dict:
        """Figures of the epochs that were measured, one a span and `images` long each: not all, if a run was resumed."""
        if self.failure or not self.spans:
            return _no_energy(self.failure or "no epoch was measured")
        joules = seconds = peak_w = 0.0
        for span in self.spans:
            for (then, last), (now, reading) in itertools.pairwise(span):
                interval = now - then
                if reading.joules is None:
                    spent, watts = interval * (last.watts + reading.watts) / 2, reading.watts
                else:
                    spent = (reading.joules - last.joules) % reading.wraps_at
                    # A counter moves in steps: over too short an interval it shows a peak that is none.
                    watts = reading.watts or (spent / interval if interval > self.INTERVAL_S / 2 else 0.0)
                joules, seconds, peak_w = joules + spent, seconds + interval, max(peak_w, watts)
        readings = [reading for span in self.spans for _, reading in span]
        utilization = [r.utilization_percent for r in readings if r.utilization_percent is not None]
        return {
            "source": self.source,
            "joules_per_epoch": joules / len(self.spans),
            "joules_per_image": joules / len(self.spans) / images,
            "mean_w": joules / seconds,
            "peak_w": peak_w or None,
            "utilization_percent": statistics.fmean(utilization) if utilization else None,
            "max_temperature_c": max((r.temperature_c for r in readings if r.temperature_c is not None), default=None),
        }


def _no_energy(reason: str) -> dict:
    names = ["joules_per_epoch", "joules_per_image", "mean_w", "peak_w", "utilization_percent", "max_temperature_c"]
    return {"source": f"unavailable: {reason}", **dict.fromkeys(names)}


def _start_meters(is_gpu: bool) -> dict[str, EnergyMeter | str]:
    """A meter, or the reason why there is none, for the accelerator (on a Jetson the whole module) and the CPU package."""
    candidates = {"accelerator": [_nvml_sensor, _ina3221_sensor] if is_gpu else [], "cpu_package": [_rapl_sensor]}
    meters: dict[str, EnergyMeter | str] = {}
    for part, sensors in candidates.items():
        meters[part] = "the backend runs on the CPU" if not sensors else ""
        for sensor in sensors:
            try:
                meters[part] = EnergyMeter(*sensor())
                break
            except Exception as error:  # no library, no driver, no such file, no permission: all mean no sensor
                meters[part] = "; ".join(filter(None, [meters[part], str(error) or type(error).__name__]))
    return meters


def _power_mode() -> str | None:
    """The power mode of a Jetson, as nvpmodel keeps it; None elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/var/lib/nvpmodel/status").read_text().strip()
    return None


class EpochMeter(keras.callbacks.Callback):
    """Time and energy of the training part of every epoch, without the validation that follows it.

    It has no batch hooks: those would make JAX and torch wait for the device in every step.
    """

    def __init__(self, meters: Sequence[EnergyMeter]):
        super().__init__()
        self.meters = meters
        self.train_s: list[float] = []
        self.wall_s: list[float] = []  # from the start of the training to the end of the epoch, validation included

    def on_train_begin(self, logs=None):
        before_s = self.wall_s[-1] if self.wall_s else 0.0  # of a run that is resumed
        self._training_began = time.perf_counter() - before_s
        self._is_first_epoch = True

    def on_epoch_begin(self, epoch, logs=None):
        for meter in self.meters:
            meter.begin()
        self._epoch_began = time.perf_counter()

    def on_test_begin(self, logs=None):
        self._end_training_part()

    def on_epoch_end(self, epoch, logs=None):
        if len(self.train_s) == len(self.wall_s):  # there was no validation
            self._end_training_part()
        self.wall_s.append(time.perf_counter() - self._training_began)
        if self._is_first_epoch:
            _give_back_freed_memory()
        self._is_first_epoch = False

    def _end_training_part(self):
        ops.convert_to_numpy(self.model.trainable_weights[-1].value)  # waits for the last step, on every backend
        self.train_s.append(time.perf_counter() - self._epoch_began)
        for meter in self.meters:
            meter.end()


class StepTimer(keras.callbacks.Callback):
    """Seconds of every step, each waited for: for a `fit` of its own, apart from the epochs. The first one compiles."""

    def __init__(self, budget_s: float):
        super().__init__()
        self.budget_s, self.seconds = budget_s, []

    def on_train_batch_begin(self, batch, logs=None):
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # waits for the device: the loss is read after the whole step has been launched
        self.seconds.append(time.perf_counter() - self._began)
        steady = self.seconds[1:]
        ahead_s = statistics.median(steady or [0.0]) * (WARM_UP + MIN_STEPS)
        # Seen early, but not from one slow step.
        too_slow = sum(steady) > self.budget_s / 10 and ahead_s > self.budget_s
        self.model.stop_training = too_slow or len(steady) >= WARM_UP + MIN_STEPS


def _percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Percentiles without the first WARM_UP values; None where fewer than MIN_STEPS are left."""
    ms = 1e3 * np.array(seconds[WARM_UP:])
    if len(ms) < MIN_STEPS:
        return None
    return {**{f"p{q}": float(np.percentile(ms, q)) for q in (50, 90, 99)}, "n": len(ms)}


def _measure_inference(model: keras.Model, images: np.ndarray, batch_size: int, budget_s: float) -> dict:
    """Latency of one image and throughput of whole batches, through `predict_on_batch`, from array to array."""

    def seconds(batch: np.ndarray) -> list[float]:
        model.predict_on_batch(batch)  # compiles
        times: list[float] = []
        while len(times) < WARM_UP + MIN_STEPS and sum(times) < budget_s / 2:
            began = time.perf_counter()
            model.predict_on_batch(batch)
            times.append(time.perf_counter() - began)
        return times

    batch = images[:batch_size]
    return {
        "latency_ms": _percentiles_ms(seconds(images[:1])),
        "inference_images_per_s": len(batch) / statistics.median(seconds(batch)),
    }


def _copies(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """The values, in memory of our own: what Keras gives may be a view of memory that JAX's next step takes over."""
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]


def _put_back(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(
            ops.copy(value)
        )  # a copy, as JAX may use a NumPy array's memory, and the next step takes it over


def _measure_steps(model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int, budget_s: float) -> dict:
    """Time of the first step, which compiles, and of at least MIN_STEPS steady ones; the model is afterwards as before."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = _copies(variables)
    whole = max(len(x) // batch_size, 1) * batch_size  # a partial batch would be another shape, and compile again
    timer = StepTimer(budget_s)
    while not model.stop_training:
        model.fit(x[:whole], y[:whole], batch_size=batch_size, verbose=0, callbacks=[timer])
    if rest := len(x) % batch_size:  # compiled now, so that the first epoch is as steady as the others
        model.fit(x[:rest], y[:rest], batch_size=rest, verbose=0)
    _put_back(variables, before)
    first, *steady = timer.seconds
    return {
        "first_step_s": first,
        "compile_s": max(first - statistics.median(steady), 0.0),
        "step_ms": _percentiles_ms(steady),
    }


# --------------------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------------------


class CustomWandbCallback(keras.callbacks.Callback):
    """Log whatever Keras reports for an epoch. (wandb.integration.keras needs TensorFlow: wandb issue 7186.)

    It has no batch hooks, which would make JAX and torch wait for the device in every step.
    """

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch, logs=None):
        try:
            self.run.log({"epoch": epoch + 1, **(logs or {})})
        except Exception as error:  # a full disk, a service that has died: the training goes on
            _warn(f"W&B did not take epoch {epoch + 1} ({_one_line(error)})")


def _start_wandb(config: ViTConfig, run_id: str | None):
    """Start a W&B run, or go on with the one of that id, without ever prompting.

    Where it cannot be online it is offline, and one line says so; where it cannot be either (a full disk), there is none.
    """
    import wandb

    try:
        mode, reason = wandb.setup().settings.mode, None
    except Exception as error:  # pydantic's, for a WANDB_... in the environment or .env
        raise ExperimentError(f"W&B does not take its settings: {error}") from error
    if mode in ("online", "shared"):
        try:
            if not wandb.login(prompt=False):
                reason = "no API key (set WANDB_API_KEY or run `wandb login`)"
        except wandb.errors.Error as error:  # malformed or rejected key, server out of reach
            reason = str(error)
    settings = {
        "project": config.wandb_project,
        "entity": config.wandb_entity,
        "name": config.wandb_run_name,
        "tags": config.wandb_tags or None,
        "config": {**_plain(config), "num_patches": config.num_patches},
        # A server that is gone at the end costs two minutes, not the run: what it has not got is on disk, for `wandb sync`.
        "settings": wandb.Settings(
            **{
                name: seconds
                for name, seconds in {"init_timeout": 30, "finish_timeout": 120}.items()
                if f"WANDB_{name.upper()}" not in os.environ
            }
        ),
    }
    if run_id:
        settings |= {"id": run_id, "resume": "allow"}
    if reason is None:
        try:
            return wandb.init(mode=mode, **settings)
        except Exception as error:  # W&B's own, or the disk's
            reason = _one_line(error)
    _warn(f"W&B logs offline: {reason}; upload later with `wandb sync`")
    if os.environ.get("WANDB_SWEEP_ID"):
        _warn("the SWEEP SEES NOTHING of this run: its search and early stopping need it online")
    try:
        return wandb.init(mode="offline", **settings | {"resume": None})
    except Exception as error:
        _warn(f"W&B logs nothing: {_one_line(error)}")
        return None


def _finish_wandb(run, results: dict) -> None:
    """Send the figures and end the W&B run, as failed unless the run is complete; nothing that goes wrong here is fatal."""
    figures = {**_figures(results), **(results.get("quality", {}).get("test") or {})}
    figures |= {"num_parameters": results["what"].get("num_parameters"), "failure": results["failure"]}
    try:
        run.summary.update({name: value for name, value in figures.items() if value is not None})
        run.finish(exit_code=0 if results["status"] == "complete" else 1)
    except Exception as error:
        _warn(f"W&B did not take the results ({_one_line(error)}); `wandb sync` uploads what it has")


def _plain(config: ViTConfig) -> dict:
    """The configuration as JSON takes it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


# --------------------------------------------------------------------------------------------------------------
# Interruptions: what a run leaves behind at every instant, and how it ends before its time
# --------------------------------------------------------------------------------------------------------------


class InMemoryFile(io.BytesIO):
    """Where Keras can save weights without a disk: HDF5 ends the whole process (SIGSEGV) where a disk is full."""

    def __str__(self) -> str:
        return "in_memory.weights.h5"  # Keras looks at the ending


class BestWeights(keras.callbacks.Callback):
    """Keep the weights of the best epoch by validation accuracy, in memory and as a file that is whole at every instant.

    The copy in memory is what the run evaluates: other runs may share the file's path. (keras.callbacks.ModelCheckpoint
    writes in place.) Without validation images every epoch counts as better than the one before.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.weights: list[np.ndarray] = []
        self.epoch = 0
        self.accuracy = -math.inf

    def on_epoch_end(self, epoch, logs=None):
        accuracy = (logs or {}).get("val_accuracy")
        if accuracy is not None and accuracy <= self.accuracy:
            return
        self.epoch, self.weights = epoch + 1, _copies(self.model.weights)
        if accuracy is not None:
            self.accuracy = accuracy
        self.write(self.model)

    def write(self, model: keras.Model) -> None:
        """The weights of `model`, which are the best ones now, into the file."""
        try:
            file = InMemoryFile()
            model.save_weights(file)
            with _replacing(self.path) as scratch:
                scratch.write_bytes(file.getbuffer())
        except OSError as error:
            _warn(f"the best weights stay in memory, {self.path} cannot be written ({_one_line(error)})")


class EpochSeeds(keras.callbacks.Callback):
    """Every epoch draws from a seed of its own: it is the same after a measurement, and in a run that was resumed."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        _seed_everything((self.seed + 1_000_003 * (epoch + 1)) % 2**32)


class FiniteLoss(keras.callbacks.Callback):
    """End the run in the epoch whose loss becomes NaN or infinite, before its weights count as anything."""

    ADVICE = "lower --learning-rate, or take another --dtype-policy"
    async_safe = True  # Keras reads the loss in threads of its own, and no step waits for that

    def __init__(self, images: np.ndarray):
        super().__init__()
        self.images = images  # to try the weights on, where there is no validation
        self.bad_steps: list[int] = []  # in no order: each step's loss is read in one of several threads

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            self.bad_steps.append(batch + 1)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1

    def on_epoch_end(self, epoch, logs=None):  # not before the validation: only here have all the threads ended
        if self.bad_steps:
            raise Diverged(
                f"the loss is not a finite number from step {min(self.bad_steps)} of epoch {self.epoch} on; {self.ADVICE}"
            )
        # The epoch's last step can have spoiled the weights; its loss, of before, does not tell.
        if not math.isfinite((logs or {}).get("val_loss", 0.0)):
            raise Diverged(f"the validation loss is not a finite number after epoch {self.epoch}; {self.ADVICE}")
        if "val_loss" not in (logs or {}) and not np.isfinite(self.model.predict_on_batch(self.images)).all():
            raise Diverged(f"the model's answers are not finite numbers after epoch {self.epoch}; {self.ADVICE}")


class StopSignals(keras.callbacks.Callback):
    """SIGINT and SIGTERM end the training after the current step, or whatever else runs at once; a second one, everything.

    As a context manager it holds the signals; as a callback it knows when a step is under way.
    """

    def __init__(self):
        super().__init__()
        self.received: int | None = None
        self.in_epoch = False
        self.is_finishing = (
            False  # what there is of the run is being written: the first signal changes nothing any more
        )

    def set_model(self, model):
        super().set_model(model)
        # Not self.model: that makes Keras on JAX collect the variables, which a step under way has just taken over.
        self.running = model

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        print(f"\nvit.py: {signal.Signals(number).name}: stopping; once more ends it at once", file=sys.stderr)
        if self.is_finishing:
            return
        if not self.in_epoch:
            raise Interrupted(number)
        self.running.stop_training = True

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def on_epoch_begin(self, epoch, logs=None):
        self.in_epoch = True

    def on_test_begin(self, logs=None):  # the validation: not worth waiting for
        self.check()
        self.in_epoch = False

    def on_test_end(self, logs=None):
        self.in_epoch = True

    def on_epoch_end(self, epoch, logs=None):
        self.check()


class ResumePoint(keras.callbacks.Callback):
    """All that continues a run after its last complete epoch, as one file beside the checkpoint, whole at every instant.

    keras.callbacks.BackupAndRestore keeps weights, optimizer and epoch; what it leaves out is the best epoch so far, the
    seeds on the device, all that was measured, and whose state it is. The file's name holds a digest of the
    configuration and the data, so that runs which share a checkpoint path keep their own (but not twice the same run at once).
    A complete run removes it.
    """

    # What may differ in a run that goes on: how long, where to, and under which name.
    FREE = ("num_epochs", "resume", "fit_batch", "debug", "measure_seconds", "compile_cache", "device")
    FREE += ("checkpoint_path", "results_dir", "node_name", "use_wandb")
    FREE += ("wandb_project", "wandb_entity", "wandb_run_name", "wandb_tags")

    KEYS = {"identity", "epochs", "resumed_after_epochs", "wandb_id", "counts", "best_epoch", "best_accuracy"}
    KEYS |= {"train_s", "wall_s", "spans", "results"}

    def __init__(self, config: ViTConfig, data: Dataset):
        super().__init__()
        self.identity = {name: value for name, value in _plain(config).items() if name not in self.FREE}
        self.identity["data"] = zlib.crc32(data.y_train, zlib.crc32(np.ascontiguousarray(data.x_train)))
        digest = zlib.crc32(json.dumps(self.identity, sort_keys=True).encode())
        self.stem = config.checkpoint_path.name.removesuffix(".weights.h5")
        self.path = config.checkpoint_path.with_name(f"{self.stem}.{digest:08x}.resume.npz")
        # The trials of a sweep are never resumed, and hundreds of such files would fill the disk.
        self.is_kept = not os.environ.get("WANDB_SWEEP_ID")
        self.progress: dict = {"identity": self.identity, "epochs": [], "resumed_after_epochs": [], "wandb_id": None}
        self.values: list[np.ndarray] = []

    def load(self) -> bool:
        """Read what an interrupted run has left; False if there is nothing.

        Raises ExperimentError for a file that is damaged, or where only a run with another configuration has left one.
        """
        if self.path.exists():
            try:
                with np.load(self.path, allow_pickle=False) as archive:
                    self.progress = json.loads(archive["progress"].tobytes())
                    self.values = [archive[f"value_{i}"] for i in range(sum(self.progress["counts"]))]
                if missing := self.KEYS - set(self.progress):
                    raise ValueError(f"{', '.join(sorted(missing))} missing")
                if self.progress["identity"] != self.identity:
                    raise ValueError("it is another run's")
            except Exception as error:  # zipfile, zlib, json and numpy between them raise a dozen types
                said = f"--resume: {self.path} is damaged ({_one_line(error)}); remove it to start anew"
                raise ExperimentError(said) from error
            self.progress["resumed_after_epochs"].append(len(self.progress["epochs"]))
            return True
        pattern = f"{glob.escape(self.stem)}.{'[0-9a-f]' * 8}.resume.npz"
        for other in sorted(self.path.parent.glob(pattern), key=_modified, reverse=True):
            with contextlib.suppress(Exception), np.load(other, allow_pickle=False) as archive:
                theirs = json.loads(archive["progress"].tobytes())["identity"]
                names = [name for name in self.identity if theirs.get(name) != self.identity[name]]
                differences = ", ".join(
                    "other data" if name == "data" else f"{_flag(name)} {theirs.get(name)} (not {self.identity[name]})"
                    for name in names
                    if name != "data" or "dataset" not in names
                )
                break
        else:
            return False
        raise ExperimentError(
            f"--resume: the interrupted run beside --checkpoint-path, {other}, has {differences}; repeat its flags to go on "
            "with it, or start another without --resume"
        )

    def go_back(self) -> None:
        """To the last epoch on file, or to the start where none of this run's is."""
        has_file = bool(self.progress["epochs"]) and self.is_kept and self.path.exists()
        self.progress["epochs"], self.values = [], []
        if has_file:
            self.load()

    def attach(self, best: BestWeights, epochs: EpochMeter, results: dict) -> None:
        """Follow these from now on."""
        self.best, self.epochs, self.results = best, epochs, results

    def restore(self, model: keras.Model) -> None:
        """Put a model, and what `attach` has named, where the interrupted run was."""
        done, (weights, states, _) = self.progress, self.progress["counts"]
        variables = self._variables(model)
        _require(
            [value.shape for value in self.values]
            == [tuple(v.shape) for v in [*variables, *(model.weights if len(self.values) > len(variables) else [])]],
            f"--resume: {self.path} does not fit the model of this version of Keras; remove it to start anew",
        )
        _put_back(variables, self.values[: weights + states])
        accuracy = done["best_accuracy"]  # 0.0 is one, and not less than any
        self.best.epoch, self.best.accuracy = done["best_epoch"], -math.inf if accuracy is None else accuracy
        self.best.weights = self.values[weights + states :] or _copies(model.weights)
        self.epochs.train_s, self.epochs.wall_s = done["train_s"], done["wall_s"]
        for meter in self.epochs.meters:  # the sensors may be others, as on another device
            spans = done["spans"].get(meter.source, [])
            meter.spans = [[(seconds, Reading(**reading)) for seconds, reading in span] for span in spans]

    def on_epoch_end(self, epoch, logs=None):
        self.progress["epochs"].append(logs)
        if not self.is_kept:
            return
        best = self.best.weights if self.best.epoch != epoch + 1 else []  # else they are the model's own
        weights, states = self._variables(self.model), self.model.optimizer.variables
        values = [*_copies(weights), *best]
        self.progress |= {
            "counts": [len(weights) - len(states), len(states), len(best)],
            "best_epoch": self.best.epoch,
            "best_accuracy": self.best.accuracy if math.isfinite(self.best.accuracy) else None,
            "train_s": self.epochs.train_s,
            "wall_s": self.epochs.wall_s,
            "spans": {
                meter.source: [[(s, asdict(reading)) for s, reading in span] for span in meter.spans]
                for meter in self.epochs.meters
            },
            "results": {name: self.results[name] for name in ("time", "memory")},
        }
        try:
            text = np.frombuffer(json.dumps(self.progress).encode(), np.uint8)
            arrays = {"progress": text} | {f"value_{i}": value for i, value in enumerate(values)}
            # As np.savez does it; but where the disk is full, that leaves an archive open, which says so in a traceback.
            with _replacing(self.path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
        except OSError as error:
            _warn(f"the run cannot be resumed from here, {self.path} cannot be written ({_one_line(error)})")

    @staticmethod
    def _variables(model: keras.Model) -> list[keras.Variable]:
        """All that a training step reads and writes: weights, seeds, the optimizer's state."""
        model.optimizer.build(model.trainable_variables)
        return [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------
# Experiment
# --------------------------------------------------------------------------------------------------------------


def run_experiment(config: ViTConfig) -> dict:
    """Train on `config.dataset`, evaluate the best epoch's weights on the test images, and return all that was measured.

    The result, as results.schema.json describes it, is also printed, written to `config.results_dir` and sent to W&B; so
    is what there is of it when the run ends before its time. Raises ExperimentError for what is to be expected, else
    whatever went wrong, and Interrupted for SIGINT and SIGTERM.
    """
    config = replace(config, keras_backend=keras.backend.backend())
    _seed_everything(config.seed)
    _set_tf32(config.tf32)
    keras.config.set_dtype_policy(config.dtype_policy)
    _require_working_device(config.device)
    results = {"schema_version": SCHEMA_VERSION, "status": "failed", "failure": None, "what": _what_runs(config)}
    what, timing = results["what"], results.setdefault("time", {"import_s": _IMPORT_S})
    versions = ", ".join(f"{name} {version}" for name, version in what["versions"].items() if version)
    print(f"{versions} on {what['device']}, node {config.node_name}")
    print("config: " + " ".join(f"{name}={value}" for name, value in what["config"].items()))

    began = time.perf_counter()
    data = load_dataset(config)
    timing["load_s"] = time.perf_counter() - began
    what["images"] = {"train": len(data.x_train), "validation": len(data.x_val), "test": len(data.x_test)}
    what["image_shape"], what["num_classes"] = list(data.image_shape), data.num_classes
    shapes = f"train {data.x_train.shape}, validation {data.x_val.shape}, test {data.x_test.shape}"
    print(f"data: {config.dataset}, {data.num_classes} classes, {shapes}")
    if rest := config.image_size % config.patch_size:
        sizes = f"patches of {config.patch_size} do not divide {config.image_size} pixels"
        print(f"note: {sizes}: the last {rest} rows and columns are cut off")

    point = ResumePoint(config, data)
    if config.resume:
        found = point.load()
        done = len(point.progress["epochs"])
        print(f"resume: {done} epochs are done" if found else f"resume: nothing at {point.path}, starting anew")
    elif point.path.exists() and point.is_kept:
        _warn(
            f"an interrupted run of this configuration is replaced, epoch by epoch; --resume goes on with it: {point.path}"
        )
    with StopSignals() as stop:
        wandb_run = _start_wandb(config, point.progress["wandb_id"]) if config.use_wandb else None
        point.progress["wandb_id"] = wandb_run.id if wandb_run else None
        logger = CustomWandbCallback(wandb_run) if wandb_run else None
        try:
            _fit_into_memory(config, data, results, point, stop, logger)
            results["status"] = "complete"
        except Interrupted as error:
            results["status"], results["failure"] = "interrupted", str(error)
            raise
        except BaseException as error:
            results["failure"] = _one_line(error) if isinstance(error, ExperimentError) else repr(error)
            raise
        finally:
            stop.is_finishing = True
            what["resumed_after_epochs"] = point.progress["resumed_after_epochs"]
            _print_table(results)
            if results["status"] == "complete":
                test = results["quality"]["test"]
                print(f"best weights: epoch {results['quality']['best_epoch']}, in {config.checkpoint_path}")
                print(
                    f"test accuracy {test['test_accuracy']:.4f}, top-5 {test['test_top-5-accuracy']:.4f}, "
                    f"loss {test['test_loss']:.4f}"
                )
            _write_results(config.results_dir, results)
            if results["status"] == "complete":
                point.remove()
            if wandb_run:  # last, as it may wait for a server
                _finish_wandb(wandb_run, results)
    return results


def _fit_into_memory(
    config: ViTConfig,
    data: Dataset,
    results: dict,
    point: ResumePoint,
    stop: StopSignals,
    logger: keras.callbacks.Callback | None,
) -> None:
    """Train and measure; out of memory, try again with the batch in twice as many parts, if --fit-batch allows it."""
    parts = results["what"]["micro_batches"] = 1
    while True:
        try:
            return _train_and_measure(config, data, _build(config, data, parts, results), results, point, stop, logger)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            needed = train_memory_bytes(config, data.image_shape[2], data.num_classes, parts) / 1e9
            failure = f"out of memory with {config.batch_size // parts or 1} images at a time, which need an estimated {needed:.1f} GB"
            if not config.fit_batch or parts >= config.batch_size:
                advice = "lower --batch-size, --image-size or --projection-dim" + ", or add --fit-batch" * (parts == 1)
                raise OutOfMemory(f"{failure}: {advice} ({_one_line(error)[:200]})") from error
        # Outside of the except clause, as the error's traceback holds on to the model and its memory.
        parts = results["what"]["micro_batches"] = 2 * parts
        _warn(f"{failure}: trying again in {parts} parts of a batch")
        keras.utils.clear_session()
        gc.collect()
        _give_back_freed_memory()
        _seed_everything(config.seed)
        point.go_back()


def _build(config: ViTConfig, data: Dataset, micro_batches: int, results: dict) -> VisionTransformer:
    """The compiled model, whose facts go into `results`."""
    began = time.perf_counter()
    augmentation = create_data_augmentation(config, data.x_train)
    model = create_vit_classifier(config, data.image_shape, data.num_classes, augmentation)
    is_torch = config.keras_backend == "torch"
    jit = {"auto": "auto", "on": True, "off": False}[config.jit]
    adamw = FusedAdamW if is_torch else keras.optimizers.AdamW
    model.compile(
        optimizer=adamw(learning_rate=config.learning_rate, weight_decay=config.weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(min(5, data.num_classes), name="top-5-accuracy"),
        ],
        jit_compile=False if is_torch else jit,
    )
    model.micro_batches = micro_batches
    what = results["what"]
    if is_torch and (jit is True or (jit == "auto" and what["is_gpu"])):
        model.graphs = TorchGraphs({1, -(-config.batch_size // micro_batches)})
    results["time"]["build_s"] = time.perf_counter() - began
    what["num_parameters"] = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    what["train_flops_per_image"] = _train_flops_per_image(config, data.image_shape[2], data.num_classes)
    patches = f"{config.num_patches} patches of {config.patch_size}x{config.patch_size} pixels"
    print(f"model: {what['num_parameters']:,} trainable parameters, {patches}")
    return model


def _what_runs(config: ViTConfig) -> dict:
    """What really runs: machine, code, configuration, versions and number format."""
    device = _device()
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "node": config.node_name,
        "device": device["name"],
        "is_gpu": device["is_gpu"],
        "power_mode": _power_mode(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "backend": config.keras_backend,
        "versions": {
            "Python": platform.python_version(),
            "Keras": keras.__version__,
            config.keras_backend: sys.modules[config.keras_backend].__version__,
            "CUDA": device["cuda"],
        },
        "config": _plain(config),
        "dtype_policy": keras.config.dtype_policy().name,
        "tf32": config.tf32,
        "attention": _attention_path(config, is_compiled=False),  # until it is compiled
        "augmentation": config.augmentation,
    }


def _attention_path(config: ViTConfig, is_compiled: bool) -> str:
    """Which implementation of attention a training step runs."""
    by_hand = config.attention_dropout > 0
    if config.keras_backend == "jax":
        by_hand = by_hand or _is_float16_on_cpu(keras.config.dtype_policy().compute_dtype)
    elif config.keras_backend == "torch":
        by_hand = by_hand and is_compiled and not _device()["is_gpu"]
    if by_hand or config.keras_backend != "torch":
        return "explicit einsums" if by_hand else "dot_product_attention"
    import torch

    kind = {"float32": torch.float32, "mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}
    shape = (config.batch_size, config.num_heads, config.num_patches, config.projection_dim)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.empty(1, device=device, dtype=kind[config.dtype_policy], requires_grad=True).expand(shape)
    choice = torch._fused_sdp_choice(query, query, query, None, config.attention_dropout, False)
    return "scaled_dot_product_attention, " + {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}[choice]


def _train_and_measure(
    config: ViTConfig,
    data: Dataset,
    model: VisionTransformer,
    results: dict,
    point: ResumePoint,
    stop: StopSignals,
    logger: keras.callbacks.Callback | None,
) -> None:
    """Measure, train, evaluate; fill `results` section by section, also where the training ends before its time."""
    what, timing, budget_s = results["what"], results["time"], config.measure_seconds
    memory = results["memory"] = {"inference_peak_device_bytes": None}
    batch_size = -(-config.batch_size // model.micro_batches)  # of inference, which may not fit into memory either
    is_resumed = bool(point.values)
    meters: dict[str, EnergyMeter | str] = dict.fromkeys(("accelerator", "cpu_package"), "not measured")
    if budget_s and is_resumed:
        for section, figures in point.progress["results"].items():
            results[section].update(figures)
    elif budget_s:
        print(f"measuring latency and step time, for up to {budget_s:g} s each (--measure-seconds)")
        timing |= _measure_inference(model, data.x_test, batch_size, budget_s)
        memory["inference_peak_device_bytes"] = _device()["peak_bytes"]  # before the training, which holds more
        timing |= _measure_steps(model, data.x_train, data.y_train, config.batch_size, budget_s)
    if budget_s:
        meters = _start_meters(what["is_gpu"])

    epochs = EpochMeter([meter for meter in meters.values() if isinstance(meter, EnergyMeter)])
    best = BestWeights(config.checkpoint_path)
    point.attach(best, epochs, results)
    if is_resumed:
        point.restore(model)
    finite = FiniteLoss(data.x_train[:batch_size])
    try:
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=config.batch_size,
            epochs=config.num_epochs,
            initial_epoch=len(point.progress["epochs"]),
            validation_data=(data.x_val, data.y_val) if len(data.x_val) else None,
            validation_batch_size=batch_size,
            callbacks=[EpochSeeds(config.seed), stop, epochs, finite, best, point, *([logger] if logger else [])],
            verbose=1 if sys.stdout.isatty() else 2,  # a progress bar for people, a line an epoch for a log file
        )
        stop.check()
    finally:
        stop.in_epoch = False
        _record_training(results, len(data.x_train), epochs, point)
        what["jit_compile"] = bool(model.graphs and not model.graphs.failure) or bool(model.jit_compile)
        what["attention"] = _attention_path(config, what["jit_compile"])
        what["jit_failure"] = model.graphs.failure if model.graphs else None

    results["energy"] = {
        part: _no_energy(meter) if isinstance(meter, str) else meter.summary(len(data.x_train))
        for part, meter in meters.items()
    }
    _put_back(model.weights, best.weights)
    if not best.path.exists():  # a cleaner of /tmp has been there, or someone between a kill and --resume
        best.write(model)
    began = time.perf_counter()
    test = model.evaluate(data.x_test, data.y_test, batch_size=batch_size, verbose=0, return_dict=True)
    if time.perf_counter() - began < budget_s:  # once more, as the first time may have compiled
        began = time.perf_counter()
        model.evaluate(data.x_test, data.y_test, batch_size=batch_size, verbose=0)
        timing["evaluation_images_per_s"] = len(data.x_test) / (time.perf_counter() - began)
    results["quality"] |= {
        "best_epoch": best.epoch,
        "best_epoch_s": epochs.wall_s[best.epoch - 1],
        "test": {f"test_{name}": value for name, value in test.items()},
    }
    memory["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _record_training(results: dict, images: int, epochs: EpochMeter, point: ResumePoint) -> None:
    """What is known of the epochs that were completed, `images` long each."""
    timing, train_s = results["time"], epochs.train_s[: len(point.progress["epochs"])]
    results["memory"]["train_peak_device_bytes"] = _device()["peak_bytes"]
    timing["epoch_s"] = train_s
    # An epoch that compiles does not count: the first one where no step was timed apart, and the first after a resume.
    resumed = point.progress["resumed_after_epochs"]
    compiled = {*resumed, *(() if "compile_s" in timing else (0,))}
    steady_s = [seconds for epoch, seconds in enumerate(train_s) if epoch not in compiled]
    rate = timing["train_images_per_s"] = images / statistics.median(steady_s) if steady_s else None
    what = results["what"]
    number_format = what["dtype_policy"] + ("+tf32" if what["tf32"] and what["dtype_policy"] == "float32" else "")
    peak = PEAK_TFLOPS.get(what["device"], {}).get(number_format)
    timing["model_flops_utilization"] = rate * what["train_flops_per_image"] / (peak * 1e12) if rate and peak else None
    results["quality"] = {"epochs": point.progress["epochs"], "epoch_end_s": epochs.wall_s[: len(train_s)]}


def _figures(results: dict) -> dict[str, float | None]:
    """Every figure of a run under one flat name, `time/step_ms/p50`, on the console, in W&B and in a report alike."""
    flat: dict[str, float | None] = {}

    def add(prefix: str, value) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{prefix}/{name}", inner)
        elif not isinstance(value, list | str):
            flat[prefix] = value

    for section in ("time", "memory", "energy", "quality"):
        add(section, results.get(section, {}))
    return flat


def _print_table(results: dict) -> None:
    what, energy = results["what"], results.get("energy", {})
    switches = f"TF32 {'on' if what['tf32'] else 'off'}, jit {'on' if what.get('jit_compile') else 'off'}"
    paths = f"{what['attention']} attention, {what['augmentation']} augmentation"
    print(f"results of {what['backend']} on {what['device']}: {what['dtype_policy']}, {switches}, {paths}")
    for name, value in _figures(results).items():
        print(f"  {name:<42} {'unavailable' if value is None else format(value, ',.5g' if value < 1e5 else ',.0f')}")
    for part in energy:
        print(f"  energy of {part} from: {energy[part]['source']}")


def _without_nan(value):
    """`value` with null for what is not finite, as the loss of a run that diverged: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_results(folder: Path, results: dict) -> None:
    """One file a run, whole or not at all; a disk that is full costs the file, not the result on the console."""
    what = results["what"]
    node = "".join(c if c.isalnum() or c in "-_." else "_" for c in what["node"])
    stamp = what["started"].replace(":", "").replace("-", "").partition("+")[0]
    path = folder / f"{stamp}-{node}-{what['backend']}-{os.urandom(4).hex()}.json"
    try:
        with _replacing(path) as scratch:
            scratch.write_text(json.dumps(_without_nan(results), indent=1, allow_nan=False) + "\n")
        print(f"results: {path}")
    except OSError as error:
        _warn(f"the results cannot be written to {path} ({error}): the table above is all there is of them")


def main(config: ViTConfig) -> None:
    """Run one experiment; an expected failure becomes one line and an exit status."""
    with _errors_in_one_line(config.debug):
        run_experiment(config)


if __name__ == "__main__":
    main(_config)
