"""A private, throw-away Docker engine, and stand-ins for the base images of the four Dockerfiles under their real names.

    with container_engine.up(folder) as engine:
        engine.make_base_images()
        engine.docker("build", "-f", "Dockerfile.ook.jax", "-t", "vit:ook-jax", *engine.BUILD_ARGS["ook.jax"], ".", cwd=...)

or from a shell, for a command that calls `docker` itself:

    python tests/container_engine.py FOLDER COMMAND...

The engine lives in network, mount and process namespaces of its own and reaches the network through slirp4netns, a program
without privileges on the host: its bridge, firewall rules, mounts and containers vanish with it. Whatever can be made again
is kept in FOLDER/kept for the next time, the rest of FOLDER is removed.

The stand-ins: Debian with Python 3.11 for python:3.11-slim; the same with Python 3.10, JAX 0.4.35 or torch 2.4.0, and a pip
that asks a dead index for the two Jetson images. torch is the real one; the CUDA libraries that it links to (2.5 GB) are
replaced by libraries with the same symbols which answer that there is no GPU.
"""

import contextlib
import functools
import hashlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

PROGRAMS = {"dockerd": "docker.io", "docker": "docker.io", "iptables": "iptables", "slirp4netns": "slirp4netns"}
PROGRAMS |= {"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "ip": "iproute2", "gcc": "gcc", "nm": "binutils"}
HOST = "10.0.2.2"  # the host's loopback, as slirp4netns shows it to the engine and its containers
DEAD_INDEX = "http://127.0.0.1:9/simple"
JETSON = {"jax": "dustynv/jax:r36.4.0", "torch": "dustynv/l4t-pytorch:r36.4.0"}
VENDOR = {"jax": ["jax==0.4.35", "jaxlib==0.4.35", "numpy==1.26.4"], "torch": ["torch==2.4.0", "numpy==1.26.4"]}
PYTORCH = {"3.11": ["torch==2.5.1", "torchvision==0.20.1"], "3.10": VENDOR["torch"]}  # what the local wheel index holds

# The engine's own view of /run and /etc, where it leaves files.
START = 'mount -t tmpfs tmpfs /run && cp -a /etc "$0/etc" && mount --bind "$0/etc" /etc && exec dockerd "$@"'
# runc without ulimits: who lacks CAP_SYS_RESOURCE may not set them. It notes the name that it was called by.
RUNC = """#!/usr/bin/env python3
import json, os, sys
with open(os.path.dirname(__file__) + "/../asked-for", "a") as file:
    file.write(os.path.basename(__file__) + "\\n")
arguments = sys.argv[1:]
for flag, bundle in zip(arguments, arguments[1:]):
    if flag in ("--bundle", "-b"):
        path = os.path.join(bundle, "config.json")
        with open(path) as file:
            config = json.load(file)
        config["process"].pop("rlimits", None)
        with open(path, "w") as file:
            json.dump(config, file)
os.execvp("runc", ["runc", *arguments])
"""


def why_not() -> str | None:
    """Why no engine can be brought up here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a container engine needs Linux and root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := sorted({package for name, package in PROGRAMS.items() if not shutil.which(name, path=path)}):
        return f"a container engine needs: apt-get install {' '.join(missing)}"
    if not os.access("/dev/net/tun", os.W_OK):
        return "a container engine needs /dev/net/tun"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "a container engine needs the right to make namespaces"
    if python310() is None:
        return "the stand-in of a Jetson image needs a Python 3.10 (python3.10 on PATH, or of pyenv)"
    return None


def python310() -> Path | None:
    """The folder that a Python 3.10 is installed in."""
    candidates = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True)
        if done.returncode == 0:
            return Path(done.stdout.strip())
    return None


class Engine:
    """A running engine; `docker` runs a command against it, `environment` is what makes `docker` find it."""

    def __init__(self, folder: Path, kept: Path, wheel_server: str):
        self.folder, self.kept, self.wheel_server = folder, kept, wheel_server
        self.environment = os.environ | {
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_BUILDKIT": "0",  # the builder inside the engine: buildx may not be there
            "DOCKER_CONFIG": str(folder / "config"),
        }
        # What stands in for the heavy wheels with CUDA; the Dockerfiles themselves are built as they are.
        self.build_args = {
            "ook.jax": ["--build-arg", "JAX=jax"],
            "ook.pytorch": ["--build-arg", f"TORCH_WHEEL_INDEX={wheel_server}/simple"],
            "ojo.jax": [],
            "ojo.pytorch": [],
        }

    def docker(
        self, *arguments: str, check: bool = True, timeout: float = 600, **options
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["docker", *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout, **options
        )
        if check and done.returncode:
            raise AssertionError(
                f"docker {' '.join(arguments)}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def asked_for(self) -> list[str]:
        """`gpus` for each container since the last call that asked for --gpus, and the runtimes that were called."""
        note = self.folder / "asked-for"
        lines = note.read_text().split() if note.exists() else []
        note.unlink(missing_ok=True)
        return lines

    def make_base_images(self) -> None:
        """Stand-ins for the three base images, under the names that the Dockerfiles ask for."""
        tar = self.kept / "base.tar"
        if not tar.exists():
            part = self.kept / "part-of-base.tar"
            packages = "ca-certificates,libpython3.11-dev,python3,python3-pip,python3-venv"
            without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc")]
            command = ["mmdebstrap", "-q", "--variant=minbase", f"--include={packages}", *without]
            _run(*command, '--aptopt=APT::Install-Recommends "false"', "bookworm", str(part))
            os.replace(part, tar)
        self.docker("import", str(tar), "stand-in:raw")
        self.certificates = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")).read_bytes()
        common = [
            "COPY ca-certificates.crt /etc/ssl/certs/",
            "ENV LANG=C.UTF-8 PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_ROOT_USER_ACTION=ignore"
            f" PIP_TRUSTED_HOST={HOST}",
        ]
        slim = [
            "FROM stand-in:raw",
            *common,
            "RUN ln -s python3 /usr/bin/python && rm /usr/lib/python3*/EXTERNALLY-MANAGED",
        ]
        self.build("python:3.11-slim", [*slim, 'CMD ["python3"]'], {"ca-certificates.crt": self.certificates})

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(functools.partial(self._make_jetson_image, common), JETSON))

    def _make_jetson_image(self, common: list[str], backend: str) -> None:
        prefix = python310()
        skip = shutil.ignore_patterns("__pycache__", "test", "*.a", "site-packages")
        with tempfile.TemporaryDirectory(dir=self.folder) as context:
            for part in ("bin/python3.10", "lib/libpython3.10.so.1.0"):
                if (prefix / part).exists():
                    target = Path(context, "python", part)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(prefix / part, target)
            shutil.copytree(prefix / "lib/python3.10", Path(context, "python/lib/python3.10"), ignore=skip)
            index = f"--index-url {self.wheel_server}/simple" if backend == "torch" else ""
            dockerfile = [
                "FROM stand-in:raw",
                *common,
                "COPY python /usr/local",
                # A real one has a python3 and perhaps no python.
                "RUN ldconfig && ln -s python3.10 /usr/local/bin/python3 && python3 -m ensurepip"
                f" && python3 -m pip install --no-cache-dir {index} {' '.join(VENDOR[backend])}",
                f"ENV PIP_INDEX_URL={DEAD_INDEX} PIP_EXTRA_INDEX_URL={DEAD_INDEX} PIP_TRUSTED_HOST=127.0.0.1",
                f"RUN printf '[global]\\nindex-url = {DEAD_INDEX}\\n' > /etc/pip.conf",
            ]
            self.build(JETSON[backend], dockerfile, {"ca-certificates.crt": self.certificates}, Path(context))

    def build(self, tag: str, dockerfile: list[str], files: dict[str, bytes], context: Path | None = None) -> None:
        """Build an image from the lines of a Dockerfile."""
        with contextlib.ExitStack() as stack:
            context = context or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder)))
            for name, content in files.items():
                (context / name).write_bytes(content)
            (context / "Dockerfile").write_text("\n".join(dockerfile) + "\n")
            self.docker("build", "-t", tag, str(context))


@contextlib.contextmanager
def up(folder: Path) -> Iterator[Engine]:
    """Bring an engine up in `folder`, and take it down."""
    folder = folder.resolve()
    kept = folder / "kept"
    wheels = _wheel_index(kept)
    engine_folder = folder / "engine"
    if engine_folder.exists():
        if _is_answered(engine_folder / "socket"):
            raise AssertionError(f"another engine runs in {folder}")
        shutil.rmtree(engine_folder)  # left by tests that were killed
    (engine_folder / "bin").mkdir(parents=True)
    # dockerd accepts --gpus where it finds this hook on its PATH, and has it run for each container that asks.
    hook = f"#!/bin/sh\necho gpus >> {engine_folder}/asked-for\n"
    for name, text in {"nvidia-container-runtime-hook": hook, "plain": RUNC, "nvidia": RUNC}.items():
        (engine_folder / "bin" / name).write_text(text)
        (engine_folder / "bin" / name).chmod(0o755)
    group = f"/vit-{os.getpid()}"
    command = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        START,
        str(engine_folder),
    ]
    command += [
        f"--data-root={engine_folder}/data",
        f"--exec-root={engine_folder}/exec",
        f"--host=unix://{engine_folder}/socket",
    ]
    command += [f"--pidfile={engine_folder}/pid", "--oom-score-adjust=0", "--mtu=1400"]
    command += [f"--add-runtime={name}={engine_folder}/bin/{name}" for name in ("nvidia", "plain")]
    command += ["--default-runtime=plain", f"--cgroup-parent={group}", "--dns=10.0.2.3"]  # slirp4netns' name server
    environment = os.environ | {"PATH": f"{engine_folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, engine_folder, group)
        engine = Engine(engine_folder, kept, stack.enter_context(_serve(wheels)))
        log = stack.enter_context((folder / "engine.log").open("w"))
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        outer = subprocess.Popen(command, env=environment, **quiet)
        stack.callback(_stop, outer)
        inner = _wait_for(lambda: _child(outer.pid), "the engine's process")
        network = subprocess.Popen(["slirp4netns", "--configure", "--mtu", "1400", str(inner), "tap0"], **quiet)
        stack.callback(_stop_network, network)
        ready = lambda: engine.docker("info", check=False).returncode == 0  # noqa: E731
        _wait_for(ready, f"the engine, see {folder / 'engine.log'}")
        yield engine


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return next(map(int, children.read_text().split()), None) if children.exists() else None


def _wait_for(condition, what: str, seconds: float = 180):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no sign of {what} after {seconds:g} s")
        time.sleep(0.2)
    return result


def _stop(outer: subprocess.Popen) -> None:
    """End the engine in good order; whatever is left of it ends with its process namespace."""
    if (inner := _child(outer.pid)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(inner, signal.SIGTERM)
    try:
        outer.wait(20)
    except subprocess.TimeoutExpired:
        outer.kill()
        outer.wait()


def _stop_network(network: subprocess.Popen) -> None:
    network.terminate()
    network.wait()


def _remove(folder: Path, group: str) -> None:
    """Remove the engine's folder, and the control groups that its containers ran in."""
    for path in [*Path("/sys/fs/cgroup").glob(group[1:]), *Path("/sys/fs/cgroup").glob("*" + group)]:
        for inner in sorted(path.rglob("*/"), reverse=True):
            inner.rmdir()
        path.rmdir()
    shutil.rmtree(folder)


def _run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def _serve(folder: Path) -> Iterator[str]:
    """Serve `folder` on the host's loopback; the address is the one that the engine and its containers use."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# --------------------------------------------------------------------------------------------------------------
# A wheel index with torch, and with stand-ins for the CUDA libraries that it asks for
# --------------------------------------------------------------------------------------------------------------


def _wheel_index(kept: Path) -> Path:
    """A folder whose `simple` is a wheel index: PyTorch's wheels, what they need, and stand-ins for CUDA and triton."""
    index = kept / ("wheels-" + hashlib.sha256(repr(PYTORCH).encode()).hexdigest()[:8])
    if index.exists():
        return index
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        for python, requirements in PYTORCH.items():
            folder = Path(scratch, python)
            pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), "--only-binary", ":all:"]
            pip += [
                "--python-version",
                python,
                "--platform",
                "manylinux_2_28_x86_64",
                "--platform",
                "manylinux2014_x86_64",
            ]
            pip += ["--platform", "manylinux1_x86_64", "--platform", "manylinux_2_17_x86_64", "--implementation", "cp"]
            _run(*pip, "--no-deps", *requirements)
            torch = next(folder.glob("torch-*.whl"))
            others = []
            with zipfile.ZipFile(torch) as wheel:
                metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
                lines = wheel.read(metadata).decode().splitlines()
            for line in (line for line in lines if line.startswith("Requires-Dist: ")):
                needed = Requirement(line.removeprefix("Requires-Dist: "))
                if needed.marker and not needed.marker.evaluate({"python_version": python, "extra": ""}):
                    continue
                if needed.name.startswith("nvidia-") or needed.name == "triton":
                    files = _cuda_libraries(torch) if needed.name == "nvidia-cuda-runtime-cu12" else {}
                    _write_wheel(folder, needed.name, str(needed.specifier).removeprefix("=="), files)
                else:
                    others.append(needed.name + str(needed.specifier))
            _run(*pip, *others, "pillow")
            for wheel_file in folder.iterdir():
                project = re.sub(r"[-_.]+", "-", wheel_file.name.split("-")[0]).lower()
                target = Path(scratch, "index/simple", project)
                target.mkdir(parents=True, exist_ok=True)
                wheel_file.rename(target / wheel_file.name)
        Path(scratch, "index").rename(index)
    return index


