"""Promises about sweeps: every trial drawn can be run, every run reaches W&B, and the launchers show what they do."""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkout import copy_from_root
from conftest import INSTALLED, ROOT

# Not "sweeps" alone: without W&B's library that name imports our folder.
pytest.importorskip("sweeps.random_search", reason="W&B's sweeps library is not installed (make test installs it)")

import sweeps
from sweeps.random_search import random_search_next_runs
from wandb_server import ENTITY, PROJECT, WandbServer

import sweep as sweep_py
import vit
from edgebench import flags
from edgebench.measure import costs

KEY = "0123456789abcdef" * 3
GIB = 2**30
# The memory that a trial may use. ook: all of the RTX 4050's. ojo: half of what CPU and GPU of the smaller Orin share.
MEMORY_BYTES = {"ook": 6 * GIB, "ojo": 16 * GIB}
LAUNCHERS = ("ook", "ojo")
FILES = ["run_sweep_ook.sh", "run_sweep_ojo.sh", "sweeps", "sweep_config.json"]
DOCKERFILES = [f"Dockerfile.{device}.{backend}" for device in LAUNCHERS for backend in ("jax", "pytorch")]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with this Python first on PATH, and the W&B account of the tests."""
    env = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "VIT_DEVICE")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["OMP_NUM_THREADS"] = "1"  # on few cores torch's threads wait for each other: 350 ms a step instead of a few
    return env | {"WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT} | more


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with everything the launchers need. They change into their own folder and write results there."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    copy_from_root(folder, *FILES, "edgebench", "vit.py")
    for name in DOCKERFILES:
        (folder / name).touch()
    return folder


def launch(folder: Path, device: str, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [str(folder / f"run_sweep_{device}.sh"), *arguments]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
    return subprocess.run(command, cwd=folder.parent, env=env or environment(), **options)


def shipped_config(device: str, backend: str = "jax") -> dict:
    """The sweep that the launcher would create, from the command that its dry run prints."""
    done = launch(ROOT, device, backend, "--no-docker", "--dry-run")
    words = shlex.split(next(line for line in done.stdout.splitlines() if " create " in line))
    return sweep_py.sweep_config(device, backend, json.loads(words[words.index("--parameters") + 1]), [])


@pytest.mark.parametrize("device", LAUNCHERS)
def test_the_configuration_is_valid_and_every_trial_drawn_from_it_can_be_run(device, tmp_path, monkeypatch):
    """W&B's library validates the configuration and draws 1,000 trials; each can be built and fits into the device's memory."""
    monkeypatch.chdir(ROOT)
    config = shipped_config(device)
    assert sweeps.schema_violations_from_proposed_config(config) == []
    assert set(config["parameters"]) <= set(vit.ViTConfig.__dataclass_fields__)
    assert config["project"] == vit.ViTConfig().wandb_project
    monkeypatch.chdir(tmp_path)
    drawn = [
        {name: item["value"] for name, item in run.config.items()} for run in random_search_next_runs(config, n=1000)
    ]
    for values in drawn:
        trial = vit.ViTConfig(**values, checkpoint_path=tmp_path / "a.weights.h5")
        flags.check(trial)
        assert trial.image_size % trial.patch_size == 0, f"{values} cuts pixels off"
        needed = costs.vit_size(trial.as_json(), 3, 100).train_memory_bytes(trial.batch_size, trial.dtype_policy)
        assert needed < MEMORY_BYTES[device], values
    for name in ("batch_size", "projection_dim", "transformer_layers"):  # the draw includes the largest
        assert max(values[name] for values in drawn) == max(config["parameters"][name]["values"])


def test_the_jetson_draws_from_smaller_values(monkeypatch):
    """ojo's largest width, depth, image, batch and number of epochs are below ook's. Nothing else differs."""
    monkeypatch.chdir(ROOT)
    ook, ojo = (shipped_config(device)["parameters"] for device in LAUNCHERS)

    def largest(parameter: dict) -> int:
        return max(parameter.get("values") or [parameter["value"]])

    narrowed = {name for name in ook if ook[name] != ojo[name]} - {"node_name"}
    assert narrowed == {"batch_size", "projection_dim", "transformer_layers", "image_size", "num_epochs"}
    assert all(largest(ojo[name]) < largest(ook[name]) for name in narrowed)


DRY_RUNS = """\
+ docker build -f Dockerfile.ook.jax -t vit:ook-jax .
+ docker run --rm --init --name vit-sweep-ook-jax -v FOLDER:/app -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ook-jax python sweeps/sweep.py create --device ook --backend jax --parameters '{}' -- --num-epochs 1
+ docker run --rm --init --name vit-sweep-ook-jax -v FOLDER:/app --gpus all -e SWEEP_LEDGER=results/sweep-ID.tsv -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ook-jax python sweeps/sweep.py agent --count 3 edge-team/edge-project/ID
+ docker build -f Dockerfile.ook.pytorch -t vit:ook-pytorch .
+ docker run --rm --init --name vit-sweep-ook-pytorch -v FOLDER:/app -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ook-pytorch python sweeps/sweep.py create --device ook --backend pytorch --parameters '{}' -- --num-epochs 1
+ docker run --rm --init --name vit-sweep-ook-pytorch -v FOLDER:/app --gpus all -e SWEEP_LEDGER=results/sweep-ID.tsv -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ook-pytorch python sweeps/sweep.py agent --count 3 edge-team/edge-project/ID
---
+ docker build -f Dockerfile.ojo.pytorch -t vit:ojo-pytorch .
+ docker run --rm --init --name vit-sweep-ojo-pytorch -v FOLDER:/app -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ojo-pytorch python sweeps/sweep.py join a/b/c --device ojo --backend pytorch
+ docker run --rm --init --name vit-sweep-ojo-pytorch -v FOLDER:/app --runtime nvidia -e SWEEP_LEDGER=results/sweep-c.tsv -e WANDB_API_KEY -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_AGENT_DISABLE_FLAPPING -e WANDB_AGENT_KILL_DELAY -e PYTHONUNBUFFERED vit:ojo-pytorch python sweeps/sweep.py agent a/b/c
"""


def test_a_dry_run_prints_every_command_and_changes_nothing(checkout):
    before = sorted(checkout.rglob("*"))
    (checkout.parent / "bin").mkdir()
    fake = checkout.parent / "bin" / "docker"
    fake.write_text("#!/bin/sh\necho a dry run called docker >&2; exit 9\n")
    fake.chmod(0o755)
    env = environment()
    env["PATH"] = f"{fake.parent}:{env['PATH']}"
    ook = launch(checkout, "ook", "--dry-run", "--count", "3", "--", "--num-epochs", "1", env=env)
    ojo = launch(checkout, "ojo", "pytorch", "--dry-run", "--sweep", "a/b/c", env=env)
    assert (ook.returncode, ook.stderr, ojo.returncode, ojo.stderr) == (0, "", 0, "")
    assert (ook.stdout + "---\n" + ojo.stdout).replace(str(checkout), "FOLDER") == DRY_RUNS
    assert sorted(checkout.rglob("*")) == before
    assert KEY not in ook.stdout + ojo.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tensorflow"], "unknown argument 'tensorflow' (see --help)"),
        (["jax", "both"], "choose one of jax, pytorch and both"),
        (["--count", "0"], "--count must be a positive number, not '0'"),
        (["--count"], "--count needs a value"),
        (["jax", "--sweep", "abc"], "--sweep must be ENTITY/PROJECT/ID, not 'abc'"),
        (["--sweep", "a/b/c"], "--sweep needs one backend, jax or pytorch"),
        (
            ["jax", "--sweep", "a/b/c", "--", "--num-epochs", "1"],
            "--sweep joins a sweep unchanged and takes no flags after --",
        ),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments, message, checkout):
    done = launch(checkout, "ook", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"run_sweep_ook.sh: error: {message}\n")


def test_everything_missing_is_reported_one_line_each(checkout):
    """The machine has no docker, no python, no settings and no files. A dry run reports the same and goes on."""
    tools = checkout.parent / "tools"
    tools.mkdir()
    for name in ("bash", "basename", "dirname", "tr"):
        (tools / name).symlink_to(shutil.which(name))
    for name in [*DOCKERFILES, "sweep_config.json"]:
        (checkout / name).unlink()
    bare = {"PATH": str(tools), "WANDB_MODE": "offline"}

    def lines(done: subprocess.CompletedProcess) -> list[str]:
        return [line.partition(": missing: ")[2] for line in done.stderr.splitlines()]

    settings = [
        "WANDB_API_KEY: set it in .env (copied from .env.example) or in the environment",
        "WANDB_ENTITY, your W&B user or team: set it in .env or in the environment",
        "a connection to W&B: a sweep needs its server, but WANDB_MODE is offline",
        "sweep_config.json, the sweep's configuration",
    ]
    docker = ["docker: install it, or use --no-docker", "Dockerfile.ojo.pytorch", "Dockerfile.ojo.jax"]
    done = launch(checkout, "ojo", env=bare)
    assert (done.returncode, done.stdout, lines(done)) == (2, "", settings + docker)
    done = launch(checkout, "ook", "jax", "--no-docker", env=bare)
    python = "python on PATH: activate an environment, or leave out --no-docker"
    assert (done.returncode, lines(done)) == (2, [*settings, python])
    dry = launch(checkout, "ojo", "--dry-run", env=bare)
    assert dry.returncode == 0 and lines(dry) == settings + docker and dry.stdout.count("+ docker") == 6

    (checkout / ".env").write_text(
        "\ufeffWANDB_API_KEY='k' # mine\nexport WANDB_ENTITY=me # or you\nWANDB_MODE=offline\n"
    )
    done = launch(checkout, "ook", "jax", "--no-docker", env=bare | {"WANDB_MODE": "online"})
    assert lines(done) == [settings[3], python], "values in .env count, and the environment overrides them"

    (tools / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tools / "docker").chmod(0o755)
    daemon = "the Docker daemon: it is not running, or this user may not use it (try: docker info)"
    assert daemon in lines(launch(checkout, "ook", env=bare))
    (tools / "python").symlink_to(shutil.which("false"))
    done = launch(checkout, "ook", "--no-docker", env=bare)
    assert f"wandb in {tools}/python: pip install -c constraints.txt wandb" in lines(done)


def test_flags_become_constants_of_the_sweep():
    flags = "--num-epochs 1 --no-tf32 --mlp-head-units 8 4 --dataset=synthetic --wandb-tags a --use_wandb=True"
    assert sweep_py.parse_flags(flags.split()) == {
        "num_epochs": 1,
        "tf32": False,
        "mlp_head_units": [8, 4],
        "dataset": "synthetic",
        "wandb_tags": "a",
        "use_wandb": True,
    }


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.close()


def sweep_command(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run sweep.py in `folder`, in which sweep_config.json may differ."""
    command = [sys.executable, "sweeps/sweep.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "config, reason",
    [
        ('{"program": ', "cannot read sweep_config.json (Expecting value: line 1 column 13 (char 12))"),
        ("[" * 100_000, "cannot read sweep_config.json (maximum recursion depth exceeded"),
        ('"vit.py"', "sweep_config.json must be a JSON object whose 'program' is 'str'"),
        ('{"program": "vit.py", "project": "p", "command": []}', "object whose 'parameters' is 'dict'"),
    ],
)
def test_a_broken_configuration_is_one_line(config, reason, checkout):
    (checkout / "sweep_config.json").write_text(config)
    done = sweep_command(checkout, "create", "--device", "ook", "--backend", "jax")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and reason in done.stderr, done


