"""Who owns a run: its results, its status, signals, out of memory, the console, W&B, and the file, however it ends."""

import contextlib
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras

from edgebench import process
from edgebench.callbacks import StopSignals
from edgebench.cli import ExperimentError, Interrupted, one_line
from edgebench.compile_cache import CompileCache
from edgebench.device import Device, backend_threads, find_device, out_of_memory_as
from edgebench.files import WeightsFile
from edgebench.layers import attention_path
from edgebench.machine import machine_and_code
from edgebench.measure import costs
from edgebench.measure.epochs import EpochRecorder, training_figures
from edgebench.measure.latency import Sections, merge
from edgebench.measure.meters import Meter, all_of
from edgebench.measure.sensors import find_sensors, peak_rss_bytes
from edgebench.measure.steps import to_first_epoch, waits
from edgebench.record import console, tracking
from edgebench.record.results import SCHEMA_VERSION, write_results
from edgebench.record.resume import ResumableRun, Resumed
from edgebench.torch_graphs import is_compiled


@dataclass(frozen=True)
class Program:
    """What runs: `name` is Keras' backend or a hand-written peer, `packages` are versions by name.

    `environment` are the variables that the user has set for a backend, `import_s` seconds until everything was imported.
    """

    name: str
    packages: dict[str, str]
    environment: dict[str, str]
    import_s: float

    def versions(self, device: Device) -> dict[str, str | None]:
        """The versions of everything that matters, by name."""
        return {"Python": platform.python_version(), **self.packages, "CUDA": device.cuda}


