"""Promises about deployed files: they compute what Keras computes, need no Keras, and stand beside it in a report."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TINY

import export
import vit
from deploy import keras_model, parity
from deploy.pipeline import Disagrees
from deploy.source import read_source
from edgebench.cli import ExperimentError

HAS = {
    name: importlib.util.find_spec(name) is not None
    for name in ("torch", "tensorflow", "onnxruntime", "ai_edge_litert")
}
needs_onnx = pytest.mark.skipif(
    not (HAS["torch"] and HAS["onnxruntime"]), reason="torch and onnxruntime build and run ONNX"
)
needs_litert = pytest.mark.skipif(not (HAS["tensorflow"] and HAS["ai_edge_litert"]), reason="LiteRT is not installed")
LEARNING = ["--num-epochs", "3", "--learning-rate", "0.003", "--no-use-wandb", "--checkpoint-path", "best.weights.h5"]
# A device that has onnxruntime and NumPy, and nothing of this project.
ON_THE_DEVICE = """
import sys
sys.modules |= dict.fromkeys(("keras", "torch", "jax", "tensorflow", "vit", "edgebench", "deploy"))
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
data = numpy.load(sys.argv[2])
answers = [session.run(None, {"images": image[None]})[0].argmax() for image in data["x_test"]]
print((answers == data["y_test"]).mean())
"""


@pytest.fixture
def trained(run_vit, digits, tmp_path):
    """Train on a backend and return the results file; real digits, an accuracy far from chance."""

    def train(backend: str = "jax") -> Path:
        run = run_vit("--keras-backend", backend, "--dataset", str(digits), *TINY.split(), *LEARNING)
        assert run.status == 0, run.stderr
        (path,) = (tmp_path / "results").glob(f"*-{backend}-*.json")
        return path

    return train


def run_export(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "export.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def deployed(path: Path, *flags: str) -> dict:
    """The results of a deployment that must succeed, checked against the schema."""
    before = set(path.parent.glob("*.json"))
    done = run_export(path, *flags, "--measure-seconds", "1", cwd=path.parents[1])
    assert done.returncode == 0, done.stderr
    (written,) = set(path.parent.glob("*.json")) - before
    results = json.loads(written.read_text())
    jsonschema.validate(results, json.loads((ROOT / "results.schema.json").read_text()))
    return results


def require_parity(results: dict, source: dict, difference: float) -> None:
    for file in results["what"]["deployed"]["files"]:
        assert file["parity"]["largest_logit_difference"] < difference and file["parity"]["images"] == 360
    assert results["quality"]["test"] == pytest.approx(source["quality"]["test"], abs=1e-4)


@pytest.mark.slow
@needs_onnx
def test_an_onnx_file_agrees_with_keras_and_runs_where_there_is_none(trained, digits, tmp_path):
    """Weights that JAX trained. Two files, for one image and for the batch of the run; every figure of inference."""
    path = trained()
    source, results = json.loads(path.read_text()), deployed(path, "--format", "onnx")
    require_parity(results, source, difference=1e-4)
    what = results["what"]
    assert [Path(file["path"]).name for file in what["deployed"]["files"]] == [
        f"{path.stem}.onnx",
        f"{path.stem}.b32.onnx",
    ]
    assert what["backend"] == "onnxruntime" and what["deployed"]["opset"] == 17
    assert what["deployed"]["file_bytes"] == path.with_suffix(".onnx").stat().st_size
    assert results["time"]["latency_ms"]["p50"] > 0 and results["time"]["inference_images_per_s"] > 0
    assert 0 < results["memory"]["inference_peak_rss_bytes"] < 300 * 2**20  # less than Keras and a backend alone
    assert results["time"]["train_images_per_s"] is None and "time/train_images_per_s" in results["missing"]

    command = [sys.executable, "-c", ON_THE_DEVICE, path.with_suffix(".onnx"), digits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(source["quality"]["test"]["test_accuracy"]), done.stderr


@needs_onnx
def test_the_process_that_measures_imports_neither_keras_nor_torch():
    """Its memory is the runtime's."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('keras', 'torch', 'jax', 'vit')); from deploy import run, runtimes; "
    )
    code += "import onnxruntime, numpy; from edgebench.measure import latency, meters, sensors"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "jax"])
