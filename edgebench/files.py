"""Files that are written atomically: a path holds the old file or the new one, never a part of one."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path


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


class InMemoryWeights(io.BytesIO):
    """A file in memory that Keras saves weights to. Writing straight to a full disk, HDF5 ends the process with SIGSEGV."""

    def __str__(self) -> str:
        return "in_memory.weights.h5"  # Keras checks the ending
