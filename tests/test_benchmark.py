"""Promises about the report on backends: right figures and names, no claim beyond the spread, nothing taken as markup."""

import copy
import csv
import json
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
from conftest import ROOT

import benchmark
from edgebench import flags
from edgebench.compare import metrics, report
from edgebench.compare.items import find_baseline
from edgebench.compare.report import build_report
from edgebench.compare.runs import read_failures, read_results
from edgebench.compare.sets import FACTS, NOTED_PATHS, NOTED_WITHIN_A_NAME
from edgebench.files import replacing
from studies import schema

JAX, EAGER, COMPILED = "JAX (compiled)", "torch (eager)", "torch (compiled)"
BASE = {
    "schema_version": 3,
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
        "environment": {},
        "versions": {"Python": "3.11.7", "Keras": "3.15.1", "jax": "0.10", "CUDA": "13.0"},
        "config": {
            **{"image_size": 72, "patch_size": 6, "projection_dim": 64, "num_heads": 4, "transformer_layers": 8},
            **{"transformer_units": [128, 64], "mlp_head_units": [2048, 1024], "batch_size": 32, "num_epochs": 10},
            **{"learning_rate": 0.001, "weight_decay": 0.0001, "validation_split": 0.1, "dataset": "cifar100"},
            **{"attention_dropout": 0.1, "gradient_accumulation_steps": 1, "augmentation": "fused", "jit": "auto"},
            **{"dtype_policy": "float32", "tf32": True, "seed": 0, "measure_seconds": 60.0, "use_wandb": False},
            **{"initial_weights": "published"},
        },
        "dtype_policy": "float32",
        "tf32": True,
        "attention": "explicit",
        "augmentation": "fused",
        "images": {"train": 45000, "validation": 5000, "test": 10000},
        "image_shape": [32, 32, 3],
        "num_classes": 100,
        "jit_compile": True,
        "jit_failure": None,
        "resumed_after_epochs": [],
        "compile_cache": {"state": "cold", "hits": 0, "misses": 9},
        "num_parameters": 21_000_000,
    },
    "time": {
        "latency_ms": {"p50": 2.0},
        "bare_latency_ms": {"p50": 0.5},
        "inference_images_per_s": 9000.0,
        "compile_s": {"train_step": 20.0, "total": 30.0},
        "to_first_step_s": 35.0,
        "to_first_epoch_s": 45.0,
        "epoch_spread": 1.05,
        "step_ms": {"p50": 8.0, "p99": 9.0},
        "train_images_per_s": 100.0,
        "evaluation_images_per_s": 8000.0,
    },
    "memory": {"train_peak_device_bytes": 2**30, "peak_rss_bytes": 3 * 2**30},
    "load": {"cores": 2, "cpu_s_per_wall_s": 1.9, "problems": []},
    "missing": {},
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
    """Write a run for each value, with the seeds 0, 1, 2 ..."""
    for seed, value in enumerate(values):
        write(backend, {"what/config/seed": seed, path: value, **changes})


def eager(backend: str = "torch") -> dict:
    return {"what/backend": backend, "what/jit_compile": False, "what/compile_cache": {"state": "none"}}


def text_of(folder, baseline: str | None = None) -> str:
    runs = read_results([folder])
    return build_report(runs, read_failures([folder]), find_baseline(baseline, runs, [folder]))


def cells(markdown: str, row: str, column: str) -> str:
    """The cell of the first table that has such a row and column."""
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for found in rows:
            if found[0] == row and column in rows[0]:
                return found[rows[0].index(column)]
    raise AssertionError(f"no {row}, {column} in {markdown}")


def test_medians_ratios_and_intervals_are_right_and_said_in_words(write, tmp_path):
    """The mean of the logarithms is that of 0.5, 0.5, 0.51 and 0.49; n = 4 pairs have 3 degrees of freedom."""
    rates(write, "jax", 100, 200, 100, 200)
    rates(write, "torch", 50, 100, 51, 98, **eager())
    text = text_of(tmp_path)
    assert cells(text, JAX, "training, images/s") == "150 (100–200)"
    assert cells(text, EAGER, "training, images/s") == "74.5 (50.0–100)"
    found = "torch (eager) trained 0.500× as fast as JAX (compiled) (median 74.5 against 150 images/s; 95 % interval "
    assert found in text and "n = 4 pairs)" in text
    assert cells(text, f"{EAGER} / {JAX}", "training, images/s").startswith("0.500× [0.4")
    assert "JAX (compiled) trained 2.00× as fast as torch (eager)" in text_of(tmp_path, baseline=EAGER)


