"""The formats of deployed files: who builds them, who runs them, and what has to be installed. Imports no Keras."""

from dataclasses import dataclass

from edgebench.cli import is_installed, require


@dataclass(frozen=True)
class Format:
    """A format of --format."""

    runtime: str  # what runs the file, `what/backend` of its results
    backend: str  # Keras' backend in the process that builds the file
    suffix: str
    to_build: tuple[str, ...]  # modules, besides the backend's
    to_run: str  # module
    extra: str  # of pyproject.toml, which installs both
    has_int8: bool = True
    runs_on_gpu: bool = False


FORMATS = {
    # torch: tensorflow-onnx writes an operator that onnxruntime rejects, and the exporter for JAX does not take this model.
    "onnx": Format("onnxruntime", "torch", ".onnx", ("onnx", "onnxscript"), "onnxruntime", "export", runs_on_gpu=True),
    "litert": Format("litert", "tensorflow", ".tflite", (), "ai_edge_litert", "litert"),
    "saved_model": Format("saved_model", "tensorflow", ".saved_model", (), "tensorflow", "tensorflow", has_int8=False),
}


def check_format(name: str, int8: bool, device: str) -> None:
    """Raise ExperimentError for what a format cannot do, or what is not installed for it; the line says what would work."""
    chosen = FORMATS[name]
    with_int8 = ", ".join(each for each, form in FORMATS.items() if form.has_int8)
    require(chosen.has_int8 or not int8, f"--format {name} has no --int8; these have: {with_int8}")
    require(
        device == "cpu" or chosen.runs_on_gpu, f"--format {name} is run on the CPU only; --format onnx has --device gpu"
    )
    require(
        device == "cpu" or not int8, "--int8 is for the CPU; for a GPU, see trtexec in system_ook.md and system_ojo.md"
    )
    needed = [chosen.backend, *chosen.to_build, chosen.to_run]
    missing = [module for module in dict.fromkeys(needed) if not is_installed(module)]
    extras = ",".join(dict.fromkeys((chosen.backend, chosen.extra)))
    install = f'pip install -c constraints.txt -e ".[{extras}]"'
    require(not missing, f"--format {name} needs {' and '.join(missing)}, which is not installed: {install}")


def file_name(run: str, name: str, int8: bool, batch_size: int) -> str:
    """The name of a deployed file: RUN.onnx takes one image, RUN.b64.onnx 64, RUN.int8.onnx has int8 weights."""
    batch = f".b{batch_size}" if batch_size > 1 else ""
    return f"{run}{batch}{'.int8' if int8 else ''}{FORMATS[name].suffix}"
