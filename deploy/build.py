"""The process that builds the files of a deployment with Keras: `python deploy/build.py REQUEST.json`, as pipeline.py starts it."""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from deploy.formats import FORMATS
from edgebench import cli, process


def main(request_path: Path) -> None:
    """Do what the request says and write what came of it to built.json beside it."""
    with cli.errors_in_one_line(program="export.py"):
        request = json.loads(request_path.read_text())
        os.environ["KERAS_BACKEND"] = FORMATS[request["format"]].backend
        process.set_environment("cpu", compile_cache=True)
        with process.importing_keras(is_program=True):
            from deploy import keras_model
        try:
            built = keras_model.build(request)
            request_path.with_name("built.json").write_text(json.dumps(built))
        except OSError as error:  # a full disk
            raise cli.ExperimentError(f"the files cannot be written ({cli.one_line(error)})") from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
