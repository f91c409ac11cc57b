"""Promises about the comparison of backends: right figures, no claim beyond the spread, and no run lost."""

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import INSTALLED, ROOT

import benchmark
import vit
from edgebench.compare import launch, verdicts
from edgebench.compare.report import build_report
from edgebench.compare.runs import MUST_AGREE, NOTED, NOTED_WITHIN_A_BACKEND, read_failures, read_results

TINY = "--image-size 16 --patch-size 8 --projection-dim 8 --transformer-layers 1 --mlp-head-units 8 --batch-size 256"
TINY += " --dataset synthetic --num-epochs 2 --measure-seconds 0.1"
BASE = {
    "schema_version": 2,
    "status": "complete",
    "failure": None,
    "what": {
        "started": "2026-01-01T00:00:00+00:00",
        "node": "bench",
        "device": "Some GPU",
        "is_gpu": True,
        "power_mode": None,
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "backend": "jax",
        "versions": {"Python": "3.11.7", "Keras": "3.15.1", "jax": "0.10", "CUDA": "13.0"},
        "config": {
            **{"image_size": 72, "patch_size": 6, "projection_dim": 64, "num_heads": 4, "transformer_layers": 8},
            **{"transformer_units": [128, 64], "mlp_head_units": [2048, 1024], "batch_size": 32, "num_epochs": 10},
            **{"learning_rate": 0.001, "weight_decay": 0.0001, "validation_split": 0.1, "dataset": "cifar100"},
        },
        "dtype_policy": "float32",
        "tf32": True,
        "attention": "explicit",
        "augmentation": "fused",
        "images": {"train": 45000, "validation": 5000, "test": 10000},
        "image_shape": [32, 32, 3],
        "num_classes": 100,
        "jit_compile": True,
        "num_parameters": 21_000_000,
    },
    "time": {
        "latency_ms": {"p50": 2.0},
        "inference_images_per_s": 9000.0,
        "compile_s": 30.0,
        "step_ms": {"p50": 8.0, "p99": 9.0},
        "train_images_per_s": 100.0,
        "evaluation_images_per_s": 8000.0,
    },
    "memory": {"train_peak_device_bytes": 2**30, "peak_rss_bytes": 3 * 2**30},
    "energy": {"accelerator": {"joules_per_image": 0.5}, "cpu_package": {"joules_per_image": None}},
    "quality": {
        "epochs": [{"val_accuracy": 0.2}, {"val_accuracy": 0.4}],
        "epoch_end_s": [40.0, 50.0],
        "best_epoch_s": 50.0,
        "test": {"test_accuracy": 0.4, "test_top-5-accuracy": 0.7},
    },
}


@pytest.fixture
def write(tmp_path):
    """Write a results file of a backend; `changes` go by their path, as in {"what/config/batch_size": 64}."""

    def write(backend: str = "jax", changes: dict | None = None):
        document = copy.deepcopy(BASE)
        number = len(list(tmp_path.glob("*.json")))
        changes = {"what/backend": backend, "what/started": f"2026-01-01T00:00:{number:02}+00:00", **(changes or {})}
        for path, value in changes.items():
            *parents, name = path.split("/")
            inner = document
            for parent in parents:
                inner = inner[parent]
            inner[name] = value
        path = tmp_path / f"{number}-{backend}.json"
        path.write_text(json.dumps(document))
        return path

    return write


def rates(write, backend: str, *values: float, path: str = "time/train_images_per_s", **changes) -> None:
    for value in values:
        write(backend, {path: value, **changes})


def report(folder, baseline: str | None = None) -> str:
    return build_report(read_results([folder]), read_failures([folder]), baseline)


