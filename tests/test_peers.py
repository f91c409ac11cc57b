"""Promises about the hand-written peers: they are the model and the training of vit.py, and measure as it does."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest
from conftest import INSTALLED, ROOT, TINY

import vit
from edgebench.cli import ExperimentError
from peers import experiment

PEERS = [name for name in ("jax", "torch") if name in INSTALLED]


@pytest.mark.parametrize("backend", [*PEERS[1:], *(pytest.param(name, marks=pytest.mark.slow) for name in PEERS[:1])])
def test_a_peer_is_the_same_model_with_the_same_gradients_and_optimizer(backend, tmp_path):
    """On the same weights and batch: loss, accuracy and top-5 before and after a step of AdamW, and all gradients."""
    command = [sys.executable, str(ROOT / "studies" / "peer_gradients.py"), backend]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"][0] == found["parameters"][1]
    for moment in ("before", "after"):
        peer, keras = found[moment]
        assert peer == pytest.approx(keras, rel=1e-4), moment
    assert found["after"][1][0] < found["before"][1][0] - 0.1  # the step moved the loss by more than they may differ
    assert found["gradients"] < 1e-3 and found["logits"] < 1e-4


def run_peer(backend: str, *flags: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "peers" / f"native_{backend}.py"), *TINY.split(), "--no-use-wandb", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--checkpoint-path", "a.weights.h5"], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", PEERS)
def test_a_peer_learns_and_leaves_the_results_that_vit_leaves(backend, digits, tmp_path):
    """Real digits, in half precision with a scaled loss, eagerly on torch: an accuracy far from chance, and every figure."""
    flags = ["--dataset", str(digits), "--num-epochs", "5", "--learning-rate", "0.003", "--measure-seconds", "4"]
    flags += ["--dtype-policy", "mixed_float16", "--jit", "off"]
    done = run_peer(backend, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    jsonschema.validate(results, json.loads((ROOT / "results.schema.json").read_text()))
    quality, times = results["quality"], results["time"]
    assert quality["test"]["test_accuracy"] > 0.5 and quality["test"]["test_top-5-accuracy"] > 0.8
    assert quality["epochs"][-1]["loss"] < 0.8 * quality["epochs"][0]["loss"]
    accuracies = [epoch["val_accuracy"] for epoch in quality["epochs"]]
    assert quality["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert times["step_ms"]["n"] >= 10 and times["latency_ms"]["p50"] > 0 and len(times["epoch_s"]) == 5
    assert times["bare_latency_ms"] is None and "peer" in results["missing"]["time/bare_latency_ms"]
    assert results["what"]["backend"] == f"native-{backend}" and (tmp_path / "a.weights.h5").stat().st_size > 10**5


def test_what_a_peer_does_not_have_is_refused_with_one_line(tmp_path):
    done = run_peer(PEERS[-1], "--dataset", "synthetic", "--augmentation", "stock", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--augmentation" in done.stderr
    for config in (vit.ViTConfig(resume=True), vit.ViTConfig(gradient_accumulation_steps=2)):
        with pytest.raises(ExperimentError, match="have no --"):
            experiment.check(config)
