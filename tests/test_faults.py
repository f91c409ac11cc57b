"""Promises about what goes wrong: what was computed is kept, a run that can go on does, and one line names the cause.

Signals, kills, file systems, memory limits and servers are real; the long campaigns are in studies/faults.py.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import INSTALLED, TINY, Run, finish, only_results, wait_for_line, weights_in
from test_wandb import records

import vit
from edgebench import cli, files
from edgebench.measure.epochs import Epoch, EpochRecorder
from edgebench.measure.meters import Meter
from edgebench.record import resume

# No epoch changes the accuracy, so the resumed process writes the weights of an epoch that it has not run.
FIRST_IS_BEST = "--learning-rate 1e-12"
MODERN = "--recipe modern --learning-rate-schedule cosine --warmup-epochs 1 --ema 0.9"  # an average, a schedule and mixed images
SMALL = f"--dataset synthetic {TINY} --checkpoint-path a.weights.h5"


def assert_same_weights(a: Path, b: Path) -> None:
    """The same arrays, bit for bit."""
    first, second = weights_in(a), weights_in(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def errors(run: Run) -> list[str]:
    """The error lines of a run that printed no traceback."""
    assert "Traceback" not in run.stderr, run
    return [line for line in run.stderr.splitlines() if line.startswith("vit.py: error: ")]


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_in_an_epoch_ends_the_run_with_all_there_is(number, status, start_vit, tmp_path):
    """Results, best weights and the W&B run are finished, the last line says how to go on, and the status names the signal.

    The environment chooses the backend, against the flag.
    """
    backend = INSTALLED[0] if number == signal.SIGHUP else INSTALLED[-1]
    environment = {"WANDB_MODE": "offline", "KERAS_BACKEND": backend}
    process = start_vit(*f"{SMALL} --num-epochs 1000 --keras-backend jax".split(), environment=environment)
    wait_for_line(process, "Epoch 2/1000:")
    process.send_signal(number)
    run = finish(process)
    last = [line for line in run.stderr.splitlines() if line.startswith("vit.py: ")][-1]  # TensorFlow may say more
    assert run.status == status and last.startswith(f"vit.py: stopped by {number.name}; "), run
    assert "the best weights so far are in a.weights.h5; resume with: python " in last and last.endswith(" --resume")
    assert ("wins over --keras-backend jax" in run.stderr) == (backend != "jax")
    assert "Traceback" not in run.stderr and "  quality/" not in run.stderr
    results = only_results(tmp_path)
    assert (results["status"], results["failure"]) == ("interrupted", number.name)
    assert results["what"]["backend"] == results["what"]["config"]["keras_backend"] == backend
    assert 2 <= len(results["quality"]["epochs"]) < 1000
    assert weights_in(tmp_path / "a.weights.h5")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = records(folder)
    assert logged[-1]["exit"]["exit_code"] == 1
    assert sum(record["type"] == "history" for record in logged) == len(results["quality"]["epochs"])
    assert not list(tmp_path.glob(".*.h5")) and not list(tmp_path.glob(".*.npz"))


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        *(pytest.param(n, "", marks=[] if n == "jax" else pytest.mark.slow) for n in INSTALLED),
        pytest.param("jax", "--dtype-policy mixed_float16", marks=pytest.mark.slow),
        pytest.param("jax", FIRST_IS_BEST, marks=pytest.mark.slow),
        *(pytest.param(n, MODERN, marks=[] if n == "jax" else pytest.mark.slow) for n in INSTALLED),
    ],
)
def test_a_killed_run_that_is_resumed_ends_as_one_that_was_not(backend, more, start_vit, run_vit, tmp_path):
    """SIGKILL after two epochs: the same weights bit for bit, the same history, the same test figures.

    An epoch ends with small batches that do not fill a whole one. The checkpoint may be removed in between, although no
    epoch is left to write it again. A run that is complete goes on in the same way, if it was started with --resume.
    """
    paths = {name: tmp_path / name / "a.weights.h5" for name in ("whole", "killed", "without checkpoint")}

    def flags(name: str) -> list[str]:
        run = f"--dataset synthetic --no-use-wandb {TINY} --num-epochs 3 --keras-backend {backend} --resume"
        run += f" --batch-size 96 --gradient-accumulation-steps 3 {more}"
        return [*run.split(), f"--checkpoint-path={paths[name]}", f"--results-dir={paths[name].parent}"]

    killed = start_vit(*flags("killed"))
    wait_for_line(killed, "Epoch 2/3:")
    killed.kill()
    assert finish(killed).status == -signal.SIGKILL
    whole = run_vit(*flags("whole"))
    assert whole.status == 0 and "starting from scratch" in whole.stdout, whole
    assert len(list(paths["killed"].parent.glob("a.*.resume.npz"))) == 1

    if more == MODERN:
        assert "has --num-epochs 3 (not 4)" in run_vit(*flags("killed"), "--num-epochs", "4").error_line
    if (backend, more) == (INSTALLED[0], ""):
        refused = run_vit(*flags("killed"), "--learning-rate", "0.002")
        assert "has --learning-rate 0.001 (not 0.002)" in refused.error_line
        assert "2 epochs are done" in run_vit(*flags("killed"), "--num-epochs", "1").error_line
        shutil.copytree(paths["killed"].parent, paths["without checkpoint"].parent)
        paths["without checkpoint"].unlink()
        assert run_vit(*flags("without checkpoint"), "--num-epochs", "2").status == 0
        assert_same_weights(paths["killed"], paths["without checkpoint"])
        longer = run_vit(*flags("without checkpoint"))
        assert longer.status == 0 and "resume: 2 epochs are done" in longer.stdout, longer
        assert_same_weights(paths["whole"], paths["without checkpoint"])
        assert "more than --num-epochs 2" in run_vit(*flags("without checkpoint"), "--num-epochs", "2").error_line
        resumed = finish(start_vit(*flags("killed")))
    else:
        resumed = run_vit(*flags("killed"))
    assert resumed.status == 0 and "resume: 2 epochs are done" in resumed.stdout, resumed
    assert_same_weights(paths["whole"], paths["killed"])
    first, second = (json.loads(next(paths[name].parent.glob("*.json")).read_text()) for name in ("whole", "killed"))
    assert second["what"]["resumed_after_epochs"] == [2]
    assert first["quality"]["epochs"] == second["quality"]["epochs"]
    assert first["quality"]["test"] == second["quality"]["test"]
    assert len(second["time"]["epoch_s"]) == 3
    rest = [path.suffixes[-2:] for path in sorted(paths["killed"].parent.iterdir()) if path.suffix != ".json"]
    assert rest == [[".complete", ".npz"], [".weights", ".h5"]]


def identity_of(tmp_path: Path, dataset: Path, **changes) -> tuple[Path, dict]:
    """The resume file of a run on `dataset`, and the run's identity."""
    config = vit.ViTConfig(dataset=str(dataset), checkpoint_path=tmp_path / "a.weights.h5", **changes)
    data = vit.load_dataset(config.dataset, config.validation_split, config.seed)
    identity = resume.identity(config.as_json(), vit.FLAGS, data.x_train, data.y_train)
    return resume.path_of(config.checkpoint_path, identity), identity


