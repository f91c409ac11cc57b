"""A temporary Docker engine for the tests, with stand-ins for the base images of the four Dockerfiles.

    with container_engine.start(folder) as engine:
        engine.make_base_images()
        engine.docker("build", "-f", "Dockerfile.ook.jax", "-t", "vit:ook-jax", *engine.build_args["ook.jax"], ".", cwd=...)

From a shell, to run a command that calls `docker` itself:

    python tests/container_engine.py FOLDER COMMAND...

The engine runs in its own network, mount and process namespaces, so its bridge, firewall rules, mounts and containers
vanish with it. It reaches the network through slirp4netns, which needs no privileges on the host. FOLDER/kept holds the
packed Debian and the wheels for the next time. Besides that only engine.log stays in FOLDER.

The stand-ins have the real images' names. python:3.11-slim is a Debian with Python 3.11. The two Jetson images add Python
3.10, JAX 0.4.35 or torch 2.4.0, and a pip that is set to a dead index. torch is the real one, but the CUDA libraries that
it links to (2.5 GB) are replaced: these have the same symbols and report that there is no GPU.
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
HOST = "10.0.2.2"  # the address at which slirp4netns offers the host's loopback to the engine and its containers
DEAD_INDEX = "http://127.0.0.1:9/simple"
JETSON = {"jax": "dustynv/jax:r36.4.0", "torch": "dustynv/l4t-pytorch:r36.4.0"}
VENDOR = {"jax": ["jax==0.4.35", "jaxlib==0.4.35", "numpy==1.26.4"], "torch": ["torch==2.4.0", "numpy==1.26.4"]}
# The contents of the local wheel index
PYTORCH = {"3.11": ["torch==2.5.1", "torchvision==0.20.1"], "3.10": VENDOR["torch"]}

# The engine writes to /run and /etc, so it gets its own copies.
START_DOCKERD = 'mount -t tmpfs tmpfs /run && cp -a /etc "$0/etc" && mount --bind "$0/etc" /etc && exec dockerd "$@"'
# runc without ulimits, which need CAP_SYS_RESOURCE. It records the name by which it was called.
RUNC = """#!/usr/bin/env python3
import json, os, sys
with open(os.path.dirname(__file__) + "/../gpu-requests", "a") as file:
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


def unavailable_reason() -> str | None:
    """Why no engine can run here, or None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a container engine needs Linux and root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := sorted({package for name, package in PROGRAMS.items() if not shutil.which(name, path=path)}):
        return f"a container engine needs: apt-get install {' '.join(missing)}"
    if not os.access("/dev/net/tun", os.W_OK):
        return "a container engine needs /dev/net/tun"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "a container engine needs permission to create namespaces"
    if python310() is None:
        return "the stand-in for a Jetson image needs Python 3.10 (python3.10 on PATH or in pyenv)"
    return None


def python310() -> Path | None:
    """The installation folder of a Python 3.10, or None."""
    candidates = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True)
        if done.returncode == 0:
            return Path(done.stdout.strip())
    return None


class Engine:
    """A running engine. `docker` runs a command on it; with `environment`, any other program's `docker` does too."""

    def __init__(self, folder: Path, kept: Path, wheel_server: str):
        self.folder, self.kept, self.wheel_server = folder, kept, wheel_server
        self.environment = os.environ | {
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_BUILDKIT": "0",  # use the engine's own builder, because buildx may be missing
            "DOCKER_CONFIG": str(folder / "config"),
        }
        # These replace the large CUDA wheels; the Dockerfiles stay unmodified.
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

    def gpu_requests(self) -> list[str]:
        """What containers have requested since the last call: `gpus` for each --gpus, and each runtime's name."""
        path = self.folder / "gpu-requests"
        requests = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return requests

    def make_base_images(self) -> None:
        """Build stand-ins for the three base images, under the names in the Dockerfiles."""
        tar = self.kept / "base.tar"
        if not tar.exists():
            unfinished = self.kept / "unfinished-base.tar"
            packages = "ca-certificates,libpython3.11-dev,python3,python3-pip,python3-venv"
            without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc")]
            command = ["mmdebstrap", "-q", "--variant=minbase", f"--include={packages}", *without]
            _run(*command, '--aptopt=APT::Install-Recommends "false"', "bookworm", str(unfinished))
            os.replace(unfinished, tar)
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
                # The real image has python3, but possibly no python.
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
def start(folder: Path) -> Iterator[Engine]:
    """Start an engine in `folder`, and stop it at the end."""
    folder = folder.resolve()
    kept = folder / "kept"
    wheels = _wheel_index(kept)
    engine_folder = folder / "engine"
    if engine_folder.exists():
        if _accepts_connections(engine_folder / "socket"):
            raise AssertionError(f"another engine is running in {folder}")
        shutil.rmtree(engine_folder)  # left over from tests that were killed
    (engine_folder / "bin").mkdir(parents=True)
    # dockerd accepts --gpus if this hook is on its PATH, and runs it for each container with that flag.
    hook = f"#!/bin/sh\necho gpus >> {engine_folder}/gpu-requests\n"
    for name, text in {"nvidia-container-runtime-hook": hook, "plain": RUNC, "nvidia": RUNC}.items():
        (engine_folder / "bin" / name).write_text(text)
        (engine_folder / "bin" / name).chmod(0o755)
    group = f"/vit-{os.getpid()}"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-c", START_DOCKERD, str(engine_folder), f"--host=unix://{engine_folder}/socket"]
    command += [f"--data-root={engine_folder}/data", f"--exec-root={engine_folder}/exec"]
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
        inner = wait_for(lambda: _child(outer.pid), "the engine's process")
        network = subprocess.Popen(["slirp4netns", "--configure", "--mtu", "1400", str(inner), "tap0"], **quiet)
        stack.callback(_stop_network, network)
        wait_for(
            lambda: engine.docker("info", check=False).returncode == 0, f"the engine (see {folder / 'engine.log'})"
        )
        yield engine


