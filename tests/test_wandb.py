"""Promises about W&B: nothing logged is lost, nothing is asked, and without it nothing of it is touched."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

import vit

RUN = f"--dataset synthetic {TINY} --num-epochs 2 --checkpoint-path a.weights.h5"


def records(run: Path) -> list[dict]:
    """Every record in the folder of a W&B run, as W&B's own reader gives them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_offline_run_holds_everything(run_vit, tmp_path):
    """No key and no terminal: the run goes offline, says so in one line, and its file holds all that was logged."""
    run = run_vit(*RUN.split(), '--wandb-tags=["edge", "test"]', "--wandb-run-name", "named")
    assert run.status == 0 and run.stderr.count("vit.py: warning: W&B logs offline: no API key") == 1, run
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    told = records(folder)
    start = next(record["run"] for record in told if record["type"] == "run")
    assert (start["project"], start["tags"], start["display_name"]) == (
        "keras3_edge_baseline",
        ["edge", "test"],
        "named",
    )
    config = start["config"]["update"]
    assert set(vit.ViTConfig.__dataclass_fields__) <= set(config)
    assert (config["keras_backend"], config["batch_size"], config["num_patches"]) == ("jax", 32, 16)

    epochs = [record["history"]["item"] for record in told if record["type"] == "history"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    printed = re.findall(r"- val_accuracy: ([\d.]+) - val_loss: [\d.]+ - val_top-5-accuracy: ([\d.]+)", run.stdout)
    for epoch, (accuracy, top_5) in zip(epochs, printed, strict=True):
        assert {"loss", "accuracy", "top-5-accuracy", "val_loss"} <= set(epoch)
        assert epoch["val_accuracy"] == pytest.approx(float(accuracy), abs=1e-4)
        assert epoch["val_top-5-accuracy"] == pytest.approx(float(top_5), abs=1e-4)

    summary = {}
    for record in told:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    tested = re.search(r"test accuracy ([\d.]+), top-5 ([\d.]+)", run.stdout)
    assert summary["test_accuracy"] == pytest.approx(float(tested[1]), abs=1e-4)
    assert summary["test_top-5-accuracy"] == pytest.approx(float(tested[2]), abs=1e-4)
    assert summary["num_parameters"] == 42_980 and told[-1]["exit"]["exit_code"] == 0


def test_without_wandb_nothing_of_it_is_imported_or_written(run_vit, tmp_path):
    run = run_vit(
        *RUN.split(), "--no-use-wandb", environment={"PYTHONPROFILEIMPORTTIME": "1", "WANDB_API_KEY": "x" * 40}
    )
    assert run.status == 0, run
    assert " wandb" not in run.stderr and not (tmp_path / "wandb").exists()


def test_a_setting_that_wandb_refuses_is_one_line(run_vit):
    run = run_vit(*RUN.split(), environment={"WANDB_BASE_URL": "localhost:8080"})
    assert "W&B does not take its settings" in run.error_line


@pytest.mark.parametrize("key", ["", "malformed", "0" * 40])
def test_a_key_that_does_not_work_never_costs_the_run(key, run_vit, tmp_path):
    """Malformed, empty as in a fresh copy of .env.example, and one whose server cannot be reached."""
    started = time.perf_counter()
    run = run_vit(
        *RUN.split(), environment={"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SWEEP_ID": "s1"}
    )
    assert (
        run.status == 0 and "vit.py: warning: W&B logs offline" in run.stderr and "SWEEP SEES NOTHING" in run.stderr
    ), run
    assert list((tmp_path / "wandb").glob("offline-run-*")) and time.perf_counter() - started < 240