def test_only_the_same_run_is_resumed_and_a_damaged_file_is_refused_with_one_line(tmp_path, digits):
    """Another model, other data, cut short, one bit wrong, a key missing, of a wrong type, renamed from another run."""
    path, identity = identity_of(tmp_path, digits)
    assert resume.read(path, identity, 9) == resume.Resumed()
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    epochs = [Epoch({"loss": 1.0}, train_s=1.0, end_s=2.0)]
    recorder, best = EpochRecorder(Meter({}), epochs), vit.BestWeights(tmp_path / "a.weights.h5", 1, 0.0)
    writer = resume.ResumeFile(path, identity, resume.Resumed().progress, recorder, best)
    writer.set_model(model)
    writer.on_epoch_end(0)
    kept = model.get_weights()

    assert identity_of(tmp_path, digits, num_epochs=99) == (path, identity)  # how long may change
    resumed = resume.read(path, identity, 9)
    progress = resumed.progress
    assert (progress.epochs, progress.best_epoch, progress.resumed_after_epochs) == (epochs, 1, [1])
    assert progress.best_accuracy == 0.0  # and not less than any
    model.set_weights([weight + 1 for weight in kept])
    best_weights = resume.restore(model, resumed, path)
    for values in (model.get_weights(), best_weights):
        assert all((a == b).all() for a, b in zip(values, kept, strict=True))
    other_model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other_model.compile("adam", "mse")
    with pytest.raises(cli.ExperimentError, match="does not fit the model"):
        resume.restore(other_model, resumed, path)

    for changes, flag in [({"projection_dim": 32}, "--projection-dim 64 (not 32)"), ({"seed": 1}, "--seed 0 (not 1)")]:
        with pytest.raises(cli.ExperimentError) as refused:
            resume.read(*identity_of(tmp_path, digits, **changes), 9)
        assert flag in str(refused.value)
    with np.load(digits) as data:
        inverted = {name: 255 - array if name[0] == "x" else array for name, array in data.items()}
    np.savez(tmp_path / "other.npz", **inverted)
    with pytest.raises(cli.ExperimentError, match="--dataset"):
        resume.read(*identity_of(tmp_path, tmp_path / "other.npz"), 9)

    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"identity")] ^= 1
    with np.load(path) as archive:
        arrays = dict(archive)
    state = json.loads(arrays["progress"].tobytes())
    damaged = {"cut short": good[:-100], "one bit wrong": bytes(flipped), "empty": b""}

    def damage(name: str, progress) -> None:
        np.savez(
            tmp_path / "crafted.npz", **arrays | {"progress": np.frombuffer(json.dumps(progress).encode(), np.uint8)}
        )
        damaged[name] = (tmp_path / "crafted.npz").read_bytes()

    inside = state["progress"]
    damage("no object", [state])
    damage("a key missing", state | {"progress": {name: inside[name] for name in inside if name != "best_epoch"}})
    damage("a wrong number of arrays", state | {"variables": "2"})
    for name in sorted(inside.keys() - {"wandb_id"}):
        damage(f"{name} of a wrong type", state | {"progress": inside | {name: "wrong"}})
    for wrong in (
        {"train_s": "1"},
        {"load": [1]},
        {"energy": {"accelerator": {"source": 1}}},
        {"logs": {"loss": None}},
    ):
        damage(f"{wrong} in an epoch", state | {"progress": inside | {"epochs": [inside["epochs"][0] | wrong]}})
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(cli.ExperimentError, match="is damaged") as refused:
            resume.read(path, identity, 9)
        assert "\n" not in str(refused.value)
    path, identity = identity_of(tmp_path, digits, seed=1)
    path.write_bytes(good)
    with pytest.raises(cli.ExperimentError, match="is damaged .it belongs to another run"):
        resume.read(path, identity, 9)


