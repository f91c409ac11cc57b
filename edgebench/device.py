"""The device behind the backend: what it is, whether it works, its seeds, its number format and its memory."""

import contextlib
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops

from edgebench import nvml
from edgebench.cli import ExperimentError, OutOfMemory, one_line, require, warn
from edgebench.machine import cpu_name

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch
else:
    import tensorflow as tf

KERAS_DEFAULTS = {"floatx": "float32", "epsilon": 1e-7, "image_data_format": "channels_last"}
NO_LIMIT = 2**40  # bytes; where a backend does not report its GPU's memory: no GPU has as much
NO_GPU = (
    "is a GPU there (nvidia-smi), does the container have it (--gpus all, on a Jetson --runtime nvidia), "
    "is this a CUDA build? To run on the CPU on purpose: --device cpu, or VIT_DEVICE=cpu"
)
LIKELY_CAUSES = {  # what a backend's error message contains, and what it usually means
    "no kernel image": "this build of {backend} was not made for this GPU (an AGX Orin needs sm_87)",
    "driver": "the NVIDIA driver is older than the CUDA of this build of {backend}",
    "out of memory": "another process holds the device's memory",
    "RESOURCE_EXHAUSTED": "another process holds the device's memory",
}
OUT_OF_MEMORY = re.compile(  # as each backend says it
    "resource_exhausted|out of memory|can't allocate memory|not enough memory|oom when|bad_alloc"
    "|ynnpack operation failed",  # JAX on a CPU, whose YNNPACK gives no reason
    re.IGNORECASE,
)
RESERVE_BYTES = 64 << 20  # kept back for what follows an error about memory


@dataclass(frozen=True)
class Device:
    """The device on which the backend computes by default.

    On a CPU `cuda`, the CUDA version, `peak_memory_bytes`, the most that the backend's allocator has held at once, and
    `gpu_id`, the PCI address, are None. The address is also None where CUDA does not report it. `memory_bytes` is what
    there is of memory in all.
    """

    name: str
    memory_bytes: int
    is_gpu: bool = False
    cuda: str | None = None
    peak_memory_bytes: int | None = None
    gpu_id: str | None = None


def reset_keras() -> None:
    """Set what keras.json can change to Keras' defaults; a warning names what it had changed."""
    for name, default in KERAS_DEFAULTS.items():
        if (value := getattr(keras.config, name)()) != default:
            warn(f"{name} {value} of keras.json is ignored: {default} is used")
            getattr(keras.config, f"set_{name}")(default)


def find_device() -> Device:
    """The device as it is now on which the backend puts what it computes."""
    if BACKEND == "jax":
        with jax.ensure_compile_time_eval():  # the layers ask while they are traced
            (gpu,) = ops.ones(()).devices()
        if gpu.platform != "cpu":
            memory, cuda = gpu.memory_stats() or {}, gpu.client.platform_version
            name, limit, peak = gpu.device_kind, memory.get("bytes_limit", NO_LIMIT), memory.get("peak_bytes_in_use")
            return Device(name, limit, True, " ".join(cuda.split()), peak, _pci_address(gpu.local_hardware_id))
    elif BACKEND == "torch":
        device = ops.ones(()).device
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            properties, peak = torch.cuda.get_device_properties(index), torch.cuda.max_memory_allocated(index)
            cuda, limit = torch.version.cuda, properties.total_memory
            return Device(properties.name, limit, True, cuda, peak, _pci_address(index))
    else:
        with tf.init_scope():  # a product, as TensorFlow keeps a constant on the CPU
            place = ops.matmul(ops.ones((2, 2)), ops.ones((2, 2))).device.rpartition("/device:")[2]
        if place.startswith("GPU"):
            # Of the GPUs that CUDA shows, TensorFlow may use some only: the physical name has CUDA's number.
            gpu = tf.config.get_visible_devices("GPU")[int(place.partition(":")[2])]
            name = tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            peak = tf.config.experimental.get_memory_info(place)["peak"]
            cuda = tf.sysconfig.get_build_info().get("cuda_version")
            return Device(name, NO_LIMIT, True, cuda, peak, _pci_address(int(gpu.name.rpartition(":")[2])))
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(cpu_name(), memory_bytes)


