"""Promises about what goes wrong: whatever was computed is kept, the run that can go on goes on, and one line says what happened.

Signals, kills, file systems, memory limits and servers are real ones; the long campaigns are in campaign_faults.py.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jsonschema
import keras
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TINY, Run
from test_wandb import records

import vit

SMALL = f"--dataset synthetic {TINY} --checkpoint-path a.weights.h5"
SCHEMA = json.loads((ROOT / "results.schema.json").read_text())
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    """Until the process prints `text`: `Epoch 3/9` is printed as that epoch begins."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen) + process.stderr.read())


def finish(process: subprocess.Popen, timeout: float = 300) -> Run:
    stdout, stderr = process.communicate(timeout=timeout)
    return Run(process.returncode, stdout, stderr)


def only_results(folder: Path) -> dict:
    """The one result file of a folder, which follows its schema."""
    (path,) = (folder / "results").iterdir()
    results = json.loads(path.read_text())
    jsonschema.validate(results, SCHEMA)
    return results


def weights_in(path: Path) -> dict[str, np.ndarray]:
    """Every array of a weights file; it cannot be read unless it is whole."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    assert found
    return found


def assert_same_weights(a: Path, b: Path) -> None:
    """The same arrays, bit for bit."""
    first, second = weights_in(a), weights_in(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def errors(run: Run) -> list[str]:
    """The error lines of a run that ended with a status; there is no traceback beside them."""
    assert "Traceback" not in run.stderr, run
    return [line for line in run.stderr.splitlines() if line.startswith("vit.py: error: ")]


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_an_epoch_ends_the_run_with_all_there_is(number, status, start_vit, tmp_path):
    """Results, best weights and the W&B run are finished, and the status says which signal it was."""
    backend = INSTALLED[0] if number == signal.SIGTERM else INSTALLED[-1]
    flags = f"{SMALL} --num-epochs 1000 --keras-backend {backend}"
    process = start_vit(*flags.split(), environment={**UNBUFFERED, "WANDB_MODE": "offline"})
    wait_for_line(process, "Epoch 3/1000")
    process.send_signal(number)
    run = finish(process)
    assert run.status == status and f"vit.py: stopped by {number.name}" in run.stderr, run
    assert "Traceback" not in run.stderr and "  quality/" not in run.stderr
    results = only_results(tmp_path)
    assert (results["status"], results["failure"]) == ("interrupted", number.name)
    assert 2 <= len(results["quality"]["epochs"]) < 1000
    assert weights_in(tmp_path / "a.weights.h5")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    told = records(folder)
    assert told[-1]["exit"]["exit_code"] == 1
    assert sum(record["type"] == "history" for record in told) == len(results["quality"]["epochs"])
    assert not list(tmp_path.glob(".*.h5")) and not list(tmp_path.glob(".*.npz"))


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_killed_run_that_is_resumed_ends_as_one_that_was_not(backend, start_vit, run_vit, tmp_path):
    """SIGKILL after two epochs: the same weights bit for bit, the same history, the same test figures.

    Also where the checkpoint was removed in between, and no epoch is left to write it again."""
    paths = {name: tmp_path / name / "a.weights.h5" for name in ("whole", "killed", "swept")}

    def flags(name: str) -> list[str]:
        return [
            *f"--dataset synthetic --no-use-wandb {TINY} --num-epochs 4 --keras-backend {backend} --resume".split()
        ] + [
            f"--checkpoint-path={paths[name]}",
            f"--results-dir={tmp_path / name}",
        ]

    whole = start_vit(*flags("whole"))
    killed = start_vit(*flags("killed"), environment=UNBUFFERED)
    wait_for_line(killed, "Epoch 3/4")
    killed.kill()
    assert finish(killed).status == -signal.SIGKILL
    whole = finish(whole)
    assert whole.status == 0 and "starting anew" in whole.stdout, whole
    assert len(list(paths["killed"].parent.glob("a.*.resume.npz"))) == 1

    refused = None
    if backend == INSTALLED[0]:
        refused = run_vit(*flags("killed"), "--learning-rate", "0.002")
        shutil.copytree(paths["killed"].parent, paths["swept"].parent)
        paths["swept"].unlink()
        assert run_vit(*flags("swept"), "--num-epochs", "2").status == 0
        assert_same_weights(paths["killed"], paths["swept"])
    resumed = run_vit(*flags("killed"))
    assert resumed.status == 0 and "resume: 2 epochs are done" in resumed.stdout, resumed
    assert_same_weights(paths["whole"], paths["killed"])
    (first,), (second,) = (
        [json.loads(p.read_text()) for p in paths[n].parent.glob("*.json")] for n in ("whole", "killed")
    )
    assert second["what"]["resumed_after_epochs"] == [2]
    assert first["quality"]["epochs"] == second["quality"]["epochs"]
    assert first["quality"]["test"] == second["quality"]["test"]
    assert len(second["time"]["epoch_s"]) == 4
    assert sorted(p.name for p in paths["killed"].parent.iterdir() if p.suffix != ".json") == ["a.weights.h5"]
    if refused:
        assert "has --learning-rate 0.001 (not 0.002)" in refused.error_line


def resumable(tmp_path, digits, **changes) -> tuple[vit.ResumePoint, vit.ViTConfig]:
    config = vit.ViTConfig(dataset=str(digits), checkpoint_path=tmp_path / "a.weights.h5", **changes)
    return vit.ResumePoint(config, vit.load_dataset(config)), config


def test_only_the_same_run_is_resumed_and_a_damaged_file_is_refused_in_one_line(tmp_path, digits):
    """Other model, other data, cut short, one bit wrong, a key missing, renamed from another run."""
    point, _ = resumable(tmp_path, digits)
    assert point.load() is False
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    best, epochs = vit.BestWeights(tmp_path / "a.weights.h5"), vit.EpochMeter([])
    for callback in (point, best):
        callback.set_model(model)
    best.epoch, best.accuracy = 1, 0.0
    point.attach(best, epochs, {"time": {}, "memory": {}})
    point.on_epoch_end(0, {"loss": 1.0})

    again, _ = resumable(tmp_path, digits, num_epochs=99)  # how long may change
    assert again.load() and again.progress["epochs"] == [{"loss": 1.0}]
    again.attach(best := vit.BestWeights(tmp_path / "b.weights.h5"), vit.EpochMeter([]), {})
    again.restore(model)
    assert best.accuracy == 0.0  # and not less than any
    for changes, told in [({"projection_dim": 32}, "--projection-dim 64 (not 32)"), ({"seed": 1}, "--seed 0 (not 1)")]:
        with pytest.raises(vit.ExperimentError) as refused:
            resumable(tmp_path, digits, **changes)[0].load()
        assert told in str(refused.value)
    with np.load(digits) as images:
        np.savez(
            tmp_path / "other.npz", **{name: 255 - images[name] if name[0] == "x" else images[name] for name in images}
        )
    with pytest.raises(vit.ExperimentError, match="--dataset"):
        resumable(tmp_path, tmp_path / "other.npz")[0].load()

    good = point.path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"identity")] ^= 1
    other = point.path.with_name(resumable(tmp_path, digits, seed=1)[0].path.name)
    damaged = [(point.path, good[:-100]), (point.path, bytes(flipped)), (point.path, b""), (other, good)]
    progress = {name: value for name, value in point.progress.items() if name != "best_epoch"}
    np.savez(
        tmp_path / "keys.npz", progress=np.frombuffer(json.dumps(progress).encode(), np.uint8), value_0=np.zeros(1)
    )
    for path, content in [*damaged, (point.path, (tmp_path / "keys.npz").read_bytes())]:
        path.write_bytes(content)
        with pytest.raises(vit.ExperimentError, match="is damaged") as refused:
            resumable(tmp_path, digits, seed=int(path == other))[0].load()
        assert "\n" not in str(refused.value)


def test_a_loss_that_is_not_a_number_ends_the_run_and_the_last_good_weights_stay(run_vit, tmp_path):
    """One step an epoch at a rate at which the loss overflows after a few: epochs before that were good."""
    run = run_vit(*f"{SMALL} --no-use-wandb --batch-size 4096 --learning-rate 1e5 --num-epochs 30".split())
    assert run.status == 4, run
    (line,) = errors(run)
    assert "is not a finite number" in line
    results = only_results(tmp_path)
    done = len(results["quality"]["epochs"])
    assert results["status"] == "failed" and 1 <= done < 30 and f"epoch {done + 1}" in results["failure"]
    assert all(epoch["val_loss"] is not None and epoch["loss"] is not None for epoch in results["quality"]["epochs"])
    assert all(np.isfinite(value).all() for value in weights_in(tmp_path / "a.weights.h5").values())

    run = run_vit(
        *f"{SMALL} --no-use-wandb --learning-rate 1e30 --num-epochs 2 --validation-split 0".split(), "--debug"
    )
    assert run.status == 4 and "Traceback" in run.stderr, run  # --debug shows where
    assert "from step 2 of epoch 1 on" in run.stderr.splitlines()[-1]
    assert run.stderr.splitlines()[-1].startswith("vit.py: error: ")


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------

# A batch of 128 needs five arrays of 1 GiB or more: attention weights of two heads for 1,024 tokens, before softmax and after,
# their dropout, their gradients. So what fails is one large request, and all small ones (threads, stacks) are granted.
LARGE = "--image-size 64 --patch-size 2 --projection-dim 8 --transformer-layers 1 --mlp-head-units 8 --batch-size 128"
# TensorFlow reserves 2.6 GiB before it starts its last threads, and ends the process where a thread is refused.
HEADROOM_BYTES = {"jax": 2 << 30, "torch": 2 << 30, "tensorflow": 7 << 29}


def start_limited(start_vit, backend: str, *flags: str) -> Run:
    """A run that may not reserve more than HEADROOM_BYTES beyond what it has once its model is built."""
    process = start_vit(*flags, "--keras-backend", backend, environment=UNBUFFERED)
    wait_for_line(process, "model: ")
    reserved = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (reserved + HEADROOM_BYTES[backend],) * 2)
    return finish(process, timeout=240)


@pytest.mark.parametrize("backend", INSTALLED)
def test_out_of_memory_is_one_line_and_fit_batch_goes_on(backend, start_vit, tmp_path):
    """A process that may not have more: the allocator of each backend fails for real."""
    images, labels = np.zeros((128, 8, 8, 3), np.uint8), np.arange(128) % 4
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    flags = f"--dataset images.npz {LARGE} --num-heads 2 --validation-split 0 --num-epochs 1 --measure-seconds 0 --no-use-wandb"
    flags = [*flags.split(), "--checkpoint-path", "a.weights.h5"]
    run = start_limited(start_vit, backend, *flags)
    assert run.status == 3, run
    (line,) = errors(run)
    assert "out of memory with 128 images at a time" in line and "add --fit-batch" in line
    results = only_results(tmp_path)
    assert results["status"] == "failed" and results["failure"].startswith("out of memory")
    shutil.rmtree(tmp_path / "results")
    if (
        backend == "tensorflow"
    ):  # on a CPU it keeps the memory of the step that failed: no second try; and it talks on stderr
        return
    assert run.stderr.strip() == line

    run = start_limited(start_vit, backend, *flags, "--fit-batch")
    assert run.status == 0 and "trying again in 2 parts of a batch" in run.stderr, run
    what = only_results(tmp_path)["what"]
    assert what["micro_batches"] > 1 and what["config"]["batch_size"] == 128


GRADIENTS = """
import sys
sys.path.insert(0, ".")
import keras, numpy as np, vit
vit.Dropout = lambda rate, **options: keras.layers.Activation("linear")  # draws differ between a batch and its parts
config = vit.ViTConfig(image_size=8, patch_size=4, projection_dim=8, num_heads=2, transformer_layers=1,
                       mlp_head_units=[16], attention_dropout=0.0)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(13, 8, 8, 1)).astype("float32"), rng.integers(0, 3, 13)