def _accepts_connections(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return next(map(int, children.read_text().split()), None) if children.exists() else None


def wait_for(condition, description: str, seconds: float = 180):
    """Return the first true result of `condition`."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {description}")
        time.sleep(0.2)
    return result


def _stop(outer: subprocess.Popen) -> None:
    """Stop the engine. If it does not end by itself, its process namespace is killed with everything in it."""
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
    """Remove the engine's folder and the control groups of its containers."""
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
    """Serve `folder` on the host's loopback. Yields the URL that works inside the engine and its containers."""

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
# A wheel index with torch and with stand-ins for the CUDA libraries that it needs
# --------------------------------------------------------------------------------------------------------------


def _wheel_index(kept: Path) -> Path:
    """A folder whose `simple` is a wheel index: PyTorch, its dependencies, and stand-ins for CUDA and triton."""
    index = kept / ("wheels-" + hashlib.sha256(repr(PYTORCH).encode()).hexdigest()[:8])
    if index.exists():
        return index
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        for python, requirements in PYTORCH.items():
            folder = Path(scratch, python)
            pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), "--only-binary", ":all:"]
            pip += ["--python-version", python, "--implementation", "cp"]
            for tag in ("manylinux_2_28", "manylinux2014", "manylinux_2_17", "manylinux1"):
                pip += ["--platform", f"{tag}_x86_64"]
            _run(*pip, "--no-deps", *requirements)
            torch = next(folder.glob("torch-*.whl"))
            dependencies = []
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
                    dependencies.append(needed.name + str(needed.specifier))
            _run(*pip, *dependencies, "pillow")
            for wheel_file in folder.iterdir():
                project = re.sub(r"[-_.]+", "-", wheel_file.name.split("-")[0]).lower()
                target = Path(scratch, "index/simple", project)
                target.mkdir(parents=True, exist_ok=True)
                wheel_file.rename(target / wheel_file.name)
        Path(scratch, "index").rename(index)
    return index


def _cuda_libraries(torch_wheel: Path) -> dict[str, bytes]:
    """Build a stand-in for each CUDA library that torch links to but does not contain, with every symbol that torch uses.

    Each function returns cudaErrorNoDevice, so torch reports that there is no GPU.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(torch_wheel) as wheel:
            inside = [name for name in wheel.namelist() if name.startswith("torch/lib/") and ".so" in name]
            wheel.extractall(scratch, inside)
        paths = [str(Path(scratch, name)) for name in inside]
        dynamic = _run("readelf", "-d", "--wide", *paths)
        contained = {Path(path).name for path in paths}
        system = re.compile(r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux.*|libcuda)\.so.*")
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) - contained
        missing = sorted(name for name in needed if not system.fullmatch(name))
        symbols: dict[str, set[str]] = {name: set() for name in missing}
        for path in paths:
            for line in _run("nm", "--dynamic", "--undefined-only", path).splitlines():
                symbol, _, version = line.split()[-1].partition("@")
                if symbol.startswith("nccl"):
                    library = "libnccl.so.2"
                elif symbol.startswith("curand"):
                    library = "libcurand.so.10"
                else:
                    library = version
                if library in symbols:
                    symbols[library].add(symbol)
        files = {}
        for library, names in symbols.items():
            code = Path(scratch, "stand_in.c")
            functions = [
                f'const char *{name}(void) {{ return "no GPU"; }}'
                if re.search("Error(String|Name)", name)
                else f"int {name}(void) {{ return 100; }}"
                for name in names
            ]
            code.write_text("\n".join(functions) + "\n")
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
    if reason := unavailable_reason():
        sys.exit(f"container_engine.py: error: {reason}")
    with start(Path(sys.argv[1])) as running:
        running.make_base_images()
        status = subprocess.run(sys.argv[2:], env=running.environment).returncode
    sys.exit(status)
