"""What every results file says of the machine and the code. Imports no Keras."""

import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from edgebench.cli import one_line

POWER_MODE = Path("/var/lib/nvpmodel/status")  # of a Jetson, as nvpmodel keeps it


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the CPU; its architecture where the kernel does not report it."""
    model = re.search(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return model[1] if model else platform.machine()


def machine_and_code(node: str, device: str, is_gpu: bool, gpu_id: str | None) -> tuple[dict, dict[str, str]]:
    """What the section `what` says of the time, the machine and the code, and why a figure in it is None."""
    (commit, no_git), (status, _) = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    what = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "node": node,
        "device": device,
        "is_gpu": is_gpu,
        "gpu_id": gpu_id,
        "power_mode": POWER_MODE.read_text().strip() if POWER_MODE.exists() else None,
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
    }
    return what, {} if commit else {"what/git_commit": no_git}


def _git(*arguments: str) -> tuple[str | None, str]:
    """What git prints about the folder of the program, or None and the reason: there is no git, or this is no checkout."""
    folder = str(Path(__file__).parents[1])
    # In a container the folder usually belongs to another user, which git refuses by default.
    command = ["git", "-c", f"safe.directory={folder}", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return None, one_line(error)
    return (None, done.stderr.strip().partition("\n")[0]) if done.returncode else (done.stdout.strip(), "")
