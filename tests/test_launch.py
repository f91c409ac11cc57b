"""Promises about benchmark.py's runs: the order, seeds and caches that make them comparable, and no run lost.

Most of them start a stub in the place of vit.py, which writes a results file at once.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import INSTALLED, ROOT
from test_benchmark import BASE, cells

import benchmark
from edgebench.cli import ExperimentError
from edgebench.compare import items, launch, metrics
from edgebench.compare.runs import read_results

TINY = "--image-size 16 --patch-size 8 --projection-dim 8 --transformer-layers 1 --mlp-head-units 8 --batch-size 256"
TINY += " --dataset synthetic --num-epochs 2 --measure-seconds 0.1"
STUB = """
import json, os, pathlib, sys, time
values = dict(zip(sys.argv, sys.argv[1:]))
values |= dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)
if values.get("--learning-rate") == "0.5":
    sys.exit("vit.py: error: unlucky")
time.sleep(float(values.get("--weight-decay", 0)))
cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])
off, warm = "--no-compile-cache" in sys.argv, any(cache.iterdir())
(cache / "compiled").touch()
document = json.loads(pathlib.Path(sys.argv[0]).with_name("base.json").read_text())
what = document["what"]
what |= {"started": f"{time.time():.6f}", "backend": values["--keras-backend"], "jit_compile": values.get("--jit") != "off"}
what["compile_cache"]["state"] = "off" if off else "warm" if warm else "cold"
what["config"] |= {"seed": int(values["--seed"]), "dtype_policy": values.get("--dtype-policy", "float32")}
what["node"] = "JAX_COMPILATION_CACHE_DIR" in os.environ or "TORCHINDUCTOR_CACHE_DIR" in os.environ
pathlib.Path(values["--results-dir"], f"{time.time_ns()}.json").write_text(json.dumps(document))
"""
WITH_STUB = """
import pathlib, runpy, sys
from edgebench.compare import items, launch  # launch checks the flags with the real vit.py
items.VIT = pathlib.Path(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def stub(tmp_path):
    """Start benchmark.py on a stub of vit.py; its flags are still checked by the real one."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    (tmp_path / "stub.py").write_text(STUB)

    def start(*arguments, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", WITH_STUB, tmp_path / "stub.py", ROOT / "benchmark.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": "/nowhere"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([*map(str, command)], env=environment, cwd=tmp_path, text=True, **pipes)

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


@pytest.mark.any_version
def test_rounds_share_a_seed_alternate_in_order_and_start_from_a_cache_of_their_own(stub, tmp_path):
    """Also: torch runs in both modes, what is varied is recorded, and nothing but the results stays."""
    names = ["jax", "torch", "jax:dtype_policy=mixed_bfloat16"]
    out = tmp_path / "out"
    flags = ["--backends", *names, "--repeats", 2, "--out", out, "--baseline", "torch:jit=on", "--", "--seed=7"]
    status, stdout, stderr = finish(stub(*flags))
    assert (status, stderr) == (0, "")
    started = re.findall(r"^\[\d/8\] (\S+), seed (\d) \.\.\.$", stdout, re.M)
    order = ["jax", "torch:jit=off", "torch:jit=on", "jax:dtype_policy=mixed_bfloat16"]
    assert started == [(name, "7") for name in order] + [(name, "8") for name in reversed(order)]
    runs = read_results([out])
    assert [run.seed for run in runs] == ["7"] * 4 + ["8"] * 4
    assert [run.get("what/compile_cache/state") for run in runs] == ["cold"] * 4 + ["warm"] * 4
    assert {run.text("what/node") for run in runs} == {"off"}  # no cache from the environment
    assert {run.name for run in runs} == {
        "JAX (compiled, dtype_policy float32)",
        "JAX (compiled, dtype_policy mixed_bfloat16)",
        "torch (compiled, dtype_policy float32)",
        "torch (eager, dtype_policy float32)",
    }
    assert "torch (eager, dtype_policy float32) / torch (compiled, dtype_policy float32)" in stdout
    left = {path.name for path in out.iterdir() if not path.name[0].isdecimal()}
    assert left - {"report.png"} == {"benchmark.json", "logs", "report.md", "report.csv"}
    status, again, _ = finish(stub("--report", out))
    assert status == 0 and again.partition("\nwritten")[0] in stdout


@pytest.mark.any_version
def test_cold_compiles_in_every_run_and_an_odd_number_of_rounds_is_noted(stub, tmp_path):
    status, stdout, _ = finish(stub("--backends", "jax", "--cold", "--repeats", 3, "--out", tmp_path / "out"))
    states = [run.get("what/compile_cache/state") for run in read_results([tmp_path / "out"])]
    assert status == 0 and states == ["off"] * 3 and stdout.startswith("note: --repeats 3 is odd")


@pytest.mark.any_version
def test_a_run_that_fails_is_told_with_its_reason_and_stops_no_other(stub, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = finish(stub("--backends", "jax:learning_rate=0.5", "jax", "--repeats", 2, "--out", out))
    assert status == 0, stderr
    reason = "vit.py: error: unlucky"
    assert stdout.count(reason) == 4  # both runs, on the console and in the report
    failures = json.loads((out / "failures.json").read_text())["failures"]
    assert [(each["backend"], each["reason"]) for each in failures] == [("jax:learning_rate=0.5", reason)] * 2
    assert (out / failures[0]["log"]).exists() and len(read_results([out])) == 2
    status, stdout, _ = finish(
        stub("--backends", "jax", "--repeats", 1, "--out", out / "b", "--", "--learning-rate=0.5")
    )
    assert status == 1 and "No run has finished" in stdout


@pytest.mark.any_version
def test_a_reader_that_leaves_loses_no_run(stub, tmp_path):
    """As with `benchmark.py | head -1`."""
    process = stub("--backends", "jax", "--repeats", 4, "--out", tmp_path / "out")
    assert process.stdout.readline().startswith("[1/4]")
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(300) == 0 and stderr == ""
    assert len(read_results([tmp_path / "out"])) == 4 and (tmp_path / "out/report.md").exists()


@pytest.mark.any_version
@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_report_is_written_whatever_becomes_of_the_output(streams, tmp_path):
    """And a ~ that the shell has left alone is the home folder."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    command = f"{sys.executable} {ROOT / 'benchmark.py'} --report . --out=~/out {streams}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0 and "# Keras backends compared" in (tmp_path / "out/report.md").read_text()
    assert not (tmp_path / "~").exists()


@pytest.mark.any_version
def test_ctrl_c_reports_what_has_finished(stub, tmp_path):
    """The second of two runs is stopped, and gone at the end; the first is in the report."""
    out = tmp_path / "out"
    process = stub("--backends", "jax", "jax:weight_decay=99", "--repeats", 1, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.glob("logs/*-2-*.log")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    status, stdout, stderr = finish(process)
    assert status == 130, (stdout, stderr)
    assert "Runs: 1 (1 JAX (compiled, weight_decay " in stdout and "stopped by SIGINT" in stdout
    assert "Traceback" not in stderr and not list(out.glob("c*-*"))  # neither checkpoint nor caches


@pytest.mark.any_version  # needs torch, which the floor lacks
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "mxnet"], "mxnet"),
        (["--backends", "jax:jit"], "'jax:jit' is not NAME or NAME:FLAG=VALUE,FLAG=VALUE"),
        (["--backends", "jax:"], "'jax:' is not"),
        (["--backends", "jax:jit=on,jit=off"], "is not NAME"),
        (["--backends", "jax:seed=3"], "benchmark.py sets --seed itself"),
        (["--backends", "jax:results-dir=x"], "--results-dir"),
        (["--backends", "jax", "jax"], "jax is named twice"),
        (["--backends", "torch", "torch:jit=on"], "torch:jit=on is named twice (torch alone means both modes)"),
        (["--backends", "jax:num_epoch=3"], "did you mean --num-epochs?"),
        (["--repeats", "0"], "--repeats"),
        (["--baseline", "mxnet"], "--baseline"),
        (["--baseline", "torch"], "--baseline"),
        (["--unknown"], "--unknown"),
        (["--num-epochs", "3"], "flags for vit.py come after --"),
        (["--report", "nowhere"], "no results"),
        (["--report", "nowhere", "--", "--num-epochs", "2"], "--report"),
        (["--report", "nowhere", "--cold"], "--report"),
        (["--", "--keras_backend=jax"], "--keras-backend"),
        (["--", "--results-dir", "x"], "--results-dir"),
        (["--", "--checkpoint-path", "x"], "--checkpoint-path"),
        (["--", "--seed", "x"], "--seed"),
        (["--", "--num-epoch", "3"], "unknown flag '--num-epoch'; did you mean --num-epochs?"),
        (["--", "--patch-size", "99"], "--patch-size 99 is larger"),
        (["--", "--help"], "python vit.py --help"),
    ],
)
def test_wrong_input_is_refused_with_one_line_before_anything_runs(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("benchmark.py: error: ") and stderr.count("\n") == 1 and message in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.any_version  # needs torch, which the floor lacks
def test_an_item_is_a_backend_with_flags_and_torch_alone_is_both_of_its_modes():
    def chosen(*texts: str, flags: tuple[str, ...] = ()) -> list[str]:
        return [item.text for item in items.choose_items(texts, flags)]

    assert chosen("jax", "torch") == ["jax", "torch:jit=off", "torch:jit=on"]
    assert chosen("torch", flags=("--jit=on",)) == ["torch"]
    assert chosen("torch:attention_dropout=0") == ["torch:attention_dropout=0"]
    item = items.parse_item("native-torch:mlp-head-units=[8,4],jit=off")
    assert item.command[1:] == ["--mlp-head-units=[8,4]", "--jit=off"] and item.package == "torch"
    assert items.varied_fields([item]) == ["mlp_head_units"]
    assert items.take_seed(["--seed", "3", "--num-epochs", "2"]) == (3, ["--num-epochs", "2"])


@pytest.mark.any_version  # needs torch, which the floor lacks
def test_a_baseline_is_an_item_or_a_name():
    chosen = items.choose_items(["jax", "torch"], [])
    for known in ("jax", "torch:jit=on", "torch (compiled)"):
        items.check_baseline(known, chosen)
    with pytest.raises(ExperimentError, match="none of jax, torch:jit=off, torch:jit=on"):
        items.check_baseline("TensorFlow (graph)", chosen)


def test_the_order_is_reversed_from_round_to_round():
    assert launch.alternating(["jax", "torch"], 3) == [
        *((0, "jax"), (0, "torch"), (1, "torch"), (1, "jax"), (2, "jax"), (2, "torch"))
    ]


def test_wandb_is_off_unless_the_flags_speak_of_it():
    flags = ["--num-epochs", "2"]
    assert benchmark.parse(["--", *flags])[1] == [*flags, "--no-use-wandb"]
    for spoken in ("--use_wandb=True", "--use-wandb", "--no-use-wandb"):
        assert benchmark.parse(["--", spoken])[1] == [spoken]


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


@pytest.mark.any_version
def test_backends_run_and_are_reported(tmp_path):
    """Real runs, with another backend in the environment, one of them of a hand-written peer; nothing else stays."""
    backends = {f"{INSTALLED[-1]}:jit=off": INSTALLED[-1], "native-jax": "native-jax"}
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "benchmark.py", "--backends", *backends, "--repeats", "1", "--out", out, "--"]
    environment = {**os.environ, "KERAS_BACKEND": INSTALLED[0]}
    done = subprocess.run(
        [*command, *TINY.split(), "--num-epochs=2"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for number, item in enumerate(backends, start=1):
        line = rf"^\[{number}/2\] {item}, seed 0 \.\.\. \d+ s, [\d,.]+ images/s"
        assert re.search(line, done.stdout, re.M), done.stdout
    runs = read_results([out])
    assert sorted(run.backend for run in runs) == sorted(backends.values())
    for run in runs:
        for metric in (metrics.TRAINING, metrics.COMPILE_COLD, metrics.MEMORY, metrics.ACCURACY):
            assert re.search(r"\d", cells(done.stdout, run.name, metric.heading)), metric.title
    left = {path.name for path in out.iterdir() if not path.name.endswith(".json")}
    assert left - {"report.png"} == {"logs", "report.md", "report.csv"} and not (tmp_path / "wandb").exists()
