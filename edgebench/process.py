"""What has to be set in the process before Keras, and with it a backend, is imported."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def set_environment(device: str, compile_cache: bool) -> None:
    """Set what the backends read when they are imported.

    "cpu" hides the GPU, "gpu" keeps JAX from falling back to the CPU, "auto" leaves the choice to the backend. With
    `compile_cache` JAX and torch keep what they compile in ~/.cache/vit (XDG_CACHE_HOME), otherwise nowhere.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's chatter
    if device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    elif device == "gpu":
        os.environ["JAX_PLATFORMS"] = "cuda"  # unset, or with "cuda,cpu", JAX silently takes the CPU
    if device != "auto":
        os.environ.pop("JAX_PLATFORM_NAME", None)  # an older spelling, which would win
    has_nvidia_driver = Path("/dev/nvidiactl").exists() or Path("/dev/nvmap").exists()  # the latter on a Jetson
    if device == "cpu" or not has_nvidia_driver:
        _keep_freed_memory()
    if compile_cache:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
        # By default JAX keeps only what took a second to compile: none of the many small programs that build the model.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    else:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


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
def exit_on_sigint(enabled: bool) -> Iterator[None]:
    """End the process at once on Ctrl-C, without the traceback of an import that takes seconds."""
    before = signal.getsignal(signal.SIGINT)
    if enabled and before is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    yield
    if enabled:
        signal.signal(signal.SIGINT, before)
