"""What has to be set in the process before Keras, and with it a backend, is imported."""

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from edgebench.cli import ExperimentError, one_line, require, require_writable_folder, warn

OURS = {  # variables that would change what runs without a trace, and what decides instead
    "KERAS_MAX_EPOCHS": "--num-epochs",
    "KERAS_MAX_STEPS_PER_EPOCH": "the number of images",
    "KERAS_TORCH_DEVICE": "--device",
    "JAX_DISABLE_JIT": "--jit",
    "TORCH_COMPILE_DISABLE": "--jit",
    "TORCHDYNAMO_DISABLE": "--jit",
    "JAX_DEFAULT_MATMUL_PRECISION": "--tf32",
    "NVIDIA_TF32_OVERRIDE": "--tf32",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "--tf32",
}
# Variables that users set on purpose for a backend or its libraries. They stay.
THEIRS = re.compile(
    "(JAX|XLA|TF|TENSORFLOW|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|CUDA|NVIDIA|CUBLAS|CUDNN|NCCL|OMP|GOMP|KMP|MKL"
    "|ONEDNN|DNNL|OPENBLAS|MALLOC)_.+|LD_PRELOAD|LD_LIBRARY_PATH"
)
# How a line of TensorFlow's or XLA's C++ code begins.
CHATTER = re.compile(
    rb"[IWE]\d{4} \d\d:|WARNING: All log messages before absl|\d{4}-\d\d-\d\d .*tensorflow/|To enable the following"
)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def clear_environment() -> dict[str, str]:
    """Remove the variables that would change what runs, whatever the flags say; a warning names each one.

    Return those for the backends as the user has set them: part of the provenance of a run. Later calls set more.
    """
    for name, decides in OURS.items():
        _override(name, None, decides)
    _override("KERAS_NNX_ENABLED", "false", "vit.py")  # not None: keras.json can turn it on, too
    return {name: value for name, value in sorted(os.environ.items()) if THEIRS.fullmatch(name)}


def set_environment(device: str, compile_cache: bool) -> None:
    """Set what the backends read when they are imported; a warning names every variable that is overridden.

    "cpu" hides the GPU, "gpu" keeps JAX from falling back to the CPU, "auto" leaves the choice to the backend. With
    `compile_cache` JAX and torch keep what they compile in ~/.cache/vit (XDG_CACHE_HOME), otherwise nowhere.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its errors come as exceptions as well
    if device == "cpu":
        _override("JAX_PLATFORMS", "cpu", "--device")
        _override("CUDA_VISIBLE_DEVICES", "-1", "--device")
    elif device == "gpu":
        _override("JAX_PLATFORMS", "cuda", "--device")  # unset, or with "cuda,cpu", JAX silently takes the CPU
    if device != "auto":
        _override("JAX_PLATFORM_NAME", None, "--device")  # an older spelling, which would win
    has_nvidia_driver = Path("/dev/nvidiactl").exists() or Path("/dev/nvmap").exists()  # the latter on a Jetson
    if device == "cpu" or not has_nvidia_driver:
        _keep_freed_memory()
    if compile_cache and (folder := _cache_folder()):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
        # By default JAX keeps only what took a second to compile: none of the many small programs that build the model.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    else:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def _override(name: str, value: str | None, decides: str) -> None:
    """Set an environment variable, or with None remove it; say so where it had another value."""
    before = os.environ.pop(name, "")
    if value is not None:
        os.environ[name] = value
    if before not in ("", value):
        warn(f"{name}={before} is ignored: {decides} decides")


def _cache_folder() -> Path | None:
    """The folder for compiled code; None, with a warning, where it cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        require(home.is_absolute(), f"there is no folder {home}")  # without a home, ~ stays as it is
        require_writable_folder(home / "vit", "the cache of compiled code")
    except ExperimentError as error:
        warn(f"compiled code is not kept for the next run ({error})")
        return None
    return home / "vit"


def age_s() -> float:
    """Seconds since the start of this process, to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that a training step on a CPU frees, for the next step.

    By default glibc returns every large block to the kernel and gets it back page by page, zeroed, which takes a third of a
    step's time (docs/performance.md). This has to be set before the first thread allocates.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop what the C++ code of TensorFlow and XLA prints while it is imported, before it reads its log level."""
    printed, stderr = os.memfd_create("stderr"), os.dup(2)
    os.dup2(printed, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        with open(printed, "rb") as file:
            file.seek(0)
            for line in file:
                if not CHATTER.match(line):
                    with contextlib.suppress(OSError):  # a full disk, a reader that has left
                        os.write(2, line)


@contextlib.contextmanager
def importing_keras(is_program: bool) -> Iterator[None]:
    """End the program at once on Ctrl-C, without the traceback of an import that takes seconds.

    Raises ExperimentError where Keras does not take what keras.json says.
    """
    before = signal.getsignal(signal.SIGINT)
    if is_program and before is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        with _without_chatter() if is_program else contextlib.nullcontext():
            yield
    except (ValueError, AssertionError, AttributeError, TypeError, OSError) as error:
        settings = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"), "keras.json")
        if not os.path.exists(settings):
            raise
        message = f"Keras cannot be imported; does it not take {settings}? Correct or remove it ({one_line(error)})"
        raise ExperimentError(message) from error
    finally:
        if is_program:
            signal.signal(signal.SIGINT, before)