def start(*arguments, environment: dict | None = None, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmark.py"), *map(str, arguments)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def run(*arguments, **options) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python benchmark.py ARGUMENTS`."""
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def cells(markdown: str, row: str, column: str) -> str:
    """The cell of the first table that has such a row and column."""
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for found in rows:
            if found[0] == row and column in rows[0]:
                return found[rows[0].index(column)]
    raise AssertionError(f"no {row}, {column} in {markdown}")


def test_medians_ranges_and_ratios_are_right_and_said_in_words(write, tmp_path):
    rates(write, "jax", 90, 88, 86)
    rates(write, "torch", 110, 132, 120)
    text = report(tmp_path)
    assert cells(text, "jax", "training, images/s") == "88.0 (86.0–90.0)"
    assert cells(text, "torch", "training, images/s") == "120 (110–132)"
    assert cells(text, "torch / jax", "training, images/s") == "1.36×"
    assert (
        "torch trained 1.36× as fast as jax (median 120 against 88.0 images/s; ranges do not overlap, n = 3 each)"
        in text
    )
    assert "jax trained 0.733× as fast as torch" in report(tmp_path, baseline="torch")


def test_a_difference_within_the_spread_is_not_claimed(write, tmp_path):
    rates(write, "jax", 90, 100, 110)
    rates(write, "torch", 109, 120, 130)
    text = report(tmp_path)
    assert "training throughput: no difference between torch and jax that the spread supports" in text
    assert "as fast as" not in text and cells(text, "torch / jax", "training, images/s") == "(1.20×)"


def test_one_run_each_supports_no_statement(write, tmp_path):
    rates(write, "jax", 90)
    rates(write, "torch", 900)
    text = report(tmp_path)
    assert "one run each: no statement is supported; run with --repeats 3" in text and "as fast as" not in text


@pytest.mark.parametrize(("accuracy", "supported"), [(0.405, False), (0.415, True)])
def test_equal_repeats_need_more_than_the_error_of_the_test_set(accuracy, supported, write, tmp_path):
    """10,000 test images at 40 %: two standard errors are 0.98 points."""
    rates(write, "jax", 0.4, 0.4, path="quality/test/test_accuracy")
    rates(write, "torch", accuracy, accuracy, path="quality/test/test_accuracy")
    assert ("torch reached a test accuracy 1.50 points above that of jax" in report(tmp_path)) is supported
    assert ("test accuracy: no difference between torch and jax" in report(tmp_path)) is not supported


def test_what_was_not_measured_is_never_a_zero(write, tmp_path):
    """null, and a figure that is absent, show as unavailable; and a number from elsewhere says where it comes from."""
    nothing = {"time/compile_s": None, "time/step_ms": None, "memory/train_peak_device_bytes": None}
    for _ in range(2):
        write("jax", {**nothing, "time/latency_ms": {}, "energy": {}})
        write("torch")
    text = report(tmp_path)
    for column in ("compile, s", "step p50, ms", "one image p50, ms", "energy, J/image"):
        assert cells(text, "jax", column) == cells(text, "torch / jax", column) == "–"
    assert "compile time: unavailable for jax." in text and "energy an image: unavailable for jax." in text
    assert (
        cells(text, "jax", "peak memory, MiB").endswith("RSS") and cells(text, "torch / jax", "peak memory, MiB") == "–"
    )
    assert "peak memory: not compared" in text


def test_a_peer_is_compared_with_keras_and_its_lack_of_keras_is_no_difference(write, tmp_path):
    versions = {"Python": "3.11.7", "jax": "0.10", "optax": "0.2", "CUDA": "13.0"}
    rates(write, "jax", 90, 91)
    rates(write, "native-jax", 100, 101, **{"what/versions": versions})
    text = report(tmp_path)
    assert "native-jax trained 1.11× as fast as jax" in text and "Note:" not in text
    assert "Software: Python 3.11.7, Keras 3.15.1, CUDA 13.0, jax 0.10, native-jax 0.10" in text


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("what/config/batch_size", 64, "batch_size 64 against 32"),
        ("what/dtype_policy", "mixed_bfloat16", "dtype_policy mixed_bfloat16 against float32"),
        ("what/tf32", False, "tf32 off against on"),
        ("what/config/dataset", "/data/mine.npz", "dataset mine.npz against cifar100"),
        ("what/images/train", 1000, "images/train 1000 against 45000"),
        ("what/augmentation", "stock", "augmentation stock against fused"),
        ("what/config/learning_rate", 0.01, "learning_rate 0.01 against 0.001"),
    ],
)
def test_runs_under_other_conditions_are_not_compared_and_the_reason_is_said(path, value, reason, write, tmp_path):
    rates(write, "jax", 90, 91, 92)
    rates(write, "torch", 120, 121, **{path: value})
    text = report(tmp_path)
    assert f"Not compared with jax (set 1): {reason}." in text
    assert "torch / jax" not in text and "as fast as" not in text


