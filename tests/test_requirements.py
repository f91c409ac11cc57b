"""Promises about what the images install: the same packages, the same Keras, and wheels for each device's platform."""

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