def _pci_address(ordinal: int | None) -> str | None:
    return None if ordinal is None else nvml.pci_address(ordinal)


def backend_threads() -> int | None:
    """The number of threads that the backend computes with on the CPU; None where it has no such number."""
    if BACKEND == "torch":
        return torch.get_num_threads()
    if BACKEND == "tensorflow":  # by default one for every core that the process may use
        return tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))
    names = (_thread_name(thread) for thread in Path("/proc/self/task").iterdir())
    return sum("XLAEigen" in name for name in names) or None  # JAX does not report the size of XLA's pool


def _thread_name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text()
    except OSError:  # it has ended since the folder was listed
        return ""


def prepare(wanted: str, seed: int, dtype_policy: str, tf32: bool) -> Device:
    """Set seeds and number format, prove that the device works, and return it.

    Raises ExperimentError with the likely cause if it does not, or if "gpu" is wanted and the backend sees none.
    """
    seed_everything(seed)
    set_tf32(tf32)
    keras.config.set_dtype_policy(dtype_policy)
    try:
        device = find_device()
        # A GPU can be listed and still be useless.
        product = float(ops.matmul(ops.ones((64, 64)), ops.ones((64, 64)))[0, 0])
    except Exception as error:  # each backend has its own types for this
        message = one_line(error)
        causes = [cause.format(backend=BACKEND) for sign, cause in LIKELY_CAUSES.items() if sign in message]
        cause = [*causes, NO_GPU][0]
        raise ExperimentError(f"{BACKEND} cannot compute on its device: {cause} ({message[:200]})") from error
    require(product == 64.0, f"{BACKEND}: the device multiplies two matrices wrongly")
    require(device.is_gpu or wanted != "gpu", f"{BACKEND} sees no GPU: {NO_GPU}")
    return device


def seed_everything(seed: int) -> None:
    """Do as keras.utils.set_random_seed, which also imports TensorFlow, for seconds, wherever it is installed."""
    random.seed(seed)  # Keras' layers and initializers draw their seeds from it
    np.random.seed(seed)
    if BACKEND == "torch":
        torch.manual_seed(seed)
    elif BACKEND == "tensorflow":
        tf.random.set_seed(seed)


def seed_generators(seed: int) -> None:
    """Seed the generators that draw in a training step and are not variables of the model: only torch has any.

    TensorFlow's global seed is not one of them, and setting it clears every compiled kernel.
    """
    if BACKEND == "torch":
        torch.manual_seed(seed)


def set_tf32(allowed: bool) -> None:
    """Set TensorFloat-32 alike on every backend: JAX and TensorFlow use it by default, torch does not."""
    if BACKEND == "jax":
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if allowed else "highest")
    elif BACKEND == "torch":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
    else:
        tf.config.experimental.enable_tensor_float_32_execution(allowed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it hides, says that the device or the host could not give the memory asked for."""
    return _about_memory(error) is not None


def _about_memory(error: BaseException | None) -> BaseException | None:
    """With an average of the weights, Keras on JAX hides the error that ends `fit` behind one of its own."""
    while error is not None and not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        error = error.__context__
    return error


@contextlib.contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Raise OutOfMemory with `message` in place of a backend's own error about memory."""
    reserve = bytes(RESERVE_BYTES)  # zeros that are never touched: this takes address space, and no memory
    try:
        yield
    except Exception as error:
        del reserve  # the results are written next, and a backend may have taken all that there was
        if (reason := _about_memory(error)) is None:
            raise
        raise OutOfMemory(f"{message} ({one_line(reason)[:200]})") from error


def build_optimizer(model: keras.Model) -> None:
    """Create the optimizer's variables, unless they are there: LossScaleOptimizer, built again, forgets its scale."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def copy_values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """Copy the variables' values: the array that Keras gives may be a view of memory that JAX's next step overwrites."""
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]


def assign_copies(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    """Assign copies of `values`, as JAX may use a NumPy array's memory for a variable and overwrite it in the next step."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(ops.copy(value))
