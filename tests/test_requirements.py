"""Promises about the images that need no container engine: what they install, and the scripts that work in them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib

BINARIES = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
UV = shutil.which("uv", path=BINARIES)
# The packages of the base image, which must not change.
VENDOR = {
    "ojo.jax": ["jax==0.4.35", "jaxlib==0.4.35", "numpy==1.26.4"],
    "ojo.pytorch": ["numpy==1.26.4"],
}
IMAGES = {
    "ook.jax": ("x86_64-manylinux_2_28", "3.11"),
    "ook.pytorch": ("x86_64-manylinux_2_28", "3.11"),
    "ojo.jax": ("aarch64-manylinux_2_28", "3.10"),
    "ojo.pytorch": ("aarch64-manylinux_2_28", "3.10"),
}


def installed_by(image: str) -> list[str]:
    """The requirements that Dockerfile.<image> installs if its build arguments keep their defaults."""
    text = (ROOT / f"Dockerfile.{image}").read_text().replace("\\\n", " ")
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    names = []
    for command in re.findall(r"pip install ([^&\n]*)", text):
        words = re.sub(r"(-c|--index-url) +\S+|--no-cache-dir", "", command).replace('"', "").split()
        names += [arguments[word[1:]] if word.startswith("$") else word for word in words]
    return names


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib needs Python 3.11")
@pytest.mark.parametrize("image", IMAGES)
def test_every_image_installs_what_the_project_requires(image):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["wandb"], *(extras["nvml"] if image.startswith("ook") else [])]
    backend = {"ook.jax": ["jax[cuda12]"], "ook.pytorch": ["torch", "torchvision"]}.get(image, [])
    names = {re.split(r"[<>=~]", requirement)[0] for requirement in required}
    assert sorted(installed_by(image)) == sorted([*names, *backend])


@pytest.mark.end_to_end
@pytest.mark.skipif(UV is None, reason="uv is not installed")
@pytest.mark.parametrize("image", IMAGES)
def test_every_image_resolves_for_its_platform_from_wheels_alone(image, tmp_path):
    """All resolve to the same Keras. PyTorch's own index is not needed, because pip's default index has the same torch."""
    platform, python = IMAGES[image]
    (tmp_path / "requirements.in").write_text("\n".join(installed_by(image) + VENDOR.get(image, [])) + "\n")
    command = [UV, "pip", "compile", "--python-platform", platform, "--python-version", python]
    command += ["--only-binary", ":all:", "-c", str(ROOT / "docker/constraints.images.txt")]
    command += ["--no-header", "--no-annotate", "requirements.in"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    resolved = done.stdout.split()
    assert "keras==3.12.4" in resolved
    assert set(VENDOR.get(image, [])) <= set(resolved)


def test_the_packages_kept_are_those_that_are_imported(tmp_path):
    """A package that another one hides is not kept, and a folder without metadata is passed over."""
    metadata = {
        "first/numpy-1.26.4.dist-info": "Name: numpy\nVersion: 1.26.4\n",
        "first/torch-2.4.0.dist-info": "",
        "first/jax-0.4.35.dist-info": None,
        "first/ml_dtypes-0.5.dist-info": "Name: ml_dtypes\nVersion: 0.5\n",
        "last/numpy-2.4.6.dist-info": "Name: NumPy\nVersion: 2.4.6\n",
        "last/ml_dtypes-0.6.dist-info": "Name: ml-dtypes\nVersion: 0.6\n",
        "last/triton-3.0.dist-info": "Name: triton\nVersion: 3.0\n",
    }
    for name, text in metadata.items():
        (tmp_path / name).mkdir(parents=True)
        if text is not None:
            (tmp_path / name / "METADATA").write_text(text)

    def keep_vendor(*arguments: str, path: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", ROOT / "docker/keep_vendor.py", *arguments]  # -S: without site-packages
        return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True)

    kept = keep_vendor(path="first:last")
    assert (kept.stdout.split(), kept.stderr) == (["ml_dtypes==0.5", "numpy==1.26.4", "triton==3.0"], "")
    (tmp_path / "vendor.txt").write_text(kept.stdout)
    assert keep_vendor("--check", "vendor.txt", path="first:last").returncode == 0
    hidden = keep_vendor("--check", "vendor.txt", path="last:first")
    error = "keep_vendor.py: error: pip replaced the vendor's ml_dtypes==0.5, numpy==1.26.4\n"
    assert (hidden.returncode, hidden.stderr) == (1, error)


# A root folder with this machine's programs, and its own /app and /dev.
IN_ROOT = """cd "$0"; chmod 755 .; mkdir -p app dev usr tmp; ln -s usr/bin usr/lib usr/lib64 .; mount --bind /usr usr
mknod dev/nvmap c 1 3; chgrp $1 dev/nvmap; mknod dev/null c 1 3; cp "$2" entrypoint.sh; eval "$3"; chown $4 app
HOME=/app/.cache exec chroot . /entrypoint.sh sh -c 'id -u; id -g; id -G; touch "$HOME/file" && stat -L -c %u "$HOME/file"'"""


@pytest.mark.skipif(
    os.getuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="a root folder of its own needs root",
)
@pytest.mark.parametrize(
    "device_group, cache, owner, expected",
    [
        ("44", "", "12345:12346", ["12345", "12346", "12346 44", "12345"]),
        ("0", "", "12345:12346", ["12345", "12346", "12346", "12345"]),
        ("0", "", "12345:0", ["12345", "12345", "12345", "12345"]),
        ("44", "mkdir app/.cache", "12345:12346", ["12345", "12346", "12346 44", "12345"]),
        ("44", "ln -s /home/me/.cache app/.cache", "12345:12346", ["12345", "12346", "12346 44", "12345"]),
        ("44", "ln -s .cache app/.cache", "12345:12346", ["12345", "12346", "12346 44"]),  # a circle
        ("44", "touch app/.cache", "12345:12346", ["12345", "12346", "12346 44"]),
    ],
)
def test_the_entry_point_gives_the_user_the_gpus_groups_but_never_roots(device_group, cache, owner, expected, tmp_path):
    """A cache folder that cannot be used, such as a link that leads nowhere in the container, does not end it."""
    command = ["unshare", "--mount", "sh", "-ec", IN_ROOT, tmp_path, device_group, ROOT / "docker/entrypoint.sh"]
    done = subprocess.run([*command, cache, owner], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == expected, done
    assert ("warning: /app/.cache cannot be handed over to 12345:12346" in done.stderr) == (len(expected) == 3), done