def test_a_weights_file_that_another_run_has_replaced_is_not_claimed(tmp_path):
    """Its file may get the inode that an earlier one of this run has freed."""
    model, file = (
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        files.WeightsFile(tmp_path / "a.weights.h5"),
    )
    file.write(model)
    assert file.current == str(file.path)
    file.path.write_bytes(b"theirs")
    os.utime(file.path, ns=(0, 0))
    assert file.current is None
    file.write(model)
    assert file.current == str(file.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_weights_file_that_cannot_be_replaced_is_refused_before_the_training():
    """Another user's file in a folder like /tmp."""
    folder = Path(tempfile.mkdtemp())  # tmp_path is closed to other users
    folder.chmod(0o1777)
    path = folder / "a.weights.h5"
    path.write_bytes(b"theirs")
    os.chown(path, 12345, 12345)
    child = os.fork()
    if not child:  # as a third user
        os.setuid(12346)
        try:
            files.require_replaceable(path, "--checkpoint-path")
        except cli.ExperimentError as error:
            os._exit("belongs to another user" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    files.require_replaceable(path, "--checkpoint-path")  # root may
    assert path.read_bytes() == b"theirs"
    shutil.rmtree(folder)


def test_a_loss_that_is_not_a_number_ends_the_run_and_the_last_good_weights_stay(digits, run_vit, tmp_path):
    """One step an epoch, at a rate at which the loss overflows after a few epochs; those before were good."""
    with np.load(digits) as data:
        few = {name: array[:36] for name, array in data.items()}  # 32 for training: a batch of TINY
    np.savez(tmp_path / "few.npz", **few)
    flags = (
        f"--dataset few.npz --no-use-wandb {TINY} --checkpoint-path a.weights.h5 --learning-rate 1e5 --num-epochs 30"
    )
    run = run_vit(*flags.split())
    assert run.status == 4, run
    (line,) = errors(run)
    assert "is not a finite number" in line
    results = only_results(tmp_path)
    done = len(results["quality"]["epochs"])
    assert results["status"] == "failed" and 1 <= done < 30 and f"epoch {done + 1}" in results["failure"]
    assert all(epoch["val_loss"] is not None and epoch["loss"] is not None for epoch in results["quality"]["epochs"])
    assert all(np.isfinite(value).all() for value in weights_in(tmp_path / "a.weights.h5").values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "the loss is not a finite number in epoch 1"),
        # The only step spoils the weights, and no loss is computed from them.
        ("--validation-split 0 --batch-size 2048 --debug", "the model's answers are not finite numbers after epoch 1"),
    ],
)
def test_a_run_that_diverges_at_once_leaves_its_results_and_no_weights(more, message, run_vit, tmp_path):
    """One line with the epoch, a status of its own, and a results file with the reason. --debug shows the traceback."""
    run = run_vit(*f"{SMALL} --no-use-wandb --learning-rate 1e30 --num-epochs 2 {more}".split())
    *traceback, line = run.stderr.splitlines()
    assert run.status == 4 and line.startswith("vit.py: error: ") and message in line, run
    assert ("Traceback (most recent call last):" in traceback) if "--debug" in more else not traceback
    assert not list(tmp_path.glob("*a.*"))
    results = only_results(tmp_path)
    assert results["status"] == "failed" and message in results["failure"]


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------