def test_runs_are_paired_by_their_seed(write, tmp_path):
    """A drift that both share takes nothing from a difference; without the same seeds there are no pairs."""
    rates(write, "jax", 100, 80, 60, 40)
    for seed, rate in enumerate((44, 66.6, 88, 110)):
        write("torch", {"what/config/seed": 3 - seed, "time/train_images_per_s": rate})
    assert "torch (compiled) trained 1.10× as fast as JAX (compiled)" in text_of(tmp_path)
    for path in tmp_path.glob("*-torch.json"):
        document = json.loads(path.read_text())
        document["what"]["config"]["seed"] += 100
        path.write_text(json.dumps(document))
    text = text_of(tmp_path)
    assert "training throughput: not compared, no runs have the same seed" in text and "as fast as" not in text


def test_a_difference_within_the_spread_is_not_claimed_and_more_runs_are_asked_for(write, tmp_path):
    rates(write, "jax", 90, 100, 110, 100)
    rates(write, "torch", 109, 115, 108, 130)
    text = text_of(tmp_path)
    found = re.search(r"training throughput: no difference between .* supports, about (\d+) more runs of each", text)
    assert found and 1 < int(found[1]) < 20 and "as fast as" not in text
    assert cells(text, f"{COMPILED} / {JAX}", "training, images/s").startswith("(1.1")


def test_what_is_equal_is_called_equal_and_a_tiny_difference_is_no_sentence(write, tmp_path):
    rates(write, "jax", 1000, 1001, 999, 1000)
    rates(write, "torch", 1010, 1011, 1009, 1010)
    text = text_of(tmp_path)
    assert "training throughput: torch (compiled) and JAX (compiled) are equal within 2 % (" in text
    assert "as fast as" not in text


def test_one_pair_of_runs_supports_no_statement(write, tmp_path):
    rates(write, "jax", 90)
    rates(write, "torch", 900)
    text = text_of(tmp_path)
    assert "run at least 3 more of each (--repeats 4). training throughput median 900 against 90.0 images/s" in text
    assert "as fast as" not in text


@pytest.mark.parametrize(("accuracy", "supported"), [(0.405, False), (0.42, True)])
def test_equal_accuracies_need_more_than_the_error_of_the_test_set(accuracy, supported, write, tmp_path):
    """4 seeds of 10,000 test images at 40 %: the standard error of the difference is 0.35 points."""
    rates(write, "jax", *[0.4] * 4, path="quality/test/test_accuracy")
    rates(write, "torch", *[accuracy] * 4, path="quality/test/test_accuracy")
    text = text_of(tmp_path)
    assert ("torch (compiled) reached a test accuracy 2.00 points above that of JAX (compiled)" in text) is supported
    assert ("test accuracy: no difference between torch" in text) is not supported


def test_repeats_with_one_seed_are_one_draw_of_the_accuracy(write, tmp_path):
    for _ in range(6):
        write("jax")
        write("torch", {"quality/test/test_accuracy": 0.5})
    text = text_of(tmp_path)
    assert "test accuracy: too few runs" in text and "n = 1 seed)" in text and "reached a test accuracy" not in text


def test_the_mode_is_part_of_every_name(write, tmp_path):
    """torch that was asked to compile and could not is eager, and the report says why."""
    for _ in range(2):
        for backend, compiled in (("jax", True), ("torch", True), ("torch", False), ("tensorflow", True)):
            write(backend, {"what/jit_compile": compiled})
        write("tensorflow", {"what/jit_compile": False, "what/jit_failure": None})
        write("native-jax")
        write("torch", {"what/jit_compile": False, "what/jit_failure": "no <b>compiler</b>"})
    text = text_of(tmp_path)
    for name in (COMPILED, "TensorFlow (XLA)", "TensorFlow (graph)", "native JAX (compiled)"):
        assert cells(text, name, "n") == "2"
    assert cells(text, EAGER, "n") == "4"
    assert r"Note: torch (eager) was asked to compile and could not: no \<b\>compiler\</b\>" in text


