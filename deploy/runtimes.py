"""The runtimes of deployed files. Imports no Keras, and each runtime only where it is used."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgebench.cli import require

Predict = Callable[
    [np.ndarray], np.ndarray
]  # images (N, H, W, C) as stored -> logits (N, classes), for the file's own N
CUDA = "CUDAExecutionProvider"


def open_file(form: str, path: Path, threads: int, device: str, tf32: bool) -> Predict:
    """Load a file of a format with its runtime, on `threads` threads of the CPU or on the first GPU."""
    if form == "onnx":
        return _onnxruntime(path, threads, device, tf32)
    return _litert(path, threads) if form == "litert" else _saved_model(path, threads)


def _onnxruntime(path: Path, threads: int, device: str, tf32: bool) -> Predict:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if device == "gpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN, where pip has installed them
    wanted = (CUDA, {"use_tf32": str(int(tf32))}) if device == "gpu" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    has_gpu = session.get_providers()[0] == CUDA  # onnxruntime falls back to the CPU with no more than a warning
    require(
        device == "cpu" or has_gpu, "this onnxruntime cannot use a GPU: pip install onnxruntime-gpu, or --device cpu"
    )
    (name,) = (each.name for each in session.get_inputs())
    return lambda images: session.run(None, {name: images})[0]


def _litert(path: Path, threads: int) -> Predict:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])  # a copy

    return predict


def _saved_model(path: Path, threads: int) -> Predict:
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    model = tf.saved_model.load(str(path))
    return lambda images: model.serve(tf.constant(images)).numpy()