@pytest.mark.slow
@pytest.mark.parametrize("command", [["create"], ["join", "a/b/c"]])
def test_an_unreachable_server_is_one_line(command, checkout):
    (checkout / "vit.py").write_text("")
    options = ["--device", "ook", "--backend", "jax"]
    done = sweep_command(checkout, *command, *options, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_HTTP_TIMEOUT="3")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("sweep.py: cannot ") and "Traceback" not in done.stderr, done


def test_a_joined_sweep_runs_nothing_but_what_this_folder_would_run(checkout, server):
    """Any member of the W&B project can create a sweep, and write anything into it."""
    own = json.loads((checkout / "sweep_config.json").read_text()) | {"run_cap": 1}
    own["parameters"] |= {"keras_backend": {"value": "jax"}, "node_name": {"value": "ook"}}
    cases = [
        ({}, None),
        ({"command": ["sh", "-c", "touch joined"]}, "has the command ['sh', '-c', 'touch joined'], not that of"),
        ({"program": "other.py"}, "has the program 'other.py', not that of"),
        ({"parameters": {"keras_backend": "jax"}}, "has keras_backend None, not jax"),
    ]
    project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
    options = ["--device", "ook", "--backend", "jax"]
    for number, (change, reason) in enumerate(cases):
        server.sweeps[f"s{number}"] = {"config": own | change, "project": project, "runs": []}
        path = f"{ENTITY}/{PROJECT}/s{number}"
        done = sweep_command(checkout, "join", path, *options, WANDB_BASE_URL=server.url)
        if reason is None:
            assert (done.returncode, done.stdout) == (0, path + "\n"), done
        else:
            refused = f"sweep.py: the sweep {path} {reason}"
            assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(refused), done
    # A sweep says which program it runs once more with each run, which is not checked when it is joined.
    done = sweep_command(checkout, "trial", "-c", "--x=1", SWEEP_PROGRAM="vit.py")
    assert done.returncode == 1 and done.stderr == "sweep.py: a run of the sweep names the program ['-c'], not vit.py\n"


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-", "2>&1 >out | true", "2>/dev/full >&-"])
def test_a_trial_survives_that_it_can_print_and_record_nothing(stream, checkout):
    """Its standard error is on a full disk, closed, or a pipe whose reader has left; the ledger is on a full disk."""
    program = "import time, sys\nfor n in range(5):\n print(n, file=sys.stderr, flush=True); time.sleep(.1)\n"
    (checkout / "vit.py").write_text(program.replace("print(", "sys.stderr and print(") + "open('done', 'w')\n")
    command = f"set -o pipefail; {sys.executable} sweeps/sweep.py trial vit.py {stream}"
    done = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment(SWEEP_LEDGER="/dev/full"), timeout=60)
    assert done.returncode == 0 and (checkout / "done").exists()