def test_what_was_varied_is_compared_and_named(write, tmp_path):
    """What depends on a varied flag may differ with it; what was not varied still forbids a comparison."""
    varied = {"what/config/projection_dim": 32, "what/config/transformer_units": [64, 32], "what/num_parameters": 9}
    rates(write, "jax", 90, 91, 92, 93)
    rates(write, "jax", 180, 182, 184, 186, **varied)
    assert "as fast as" not in text_of(tmp_path)
    recorded = {"varied": ["projection_dim"], "runs": {"4-jax.json": "jax:projection_dim=32"}, "baseline": "jax"}
    (tmp_path / "benchmark.json").write_text(json.dumps(recorded))
    small, large = "JAX (compiled, projection_dim 32)", "JAX (compiled, projection_dim 64)"
    assert f"{large} trained 0.500× as fast as {small}" in text_of(tmp_path, baseline="jax:projection_dim=32")
    assert f"{small} trained 2.00× as fast as {large}" in text_of(tmp_path, baseline=large)
    rates(write, "torch", 1, 2, **{"what/config/batch_size": 64})
    assert "Not compared with" in text_of(tmp_path, baseline=large)


def test_compile_times_of_cold_and_warm_caches_stand_apart(write, tmp_path):
    """And there is no ratio to what compiles nothing."""
    for seed, state in enumerate(("cold", "warm", "warm", "off", "partly warm")):
        figures = {"what/config/seed": seed, "time/compile_s": {"total": 2.0 if "warm" in state else 30.0}}
        for factor, backend in ((1.0, "jax"), (1.5, "torch")):
            seconds = {"total": factor * figures["time/compile_s"]["total"]}
            write(backend, {**figures, "what/compile_cache": {"state": state}, "time/compile_s": seconds})
        write("torch", {**figures, **eager(), "time/compile_s": {"total": 1.0}})
    text = text_of(tmp_path)
    assert cells(text, JAX, "compile cold, s") == "30.0 (30.0–30.0) [2 of 5]"
    assert cells(text, JAX, "compile warm, s") == "2.00 (2.00–2.00) [2 of 5]"
    assert "torch (compiled) took 1.50× the time of JAX (compiled) to compile everything" in text
    assert "compile time, cold: not compared, torch (eager) does not compile" in text
    assert cells(text, f"{EAGER} / {JAX}", "compile warm, s") == "–"
    assert cells(text, EAGER, "compile warm, s").startswith("1.00")


def test_unstable_runs_are_marked_named_and_no_silent_ground_for_a_sentence(write, tmp_path):
    rates(write, "jax", 90, 91, 92, 93)
    path = write("torch", {"time/train_images_per_s": 180, "time/epoch_spread": 1.6})
    problem = "the machine was busy: 6.3 runnable tasks on 2 cores"
    write("torch", {"what/config/seed": 1, "time/train_images_per_s": 183, "load/problems": [problem]})
    for seed in (2, 3):
        write("torch", {"what/config/seed": seed, "time/train_images_per_s": 184, "time/epoch_spread": 1.4})
    text = text_of(tmp_path)
    assert cells(text, COMPILED, "n") == "4 (2 !)" and cells(text, JAX, "n") == "4"
    assert f"Unstable (!): {path.name}, {COMPILED}, seed 0: its longest epoch took 1.60× as long" in text
    assert f"seed 1: {problem}" in text
    assert re.search(r"trained 2\.\d+× as fast .*, leans on 2 unstable runs\)", text)