def test_what_may_differ_is_compared_but_noted(write, tmp_path):
    """Attention and jit are what is compared; TF32 makes no difference on a CPU; other code is worth a note."""
    rates(write, "jax", 90, 91, **{"what/is_gpu": False})
    changes = {"what/attention": "fused", "what/jit_compile": False, "what/tf32": False, "what/git_commit": "feedbeef"}
    rates(write, "torch", 120, 121, **{"what/is_gpu": False, **changes})
    text = report(tmp_path)
    assert "torch trained 1.33× as fast as jax" in text
    assert cells(text, "torch", "attention") == "fused" and cells(text, "torch", "jit") == "off"
    assert "Note: the runs differ in git_commit: jax 0123456789abcdef; torch feedbeef" in text


def test_devices_have_tables_of_their_own_and_one_backend_is_compared_across_them(write, tmp_path):
    rates(write, "jax", 100, 101, 102)
    rates(write, "torch", 90, 91, 92)
    rates(write, "jax", 49, 50, 51, **{"what/device": "Orin", "what/power_mode": "pmode:0003"})
    text = report(tmp_path)
    assert "## Some GPU, node bench" in text and "## Orin, node bench, power mode pmode:0003" in text
    across = text.partition("## Across devices")[2].partition("##")[0]
    assert "jax on Some GPU, node bench trains 2.02× as fast as on Orin, node bench, power mode pmode:0003" in across
    assert across.count("as fast as") == 1 and "torch on" not in across


def test_broken_and_foreign_files_cost_a_line_and_a_copy_counts_once(write, tmp_path, capsys):
    original = write("jax")
    (tmp_path / "broken.json").write_text('{"schema_version": 2, "what": {')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "later.json").write_text('{"schema_version": 3, "what": {"backend": "jax"}}')
    (tmp_path / "other.json").write_text('[{"name": "x"}]')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "copy.json").write_text(original.read_text())
    assert [run.path.name for run in read_results([tmp_path])] == [original.name]
    warnings = capsys.readouterr().err
    assert warnings.count("benchmark.py: warning: ") == warnings.count("\n") == 4
    assert warnings.count("cannot be read") == 2 and "schema version 3" in warnings and "counts once" in warnings


def test_the_report_comes_as_markdown_csv_and_picture(write, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rates(write, "jax", 90, 91)
    rates(write, "torch", 120, 121, **{"energy": {}})
    status, stdout, stderr = run("--report", tmp_path, "--out", tmp_path / "out")
    assert (status, stderr) == (0, "")
    assert (tmp_path / "out/report.md").read_text() in stdout
    with (tmp_path / "out/report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what/backend"] for row in rows] == ["jax", "jax", "torch", "torch"]
    assert [float(row["time/train_images_per_s"]) for row in rows] == [90, 91, 120, 121]
    assert rows[0]["energy/cpu_package/joules_per_image"] == "" and rows[0]["time/step_ms/p50"] == "8.0"
    height, width, _ = image.imread(tmp_path / "out/report.png").shape
    assert height > 1.5 * width > 1000


def test_without_matplotlib_everything_but_the_picture_is_written(write, tmp_path):
    write("jax")
    absent = tmp_path / "absent" / "matplotlib"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('No module named matplotlib', name='matplotlib')")
    status, _, stderr = run("--report", tmp_path, environment={"PYTHONPATH": str(absent.parent)})
    assert status == 0 and stderr.count("\n") == 1 and "pip install matplotlib" in stderr
    assert (tmp_path / "report.csv").exists() and not (tmp_path / "report.png").exists()


def test_every_figure_and_condition_exists_in_what_vit_writes():
    """A name that changes in vit.py would otherwise show as a figure that could not be measured."""
    schema = json.loads((ROOT / "results.schema.json").read_text())
    metrics = (*verdicts.SPEED, *verdicts.COSTS_AND_QUALITY)
    figures = [path for metric in metrics for path in (metric.path, metric.fallback) if path]
    facts = (*MUST_AGREE, *NOTED, *NOTED_WITHIN_A_BACKEND)
    for path in [*figures, *(f"what/{fact}" for fact in facts)]:
        section, name, *_ = path.split("/")
        assert name in schema["properties"][section]["properties"], path
    flags = {fact.partition("/")[2] for fact in facts if fact.startswith("config/")}
    assert flags <= set(vit.ViTConfig.__dataclass_fields__)


