"""Copy files and folders of this checkout into another folder, so that a test can run the program there."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_from_root(folder: Path, *names: str) -> None:
    for name in names:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