# A batch of 128 needs five arrays of 1 GiB or more: attention weights of two heads for 1,024 tokens, before softmax and
# after, their dropout, their gradients. So one large request fails, and all small ones (threads, stacks) are granted.
LARGE = "--image-size 64 --patch-size 2 --projection-dim 8 --transformer-layers 1 --mlp-head-units 8 --batch-size 128"
# TensorFlow reserves 2.6 GiB before it starts its last threads, and ends the process where a thread is refused.
HEADROOM_BYTES = {"jax": 2 << 30, "torch": 2 << 30, "tensorflow": 7 << 29}
# Without it, every thread that waits for another's memory reserves 64 MiB: on a busy machine the small requests fail.
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}


def run_limited(start_vit, backend: str, *flags: str) -> Run:
    """Run with no more than HEADROOM_BYTES of memory beyond what the process has once its model is built."""
    process = start_vit(*flags, "--keras-backend", backend, environment=FEW_ARENAS)
    wait_for_line(process, "model: ")
    reserved = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (reserved + HEADROOM_BYTES[backend],) * 2)
    return finish(process, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("backend", INSTALLED)
def test_out_of_memory_is_one_line_whose_advice_works(backend, start_vit, tmp_path):
    """The allocator of each backend fails for real. The number in the line is followed until the run fits."""
    images = np.random.default_rng(0).integers(0, 256, (128, 8, 8, 3), np.uint8)
    labels = np.arange(128) % 4
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    flags = f"--dataset images.npz {LARGE} --num-heads 2 --validation-split 0 --num-epochs 1 --measure-seconds 0"
    flags += " --no-use-wandb --checkpoint-path a.weights.h5 --gradient-accumulation-steps"
    parts = 1
    while (run := run_limited(start_vit, backend, *flags.split(), str(parts))).status != 0:
        assert run.status == 3 and parts < 32, run
        (line,) = errors(run)
        assert f"out of memory with {128 // parts} images at a time" in line
        assert f"try --gradient-accumulation-steps {2 * parts}, or lower --batch-size" in line
        # Libraries report it as well: TensorFlow at length, and YNNPACK, which JAX calls on a CPU.
        others = [other for other in run.stderr.strip().splitlines() if other != line]
        assert backend == "tensorflow" or all(re.fullmatch(r"allocate of <\d+> failed\.", other) for other in others)
        results = only_results(tmp_path)
        assert results["status"] == "failed" and results["failure"].startswith("out of memory")
        shutil.rmtree(tmp_path / "results")
        parts *= 2
    what = only_results(tmp_path)["what"]
    assert what["micro_batches"] == parts > 1 and what["config"]["batch_size"] == 128


# ----------------------------------------------------------------------------------------------------------------------
# Disks and streams
# ----------------------------------------------------------------------------------------------------------------------


def inside_mount(options: str) -> tuple:
    """A wrapper that runs a command with ./disk as a file system of its own, which no other process sees."""
    mount = f'mount -t tmpfs -o {options} none disk && "$@"; status=$?; echo "left: $(ls -A disk | tr "\\n" " ")"; exit $status'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")


def require_mounts(folder: Path) -> None:
    (folder / "disk").mkdir()
    tried = subprocess.run([*inside_mount("size=1m"), "true"], cwd=folder, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")


@pytest.mark.any_version
def test_a_full_disk_costs_files_and_not_the_result(start_vit, tmp_path):
    """Weights, resume file, results and W&B's own file have 96 KiB between them."""
    require_mounts(tmp_path)
    flags = f"--dataset synthetic {TINY} --num-epochs 3 --checkpoint-path disk/a.weights.h5 --results-dir disk"
    environment = {"WANDB_DIR": "disk", "WANDB_MODE": "offline", "WANDB_FINISH_TIMEOUT": "5"}
    run = finish(start_vit(*flags.split(), environment=environment, wrapper=inside_mount("size=96k")))
    assert run.status == 0 and "Traceback" not in run.stderr, run
    # The results fit before W&B's log has taken what is left, or every figure is printed.
    is_written = ".json" in run.stdout.splitlines()[-1]
    assert "test accuracy " in run.stdout and ("  test_accuracy  " in run.stdout) != is_written
    assert "warning: the best weights stay in memory" in run.stderr and "the run cannot be resumed" in run.stderr
    left = run.stdout.splitlines()[-1]
    assert "left:" in left and ".h5" not in left and ".npz" not in left, left


@pytest.mark.any_version
def test_a_folder_that_is_read_only_is_refused_before_training(start_vit, tmp_path):
    """A file system that is read-only stops root as well."""
    require_mounts(tmp_path)
    for flags in ("--checkpoint-path disk/a.weights.h5", "--results-dir disk"):
        run = finish(start_vit(*f"{SMALL} --no-use-wandb {flags}".split(), wrapper=inside_mount("ro")))
        assert f"{flags.split()[0]}: the folder 'disk' cannot be written (Read-only file system)" in run.error_line


def train_in_a_folder_that_vanishes(*flags: str) -> None:
    class Rename(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                Path("gone").rename("elsewhere")

    vit.main(vit.read_config(flags), callbacks=[Rename()])


@pytest.mark.any_version
def test_folders_that_vanish_cost_files_and_not_the_result(call_on, tmp_path):
    flags = f"--dataset synthetic --no-use-wandb {TINY} --num-epochs 3 --checkpoint-path gone/a.weights.h5 --results-dir gone"
    run = call_on(INSTALLED[0], train_in_a_folder_that_vanishes, *flags.split())
    assert "Traceback" not in run.stderr, run
    assert "test accuracy " in run.stdout and "the results cannot be written" in run.stderr
    assert (tmp_path / "elsewhere" / "a.weights.h5").exists() and not (tmp_path / "gone").exists()


@pytest.mark.any_version
def test_a_log_that_cannot_be_written_does_not_end_the_training(start_vit, tmp_path):
    """stdout is on a full disk; stderr is a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        process = start_vit(*f"{SMALL} --no-use-wandb --num-epochs 1".split(), stdout=full, stderr=writer)
    os.close(writer)
    assert process.wait(300) == 0
    assert only_results(tmp_path)["status"] == "complete"


# ----------------------------------------------------------------------------------------------------------------------
# W&B
# ----------------------------------------------------------------------------------------------------------------------

# Three seconds instead of two minutes for a server that is gone at the end. A start has time, as the machine may be busy.
IMPATIENT = {"WANDB_FINISH_TIMEOUT": "3", "WANDB_INIT_TIMEOUT": "90", "WANDB_HTTP_TIMEOUT": "3"}
IMPATIENT |= {"WANDB_API_KEY": "0" * 40}


@pytest.mark.slow
def test_a_wandb_server_that_fails_costs_the_run_nothing(start_vit, tmp_path):
    """After the first epochs it answers 500, hangs, closes in the middle of an answer or goes away; or it hangs from the start.

    Each run is complete, and all that it logged is in its .wandb file, for `wandb sync`.
    """
    pytest.importorskip("sweeps.random_search", reason="the server's trials are drawn by W&B's own library")
    from wandb_server import WandbServer

    faults = ["error 500", "hang", "close", "gone", "hang from the start"]
    servers, processes = {}, {}
    try:
        for fault in faults:
            servers[fault] = WandbServer()
            (tmp_path / fault).mkdir()
            environment = {**IMPATIENT, "WANDB_BASE_URL": servers[fault].url, "WANDB_DIR": str(tmp_path / fault)}
            if fault == "hang from the start":
                servers[fault].fault = "hang"
                environment["WANDB_INIT_TIMEOUT"] = "8"
            flags = f"--dataset synthetic {TINY} --num-epochs 5".split()
            flags += [f"--checkpoint-path={tmp_path / fault}/a.weights.h5", f"--results-dir={tmp_path / fault}/results"]
            processes[fault] = start_vit(*flags, environment=environment)
        for fault, process in processes.items():
            wait_for_line(process, "Epoch 1/5:")
            if fault == "gone":
                servers[fault].go_away()
            elif fault != "hang from the start":
                servers[fault].fault = fault
        for fault, process in processes.items():
            run = finish(process)
            assert run.status == 0 and "Traceback" not in run.stderr, (fault, run)
            assert ("W&B logs offline" in run.stderr) == (fault == "hang from the start"), (fault, run)
            assert only_results(tmp_path / fault)["status"] == "complete"
            (folder,) = (tmp_path / fault / "wandb").glob("*run-2*")
            logged = [record["history"]["item"]["epoch"] for record in records(folder) if record["type"] == "history"]
            assert logged == [1, 2, 3, 4, 5], fault
    finally:
        for server in servers.values():
            server.close()
    assert servers["error 500"].runs and servers["gone"].runs  # these were online


def test_ctrl_c_while_keras_is_imported_is_no_traceback(start_vit):
    process = start_vit(*SMALL.split())
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    run = finish(process)
    assert (run.status, run.stderr) == (130, ""), run


@pytest.mark.any_version
def test_a_second_signal_ends_a_run_at_once(start_vit, tmp_path):
    """The first one waits for a W&B server that hangs. By then the results are on disk."""
    pytest.importorskip("sweeps.random_search", reason="the server's trials are drawn by W&B's own library")
    from wandb_server import WandbServer

    server = WandbServer()
    environment = {**IMPATIENT, "WANDB_FINISH_TIMEOUT": "600", "WANDB_BASE_URL": server.url}
    process = start_vit(*f"{SMALL} --num-epochs 1000".split(), environment=environment)
    wait_for_line(process, "Epoch 2/1000:")
    server.fault = "hang"
    process.terminate()
    wait_for_line(process, "files   ")
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    started = time.monotonic()
    assert process.wait(120) == 143 and time.monotonic() - started < 60  # a tenth of what W&B may take
    assert only_results(tmp_path)["status"] == "interrupted"
    server.close()
