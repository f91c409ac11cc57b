"""A deployment from the run to its results: build, check, measure, record; each of the first three in a process of its own.

Imports no Keras. A file is moved to its place only once it agrees with Keras.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy import parity
from deploy.formats import file_name
from deploy.record import results_of
from deploy.source import Source
from edgebench import process
from edgebench.cli import ExperimentError, OutOfMemory, require, require_writable_folder
from edgebench.record.results import write_results

HERE = Path(__file__).parent
ERROR, WARNING = "export.py: error: ", ": warning: "


class Disagrees(ExperimentError):
    """A file does not compute what Keras computes."""

    exit_status = 1


class Unexpected(ExperimentError):
    """A process has failed in a way that nobody has foreseen; its traceback is on stderr."""

    exit_status = 1


@dataclass(frozen=True)
class Options:
    """The request: the flags of export.py, with `batch_size` images in the second file."""

    format: str
    int8: bool
    batch_size: int
    device: str
    measure_seconds: float
    output_dir: Path
    results_dir: Path


def export(source: Source, options: Options) -> tuple[dict, Path]:
    """Build the files for one image and for a batch, prove that they agree, and measure them -> their results, and where.

    Raises ExperimentError where something cannot be done, and Disagrees, with no file kept, where a file does not agree with
    Keras.
    """
    output, form, int8 = options.output_dir, options.format, options.int8
    require_writable_folder(output, "--output-dir")
    require_writable_folder(options.results_dir, "--results-dir")
    environment = process.clear_environment()  # here, so that the processes inherit it and none warns again
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as scratch:
        folder = Path(scratch)
        names = {size: file_name(source.path.stem, form, int8, size) for size in sorted({1, options.batch_size})}
        request = {
            "results": source.results,
            "weights": str(source.weights),
            "format": form,
            "int8": int8,
            "files": [(size, str(folder / name)) for size, name in names.items()],
            "folder": scratch,
            "device": options.device,
            "tf32": options.device == "gpu" and source.what["tf32"],
            "measure_seconds": options.measure_seconds,
        }
        (folder / "request.json").write_text(json.dumps(request))
        print(f"building {' and '.join(names.values())}", flush=True)
        built = _process("build.py", folder)
        print("checking on the test images, in the file's own runtime", flush=True)
        _process("run.py", folder, "check")
        labels, reference = (np.load(folder / f"{name}.npy") for name in ("labels", "logits"))
        files = []
        for size, name in names.items():
            found = parity.compare(reference, np.load(folder / f"logits.{size}.npy"), labels)
            problem = parity.disagreement(found, int8, request["tf32"])
            if problem:
                raise Disagrees(f"{name} is not kept: {problem}")
            path = {"path": str(output / name), "bytes": _bytes(folder / name), "batch_size": size}
            files.append({**path, "parity": found})
        print(f"measuring, for up to {options.measure_seconds:g} s (--measure-seconds)", flush=True)
        measured = _process("run.py", folder, "measure")
        of_one_image = np.load(folder / "logits.1.npy")
        document = results_of(source, request, environment, built, measured, files, of_one_image, labels)
        for name in names.values():
            _put_in_place(folder / name, output / name)
    path = write_results(options.results_dir, document)
    require(path is not None, f"the results could not be written to {options.results_dir}; the files are in {output}")
    return document, path


def _process(script: str, folder: Path, task: str = "") -> dict:
    """Run a script of this folder on the request and return its answer. Its warnings are passed on, and on failure its error."""
    request, answer = folder / "request.json", folder / f"{task or 'built'}.json"
    command = [sys.executable, str(HERE / script), *filter(None, [task]), str(request)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = done.stderr.splitlines()
    for line in lines:
        if WARNING in line and line.startswith(("vit.py", "export.py")):
            print(line, file=sys.stderr)
    if done.returncode == 0:
        return json.loads(answer.read_text())
    errors = [line.partition("error: ")[2] for line in lines if line.startswith((ERROR, "vit.py: error: "))]
    if errors:
        raise (OutOfMemory if done.returncode == OutOfMemory.exit_status else ExperimentError)(errors[-1])
    if done.returncode == -signal.SIGKILL:
        raise OutOfMemory(f"deploy/{script} was killed, as Linux does when memory runs out")
    print(done.stderr, file=sys.stderr)
    raise Unexpected(f"deploy/{script} failed with exit status {done.returncode}: see above")


def _bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files)


def _put_in_place(scratch: Path, path: Path) -> None:
    """Move a file or a folder to its path. What is there already is replaced, and a line says so."""
    if path.exists():
        print(f"replacing {path}", flush=True)
    if path.is_dir():  # only a file can be replaced by one that takes its name
        shutil.rmtree(path)
    os.replace(scratch, path)