after = []
for parts in (1, 4):
    keras.utils.set_random_seed(0)
    model = vit.create_vit_classifier(config, (8, 8, 1), 3, keras.Sequential([keras.layers.Activation("linear")]))
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    model.micro_batches = parts
    before = [np.array(keras.ops.convert_to_numpy(w)) for w in model.trainable_weights]
    seen = model.fit(x, y, batch_size=10, epochs=1, shuffle=False, verbose=0).history  # 10 = 3 + 3 + 3 + 1; 3 = 1 + 1 + 1
    steps = [np.array(keras.ops.convert_to_numpy(w)) - b for w, b in zip(model.trainable_weights, before)]
    after.append((np.concatenate([s.ravel() for s in steps]), seen["loss"][0], seen["accuracy"][0], int(model.optimizer.iterations)))
(whole, *a), (summed, *b) = after
print(keras.backend.backend(), np.abs(whole).max(), np.abs(whole - summed).max() / np.abs(whole).max(), *a, *b)
"""


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_batch_in_parts_takes_the_very_steps_of_the_whole_batch(backend):
    """SGD at rate 1, so that a step is the gradient; the parts of neither batch divide it evenly."""
    env = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([sys.executable, "-c", GRADIENTS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, largest, difference, *told = done.stdout.split()[-9:]
    assert name == backend and float(largest) > 0.01 and float(difference) < 1e-4, done.stdout
    loss, accuracy, steps = ([float(told[i]), float(told[i + 3])] for i in range(3))
    assert loss[0] == pytest.approx(loss[1], rel=1e-4) and accuracy[0] == pytest.approx(accuracy[1]) and steps == [2, 2]


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


def test_a_full_disk_costs_files_and_not_the_result(run_vit, tmp_path):
    """Weights, resume file, results and W&B's own file have 96 KiB between them."""
    require_mounts(tmp_path)
    flags = f"--dataset synthetic {TINY} --num-epochs 3 --checkpoint-path disk/a.weights.h5 --results-dir disk"
    environment = {"WANDB_DIR": "disk", "WANDB_MODE": "offline", "WANDB_FINISH_TIMEOUT": "5"}
    run = run_vit(*flags.split(), environment=environment, wrapper=inside_mount("size=96k"))
    assert run.status == 0 and "Traceback" not in run.stderr, run
    assert "test accuracy " in run.stdout and "quality/test/test_accuracy" in run.stdout
    assert "warning: the best weights stay in memory" in run.stderr and "the run cannot be resumed" in run.stderr
    left = run.stdout.splitlines()[-1]
    assert "left:" in left and ".h5" not in left and ".npz" not in left, left


