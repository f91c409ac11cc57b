"""Promises about W&B: nothing that was logged is lost, nobody is asked for anything, and without W&B it is not imported."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, finish

import vit
from edgebench import cli, tracking

pytestmark = pytest.mark.any_version

RUN = f"--dataset synthetic {TINY} --num-epochs 2 --checkpoint-path a.weights.h5"


def records(run: Path) -> list[dict]:
    """Every record in the folder of a W&B run, as W&B's own reader gives them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_offline_run_holds_everything(start_vit, tmp_path):
    """Without a key and a terminal the run goes offline with a warning of one line. Its file holds all that was logged."""
    run = finish(start_vit(*RUN.split(), '--wandb-tags=["edge", "test"]', "--wandb-run-name", "named"))
    assert run.status == 0 and run.stderr.count("vit.py: warning: W&B logs offline: no API key") == 1, run
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = records(folder)
    start = next(record["run"] for record in logged if record["type"] == "run")
    assert (start["project"], start["display_name"]) == ("keras3_edge_baseline", "named")
    assert start["tags"] == ["edge", "test"]
    config = start["config"]["update"]
    assert set(vit.ViTConfig.__dataclass_fields__) <= set(config)
    assert (config["keras_backend"], config["batch_size"], config["num_patches"]) == ("jax", 32, 16)

    epochs = [record["history"]["item"] for record in logged if record["type"] == "history"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    printed = re.findall(r"- val_accuracy: ([\d.]+) - val_loss: [\d.]+ - val_top-5-accuracy: ([\d.]+)", run.stdout)
    for epoch, (accuracy, top_5) in zip(epochs, printed, strict=True):
        assert {"loss", "accuracy", "top-5-accuracy", "val_loss"} <= set(epoch)
        assert epoch["val_accuracy"] == pytest.approx(float(accuracy), abs=1e-4)
        assert epoch["val_top-5-accuracy"] == pytest.approx(float(top_5), abs=1e-4)

    summary = {}
    for record in logged:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    tested = re.search(r"test accuracy ([\d.]+), top-5 ([\d.]+)", run.stdout)
    assert summary["test_accuracy"] == pytest.approx(float(tested[1]), abs=1e-4)
    assert summary["test_top-5-accuracy"] == pytest.approx(float(tested[2]), abs=1e-4)
    assert summary["num_parameters"] == 101_828 and logged[-1]["exit"]["exit_code"] == 0


def modules_of_wandb_after(*flags: str) -> list[str]:
    vit.main(vit.read_config(flags))
    return [name for name in sys.modules if name.partition(".")[0] == "wandb"]


def test_without_wandb_it_is_neither_imported_nor_written(call_on, tmp_path):
    """Workers never run W&B."""
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={'x' * 40}\n")
    assert call_on("jax", modules_of_wandb_after, *RUN.split(), "--no-use-wandb").value == []
    assert (tmp_path / "results").exists() and not (tmp_path / "wandb").exists()


@pytest.fixture
def start_tracking(tmp_path, monkeypatch):
    """Start a W&B run in this process, with these variables in the environment."""
    import wandb

    monkeypatch.chdir(tmp_path)

    def start(run_id: str | None = None, **variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return tracking.start_wandb("project", None, None, [], {}, run_id)

    yield start
    wandb.teardown()  # it reads the environment once


def test_a_setting_that_wandb_refuses_is_an_expected_failure(start_tracking):
    with pytest.raises(cli.ExperimentError, match="W&B does not take its settings"):
        start_tracking(WANDB_BASE_URL="localhost:8080")


@pytest.mark.parametrize("key", ["", "malformed", "0" * 40])
def test_a_key_that_does_not_work_logs_offline_with_a_warning(key, start_tracking, tmp_path, capsys):
    """Empty, as in a fresh copy of .env.example; malformed; and one whose server cannot be reached."""
    began = time.perf_counter()
    run = start_tracking(WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_SWEEP_ID="s1")
    warnings = capsys.readouterr().err
    run.log({"epoch": 1})
    tracking.finish_wandb(run, {"figure": 1.0}, is_complete=True)
    assert "vit.py: warning: W&B logs offline" in warnings and "SWEEP SEES NOTHING" in warnings
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(record["type"] == "history" for record in records(folder)) and time.perf_counter() - began < 240


def test_the_command_for_a_resumed_offline_run_uploads_all_its_parts(start_tracking, tmp_path, capsys):
    """They are in folders of their own with one id. W&B names the last one, whose upload alone would replace the others."""
    server = pytest.importorskip("wandb_server", reason="W&B's sweeps library is not installed").WandbServer()
    folder = tmp_path / "my runs"
    folder.mkdir()
    for epochs in ([1, 2], [3], [4, 5]):
        run = start_tracking("abc", WANDB_MODE="offline", WANDB_DIR=str(folder))
        for epoch in epochs:
            run.log({"epoch": epoch})
        capsys.readouterr()
        tracking.finish_wandb(run, {"last": epochs[-1]}, is_complete=False)
        printed = capsys.readouterr().out
        assert ("WANDB_RESUME" in printed) == (epochs != [1, 2])
        time.sleep(1.1)  # the folders are named after the second
    command = printed.strip().rpartition("to upload all of it: ")[2]
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789" * 4}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=100, check=True)
    server.close()
    (uploaded,) = server.runs.values()
    assert [row["epoch"] for row in uploaded["history"]] == [1, 2, 3, 4, 5]
    assert uploaded["summary"]["last"] == 5