def _cuda_libraries(torch_wheel: Path) -> dict[str, bytes]:
    """Libraries named like the CUDA libraries that torch links to and does not bring, with every symbol that it asks of them.

    Each function returns cudaErrorNoDevice, which torch takes as: no GPU here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(torch_wheel) as wheel:
            inside = [name for name in wheel.namelist() if name.startswith("torch/lib/") and ".so" in name]
            wheel.extractall(scratch, inside)
        paths = [str(Path(scratch, name)) for name in inside]
        dynamic = _run("readelf", "-d", "--wide", *paths)
        brought = {Path(path).name for path in paths}
        system = re.compile(r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux.*|libcuda)\.so.*")
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) - brought
        missing = sorted(name for name in needed if not system.fullmatch(name))
        symbols: dict[str, set[str]] = {name: set() for name in missing}
        for path in paths:
            for line in _run("nm", "--dynamic", "--undefined-only", path).splitlines():
                symbol, _, version = line.split()[-1].partition("@")
                library = version if version in symbols else "libnccl.so.2" if symbol.startswith("nccl") else None
                library = "libcurand.so.10" if symbol.startswith("curand") else library
                if library in symbols:
                    symbols[library].add(symbol)
        files = {}
        for library, names in symbols.items():
            code = Path(scratch, "stand_in.c")
            text = [
                f'const char *{name}(void) {{ return "no GPU"; }}'
                for name in names
                if re.search("Error(String|Name)", name)
            ]
            text += [
                f"int {name}(void) {{ return 100; }}" for name in names if not re.search("Error(String|Name)", name)
            ]
            code.write_text("\n".join(text) + "\n")
            versions = Path(scratch, "versions.map")
            versions.write_text(f"{library} {{ global: *; }};\n")
            built = Path(scratch, library)
            flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
            _run("gcc", *flags, "-o", str(built), str(code))
            files[f"nvidia/cuda_runtime/lib/{library}"] = built.read_bytes()
        return files


def _write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    files = files | {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: stand-in\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in (files | {f"{stem}.dist-info/RECORD": record.encode()}).items():
            wheel.writestr(path, content)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if reason := why_not():
        sys.exit(f"container_engine.py: error: {reason}")
    with up(Path(sys.argv[1])) as running:
        running.make_base_images()
        status = subprocess.run(sys.argv[2:], env=running.environment).returncode
    sys.exit(status)
