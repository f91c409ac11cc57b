"""The run that is deployed: its results file and its weights. Imports no Keras."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from edgebench.cli import BACKENDS, ExperimentError, require
from edgebench.record.results import SCHEMA_VERSION


@dataclass(frozen=True)
class Source:
    """A complete run of vit.py."""

    path: Path
    results: dict
    weights: Path

    @property
    def what(self) -> dict:
        """What ran, with the configuration under `config`."""
        return self.results["what"]

    @property
    def micro_batch_size(self) -> int:
        """Images that went through the model at a time."""
        return self.what["config"]["batch_size"] // self.what["micro_batches"]


def read_source(path: Path, weights: Path | None) -> Source:
    """The run of a results file; `weights` replaces the file of weights that it names.

    Raises ExperimentError, in a line that says what would work, for a run that cannot be deployed.
    """
    results = _read_json(path)
    require(isinstance(results.get("what"), dict), f"{path} is not a results file of vit.py")
    version, what = results.get("schema_version"), results["what"]
    known = f"this program reads {SCHEMA_VERSION}; export with the version of the code that wrote it"
    require(version == SCHEMA_VERSION, f"{path} has schema version {version!r}, {known}")
    require(
        "deployed" not in what, f"{path} is of a file that is deployed already; name the results of the run of vit.py"
    )
    backend, status = what.get("backend"), results.get("status")
    require(backend in BACKENDS, f"{path} is of {backend}, whose weights Keras does not read; name a run of vit.py")
    reason = f"({results.get('failure')}); name a complete run, or complete this one with --resume"
    require(status == "complete", f"{path} is of a run that is {status} {reason}")

    dataset = os.path.expanduser(what["config"]["dataset"])
    gone = dataset.endswith(".npz") and not os.path.isfile(dataset)
    require(not gone, f"the data set of the run, {dataset}, is not there; parity is checked on its test images")
    recorded = results.get("files", {}).get("weights")
    remedy = "--weights names another place; benchmark.py keeps none, vit.py does with --checkpoint-path"
    require(bool(weights or recorded), f"{path} names no file of weights: {remedy}")
    weights = weights or Path(recorded)
    require(weights.is_file(), f"the weights of the run, {weights}, are not there: {remedy}")
    return Source(path, results, weights)


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path} is not a JSON file ({error})") from error
    return document if isinstance(document, dict) else {}