def test_what_was_not_measured_is_never_a_zero_and_says_why(write, tmp_path):
    """null, and a figure that is absent, show as unavailable; and a number from elsewhere says where it comes from."""
    nothing = {"time/compile_s": None, "time/step_ms": None, "memory/train_peak_device_bytes": None}
    reasons = {"missing": {"time/step_ms": "fewer than 100 steps in 15 s; raise --measure-seconds"}}
    for _ in range(2):
        write("jax", {**nothing, **reasons, "time/latency_ms": {}, "energy": {}, "time/bare_latency_ms": None})
        write("torch", {"time/bare_latency_ms": None, "missing": {"time/bare_latency_ms": "--measure-seconds 0"}})
    text = text_of(tmp_path)
    for column in ("compile cold, s", "step p50, ms", "one image p50, ms", "energy, J/image"):
        assert cells(text, JAX, column) == cells(text, f"{COMPILED} / {JAX}", column) == "–"
    assert "energy per image: unavailable for JAX (compiled)." in text
    memory = cells(text, JAX, "peak memory, MiB"), cells(text, f"{COMPILED} / {JAX}", "peak memory, MiB")
    assert memory[0].endswith("RSS") and memory[1] == "–" and "peak memory: not compared" in text
    assert "- No step p50, step p99 for JAX (compiled): fewer than 100 steps in 15 s; raise --measure-seconds." in text
    assert "bare p50, ms" not in text and "- No bare p50 for torch (compiled): --measure-seconds 0." in text


def test_a_peer_is_compared_with_keras_and_its_lack_of_keras_is_no_difference(write, tmp_path):
    versions = {"Python": "3.11.7", "jax": "0.10", "optax": "0.2", "CUDA": "13.0"}
    rates(write, "jax", 90, 91, 90, 91)
    rates(write, "native-jax", 100, 101, 100, 101, **{"what/versions": versions})
    text = text_of(tmp_path)
    assert "native JAX (compiled) trained 1.11× as fast as JAX (compiled)" in text and "Note:" not in text
    assert "Software: Python 3.11.7, Keras 3.15.1, CUDA 13.0, jax 0.10\n" in text


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("what/config/batch_size", 64, "batch_size 64 against 32"),
        ("what/config/dtype_policy", "mixed_bfloat16", "dtype_policy mixed_bfloat16 against float32"),
        ("what/config/tf32", False, "tf32 off against on"),
        ("what/config/dataset", "/data/mine.npz", "dataset mine.npz against cifar100"),
        ("what/images/train", 1000, "images/train 1000 against 45000"),
        ("what/config/augmentation", "stock", "augmentation stock against fused"),
        ("what/config/learning_rate", 0.01, "learning_rate 0.01 against 0.001"),
        ("what/config/attention_dropout", 0.0, "attention_dropout 0.0 against 0.1"),
        ("what/config/gradient_accumulation_steps", 2, "gradient_accumulation_steps 2 against 1"),
        ("what/config/initial_weights", None, "initial_weights as in Keras 3.15.1 against published"),  # an older file
        ("what/resumed_after_epochs", [4], "resumed yes against no"),
    ],
)
def test_runs_under_other_conditions_are_not_compared_and_the_reason_is_said(path, value, reason, write, tmp_path):
    rates(write, "jax", 90, 91, 92)
    rates(write, "torch", 120, 121, **{path: value})
    text = text_of(tmp_path)
    assert f"Not compared with JAX (compiled) (set 1): {reason}." in text
    assert "/ JAX" not in text and "as fast as" not in text


def test_what_may_differ_is_compared_but_noted(write, tmp_path):
    """Attention and jit are what is compared; TF32 makes no difference on a CPU; other code is worth a note."""
    rates(write, "jax", 90, 91, 90, **{"what/is_gpu": False})
    changes = {"what/attention": "fused", "what/config/tf32": False, "what/git_commit": "feedbeef", **eager()}
    changes["what/environment"] = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--a *b*"}
    rates(write, "torch", 120, 121, 120, **{"what/is_gpu": False, **changes})
    text = text_of(tmp_path)
    assert "torch (eager) trained 1.33× as fast as JAX (compiled)" in text
    assert cells(text, EAGER, "attention") == "fused"
    assert "Note: the runs differ in git_commit: JAX (compiled) 0123456789abcdef; torch (eager) feedbeef" in text
    environments = r"JAX (compiled) none; torch (eager) OMP_NUM_THREADS=1, XLA_FLAGS=--a \*b\*"
    assert f"Note: the runs differ in environment: {environments}" in text


def test_the_flags_stand_at_their_fields_and_the_schema_has_them_as_they_are():
    """A report compares by what the schema says. make schema writes it anew."""
    written = json.loads(schema.PATH.read_text())
    assert schema.with_flags(copy.deepcopy(written)) == written

    @dataclass
    class Without:
        size: Annotated[int, flags.model_flag()] = 1
        speed: int = 2

    with pytest.raises(TypeError, match="Without.speed has no flag"):
        flags.flags_of(Without)