def test_a_folder_that_is_read_only_is_refused_before_training(run_vit, tmp_path):
    """A file system that is read-only stops root too."""
    require_mounts(tmp_path)
    for flags in ("--checkpoint-path disk/a.weights.h5", "--results-dir disk"):
        run = run_vit(*f"{SMALL} --no-use-wandb {flags}".split(), wrapper=inside_mount("ro"))
        assert f"{flags.split()[0]}: the folder 'disk' cannot be written (Read-only file system)" in run.error_line


def test_folders_that_vanish_cost_files_and_not_the_result(start_vit, tmp_path):
    flags = f"--dataset synthetic --no-use-wandb {TINY} --num-epochs 6 --checkpoint-path gone/a.weights.h5 --results-dir gone"
    process = start_vit(*flags.split(), environment=UNBUFFERED)
    wait_for_line(process, "Epoch 2/6")
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    run = finish(process)
    assert run.status == 0 and "Traceback" not in run.stderr, run
    assert "test accuracy " in run.stdout and "the results cannot be written" in run.stderr


def test_a_log_that_cannot_be_written_does_not_end_the_training(start_vit, tmp_path):
    """stdout on a full disk, stderr a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        process = start_vit(*f"{SMALL} --no-use-wandb --num-epochs 2".split(), stdout=full, stderr=writer)
    os.close(writer)
    assert process.wait(300) == 0
    assert only_results(tmp_path)["status"] == "complete"


# ----------------------------------------------------------------------------------------------------------------------
# W&B
# ----------------------------------------------------------------------------------------------------------------------

# In place of two minutes for a server that is gone at the end; a start has time, also on a machine that stalls.
IMPATIENT = {
    "WANDB_FINISH_TIMEOUT": "3",
    "WANDB_INIT_TIMEOUT": "90",
    "WANDB_HTTP_TIMEOUT": "3",
    "WANDB_API_KEY": "0" * 40,
}


def test_a_wandb_server_that_fails_costs_the_run_nothing(start_vit, tmp_path):
    """It answers 500, hangs, closes in the middle of an answer or goes away after the first epochs, or hangs from the start:
    each run is complete, and all that it logged is in its .wandb file, for `wandb sync`."""
    pytest.importorskip("sweeps", reason="the server's trials are drawn by W&B's own library")
    from wandb_server import WandbServer

    faults = ["error 500", "hang", "close", "gone", "hang from the start"]
    servers, processes = {}, {}
    try:
        for fault in faults:
            servers[fault] = WandbServer()
            (tmp_path / fault).mkdir()
            environment = {
                **IMPATIENT,
                **UNBUFFERED,
                "WANDB_BASE_URL": servers[fault].url,
                "WANDB_DIR": str(tmp_path / fault),
            }
            if fault == "hang from the start":
                servers[fault].fault = "hang"
                environment["WANDB_INIT_TIMEOUT"] = "8"
            flags = f"--dataset synthetic {TINY} --num-epochs 5".split()
            flags += [
                f"--checkpoint-path={tmp_path / fault / 'a.weights.h5'}",
                f"--results-dir={tmp_path / fault / 'results'}",
            ]
            processes[fault] = start_vit(*flags, environment=environment)
        for fault, process in processes.items():
            wait_for_line(process, "Epoch 2/5")
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


def test_a_second_signal_ends_a_run_at_once(start_vit, tmp_path):
    """The first is kept waiting by a W&B server that hangs; the results are on disk by then, and nothing stays behind."""
    pytest.importorskip("sweeps", reason="the server's trials are drawn by W&B's own library")
    from wandb_server import WandbServer

    server = WandbServer()
    environment = {**IMPATIENT, **UNBUFFERED, "WANDB_FINISH_TIMEOUT": "600", "WANDB_BASE_URL": server.url}
    process = start_vit(*f"{SMALL} --num-epochs 1000".split(), environment=environment)
    wait_for_line(process, "Epoch 3/1000")
    server.fault = "hang"
    process.terminate()
    wait_for_line(process, "results: ")
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    started = time.monotonic()
    assert process.wait(120) == 143 and time.monotonic() - started < 60  # a tenth of what W&B may take
    assert only_results(tmp_path)["status"] == "interrupted"
    server.close()
