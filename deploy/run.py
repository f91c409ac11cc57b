"""The process that runs deployed files, and imports neither Keras nor torch: `python deploy/run.py TASK REQUEST.json`.

pipeline.py starts it twice: `check` predicts all test images with every file, `measure` is a fresh process that measures.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np

from deploy.formats import FORMATS
from deploy.runtimes import Predict, open_file
from edgebench import cli, nvml, process
from edgebench.compare.items import RUNTIMES
from edgebench.machine import cpu_name
from edgebench.measure import latency, meters
from edgebench.measure.sensors import cores, find_sensors


def predict_all(predict: Predict, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits (N, classes) of images (N, H, W, C), a batch at a time; the last image fills up the last batch."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = np.array(images[start : start + batch_size])
        padding = np.repeat(batch[-1:], batch_size - len(batch), axis=0)
        parts.append(predict(np.concatenate([batch, padding]))[: len(batch)])
    return np.concatenate(parts)


def gpu_name(gpu_id: str | None) -> str:
    """The name of the GPU as NVML and every backend know it."""
    with contextlib.suppress(Exception):  # no library, no driver, no such GPU
        return nvml.Gpu(gpu_id).name() or "GPU"
    return "GPU"


def check(request: dict, folder: Path, threads: int) -> dict:
    """Write the logits of every file on all test images: logits.1.npy, logits.64.npy."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    for batch_size, path in request["files"]:
        predict = open_file(request["format"], Path(path), threads, request["device"], request["tf32"])
        np.save(folder / f"logits.{batch_size}.npy", predict_all(predict, images, batch_size))
    return {}


def measure(request: dict, folder: Path, threads: int) -> dict:
    """Latency of one image, throughput of the batch, memory and energy, each by the rules for a run of vit.py."""
    form, device, budget_s = request["format"], request["device"], request["measure_seconds"]
    gpu_id = nvml.pci_address(0) if device == "gpu" else None
    files = [(batch_size, Path(path)) for batch_size, path in request["files"]]
    largest = files[-1][0]
    images = np.array(np.load(folder / "images.npy", mmap_mode="r")[:largest])
    images = np.resize(images, (largest, *images.shape[1:]))  # repeats them where there are fewer test images
    package = RUNTIMES[FORMATS[form].runtime]
    sensors = find_sensors(device == "gpu", gpu_id)
    load_meter = meters.Meter({"load": sensors.load})

    predict, open_s = latency.timed(open_file, form, files[0][1], threads, device, request["tf32"])
    ready_s = process.age_s()
    load_meter.begin()
    sections = latency.one_image(predict, images, budget_s)
    if len(files) > 1:
        predict = open_file(form, files[1][1], threads, device, request["tf32"])
        sections = latency.merge(sections, latency.batches(predict, images, budget_s))
    load_record = load_meter.end()["load"]
    joules = meters.inference_energy(sensors, lambda: predict(images), len(images))
    load, missing = meters.load_figures(sensors.load, [load_record], threads)
    times = {"time": {"import_s": ready_s - open_s, "build_s": open_s}}
    del sections["time"]["compile_s"]  # nothing compiles: the first call costs what the runtime allocates
    # The package may be another one, as onnxruntime-gpu. ai_edge_litert does not report its version.
    version = getattr(sys.modules[FORMATS[form].to_run], "__version__", None) or importlib.metadata.version(package)
    return {
        "device": gpu_name(gpu_id) if device == "gpu" else cpu_name(),
        "gpu_id": gpu_id,
        "package": {package: version},
        "sections": latency.merge(sections, joules, times, {"load": load, "missing": missing}),
    }


def main(task: str, request_path: Path) -> None:
    """Do a task of the request and write what came of it to TASK.json beside it."""
    with cli.errors_in_one_line(program="export.py"):
        request, threads = json.loads(request_path.read_text()), cores(os.sched_getaffinity(0))
        answer = {"check": check, "measure": measure}[task](request, request_path.parent, threads)
        request_path.with_name(f"{task}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