class Recorder:
    """Holds the results of a run; in a `with` block it writes them, whatever ends the block.

    Code in the block hands over what it has measured (`add`) and says what runs (`describe`). Nothing that was handed over
    is lost. Raises Interrupted for a signal, OutOfMemory for a backend's own error about memory, and otherwise what the
    block raises.
    """

    def __init__(
        self, config: Any, program: Program, device: Device, size: costs.ViTSize, resumable: ResumableRun | None = None
    ):
        """`config` is a vit.ViTConfig, `size` that of its model; `resumable` is the run's state in a file, if it keeps any."""
        self.config, self.signals = config, StopSignals()
        self.sensors = find_sensors(device.is_gpu, device.gpu_id)
        self.measured: Sections = {}  # before the training, by this process or by the one that it continues
        self.wandb = None  # the W&B run, if there is one
        self._size, self._resumable, self._is_gpu = size, resumable, device.is_gpu
        self._cache = CompileCache()
        self._measures = False  # whether this process measures before the training, and so compiles there
        self._progress = resumable.progress if resumable else Resumed().progress
        self._model: keras.Model | None = None
        self._epochs: EpochRecorder | None = None
        self._weights: WeightsFile | None = None
        machine, missing = machine_and_code(config.node_name, device.name, device.is_gpu, device.gpu_id)
        memory = dict.fromkeys(("inference_peak_device_bytes", "train_peak_device_bytes"))
        if not device.is_gpu:
            missing |= dict.fromkeys((f"memory/{name}" for name in memory), "the backend runs on the CPU")
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": "failed",
            "failure": None,
            "files": {"weights": None, "resume": None},
            "what": {
                **machine,
                "backend": program.name,
                "versions": program.versions(device),
                "environment": program.environment,
                "config": config.as_json(),
                "dtype_policy": config.dtype_policy,
                "tf32": config.tf32,
                "augmentation": config.augmentation,
                "micro_batches": config.gradient_accumulation_steps,
                "train_flops_per_image": size.train_flops_per_image,
                "resumed_after_epochs": self._progress.resumed_after_epochs,
            },
            "time": {"import_s": program.import_s},
            "memory": memory,
            "missing": missing,
        }

    def __enter__(self) -> "Recorder":
        self._block = self._until_the_end()
        return self._block.__enter__()

    def __exit__(self, *exception) -> bool | None:
        return self._block.__exit__(*exception)

    # ------------ What the block hands over ------------

    def add(self, *parts: Sections) -> None:
        """Add sections of the results."""
        self.results = merge(self.results, *parts)

    def describe(self, **facts: Any) -> None:
        """Add facts about what runs, the section `what`."""
        self.results["what"] |= facts

    def describe_model(self, model: keras.Model, build_s: float) -> None:
        """Add what is known of a Keras model, built in `build_s`, now and again at the end of the run: torch compiles late."""
        self._model = model
        parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
        self.built(build_s, num_parameters=parameters, **self._how_it_runs(model))
        console.print_model(parameters, self.config.num_patches, self.config.image_size % self.config.patch_size)
        if self.wandb:
            tracking.describe(self.wandb, self.results["what"])

    def built(self, build_s: float, **facts: Any) -> None:
        """Add that the model is built by now, and facts about it."""
        self._build_s, self._ready_s = build_s, process.age_s()
        self.add({"time": {"build_s": build_s}})
        self.describe(**facts)

    def describe_compilation(self, compiled: bool) -> None:
        """Add whether the step of a program without Keras is compiled, and from which cache."""
        self.describe(jit_compile=compiled, jit_failure=None, compile_cache=self._cache.describe(compiled))

    def measure(self, parts: Iterable[Sections]) -> None:
        """Add what is measured before the training, each part as soon as it is measured.

        Nothing is measured with --measure-seconds 0, nor where this run continues one that was measured.
        """
        self.measured = self._progress.measured
        if self.config.measure_seconds and not self.measured:
            self._measures = True
            console.print_measuring(self.config.measure_seconds)
            for part in parts:
                self.add(part)
                self.measured = merge(self.measured, part)
            self.measured = merge(self.measured, waits(self.measured, self._build_s, self._ready_s))
        self.add(self.measured)

    def record_epochs(
        self, images: int, check: Callable[[int, dict], None], wait: Callable[[], object] | None = None
    ) -> EpochRecorder:
        """What records the epochs, of `images` images each; at the end of the run they are added to the results.

        `check` and `wait` are those of EpochRecorder. What was not compiled by `measure` is compiled in the first epoch.
        """
        meter = Meter(all_of(self.sensors))
        self._images = images
        self._epochs = EpochRecorder(meter, self._progress.epochs, not self._measures, check, wait)
        return self._epochs

    def claim(self, weights: WeightsFile) -> None:
        """Name this file in the results, if it is still this run's at the end."""
        self._weights = weights

    @property
    def wandb_id(self) -> str | None:
        """What names the W&B run when it is continued."""
        return self.wandb.id if self.wandb else None

    # ------------ The end ------------

    @contextlib.contextmanager
    def _until_the_end(self) -> Iterator["Recorder"]:
        config = self.config
        message = costs.out_of_memory_message(
            self._size, config.micro_batch_size, config.batch_size, config.dtype_policy
        )
        with self.signals:
            backend = self.results["what"]["backend"]
            self.wandb = tracking.start(config, backend, self._is_gpu, self._progress.wandb_id)
            try:
                with out_of_memory_as(message):
                    yield self
            except Interrupted as stop:
                self._end("interrupted", str(stop))
                raise Interrupted(stop.number, self._what_is_left()) from stop
            except BaseException as error:
                self._end("failed", one_line(error) if isinstance(error, ExperimentError) else repr(error))
                raise
            else:
                self._end("complete", None)

    def _end(self, status: str, failure: str | None) -> None:
        """Complete the results, write and print them, and end the W&B run."""
        self.signals.finish()
        self.results |= {"status": status, "failure": failure}
        try:
            self._add_what_was_followed()
        finally:  # a device that has failed may fail again
            self._write()

    def _write(self) -> None:
        results, run = self.results, self.wandb
        path = write_results(self.config.results_dir, results)
        console.print_summary(results, path, tracking.where_to_see(run))
        if path is None or self.config.verbose:
            console.print_all(results)
        if run is not None:  # last, as it may wait for a server
            weights = results["files"]["weights"] if self.config.wandb_artifact else None
            summary = {**console.figures(results), "failure": results["failure"]}
            tracking.finish(run, summary, path, weights, is_complete=results["status"] == "complete")

    def _add_what_was_followed(self) -> None:
        """Add the epochs, what of the model has changed since, the memory, and the files that there are."""
        if self._model:
            self.describe(**self._how_it_runs(self._model))
        if self._epochs is None:
            return
        what, epochs = self.results["what"], self._epochs.epochs
        ready_s = None if self._progress.epochs else self._ready_s
        self.add(
            training_figures(epochs, self._images, self.sensors, what, backend_threads()),
            to_first_epoch(epochs, ready_s, self.results),
            {
                "memory": {
                    "train_peak_device_bytes": find_device().peak_memory_bytes,
                    "peak_rss_bytes": peak_rss_bytes(),
                }
            },
        )
        if self._weights:
            self.results["files"]["weights"] = self._weights.current
        if self._resumable and self.results["status"] != "complete":
            self.results["files"]["resume"] = self._resumable.current

    def _how_it_runs(self, model: keras.Model) -> dict:
        """Whether the training step is compiled, why torch could not compile it, from which cache, and the path of attention."""
        config, compiled = self.config, is_compiled(model)
        queries = config.micro_batch_size, config.num_heads, config.num_patches, config.projection_dim
        compute_dtype = keras.config.dtype_policy().compute_dtype
        return {
            "jit_compile": compiled,
            "jit_failure": getattr(model, "failure", None),
            "attention": attention_path(queries, config.attention_dropout, compute_dtype, compiled),
            "compile_cache": self._cache.describe(compiled),
        }

    def _what_is_left(self) -> str:
        """The weights that an interrupted run leaves, and the command that continues it."""
        files, command = self.results["files"], shlex.join(["python", *sys.argv])
        weights = f"; the best weights so far are in {files['weights']}" if files["weights"] else ""
        if not files["resume"]:
            return weights
        return f"{weights}; resume with: {command if '--resume' in sys.argv else command + ' --resume'}"