def test_the_order_is_reversed_from_round_to_round():
    assert launch.alternating(["jax", "torch"], 3) == ["jax", "torch", "torch", "jax", "jax", "torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "mxnet"], "mxnet"),
        (["--repeats", "0"], "--repeats"),
        (["--baseline", "mxnet"], "--baseline"),
        (["--unknown"], "--unknown"),
        (["--report", "nowhere"], "no results"),
        (["--report", "nowhere", "--", "--num-epochs", "2"], "--report"),
        (["--", "--keras_backend=jax"], "--keras-backend"),
        (["--", "--results-dir", "x"], "--results-dir"),
        (["--", "--checkpoint-path", "x"], "--checkpoint-path"),
    ],
)
def test_wrong_input_is_refused_with_one_line(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("benchmark.py: error: ") and stderr.count("\n") == 1 and message in stderr


def test_wandb_is_off_unless_the_flags_speak_of_it():
    flags = ["--num-epochs", "2"]
    assert benchmark.parse(["--", *flags])[1] == [*flags, "--no-use-wandb"]
    for spoken in ("--use_wandb=True", "--use-wandb", "--no-use-wandb"):
        assert benchmark.parse(["--", spoken])[1] == [spoken]


@pytest.mark.any_version
def test_backends_run_and_are_reported(tmp_path):
    """Real runs, with another backend in the environment, one of them of a hand-written peer; nothing else stays."""
    backends = [INSTALLED[-1], "native-jax"]
    out = tmp_path / "out"
    flags = ["--backends", *backends, "--repeats", 1, "--out", out, "--", *TINY.split()]
    status, stdout, _ = run(*flags, environment={"KERAS_BACKEND": INSTALLED[0]}, cwd=tmp_path)
    assert status == 0, stdout
    for number, name in enumerate(backends, start=1):
        assert re.search(rf"^\[{number}/{len(backends)}\] {name} \.\.\. \d+ s, [\d,.]+ images/s$", stdout, re.M), stdout
        for metric in (verdicts.TRAINING, verdicts.COMPILE, verdicts.MEMORY, verdicts.ACCURACY):
            assert re.search(r"\d", cells(stdout, name, metric.heading)), metric.title
    assert sorted(run.backend for run in read_results([out])) == sorted(backends)
    left = {path.name for path in out.iterdir() if not path.name.endswith(".json")}
    assert left - {"report.png"} == {"logs", "report.md", "report.csv"} and not (tmp_path / "wandb").exists()


def test_a_run_that_fails_is_told_with_its_reason_and_stops_no_other(tmp_path):
    """vit.py refuses --patch-size 99: each run is tried, and as none succeeds, the exit status is 1."""
    status, stdout, _ = run("--backends", INSTALLED[0], "--repeats", 2, "--out", tmp_path, "--", "--patch-size", "99")
    reason = "vit.py: error: --patch-size 99 is larger than --image-size 72"
    assert status == 1 and stdout.count(reason) == 4  # both runs, on the console and in the report
    failures = json.loads((tmp_path / "failures.json").read_text())["failures"]
    assert [(failure["backend"], failure["reason"]) for failure in failures] == [(INSTALLED[0], reason)] * 2
    assert (tmp_path / failures[0]["log"]).exists()
    assert (tmp_path / "report.md").read_text().count(reason) == 2


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (2, "noise\nvit.py: error: wrong\nmore noise\n", "vit.py: error: wrong"),
        (1, "Traceback\nValueError: x\n\n", "ValueError: x"),
        (3, "", "exit status 3"),
        (-signal.SIGKILL, "", "killed by SIGKILL"),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_tells_most(status, stderr, reason, tmp_path):
    (tmp_path / "1-jax.stderr.log").write_text(stderr)
    assert launch.failure_reason(status, tmp_path / "1-jax.log") == reason


def test_ctrl_c_reports_what_has_finished(tmp_path):
    """The second of two runs is stopped, and gone at the end; the first is in the report."""
    out = tmp_path / "out"
    backend = "torch" if "torch" in INSTALLED else INSTALLED[0]  # torch compiles nothing, and is done soonest
    process = start("--backends", backend, "--repeats", 2, "--out", out, "--", *TINY.split(), "--measure-seconds", "0")
    deadline = time.monotonic() + 400
    while not list(out.glob("logs/*-2-*.log")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, (stdout, stderr)
    assert len(read_results([out])) == 1 and (out / "report.md").exists()
    assert f"Runs: 1 (1 {backend})" in stdout and "stopped by SIGINT" in stdout
    assert "Traceback" not in stderr and not list(out.glob("checkpoint-*"))