def test_weights_of_every_backend_give_files_that_agree(backend, trained):
    """A file for one image only, where --batch is 1."""
    path = trained(backend)
    results = deployed(path, "--format", "onnx", "--batch", "1")
    require_parity(results, json.loads(path.read_text()), difference=1e-4)
    assert results["what"]["deployed"]["trained_on"] == backend and len(results["what"]["deployed"]["files"]) == 1
    assert results["time"]["inference_images_per_s"] is None and "time/inference_images_per_s" in results["missing"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "suffix", "int8"),
    [
        pytest.param("onnx", ".int8.onnx", True, marks=needs_onnx),
        pytest.param("litert", ".tflite", False, marks=needs_litert),
        pytest.param("litert", ".int8.tflite", True, marks=needs_litert),
        pytest.param("saved_model", ".saved_model", False, marks=needs_litert),
    ],
)
def test_the_other_formats_agree_with_keras(form, suffix, int8, trained):
    """int8 by its accuracy: within the limit, with less than half of the bytes."""
    path = trained()
    results = deployed(path, "--format", form, *(["--int8"] if int8 else []), "--batch", "7")
    assert [each.name for each in path.parent.glob(f"{path.stem}*{suffix}")]
    if not int8:
        require_parity(results, json.loads(path.read_text()), difference=1e-4)
        return
    found = results["what"]["deployed"]["files"][0]["parity"]
    assert found["accuracy"] >= found["keras_accuracy"] - parity.INT8_MOST_LOST and found["top_1_agreement"] > 0.95
    assert found["largest_logit_difference"] > 1e-4 and results["what"]["deployed"]["file_bytes"] < 200_000


@pytest.mark.slow
@needs_onnx
def test_a_file_that_does_not_agree_is_not_kept_and_the_exit_status_says_so(trained, monkeypatch, capsys, tmp_path):
    path = trained()
    monkeypatch.chdir(tmp_path)  # the path of the weights is relative
    monkeypatch.setattr(parity, "TOLERANCE", 0)
    with pytest.raises(SystemExit) as stop:
        export.main([str(path), "--format", "onnx", "--batch", "1"])
    assert stop.value.code == Disagrees.exit_status == 1
    assert "is not kept: its logits differ" in capsys.readouterr().err
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.any_version
def test_agreement_is_decided_by_the_logits_and_for_int8_by_the_accuracy():
    labels = np.arange(1000) % 10
    logits = np.random.default_rng(0).normal(size=(1000, 10)).astype(np.float32)
    logits[np.arange(1000), labels] += 3
    assert not parity.disagreement(parity.compare(logits, logits + 1e-5, labels), int8=False, tf32=False)
    swapped = logits[:, ::-1]
    assert "logits differ" in parity.disagreement(parity.compare(logits, swapped, labels), int8=False, tf32=False)
    broken = np.full_like(logits, np.nan)
    assert parity.disagreement(parity.compare(logits, broken, labels), int8=False, tf32=False)
    noisy = logits + np.random.default_rng(1).normal(0, 0.05, logits.shape)
    assert not parity.disagreement(parity.compare(logits, noisy, labels), int8=True, tf32=False)
    assert "points below" in parity.disagreement(parity.compare(logits, swapped, labels), int8=True, tf32=False)


@pytest.mark.any_version
def test_loss_and_accuracies_are_those_of_keras():
    logits = np.array([[2.0, 1, 0, -1, -2, -3], [0, 0, 5, 0, 0, -9]])
    found = parity.quality(logits, np.array([0, 5]))
    assert found["test_accuracy"] == 0.5 and found["test_top-5-accuracy"] == 0.5
    losses = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, (0, 5), strict=True)]
    assert found["test_loss"] == pytest.approx(np.mean(losses))


