"""A process that runs one thing after another on one backend, so that the tests import every backend only once.

    python tests/worker.py BACKEND

A request is a line of JSON on stdin, and its answer a line on stdout. It is either a command line of vit.py or a function
of a test module with its arguments. stdout and stderr are captured as those of a process are, with all that libraries
write to them.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from edgebench import cli, process

process.set_environment(device="auto", compile_cache=True)

import keras

import vit


def answer_to(request: dict) -> tuple[int, object]:
    """The exit status and, of a function, what it returned."""
    if flags := request.get("flags"):
        with cli.errors_in_one_line("--debug" in flags):
            config = vit.read_config(flags)
        vit.main(config)
        return 0, None
    keras.config.set_dtype_policy("float32")  # whatever the last run has set
    function = getattr(importlib.import_module(request["module"]), request["function"])
    return 0, function(*request["arguments"])


@contextlib.contextmanager
def captured():
    """Send everything that is written to stdout and stderr to two files instead."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield out, err
        finally:
            for stream, number, descriptor in zip((sys.stdout, sys.stderr), (1, 2), kept, strict=True):
                stream.flush()
                os.dup2(descriptor, number)
                os.close(descriptor)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only answers go to the stdout that the tests read
    environment = dict(os.environ)
    for line in sys.stdin:
        request, value = json.loads(line), None
        os.chdir(request["folder"])
        os.environ.pop("KERAS_BACKEND")
        os.environ.update(request["environment"])
        with captured() as (out, err):
            try:
                status, value = answer_to(request)
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        os.environ.clear()
        os.environ.update(environment)
        keras.utils.clear_session()
        answer = {"status": status, "stdout": texts[0], "stderr": texts[1], "value": value}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
