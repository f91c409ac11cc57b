"""The model as an ONNX file, made for onnxruntime and for TensorRT 8.6 and 10 (JetPack 6). Needs Keras on torch."""

import contextlib
import importlib.metadata
import logging
from pathlib import Path

import keras
import onnx

from edgebench.cli import ExperimentError, one_line, require, warn

TESTED = "torch 2.13.0"  # with Keras 3.15.1 and 3.12.4. Keras' exports fail with torch 2.4.
OPSET = 17  # the newest that TensorRT 8.6 reads; onnxruntime and TensorRT 10 read newer ones, too
# What TensorRT 8.6 has of the operators that this model may need (docs/operators.md of onnx-tensorrt). It takes bytes as an
# input that a Cast follows (since 8.5).
TENSORRT_OPERATORS = {
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Erf",
        "Tanh",
        "Min",
        "Max",
        "Clip",
        "Cast",
        "Identity",
        "Constant",
    ),
    *("MatMul", "Gemm", "Einsum", "Softmax", "LayerNormalization", "ReduceMean", "Resize", "Expand", "Where"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat", "Split", "Gather", "Shape", "Flatten"),
}


def write(model: keras.Model, path: Path, batch_size: int, image_shape: tuple[int, int, int], dtype: str) -> dict:
    """Write the model for a fixed batch and check the file -> its opset and its operators."""
    signature = [keras.InputSpec(shape=(batch_size, *image_shape), dtype=dtype, name="images")]
    try:
        with _quiet():
            model.export(path, format="onnx", verbose=False, input_signature=signature, opset_version=OPSET)
    except OSError:
        raise
    except Exception as error:  # torch's exporters have dozens of types
        versions = f"torch {importlib.metadata.version('torch')} and Keras {keras.__version__}"
        raise ExperimentError(
            f"{versions} cannot write this model as ONNX; {TESTED} can ({one_line(error)[:200]})"
        ) from error
    return check(path)


def check(path: Path) -> dict:
    """The opset and the operators of a file that ONNX's checker and shape inference accept; warn of what TensorRT lacks."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    (opset,) = (each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    require(opset == OPSET, f"this torch writes opset {opset} instead of {OPSET}, which TensorRT 8.6 may not read")
    operators = sorted({node.op_type for node in model.graph.node})
    if missing := set(operators) - TENSORRT_OPERATORS:
        warn(f"the file has operators that TensorRT 8.6 may lack: {', '.join(sorted(missing))}")
    return {"opset": opset, "operators": operators}


def quantize(path: Path, target: Path) -> None:
    """Write a file with int8 weights in its matrix products, whose activations are quantized as they come (dynamic)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(path, target, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def _quiet():
    """Silence torch's exporter and onnxruntime's quantization, which advise on what is decided here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
