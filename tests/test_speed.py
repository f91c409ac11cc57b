"""Promises about the fast paths: they train the same model, they are recorded, and where they fail the run goes on."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import INSTALLED, ROOT, TINY

import vit


def run_and_read(run_vit, tmp_path, digits, *flags: str):
    run = run_vit(*f"--no-use-wandb {TINY} --checkpoint-path a.weights.h5".split(), *flags, "--dataset", str(digits))
    assert run.status == 0, run
    [path] = (tmp_path / "results").glob("*.json")
    results = json.loads(path.read_text())
    path.unlink()
    return run, results


@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
def test_compiled_torch_trains_evaluates_and_says_so(run_vit, tmp_path, digits):
    """Whole batches compiled, the last, partial one eagerly: it learns as the eager run does, on images it is judged by."""
    flags = ["--keras-backend", "torch", "--num-epochs", "8", "--learning-rate", "0.003", "--measure-seconds", "1"]
    accuracy = {}
    for jit in ("on", "off"):
        run, results = run_and_read(run_vit, tmp_path, digits, *flags, "--jit", jit)
        assert results["what"]["jit_compile"] is (jit == "on") and results["what"]["jit_failure"] is None, run
        accuracy[jit] = results["quality"]["test"]["test_accuracy"]
    assert min(accuracy.values()) > 0.6 and accuracy["on"] == pytest.approx(accuracy["off"], abs=0.1)


@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
def test_torch_goes_on_eagerly_where_it_cannot_compile(run_vit, tmp_path, digits):
    """Keras' own augmentation draws on the host, which no graph can hold: one line, and the results say so."""
    flags = ["--keras-backend", "torch", "--num-epochs", "1", "--jit", "on", "--augmentation", "stock"]
    run, results = run_and_read(run_vit, tmp_path, digits, *flags)
    assert len(re.findall("warning: torch could not compile the model and runs eagerly", run.stderr)) == 1, run
    assert results["what"]["jit_compile"] is False and results["what"]["jit_failure"]


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_number_format_and_attention_are_what_was_asked_for_and_recorded(backend, run_vit, tmp_path, digits):
    flags = [
        "--keras-backend",
        backend,
        "--num-epochs",
        "1",
        "--dtype-policy",
        "mixed_float16",
        "--attention-dropout",
        "0",
    ]
    _, results = run_and_read(run_vit, tmp_path, digits, *flags)
    what = results["what"]
    assert what["dtype_policy"] == "mixed_float16" and (
        "dot_product_attention" in what["attention"] or backend == "jax"  # which has no float16 there on a CPU
    )
    assert results["quality"]["epochs"][0]["loss"] < 3  # chance: 2.3; a loss that is scaled but not unscaled: thousands


def test_the_memory_estimate_counts_the_very_parameters_of_the_default_model():
    """16 bytes a parameter, whatever the batch; their number is the one that the keras.io model has."""
    one, two = (vit.train_memory_bytes(vit.ViTConfig(batch_size=batch)) for batch in (1, 2))
    assert (2 * one - two) / 16 == 21_759_012 and two > one


DROPOUT = """
import sys
sys.path.insert(0, ".")
import keras, numpy as np, vit

x = np.ones((64, 33, 50), "float32")
if keras.backend.backend() == "torch":  # as a compiled step traces it
    graphs, layer = vit.TorchGraphs({64}), vit.Dropout(0.3)
    first, second = (np.array(graphs.run(lambda x: layer(x, training=True), keras.ops.convert_to_tensor(x)).cpu()) for _ in "12")
    assert len(graphs.compiled) == 1
else:
    layer = vit.Dropout(0.3)
    first, second = (np.array(keras.ops.convert_to_numpy(layer(x, training=True))) for _ in "12")
assert set(np.unique(first)) == {np.float32(0), np.float32(1) / np.float32(0.7)}, np.unique(first)
kept = first > 0
shares = [kept.mean(), kept.mean((0, 1)).min(), kept.mean((0, 1)).max(), (kept == (second > 0)).mean()]
neighbours = [(np.diff(kept.ravel().astype(int), n=1) == 0).mean(), (kept[1:] == kept[:-1]).mean()]
print(*shares, *neighbours)
"""


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_hashed_dropout_drops_its_share_evenly_and_anew_at_every_call(backend):
    """3.3 sigma of 105,600 draws is 0.005; of the 2,112 of a column, 0.033. Independent draws agree in 0.7² + 0.3²."""
    env = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([sys.executable, "-c", DROPOUT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    share, least, most, *agreements = map(float, done.stdout.split())
    assert share == pytest.approx(0.7, abs=0.005) and least > 0.66 and most < 0.74
    assert agreements == pytest.approx([0.58] * 3, abs=0.006)