@pytest.mark.any_version
def test_weights_of_another_run_are_refused(digits, tmp_path):
    """All runs write to the same default path. Another model does not fit; the same model has another loss."""
    config = vit.ViTConfig(image_size=8, patch_size=4, projection_dim=8, transformer_layers=1, mlp_head_units=[8])
    data = vit.load_dataset(str(digits), 0.1, 0)
    augmentation = vit.create_data_augmentation("fused", 8, data.moments)
    weights = tmp_path / "a.weights.h5"
    vit.create_vit_classifier(config, data.image_shape, 10, augmentation).save_weights(weights)
    assert keras_model.rebuild(config, data, str(weights))
    config.mlp_head_units = [16]
    with pytest.raises(ExperimentError, match="does not hold the weights of this model"):
        keras_model.rebuild(config, data, str(weights))
    results = {"what": {"dtype_policy": "float32"}, "quality": {"test": {"test_loss": 1.5}}}
    keras_model.require_same_run({"test_loss": 1.5001}, results, "a.weights.h5")
    with pytest.raises(ExperimentError, match="another run has replaced the weights"):
        keras_model.require_same_run({"test_loss": 1.6}, results, "a.weights.h5")


COMPLETE = {
    "schema_version": 3,
    "status": "complete",
    "what": {"backend": "jax", "config": {"dataset": "synthetic", "batch_size": 8}, "micro_batches": 1},
    "files": {"weights": "best.weights.h5"},
}


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "has schema version 2, this program reads 3"),
        ({"status": "interrupted", "failure": "SIGINT"}, r"is interrupted \(SIGINT\); name a complete run"),
        ({"files": {"weights": None}}, "names no file of weights: --weights names another place"),
        ({"files": {"weights": "gone.weights.h5"}}, "gone.weights.h5, are not there: --weights"),
        ({"what": {**COMPLETE["what"], "backend": "native-jax"}}, "whose weights Keras does not read"),
        ({"what": {**COMPLETE["what"], "deployed": {}}}, "is deployed already"),
        (
            {"what": {**COMPLETE["what"], "config": {"dataset": "gone.npz"}}},
            "data set of the run, gone.npz, is not there",
        ),
        ({"what": None}, "is not a results file of vit.py"),
    ],
)
def test_a_run_that_cannot_be_deployed_is_refused_with_what_would_work(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("best.weights.h5").touch()
    Path("run.json").write_text(json.dumps(COMPLETE))
    assert read_source(Path("run.json"), None).weights == Path("best.weights.h5")
    Path("run.json").write_text(json.dumps(COMPLETE | change))
    with pytest.raises(ExperimentError, match=message):
        read_source(Path("run.json"), None)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "onnx"], "gone.json cannot be read"),
        (["--format", "onnx", "--batch", "0"], "--batch must be positive"),
        (["--format", "onnx", "--measure-seconds", "nan"], "--measure-seconds must be positive"),
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--format", "saved_model", "--int8"], "has no --int8; these have: onnx, litert"),
        (["--format", "litert", "--device", "gpu"], "--format onnx has --device gpu"),
        (["--format", "onnx", "--int8", "--device", "gpu"], "trtexec"),
    ],
)
def test_wrong_input_is_one_line_with_status_2(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("deploy.formats.is_installed", lambda module: True)
    with pytest.raises(SystemExit) as stop:
        export.main(["gone.json", *flags])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.count("\n") == 1 and message in error and error.startswith("export.py: error: ")
    )


@pytest.mark.any_version
def test_what_is_not_installed_and_what_cannot_be_written_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("deploy.formats.is_installed", lambda module: module != "ai_edge_litert")
    with pytest.raises(SystemExit):
        export.main(["gone.json", "--format", "litert"])
    assert 'needs ai_edge_litert, which is not installed: pip install -c constraints.txt -e ".[tensorflow,litert]"' in (
        capsys.readouterr().err
    )
    monkeypatch.chdir(tmp_path)
    Path("best.weights.h5").touch()
    Path("run.json").write_text(
        json.dumps(
            COMPLETE | {"what": COMPLETE["what"] | {"config": COMPLETE["what"]["config"] | {"measure_seconds": 1}}}
        )
    )
    with pytest.raises(SystemExit) as stop:  # a file stands in the folder's place, which root cannot write either
        export.main(["run.json", "--format", "onnx", "--output-dir", "best.weights.h5"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--output-dir: the folder 'best.weights.h5' cannot be written" in error
