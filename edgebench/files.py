"""Files that are written atomically: a path holds the old file or the new one, never a part of one."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edgebench.cli import ExperimentError, one_line, require, require_writable_folder, warn


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch file beside `path` that takes its place when the block ends without an error, else is removed."""
    scratch = path.with_name(f".{os.urandom(4).hex()}-{path.name}")  # in a container every process has the same number
    try:
        yield scratch
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def require_replaceable(path: Path, flag: str) -> None:
    """Raise ExperimentError unless a file at `path`, and others with longer names beside it, can be written."""
    require(not os.path.isdir(path), f"{flag} {str(path)!r} is a folder")
    require_writable_folder(path.parent, flag)
    longest = path.with_name(f".{os.urandom(4).hex()}-{path.name}-{os.urandom(4).hex()}")  # as that of a resume file
    try:
        longest.touch()
        longest.unlink()
        file, folder = os.lstat(path), os.stat(path.parent)
    except FileNotFoundError:  # there is nothing to replace
        return
    except OSError as error:
        raise ExperimentError(f"{flag} {str(path)!r} cannot be written ({error.strerror})") from error
    # In a sticky folder such as /tmp only root and the owners of file and folder may replace it.
    may_replace = not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, file.st_uid, folder.st_uid)
    require(may_replace, f"{flag} {str(path)!r} belongs to another user, who alone may replace it")


class WeightsFile:
    """The file of a model's weights at `path`, written atomically."""

    def __init__(self, path: Path):
        self.path = path
        self._written: tuple[int, ...] | None = None

    def write(self, model) -> None:
        """Write the weights of a functional Keras model; where that fails, a warning says why.

        The state of the optimizer is left out: a resumed run may have that of a later epoch only, and keeps it elsewhere.
        """
        import keras  # not above, because the settings are checked before Keras is imported

        self._written = None
        try:
            file = InMemoryWeights()
            keras.Model(model.inputs, model.outputs).save_weights(file)
            with replacing(self.path) as scratch:
                scratch.write_bytes(file.getbuffer())
            self._written = _version(self.path)
        except OSError as error:
            warn(f"the best weights stay in memory, {self.path} cannot be written ({one_line(error)})")

    @property
    def current(self) -> str | None:
        """The path, if the file is still the one written last; None where it was not written, or another run has replaced it."""
        with contextlib.suppress(OSError):
            if self._written == _version(self.path):
                return str(self.path)
        return None


def _version(path: Path) -> tuple[int, ...]:
    """What tells a file from those that replace it, which may get the inode that an earlier one has freed."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


class InMemoryWeights(io.BytesIO):
    """A file in memory that Keras saves weights to. Writing straight to a full disk, HDF5 ends the process with SIGSEGV."""

    def __str__(self) -> str:
        return "in_memory.weights.h5"  # Keras checks the ending
