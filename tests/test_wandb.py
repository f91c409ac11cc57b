"""Promises about W&B: nothing that was logged is lost, nobody is asked for anything, and without W&B it is not imported."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, finish

import vit
from edgebench import cli
from edgebench.record import tracking

pytestmark = pytest.mark.any_version

RUN = f"--dataset synthetic {TINY} --num-epochs 2 --checkpoint-path a.weights.h5"


def records(run: Path) -> list[dict]:
    """Every record in the folder of a W&B run, as W&B's own reader gives them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_terminal_shows_a_bar_that_the_log_does_not_keep(start_vit, tmp_path):
    """The bar counts images and goes at the end of an epoch; a line an epoch stays, on the terminal and in W&B's log."""
    screen, terminal = pty.openpty()
    process = start_vit(*RUN.split(), stdout=terminal, stderr=terminal, environment={"WANDB_MODE": "offline"})
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the last process that held the terminal has ended
        while part := os.read(screen, 65536):
            shown += part
    os.close(screen)
    assert process.wait(timeout=60) == 0, shown.decode()
    text = shown.decode()
    lines = [line for line in re.split(r"[\r\n]|\x1b\[2K", text) if line.startswith("Epoch ")]
    bars, kept = [line for line in lines if "━" in line], [line for line in lines if "━" not in line]
    assert [line.partition(":")[0] for line in kept] == ["Epoch 1/2", "Epoch 2/2"]
    assert all("images/s" in line and line.rstrip().endswith("left") for line in bars)
    assert {line.split()[1] for line in bars} == {"1/2", "2/2"}
    (log,) = tmp_path.glob("wandb/offline-run-*/files/output.log")
    assert log.read_text().count("Epoch ") == 2 and "━" not in log.read_text()