def test_devices_have_tables_of_their_own_and_one_backend_is_compared_across_them(write, tmp_path):
    rates(write, "jax", 100, 101, 102)
    rates(write, "torch", 90, 91, 92)
    rates(write, "jax", 49, 50, 51, **{"what/device": "Orin", "what/power_mode": "pmode:0003"})
    text = text_of(tmp_path)
    assert "## Some GPU, node bench" in text and "## Orin, node bench, power mode pmode:0003" in text
    across = text.partition("## Across devices")[2].partition("##")[0]
    there = "on Orin, node bench, power mode pmode:0003"
    assert f"JAX (compiled) on Some GPU, node bench trains 2.02× as fast as {there} (95 % interval " in across
    assert "n = 3 unpaired runs)" in across and across.count("as fast as") == 1 and "torch (compiled) on" not in across


@pytest.mark.parametrize(
    ("backends", "lines", "counted"),
    [
        (["jax"], 150, "and 189 more, in report.csv"),
        (["jax", "torch"], 650, "190 more sets of comparable runs are left to report.csv"),
    ],
)
def test_many_configurations_make_a_short_report(backends, lines, counted, write, tmp_path):
    """As from a sweep: ten sets are compared, ten configurations of one backend listed, the rest counted."""
    for units in range(1, 201):
        for backend in backends:
            write(backend, {"what/config/mlp_head_units": [units]})
    text = text_of(tmp_path)
    assert text.count("\n") < lines and counted in text


def test_a_table_is_no_wider_than_a_console(write, tmp_path):
    (tmp_path / "benchmark.json").write_text('{"varied": ["dtype_policy", "attention_dropout"]}')
    for seed in range(3):
        for number_format in ("float32", "mixed_bfloat16"):
            write("jax", {"what/config/dtype_policy": number_format, "what/config/seed": seed})
    lines = text_of(tmp_path).splitlines()
    assert max(len(line) for line in lines if line.startswith("|")) <= 200