# ----------------------------------------------------------------------------------------------------------------------
# End to end: the real launcher, W&B's client and agent, and real training runs. Only the server is a stand-in.
# ----------------------------------------------------------------------------------------------------------------------

TINY = "--image-size 16 --patch-size 4 --projection-dim 32 --transformer-layers 1 --mlp-head-units=[32] --measure-seconds 0"
end_to_end = pytest.mark.end_to_end


class Launched:
    """A launcher running in its own session without a terminal. A thread reads its output."""

    def __init__(self, folder: Path, server: WandbServer, device: str, *arguments: str, **env: str):
        env = environment(WANDB_BASE_URL=server.url, **env)
        command = [str(folder / f"run_sweep_{device}.sh"), *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)
        self.lines: list[str] = []
        self.started = time.monotonic()
        self.on_line = lambda line: None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            print(f"{time.monotonic() - self.started:6.1f} s  {line}", end="")  # pytest shows this when the test fails
            self.on_line(line)

    def wait(self, timeout: float = 600) -> int:
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGINT)
            raise AssertionError("\n".join(self.lines)) from None
        self.reader.join(10)
        return status

    def wait_for(self, condition, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, "\n".join(self.lines)
            time.sleep(0.1)


def processes(folder: Path) -> dict[int, str]:
    """The command lines of all processes whose working directory is `folder`, by their numbers, the oldest first."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                started = int((process / "stat").read_text().rpartition(")")[2].split()[19])  # numbers start again at 1
                found.append((started, int(process.name), (process / "cmdline").read_bytes()))
        except OSError:  # the process has ended
            continue
    return {number: command_line.replace(b"\0", b" ").decode() for _, number, command_line in sorted(found)}


def call_later(function, *arguments, after: float = 0.0) -> None:
    timer = threading.Timer(after, function, arguments)
    timer.daemon = True
    timer.start()


@end_to_end
@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
def test_a_sweep_from_end_to_end(checkout, server, digits):
    """Five trials end in five ways, then another launcher joins and runs a sixth.

    The first completes, the second cannot be built, and Hyperband stops the third. The server is away for a while during
    the fourth, and from the start of the fifth.
    """
    server.change = {1: {"patch_size": 400}, 2: {"num_epochs": 5000}, 3: {"num_epochs": 100}}
    server.stop_after = {2: 2}
    server.on_run = lambda run: run["n"] == 4 and call_later(server.go_away, after=0.5)

    def go_away_and_come_back(line: str) -> None:
        if line.startswith("Epoch 4/100:"):
            call_later(server.go_away)
            call_later(server.come_back, after=10)
        elif "W&B logs offline" in line:
            call_later(server.come_back)

    flags = [*TINY.split(), "--num-epochs", "3", "--dataset", str(digits)]
    flags += ["--checkpoint-path", str(checkout / "best.weights.h5")]
    http_timeout = {"WANDB_HTTP_TIMEOUT": "5"}  # seconds until the client notices that the server is away
    launched = Launched(checkout, server, "ook", "pytorch", "--no-docker", "--count", "5", "--", *flags, **http_timeout)
    launched.on_line = go_away_and_come_back
    seen: set[str] = set()
    while launched.process.poll() is None:
        seen.update(processes(checkout).values())
        time.sleep(0.5)
    assert launched.wait() == 1, launched.lines
    log = "\n".join(launched.lines)

    # The server received the file, the device, the backend and the flags, and nothing else.
    (sweep,) = server.sweeps.values()
    expected = json.loads((ROOT / "sweep_config.json").read_text()) | {"name": "vit-ook-pytorch"}
    constants = {"keras_backend": "torch", "node_name": "ook", "num_epochs": 3, "dataset": str(digits)}
    constants |= {"image_size": 16, "patch_size": 4, "projection_dim": 32, "transformer_layers": 1}
    constants |= {"mlp_head_units": [32], "measure_seconds": 0, "checkpoint_path": str(checkout / "best.weights.h5")}
    expected["parameters"] |= {name: {"value": value} for name, value in constants.items()}
    assert sweep["config"] == expected
    assert sweep["project"]["name"] == PROJECT and sweep["project"]["entity"]["name"] == ENTITY
    assert f"{server.url}/{ENTITY}/{PROJECT}/sweeps/sweep1" in log

    # Each run reported the values it was sent, its history and its exit status.
    complete, unbuildable, stopped, cut_off, offline = (server.runs[name] for name in sweep["runs"])
    for run in (complete, unbuildable, stopped, cut_off, offline):
        assert run["sweep"] == "sweep1" and run["project"]["name"] == PROJECT, run
        assert {name: run["config"].get(name) for name in run["sent"]} == run["sent"]
    metric = expected["metric"]["name"]
    for run, epochs in ((complete, 3), (cut_off, 100), (offline, 3)):
        assert [row["epoch"] for row in run["history"]] == list(range(1, epochs + 1)), run
        assert all(0 <= row[metric] <= 1 for row in run["history"]) and run["exit"] == 0, run
        assert 0 <= run["summary"]["test_top-5-accuracy"] <= 1
    assert "SWEEP SEES NOTHING" in log and server.times_away == 2
    assert unbuildable["exit"] == 2
    assert unbuildable["summary"]["failure"] == "--patch-size 400 is larger than --image-size 16"
    assert 2 <= len(stopped["history"]) < 5000 and stopped["exit"] is not None, stopped
    assert launched.lines[-2:] == [
        f"failed: run {unbuildable['name']}, exit status 2",
        f"sweep {ENTITY}/{PROJECT}/sweep1 (pytorch): 3 finished, 1 stopped early, 1 failed",
    ]

    # The key was used, but no command line, log or file shows it.
    assert server.keys == {KEY}
    assert any("wandb agent" in line for line in seen) and any("vit.py" in line for line in seen)
    assert not any(KEY in line for line in seen) and KEY not in log
    written = [path for path in checkout.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert processes(checkout) == {}

    # A second machine for the same device and backend joins. Any other is refused, because its runs would be recorded wrongly.
    path = f"{ENTITY}/{PROJECT}/sweep1"
    joined = Launched(checkout, server, "ook", "pytorch", "--no-docker", "--sweep", path, "--count", "1")
    assert joined.wait() == 0, joined.lines
    assert len(sweep["runs"]) == 6 and server.runs[sweep["runs"][5]]["exit"] == 0 and len(server.sweeps) == 1
    assert joined.lines[-1] == f"sweep {path} (pytorch): 1 finished, 0 stopped early, 0 failed"
    for device, backend, reason in (
        ("ojo", "pytorch", "node_name ook, not ojo"),
        ("ook", "jax", "keras_backend torch, not jax"),
    ):
        refused = Launched(checkout, server, device, backend, "--no-docker", "--sweep", path)
        assert refused.wait() == 1 and f"the sweep {path} has {reason}" in "\n".join(refused.lines)


@end_to_end
@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
def test_both_runs_one_backend_after_the_other_on_the_jetson_pytorch_first(checkout, server, digits, compiled_steps):
    flags = [*TINY.split(), "--num-epochs", "1", "--dataset", str(digits)]
    flags += ["--checkpoint-path", str(checkout / "best.weights.h5")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled_steps), "KERAS_BACKEND": "jax"}
    launched = Launched(checkout, server, "ojo", "both", "--no-docker", "--count", "1", "--", *flags, **cache)
    assert launched.wait() == 0, launched.lines
    assert [sweep["config"]["name"] for sweep in server.sweeps.values()] == ["vit-ojo-pytorch", "vit-ojo-jax"]
    first, second = server.runs.values()
    for run, backend in ((first, "torch"), (second, "jax")):
        assert (run["config"]["keras_backend"], run["config"]["node_name"], run["exit"]) == (backend, "ojo", 0)
    assert launched.lines[-2:] == [
        f"sweep {ENTITY}/{PROJECT}/sweep1 (pytorch): 1 finished, 0 stopped early, 0 failed",
        f"sweep {ENTITY}/{PROJECT}/sweep2 (jax): 1 finished, 0 stopped early, 0 failed",
    ]


@end_to_end
def test_ctrl_c_ends_the_run_and_the_agent_cleanly(checkout, server, digits, compiled_steps):
    """SIGINT goes to the whole foreground process group, as from a terminal. The measurements so far are kept."""
    server.change = {0: {"num_epochs": 5000}}
    flags = [*TINY.split(), "--dataset", str(digits), "--checkpoint-path", str(checkout / "best.weights.h5")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled_steps)}
    launched = Launched(checkout, server, "ook", "both", "--no-docker", "--", *flags, **cache)
    launched.wait_for(lambda: any(run["history"] for run in server.runs.values()))
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.wait(180) == 130, launched.lines
    assert launched.lines[-1].endswith("(jax): 0 finished, 1 stopped early, 0 failed"), launched.lines
    (run,) = server.runs.values()
    assert run["exit"] is not None and len(server.sweeps) == 1
    assert (checkout / "best.weights.h5").exists() and processes(checkout) == {}


# Trains until it is told to stop, then takes a second to save its results, unless it is told once more.
PROGRAM = """
import os, signal, sys, time
if "--help" in sys.argv:
    sys.exit()
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number) if not signals else os._exit(1))
open("training", "w")
while not signals:
    time.sleep(0.1)
