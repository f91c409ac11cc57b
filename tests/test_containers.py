"""Promises about the four images. The unmodified Dockerfiles are built on stand-ins for their base images, and the
documented commands run in real containers, without a GPU.

Start them with `make test-containers`. container_engine.py describes the stand-ins.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import container_engine
import pytest
from checkout import copy_from_root
from conftest import ROOT, TINY

pytestmark = pytest.mark.end_to_end

IMAGES = ["ook.jax", "ook.pytorch", "ojo.jax", "ojo.pytorch"]
BUILD_FILES = [".dockerignore", "constraints.common.txt", "docker"]  # besides the Dockerfiles and the program
GPU_FLAGS = {"ook": ["--gpus", "all"], "ojo": ["--runtime", "nvidia"]}
USER = 12345  # not root, and unknown to every image
KERAS = "3.12.4"
EXPECTED = {  # backend, its version, Python's version
    "ook.jax": ("jax", "0.10.2", "3.11"),
    "ook.pytorch": ("torch", "2.5.1", "3.11"),
    "ojo.jax": ("jax", "0.4.35", "3.10"),
    "ojo.pytorch": ("torch", "2.4.0", "3.10"),
}
CPU = ["-e", "VIT_DEVICE=cpu"]
TRAIN = ["python", "vit.py", *TINY.split(), "--dataset", "synthetic", "--num-epochs", "1"]


def tag(image: str) -> str:
    return "vit:" + image.replace(".", "-")


def traces() -> dict[str, object]:
    """Everything that a container engine could leave behind on its host."""
    tables = {}
    for program in ("iptables-legacy-save", "iptables-nft-save", "ip6tables-legacy-save", "ip6tables-nft-save"):
        if path := shutil.which(program, path="/usr/sbin:/sbin:/usr/bin"):
            lines = subprocess.run([path], capture_output=True, text=True).stdout.splitlines()
            tables[program] = [line for line in lines if line.startswith("-A") or "ACCEPT" in line and "[" not in line]
    return tables | {
        "network devices": sorted(os.listdir("/sys/class/net")),
        "mounts": sorted(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()),
        "control groups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("**/vit-*")),
        "folders": [path for path in ("/var/lib/docker", "/run/docker", "/etc/docker") if os.path.exists(path)],
    }


def processes(folder: Path) -> list[str]:
    """The command lines that name `folder`, and those of slirp4netns."""
    command_lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line or "slirp4netns" in line:
            command_lines.append(line)
    return command_lines


@pytest.fixture(scope="module")
def engine():
    """An engine with stand-ins for the base images. The end of the fixture checks that it leaves nothing on the host."""
    if reason := container_engine.unavailable_reason():
        pytest.skip(reason)
    folder = ROOT / "build/containers"
    before, slirp = traces(), [line for line in processes(folder) if "slirp4netns" in line]
    with container_engine.start(folder) as running:
        running.make_base_images()
        yield running
    assert traces() == before
    assert processes(folder) == slirp, "the engine is still running"
    assert sorted(os.listdir(folder)) == ["engine.log", "kept"]


@pytest.fixture(scope="module")
def built(engine):
    """Build the four images with the documented command, and return the function that names them.

    Build arguments replace only the large wheels.
    """

    def build(image: str) -> None:
        engine.docker("build", "-f", f"Dockerfile.{image}", "-t", tag(image), *engine.build_args[image], ".", cwd=ROOT)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, IMAGES))
    return tag


@pytest.fixture
def checkout():
    """The folder that a user mounts: their git checkout, with a .env."""
    folder = Path(tempfile.mkdtemp(prefix="vit-checkout-"))  # that user may not enter pytest's own folders
    copy_from_root(folder, "edgebench", "vit.py")
    (folder / ".env").write_text("WANDB_MODE=offline\nWANDB_PROJECT=from-the-env-file\n")
    git = ["git", "-c", "user.name=user", "-c", "user.email=user@example.org"]
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "add", "edgebench", "vit.py"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "checkout"], cwd=folder, check=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    yield folder
    shutil.rmtree(folder)


def read_results(folder: Path) -> dict:
    (path,) = (folder / "results").glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("image", IMAGES)
def test_the_documented_commands_train_and_leave_files_the_user_can_delete(image, engine, built, checkout):
    name = built(image)
    device = image.partition(".")[0]
    engine.gpu_requests()
    command = ["run", "--rm", *GPU_FLAGS[device], "-v", f"{checkout}:/app", "--env-file", ".env", *CPU, name, *TRAIN]
    run = engine.docker(*command, cwd=checkout, check=False)
    assert run.returncode == 0, run
    assert ("gpus" if device == "ook" else "nvidia") in engine.gpu_requests()

    run_record = read_results(checkout)["what"]
    backend, version, python = EXPECTED[image]
    assert run_record["backend"] == backend and not run_record["is_gpu"]
    assert run_record["versions"]["Keras"] == KERAS
    assert run_record["versions"][backend].partition("+")[0] == version
    assert run_record["versions"]["Python"].startswith(python + ".")
    if device == "ook":  # a Jetson's base image has git, its stand-in does not
        assert run_record["git_commit"] and not run_record["git_dirty"]
    assert run_record["config"]["wandb_project"] == "from-the-env-file"
    assert list((checkout / "wandb").glob("offline-run-*")), "the offline run outlives the container"
    assert (checkout / ".cache").is_dir()

    owners = {path.lstat().st_uid for path in checkout.rglob("*")}
    assert owners == {USER}
    subprocess.run(["rm", "-r", *checkout.iterdir()], check=True, user=USER, group=USER, extra_groups=[])


@pytest.mark.parametrize("image", IMAGES)
def test_without_a_gpu_a_run_ends_with_one_error_line(image, engine, built):
    """`docker run` without --gpus must not train on the CPU unnoticed."""
    run = engine.docker(
        "run", "--rm", built(image), "python", "vit.py", "--no-use-wandb", "--dataset", "synthetic", check=False
    )
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1 and "GPU" in run.stderr, run


@pytest.mark.parametrize("image", IMAGES)
def test_every_image_has_its_backend_its_settings_and_the_vendors_packages(image, engine, built):
    name = built(image)
    config = json.loads(engine.docker("inspect", "--format", "{{json .Config}}", name).stdout)
    assert config["WorkingDir"] == "/app" and config["Cmd"] == ["python", "vit.py"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["KERAS_BACKEND"] == EXPECTED[image][0] and environment["VIT_DEVICE"] == "gpu"
    if image == "ojo.jax":
        assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "0.31.0" in engine.docker("run", "--rm", name, "wandb", "--version").stdout
    if image.startswith("ojo"):  # the installed packages are still the vendor's
        script = "cd /opt/vit && python3 docker/keep_vendor.py | grep -xFf vendor.txt | cmp - vendor.txt"
        vendor = engine.docker("run", "--rm", name, "sh", "-c", script + " && cat vendor.txt").stdout
        base = container_engine.JETSON[EXPECTED[image][0]]
        assert {line.partition("+")[0] for line in vendor.split()} >= set(container_engine.VENDOR[EXPECTED[image][0]])
        keep_vendor = (ROOT / "docker/keep_vendor.py").read_text()
        assert engine.docker("run", "--rm", "-i", base, "python3", "-", input=keep_vendor).stdout == vendor


def test_the_build_fails_if_pip_replaces_what_the_vendor_built(engine):
    """The base image has a pip that replaces NumPy in spite of the constraints."""
    metadata = "/usr/local/lib/python3.10/site-packages/numpy-1.26.4.dist-info/METADATA"
    python = [
        "#!/bin/sh -e",
        'python3.10 "$@"',
        f"[ $2 != pip ] || sed -i 's/^Version: 1.26.4/Version: 1.26.5/' {metadata}",
    ]
    base = [
        f"FROM {container_engine.JETSON['jax']}",
        "COPY python3 /usr/local/bin/",
        "RUN chmod 755 /usr/local/bin/python3",
    ]
    base.insert(1, "RUN rm /usr/local/bin/python3")  # a link to python3.10
    engine.build("faithless:latest", base, {"python3": "\n".join(python).encode()})
    build = ["build", "-f", "Dockerfile.ojo.jax", "--build-arg", "BASE_IMAGE=faithless:latest", "."]
    failed = engine.docker(*build, check=False, cwd=ROOT)
    assert failed.returncode != 0
    assert "keep_vendor.py: error: pip replaced the vendor's numpy==1.26.4" in failed.stdout + failed.stderr


def test_a_changed_script_reinstalls_nothing(engine, built, tmp_path):
    """A change in vit.py copies vit.py; a change in edgebench/ copies both. Every other layer comes from the cache."""
    copy_from_root(tmp_path, *BUILD_FILES, "Dockerfile.ook.jax", "edgebench", "vit.py")
    build = ["build", "-f", "Dockerfile.ook.jax", *engine.build_args["ook.jax"], "."]
    copy_package, copy_script = "COPY edgebench /app/edgebench/", "COPY vit.py /app/"
    for changed, expected in (("vit.py", [copy_script]), ("edgebench/cli.py", [copy_package, copy_script])):
        with (tmp_path / changed).open("a") as file:
            file.write("# changed\n")
        steps = engine.docker(*build, cwd=tmp_path).stdout.split("\nStep ")[1:]
        executed = [step.splitlines()[0].partition(" : ")[2] for step in steps if "Using cache" not in step]
        # The first ARG and FROM make no layer.
        assert [step for step in executed if not step.startswith("FROM")][1:] == expected, executed


def test_nothing_private_reaches_an_image(engine, tmp_path):
    private = [".env", ".git/config", "results/run.json", ".cache/keras/data.npz", "wandb/run.wandb"]
    private += ["docker/.env", "edgebench/.env", "edgebench/__pycache__/cli.cpython-311.pyc"]
    public = ["constraints.common.txt", "docker/constraints.images.txt", "docker/entrypoint.sh"]
    public += ["docker/keep_vendor.py", "edgebench/cli.py", "vit.py"]
    for name in private + public:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM python:3.11-slim\nCOPY . /context\n")
    engine.docker("build", "-t", "context", ".", cwd=tmp_path)
    found = engine.docker("run", "--rm", "context", "find", "/context", "-type", "f").stdout.split()
    assert sorted(found) == [f"/context/{name}" for name in public]


def test_a_container_started_as_a_user_works_too(engine, built, checkout):
    command = ["run", "--rm", "--user", f"{USER}:{USER}", "-v", f"{checkout}:/app", *CPU, built("ook.pytorch"), *TRAIN]
    run = engine.docker(*command, "--no-use-wandb", check=False)
    assert run.returncode == 0, run
    assert {path.lstat().st_uid for path in checkout.rglob("*")} == {USER}


def test_docker_stop_ends_a_run_and_keeps_its_results(engine, built, checkout):
    """The signal reaches vit.py through the entry point."""
    command = ["run", "-d", "--name", "stopped", "-v", f"{checkout}:/app", *CPU, built("ook.jax")]
    engine.docker(*command, *TRAIN[:-1], "100000", "--no-use-wandb")  # epochs
    try:
        container_engine.wait_for(
            lambda: "Epoch 1/" in engine.docker("logs", "stopped").stdout, "the second epoch", seconds=300
        )
        engine.docker("stop", "--time", "60", "stopped")
        status = engine.docker("inspect", "--format", "{{.State.ExitCode}}", "stopped").stdout.strip()
        assert status == "143", engine.docker("logs", "stopped")
        assert read_results(checkout)["what"]["backend"] == "jax"
    finally:
        engine.docker("rm", "-f", "stopped")


@pytest.mark.parametrize("device, backend", [("ook", "jax"), ("ojo", "pytorch")])
def test_a_sweep_in_containers(device, backend, engine, built, checkout, digits):
    """The unmodified launcher builds the image, creates the sweep and runs a trial, whose files belong to the user.

    Then Ctrl-C ends the second trial, the agent and the container.
    """
    sweeps = pytest.importorskip("test_sweeps")
    image = f"{device}.{backend}"
    copy_from_root(checkout, *sweeps.FILES, *BUILD_FILES, f"Dockerfile.{image}")
    shutil.copy(digits, checkout / "digits.npz")
    for path in checkout.rglob("*"):
        os.chown(path, USER, USER)
    (checkout / ".env").unlink()  # it sets W&B offline
    server = sweeps.WandbServer(host=container_engine.HOST)
    server.change = {1: {"num_epochs": 5000}}
    docker = {name: engine.environment[name] for name in ("DOCKER_HOST", "DOCKER_BUILDKIT", "DOCKER_CONFIG")}
    docker["DOCKER_BUILD_FLAGS"] = " ".join(engine.build_args[image])
    flags = [*sweeps.TINY.split(), "--num-epochs", "1", "--dataset", "digits.npz", "--device", "cpu"]
    engine.gpu_requests()
    launched = sweeps.Launched(checkout, server, device, backend, "--", *flags, **docker)
    try:
        launched.wait_for(lambda: len(server.runs) > 1 and server.runs["run2"]["history"], timeout=600)
        os.killpg(launched.process.pid, signal.SIGINT)
        assert launched.wait(240) == 130, launched.lines
        assert engine.docker("ps", "-q").stdout == ""
    finally:
        engine.docker("rm", "-f", f"vit-sweep-{device}-{backend}", check=False)
        server.close()
    assert launched.lines[-1].endswith(": 1 finished, 1 stopped early, 0 failed"), launched.lines
    assert {"ook": "gpus", "ojo": "nvidia"}[device] in engine.gpu_requests()
    first, second = server.runs.values()
    assert {name: first["config"].get(name) for name in first["sent"]} == first["sent"]
    assert (first["exit"], first["config"]["node_name"]) == (0, device) and second["exit"] is not None
    assert sweeps.KEY not in "\n".join(launched.lines)
    assert {path.lstat().st_uid for path in (checkout / "results").rglob("*.json")} == {USER}
