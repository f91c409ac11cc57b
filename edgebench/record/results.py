"""The results file of a run: its version, and how it is written. Imports no Keras."""

import json
import os
import re
from pathlib import Path

from edgebench.cli import warn
from edgebench.files import replacing

SCHEMA_VERSION = 3  # raised whenever a name or a meaning changes; results.schema.json describes it


def write_results(folder: Path, results: dict) -> Path | None:
    """Write the run's file and return its path; None on a full disk, which costs the file, not the result on the console."""
    what = results["what"]
    node = re.sub(r"[^A-Za-z0-9._-]", "_", what["node"])
    stamp = what["started"].replace(":", "").replace("-", "").partition("+")[0]
    path = folder / f"{stamp}-{node}-{what['backend']}-{os.urandom(4).hex()}.json"
    # JSON has no notation for a number that is not finite: it becomes null.
    finite = json.loads(json.dumps(results), parse_constant=lambda number: None)
    try:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        warn(f"the results cannot be written to {path} ({error}): what is printed here is all there is of them")
        return None
    return path
