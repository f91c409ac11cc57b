"""Standard output and error that never end a program. Imports nothing but Python's own library."""

import contextlib
import os
import sys


class SteadyStream:
    """A stream that drops what cannot be written, as to a full disk or to a pipe whose reader has left."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Let the program run on whatever becomes of its output: a full disk, a reader that leaves, a closed stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its number, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (
        SteadyStream(sys.stdout or os.fdopen(1, "w")),
        SteadyStream(sys.stderr or os.fdopen(2, "w")),
    )