def test_an_offline_run_holds_everything(start_vit, tmp_path):
    """Without a key and a terminal the run goes offline with a warning of one line. Its file holds all that was logged."""
    run = finish(
        start_vit(*RUN.split(), '--wandb-tags=["edge", "test"]', "--wandb-run-name", "named", "--wandb-artifact")
    )
    assert run.status == 0 and run.stderr.count("vit.py: warning: W&B logs offline: no API key") == 1, run
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = records(folder)
    start = next(record["run"] for record in logged if record["type"] == "run")
    assert (start["project"], start["display_name"]) == ("keras3_edge_baseline", "named")
    assert start["tags"] == ["edge", "test", "jax", "cpu", start["host"]]
    config = start["config"]["update"]
    assert set(vit.ViTConfig.__dataclass_fields__) <= set(config)
    assert (config["keras_backend"], config["batch_size"], config["num_patches"]) == ("jax", 32, 16)

    epochs = [record["history"]["item"] for record in logged if record["type"] == "history"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    printed = re.findall(r"^Epoch .* ([\d,]+) images/s, .* val ([\d.]+) %$", run.stdout, re.MULTILINE)
    for epoch, (rate, accuracy) in zip(epochs, printed, strict=True):
        assert {"loss", "accuracy", "top-5-accuracy", "val_loss", "val_top-5-accuracy", "train_s"} <= set(epoch)
        assert epoch["images_per_s"] == pytest.approx(float(rate.replace(",", "")), abs=1)
        assert epoch["val_accuracy"] == pytest.approx(float(accuracy) / 100, abs=1e-3)
        assert epoch["learning_rate"] == pytest.approx(0.001)

    summary = {}
    for record in logged:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    tested = re.search(r"test accuracy ([\d.]+) %, top-5 ([\d.]+) %", run.stdout)
    assert summary["test_accuracy"] == pytest.approx(float(tested[1]) / 100, abs=1e-3)
    assert summary["test_top-5-accuracy"] == pytest.approx(float(tested[2]) / 100, abs=1e-3)
    assert not [name for name in summary if name.startswith("quality/test")] and logged[-1]["exit"]["exit_code"] == 0

    # What really ran, the best epoch as a summary, over the epochs; the results file and the weights.
    added = {
        name: value
        for record in logged
        if record["type"] == "config"
        for name, value in record["config"]["update"].items()
    }
    assert added["num_parameters"] == 101_828 and added["jit_compile"] is True and added["versions"]["jax"]
    metrics = {
        record["metric"].get("name") or record["metric"].get("glob_name"): record["metric"]
        for record in logged
        if record["type"] == "metric"
    }
    assert metrics["val_accuracy"]["summary"]["max"] and metrics["val_accuracy"]["step_metric"] == "epoch"
    assert start["run_group"] == start["host"] and start["job_type"] == "train"
    (results,) = (folder / "files").glob("*.json")
    assert json.loads(results.read_text())["status"] == "complete"
    assert any("artifact" in json.dumps(record) for record in logged)
    assert "W&B" not in run.stdout and "Run history" not in run.stderr


def test_an_online_run_arrives_as_it_was_logged(start_vit):
    """What a person sees in W&B, read back from the server: names, configuration, epochs, the best epoch, the results file."""
    server = pytest.importorskip("wandb_server", reason="W&B's sweeps library is not installed").WandbServer()
    key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_RUN_GROUP": "desk 3"}
    run = finish(start_vit(*RUN.split(), "--node-name", "ook", "--wandb-job-type", "trial", environment=key))
    server.close()
    assert run.status == 0 and "W&B logs" not in run.stderr and f"{server.url}/edge-team/" in run.stdout, run
    (seen,) = server.runs.values()
    assert (seen["displayName"], seen["groupName"], seen["jobType"]) == ("ook-jax-b32-fp32", "desk 3", "trial")
    assert seen["tags"] == ["jax", "cpu", "ook"] and seen["exit"] == 0
    assert seen["config"]["batch_size"] == 32 and seen["config"]["num_parameters"] == 101_828
    assert [row["epoch"] for row in seen["history"]] == [1, 2]
    assert all(row["learning_rate"] > 0 and row["images_per_s"] > 0 and row["train_s"] > 0 for row in seen["history"])
    best = max(row["val_accuracy"] for row in seen["history"])
    assert seen["summary"]["val_accuracy"] == {"max": best, "last": seen["history"][-1]["val_accuracy"]}
    assert seen["summary"]["test_accuracy"] > 0 and "quality/test/test_accuracy" not in seen["summary"]
    (results,) = (json.loads(text) for name, text in server.files.items() if name.startswith("2"))
    assert results["status"] == "complete"
    assert b"%|" not in server.files["output.log"] and server.files["output.log"].count(b"Epoch ") == 2


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
        return tracking.start(vit.ViTConfig(wandb_project="project"), "jax", is_gpu=False, run_id=run_id)

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
    tracking.finish(run, {"figure": 1.0}, None, None, is_complete=True)
    assert "vit.py: warning: W&B logs offline" in warnings and "SWEEP SEES NOTHING" in warnings
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(record["type"] == "history" for record in records(folder)) and time.perf_counter() - began < 240


def test_the_command_for_a_resumed_offline_run_uploads_all_its_parts(start_tracking, tmp_path):
    """They are in folders of their own with one id. W&B names the last one, whose upload alone would replace the others."""
    server = pytest.importorskip("wandb_server", reason="W&B's sweeps library is not installed").WandbServer()
    folder = tmp_path / "my runs"
    folder.mkdir()
    for epochs in ([1, 2], [3], [4, 5]):
        run = start_tracking("abc", WANDB_MODE="offline", WANDB_DIR=str(folder))
        for epoch in epochs:
            run.log({"epoch": epoch})
        command = tracking.where_to_see(run)
        tracking.finish(run, {"last": epochs[-1]}, None, None, is_complete=False)
        assert ("WANDB_RESUME" in command) == (epochs != [1, 2])
        time.sleep(1.1)  # the folders are named after the second
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789" * 4}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=100, check=True)
    server.close()
    (uploaded,) = server.runs.values()
    assert [row["epoch"] for row in uploaded["history"]] == [1, 2, 3, 4, 5]
    assert uploaded["summary"]["last"] == 5