time.sleep(1)
open("saved", "w")
sys.exit(143)
"""
# Runs its commands on this machine. As with Docker, a container outlives a `docker run` that cannot print.
# Runs its commands on this machine. As with Docker, a container outlives a `docker run` that cannot print.
DOCKER = """#!/bin/bash
case $1 in
run)
  until [[ $1 == vit:* ]]; do
    [[ $1 != -e || $2 != *=* ]] || export "$2"
    shift
  done
  rm -f container.*
  { setsid "${@:2}" >container.log 2>container.err & echo $! >container.pid; wait $!; echo $? >container.status; } &
  trap 'kill "$(<container.pid)"' TERM
  until [[ -s container.pid ]]; do sleep 0.1; done
  tail --pid "$(<container.pid)" -s 0.1 -n +1 -f container.log &
  while kill -0 $! 2>/dev/null; do wait $! || code=$?; done
  [[ $code != 141 ]] || exit 141
  until [[ -s container.status ]]; do sleep 0.1; done
  exit "$(<container.status)" ;;
kill) kill -s "$3" "$(<container.pid)" ;;
stop) kill "$(<container.pid)" && tail --pid "$(<container.pid)" -s 0.1 -f /dev/null ;;
esac
"""


@end_to_end
@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize(
    "start, target, signals",
    [
        ("exec $LAUNCH", "group", "INT"),  # Ctrl-C
        ("$LAUNCH 2>&1 | tee log", "group", "INT"),  # it ends tee, too
        ("exec $LAUNCH >/dev/full 2>&1", "group", "INT"),
        ("exec $LAUNCH >&- 2>&-", "launcher", "TERM"),
        ("$LAUNCH & wait", "launcher", "TERM"),  # by a script: SIGINT is ignored from here on
        ("exec timeout 1000 $LAUNCH", "group", "TERM"),
        ("exec $LAUNCH", "launcher", "KILL"),
        ("exec $LAUNCH", "terminal", "HUP"),
        ("exec $LAUNCH", "frozen", "INT INT"),
        ("WANDB_AGENT_KILL_DELAY=3 exec $LAUNCH", "frozen", "INT"),
    ],
)
def test_no_training_outlives_its_launcher(start, target, signals, docker, checkout, server):
    """However a launcher is stopped, the run saves its results and nothing is left. A frozen run is killed, after a
    while or by a second Ctrl-C."""
    (checkout / "vit.py").write_text(PROGRAM)
    (checkout / "docker").write_text(DOCKER)
    (checkout / "docker").chmod(0o755)
    env = environment(WANDB_BASE_URL=server.url, LAUNCH="./run_sweep_ook.sh jax" + " --no-docker" * (not docker))
    env["PATH"] = f"{checkout}:{env['PATH']}"
    group, terminal = pty.fork()
    if group == 0:
        os.chdir(checkout)
        os.execvpe("bash", ["bash", "-c", start], env)
    os.set_blocking(terminal, False)
    output = b""

    def wait_until(condition, seconds: float) -> None:
        nonlocal output
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (processes(checkout), output.decode())
            with contextlib.suppress(OSError):  # the terminal is closed, or has nothing to read
                output += os.read(terminal, 65536)
            time.sleep(0.05)

    def find(words: str) -> list[int]:
        return [number for number, line in processes(checkout).items() if re.search(words, line)]

    wait_until((checkout / "training").exists, 60)
    launcher = find(r"^bash \S*run_sweep_ook.sh")[0]
    if target == "frozen":
        for number in find("[ /]vit.py"):
            os.kill(number, signal.SIGSTOP)
    for name in signals.split():
        if target == "terminal":
            os.close(terminal)
        elif target == "launcher":
            os.kill(launcher, getattr(signal, f"SIG{name}"))
        else:
            os.killpg(group, getattr(signal, f"SIG{name}"))
        time.sleep(2.5 if signals == "INT INT" else 0)
    if signals != "KILL":
        wait_until(lambda: launcher not in processes(checkout), 40)
        assert find("sweep.py|vit.py|wandb agent") == [], (launcher, processes(checkout), output.decode())
    wait_until(lambda: processes(checkout) == {}, 20)
    assert (checkout / "saved").exists() == (target != "frozen"), output.decode()
    if target != "terminal":
        os.close(terminal)
    os.waitpid(group, 0)