def test_broken_and_foreign_files_cost_a_line_and_a_copy_counts_once(write, tmp_path, capsys):
    original = write("jax")
    (tmp_path / "broken.json").write_text('{"schema_version": 3, "what": {')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "earlier.json").write_text('{"schema_version": 2, "what": {"backend": "jax"}}')
    (tmp_path / "other.json").write_text('[{"name": "x"}]')
    (tmp_path / "benchmark.json").write_text('{"varied": 3, "runs": [], "baseline": {}}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "copy.json").write_text(original.read_text())
    assert [run.path.name for run in read_results([tmp_path])] == [original.name]
    warnings = capsys.readouterr().err
    assert warnings.count("benchmark.py: warning: ") == warnings.count("\n") == 4
    assert warnings.count("cannot be read") == 2 and "schema version 2" in warnings and "counts once" in warnings


def test_a_file_cannot_bring_markup_formulas_or_impossible_numbers(write, tmp_path):
    """Such a file may come from somebody else."""
    changes = {"what/device": "<img src=x>\n# GPU *fast* [click](http://x) a|b", "what/node": "=1+1", "missing": [1]}
    huge = {"time/train_images_per_s": 10**400, "what/num_parameters": 10**400, "load/problems": 3}
    huge["time/evaluation_images_per_s"] = 1e308
    odd = {"quality/epochs": 3, "quality/epoch_end_s": "x", "what/images": None, "time/epoch_spread": "wide"}
    write("jax", {**changes, **huge})
    write("jax", {**changes, **odd})
    write("<b>mine", {**changes, "what/config": None})
    runs = read_results([tmp_path])
    report.write_report(tmp_path / "out", runs, [{"reason": "<script>\n\n# x"}], None)
    text = (tmp_path / "out/report.md").read_text()
    assert (
        not re.search(r"(?<!\\)<", text.partition("## How to read")[0])
        and "\n# GPU" not in text
        and "\n# x" not in text
    )
    assert "1.00e+308" in text and "000,000,000,000,000" not in text
    assert r"\<img src=x\> # GPU \*fast\* [click\](http://x)" in text
    with (tmp_path / "out/report.csv").open(newline="") as file:
        assert {row["what/node"] for row in csv.DictReader(file)} == {"'=1+1"}


def test_the_report_comes_as_markdown_csv_and_picture(write, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    rates(write, "jax", 90, 91)
    rates(write, "torch", 120, 121, **{"energy": {}, **eager()})
    assert benchmark.main(["--report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == "" and (tmp_path / "out/report.md").read_text() in stdout
    with (tmp_path / "out/report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [JAX, JAX, EAGER, EAGER]
    assert [float(row["time/train_images_per_s"]) for row in rows] == [90, 91, 120, 121]
    assert rows[0]["energy/cpu_package/joules_per_image"] == "" and rows[0]["time/step_ms/p50"] == "8.0"
    height, width, _ = image.imread(tmp_path / "out/report.png").shape
    assert height > 1.5 * width > 1000


@pytest.mark.parametrize(
    "changes",
    [
        {
            "quality/epochs": [
                {"loss": 3.0 - k, "val_loss": 3.1 - k, "accuracy": 0.2, "val_accuracy": 0.3} for k in (0, 1)
            ]
        },
        {"quality/epochs": [{"loss": 3.0, "accuracy": 0.2}], "quality/best_epoch": 1},
        {"quality/epochs": [3, None, {"loss": "x", "val_accuracy": float("nan")}], "quality/best_epoch": "two"},
        {"quality/epochs": 3, "quality/epoch_end_s": "x", "energy": None, "memory": [], "what/device": "a $x"},
    ],
    ids=["validated", "one epoch without validation", "damaged epochs", "no epochs"],
)
@pytest.mark.parametrize("runs", [1, 2])
def test_one_results_file_is_drawn_whatever_it_lacks_and_replaces_no_other_report(
    runs, changes, write, tmp_path, capsys
):
    """A file named alone: the learning curve of its run, in a folder of its own. And a folder with the same runs."""
    image = pytest.importorskip("matplotlib.image")
    path = [write(changes=changes) for _ in range(runs)][0]
    assert benchmark.main(["--report", str(path)]) == benchmark.main(["--report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    alone = tmp_path / f"{path.stem}-report"
    assert "Runs: 1 (1 JAX (compiled))" in (alone / "report.md").read_text()
    assert f"Runs: {runs} ({runs} JAX (compiled))" in (tmp_path / "report.md").read_text()
    pictures = [image.imread(folder / "report.png") for folder in (alone, tmp_path)]
    assert (pictures[0].shape == pictures[1].shape) is (runs == 1)


def test_a_picture_has_no_empty_panel_and_a_slow_run_squeezes_no_bar(write, tmp_path, monkeypatch):
    """Unmeasured energy is a line at the foot; the axis follows the medians, and the number of a run beyond it is shown."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **options: drawn.append(self))
    for backend in ("jax", "torch"):
        rates(write, backend, 2.0, 2.1, 2.2, 50.0, path="time/latency_ms", energy={})
    for path in tmp_path.glob("*.json"):
        document = json.loads(path.read_text())
        document["time"]["latency_ms"] = {"p50": document["time"]["latency_ms"]}
        path.write_text(json.dumps(document))
    report.picture.draw(tmp_path / "report.png", read_results([tmp_path]), None)
    texts = [text.get_text() for text in drawn[0].texts]
    titles = [
        text for text in texts if text.startswith(("Training", "Latency", "Peak", "Energy", "Validation", "Wait"))
    ]
    assert [title.split()[0] for title in titles] == ["Training", "Latency", "Peak", "Validation", "Wait"]
    assert texts.count("more is better") == 2 and texts.count("less is better") == 3
    assert any(text.startswith("Not measured: energy") for text in texts)
    latency = drawn[0].axes[1]
    assert latency.get_xlim()[1] < 3 and [text.get_text() for text in latency.texts].count("50.0 ▸") == 2


def test_without_the_picture_and_the_files_the_report_is_still_printed(write, tmp_path, capsys, monkeypatch):
    """matplotlib is not installed; the disk is full: no part of a file is left, and the exit status says so."""
    write("jax")

    def absent(*arguments):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(report.picture, "draw", absent)
    assert benchmark.main(["--report", str(tmp_path)]) == 0
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "pip install matplotlib" in stderr
    assert (tmp_path / "report.csv").exists() and not (tmp_path / "report.png").exists()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "replacing", full)
    assert benchmark.main(["--report", str(tmp_path), "--out", str(tmp_path / "full")]) == 2
    stdout, stderr = capsys.readouterr()
    assert "# Keras backends compared" in stdout and "No space left" in stderr and not list(tmp_path.glob("full/*"))
    assert replacing  # the real one is atomic: tests/test_faults.py


def test_every_figure_and_condition_exists_in_what_vit_writes():
    """A name that changes in vit.py would otherwise show as a figure that could not be measured."""
    schema = json.loads((ROOT / "results.schema.json").read_text())
    tabulated = [metric for table in metrics.TABLES.values() for metric in table]
    figures = [path for metric in tabulated for path in (metric.path, metric.fallback) if path]
    facts = [fact for fact in FACTS if not fact.startswith("config/")]
    for path in [*figures, *NOTED_PATHS, *NOTED_WITHIN_A_NAME, *(f"what/{fact}" for fact in facts)]:
        section, name, *_ = path.split("/")
        assert name in schema["properties"][section]["properties"], path
    for path in (
        "time/epoch_spread",
        "load/problems",
        "what/compile_cache",
        "what/jit_failure",
        "what/resumed_after_epochs",
    ):
        section, name = path.split("/")
        assert name in schema["properties"][section]["properties"], path


def deployed(**changes) -> dict:
    """The changes that make a results file that of a deployed file, by their path."""
    facts = {"int8": False, "processor": "CPU", "trained_on": "jax", "batch_size": 32, "file_bytes": 87_000_000}
    none = (
        "time/train_images_per_s",
        "time/step_ms",
        "time/compile_s",
        "memory/peak_rss_bytes",
        "quality/best_epoch_s",
    )
    none = {path: None for path in (*none, "memory/train_peak_device_bytes", "energy/accelerator")}
    missing = {path: "a deployed file is not trained" for path in none}
    lists = {"quality/epochs": [], "quality/epoch_end_s": []}
    return {**none, **lists, "missing": missing, "what/jit_compile": False, "what/deployed": facts | changes}


def test_deployed_files_stand_beside_the_backends_in_the_table_for_inference_and_in_no_other(write, tmp_path):
    for seed in range(4):
        write("jax", {"what/config/seed": seed, "time/latency_ms/p50": 2.0 + seed / 100})
        for changes, ms in (({}, 0.5), ({"int8": True, "file_bytes": 24_000_000}, 0.4)):
            figures = {"what/config/seed": seed, "time/latency_ms/p50": ms + seed / 1000}
            write("onnxruntime", {**deployed(**changes), **figures})
        write("litert", {**deployed(), "what/config/seed": seed, "time/latency_ms/p50": 0.6 + seed / 1000})
    text = text_of(tmp_path)
    tables = {part.split("**")[0]: part.split("**")[1] for part in text.split("\n**")[1:]}
    names = ("onnxruntime (CPU)", "onnxruntime (int8)", "LiteRT (CPU)")
    for name in names:
        assert f"| {name} " in tables["Inference"] and f"| {name} " not in tables["Training"]
        assert re.search(re.escape(name) + r" took 0\.[1-3]\d+× the time of JAX \(compiled\) for one image", text)
        assert f"{name} used" not in text and f"for {name}: a deployed" not in text
    row = next(line for line in tables["Inference"].splitlines() if line.startswith("| onnxruntime (int8) "))
    assert "24.0" in row and "40.00" in row  # MB of its file, % of accuracy
    assert "training throughput" not in text.split("**What was found**")[1]
    based = text_of(tmp_path, baseline="LiteRT (CPU)")
    assert "JAX (compiled) took" in based and "Training throughput:" not in based


def test_files_for_another_number_of_images_are_not_compared(write, tmp_path):
    rates(write, "jax", 90, 91)
    rates(write, "onnxruntime", 1, 2, path="time/inference_images_per_s", **deployed(batch_size=8))
    assert "inference_batch 8 against as in the training" in text_of(tmp_path)


def test_a_report_on_deployed_files_alone_is_drawn(write, tmp_path, capsys):
    path = write("onnxruntime", deployed())
    assert benchmark.main(["--report", str(path)]) == 0
    write("litert", deployed())
    assert benchmark.main(["--report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "" and (tmp_path / "report.png").exists()
