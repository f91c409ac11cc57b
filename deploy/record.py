"""The results file of a deployed file, in the schema of a run, so that a report puts both side by side. Imports no Keras."""

import platform

import numpy as np

from deploy import parity
from deploy.formats import FORMATS
from deploy.source import Source
from edgebench.machine import machine_and_code
from edgebench.measure.meters import unavailable
from edgebench.record.results import SCHEMA_VERSION

NOT_TRAINED = "a deployed file is not trained"
NOT_TRAINED_PATHS = (
    *("time/load_s", "time/train_images_per_s", "time/model_flops_utilization", "time/step_ms", "time/epoch_spread"),
    *("time/compile_s", "time/to_first_step_s", "time/to_first_epoch_s", "time/evaluation_images_per_s"),
    *("memory/train_peak_device_bytes", "memory/peak_rss_bytes", "energy/accelerator", "energy/cpu_package"),
    *("quality/best_epoch_s", "what/compile_cache"),
)
OF_THE_MODEL = (
    *("tf32", "augmentation", "images", "image_shape", "num_classes", "num_parameters", "train_flops_per_image"),
    *("micro_batches", "resumed_after_epochs"),
)


def results_of(
    source: Source,
    request: dict,
    environment: dict[str, str],
    built: dict,
    measured: dict,
    files: list[dict],
    logits: np.ndarray,
    labels: np.ndarray,
) -> dict:
    """The results of a deployment: `logits` (N, classes) are those of its file for one image, on the test images.

    `environment` are the variables that the user has set for a backend, `built` and `measured` what the two processes say,
    `files` the section `what/deployed/files`.
    """
    what, form, is_gpu = source.what, request["format"], request["device"] == "gpu"
    config = what["config"] | {"dtype_policy": "float32", "measure_seconds": request["measure_seconds"]}
    machine, no_git = machine_and_code(config["node_name"], measured["device"], is_gpu, measured["gpu_id"])
    sections, batch_size = measured["sections"], files[-1]["batch_size"]
    deployed = {
        "format": form,
        "int8": request["int8"],
        "processor": "CUDA" if is_gpu else "CPU",
        "trained_on": what["backend"],
        "results": source.path.name,
        "opset": built.get("opset"),
        "operators": built.get("operators"),
        "batch_size": batch_size if batch_size > 1 else None,
        "file_bytes": files[0]["bytes"],
        "files": files,
    }
    missing = no_git | dict.fromkeys(NOT_TRAINED_PATHS, NOT_TRAINED) | sections["missing"]
    missing |= {
        "memory/inference_peak_device_bytes": "the runtime does not report it",
        "time/bare_latency_ms": "there is no Keras around it",
    }
    if batch_size == 1:
        missing["time/inference_images_per_s"] = "--batch 1: there is no file for more"
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "failure": None,
        "files": {"weights": str(source.weights), "resume": None},
        "what": {
            **machine,
            "backend": FORMATS[form].runtime,
            "versions": {"Python": platform.python_version(), **built["versions"], **measured["package"], "CUDA": None},
            "environment": environment,
            "config": config,
            "dtype_policy": "float32",
            **{name: what[name] for name in OF_THE_MODEL},
            "attention": "part of the file",
            "jit_compile": False,
            "jit_failure": None,
            "deployed": deployed,
        },
        "time": {
            "load_s": None,
            "epoch_s": [],
            "train_images_per_s": None,
            "model_flops_utilization": None,
            "inference_images_per_s": None,
            "bare_latency_ms": None,
            **sections["time"],
        },
        "memory": {
            **dict.fromkeys(("inference_peak_device_bytes", "train_peak_device_bytes", "peak_rss_bytes")),
            **sections["memory"],
        },
        "load": sections["load"],
        "energy": {
            "accelerator": unavailable(NOT_TRAINED),
            "cpu_package": unavailable(NOT_TRAINED),
            **sections["energy"],
        },
        "quality": {
            "epochs": [],
            "epoch_end_s": [],
            "best_epoch": source.results["quality"]["best_epoch"],
            "best_epoch_s": None,
            "test": parity.quality(logits, labels),
        },
        "missing": missing,
    }


def describe(results: dict) -> str:
    """What was written and found, in a few lines."""
    lines = []
    for file in results["what"]["deployed"]["files"]:
        found = file["parity"]
        lines += [
            f"{file['path']}: {file['bytes'] / 1e6:,.2f} MB, takes {file['batch_size']} at a time",
            f"  against Keras on {found['images']:,} test images: logits differ by up to "
            f"{found['largest_logit_difference']:.2g} (largest {found['largest_logit']:.3g}), top-1 agrees on "
            f"{found['top_1_agreement']:.2%}, accuracy {found['accuracy']:.2%} (Keras {found['keras_accuracy']:.2%})",
        ]
    latency, rate = results["time"]["latency_ms"], results["time"]["inference_images_per_s"]
    percentiles = ", ".join(
        f"{name} {latency[name]:.3g}" for name in ("p50", "p90", "p99") if latency[name] is not None
    )
    throughput = f"; {rate:,.0f} images/s in batches" if rate else ""
    memory = results["memory"]["inference_peak_rss_bytes"] / 2**20
    lines.append(f"one image: {percentiles} ms (n = {latency['n']}){throughput}; peak memory {memory:,.0f} MiB")
    return "\n".join([*lines, *results["load"]["problems"]])
