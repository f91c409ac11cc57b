"""The model as an ONNX file, made for onnxruntime and for TensorRT 8.6 and 10 (JetPack 6). Needs Keras on torch."""

import contextlib
import importlib.metadata
import logging
from pathlib import Path

import keras
import onnx
import onnx.version_converter
import onnxscript.optimizer
from onnxruntime.quantization import QuantType, quantize_dynamic

from edgebench.cli import ExperimentError, one_line, require, warn

TESTED = "torch 2.5.1 and 2.13.0"  # the former with Keras 3.12.4, the latter with 3.15.1; torch 2.4.0 fails
OPSET = 17  # the newest that TensorRT 8.6 reads; onnxruntime and TensorRT 10 read newer ones as well
TORCH_OPSET = 18  # the oldest that torch's exporter writes; ONNX's own converter makes 17 of it
# Those that TensorRT 8.6 has (docs/operators.md of onnx-tensorrt) of the operators that this model may need. As an input it
# takes bytes if a Cast follows (since 8.5).
TENSORRT_OPERATORS = {
    *("Add", "Cast", "Clip", "Concat", "Constant", "Div", "Einsum", "Erf", "Expand", "Flatten", "Gather", "Gemm"),
    *("Identity", "LayerNormalization", "MatMul", "Max", "Min", "Mul", "Pow", "Reciprocal", "ReduceMean", "Reshape"),
    *(
        "Resize",
        "Shape",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
    ),
}


def write(model: keras.Model, path: Path, batch_size: int, image_shape: tuple[int, int, int], dtype: str) -> dict:
    """Write the model for a fixed batch and check the file -> its opset and its operators."""
    signature = [keras.InputSpec(shape=(batch_size, *image_shape), dtype=dtype, name="images")]
    with _quiet():
        try:
            model.export(path, format="onnx", verbose=False, input_signature=signature, opset_version=TORCH_OPSET)
        except Exception as error:  # torch's exporters have dozens of types
            versions = f"torch {importlib.metadata.version('torch')} with Keras {keras.__version__}"
            reason = f"{versions} cannot write this model as ONNX ({one_line(error)[:200]})"
            raise ExperimentError(f"{reason}; tested: {TESTED}") from error
        # torch 2.5 leaves functions, which TensorRT 8.6 does not know, and computations on constants.
        plain = onnxscript.optimizer.optimize(onnx.load(path))
        onnx.save(_without_newer_attributes(onnx.version_converter.convert_version(plain, OPSET)), path)
    return check(path)


def _without_newer_attributes(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX's converter turns the axes of ReduceMean into an attribute, as before opset 18, but leaves one that 18 has brought."""
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return model


def check(path: Path) -> dict:
    """The opset and the operators of a file that ONNX's checker and shape inference accept; warn of what TensorRT lacks."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    (opset,) = (each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    require(opset == OPSET, f"the file has opset {opset}, and TensorRT 8.6 reads {OPSET} at most; tested: {TESTED}")
    operators = sorted({node.op_type for node in model.graph.node})
    if missing := set(operators) - TENSORRT_OPERATORS:
        warn(f"the file has operators that TensorRT 8.6 may lack: {', '.join(sorted(missing))}")
    return {"opset": opset, "operators": operators}


def quantize(path: Path, target: Path) -> None:
    """Write a file with int8 weights in its matrix products, whose activations are quantized as they come (dynamic).

    The weights have 7 bits: without VNNI a CPU adds products in 16 bits, which 8 bits overflow. Static quantization, with
    calibration images, was slower and less accurate (docs/deploy.md).
    """
    with _quiet():
        quantize_dynamic(path, target, weight_type=QuantType.QInt8, reduce_range=True)


@contextlib.contextmanager
def _quiet():
    """Silence torch's exporter and onnxruntime's quantization, which advise on what is decided here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
