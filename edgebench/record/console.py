"""What a person sees of a run: its configuration, its epochs, and in the end eight lines; with --verbose every figure."""

import sys
import textwrap
import time
from pathlib import Path

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from edgebench.cli import flag
from edgebench.measure.epochs import EpochRecorder
from edgebench.measure.meters import UNAVAILABLE
from edgebench.streams import SteadyStream

WIDTH = 80
LABEL = 10  # columns before the text of a line
# The figures that a run is asked for first, and their lines on the console, which say why one is missing.
HEADLINES = {
    "time/train_images_per_s": "training",
    "time/latency_ms/p50": "latency",
    "energy/accelerator/joules_per_image": "energy",
}


def print_start(versions: dict[str, str | None], device: str, config: dict, defaults: dict) -> None:
    """Print what runs where, and the configuration: first the flags that differ from the defaults, then all others."""
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    _print(f"{known} on {device}, node {config['node_name']}", "bold")
    changed = [_as_flag(name, value) for name, value in config.items() if value != defaults[name]]
    same = [f"{name} {_as_text(value)}" for name, value in config.items() if value == defaults[name]]
    _print_paragraph("changed", " ".join(changed) or "nothing", "bold")
    _print_paragraph("default", ", ".join(same), "dim")


def print_resumed(path: Path, epochs: int) -> None:
    """Print how many epochs of an interrupted run are done; `path` is where its state would be."""
    if epochs:
        print(f"resume: {epochs} {'epoch is' if epochs == 1 else 'epochs are'} done")
    else:
        print(f"resume: nothing at {path}, starting from scratch")


def print_measuring(budget_s: float) -> None:
    """Print what happens before the training, and for how long."""
    print(f"measuring latency and step time, for up to {budget_s:g} s each (--measure-seconds)")


def print_model(parameters: int, patches: int, rest: int) -> None:
    """Print the size of the model; `rest` is the number of rows and of columns that no patch covers."""
    print(f"model: {parameters:,} trainable parameters, {patches} patches")
    if rest:
        print(f"note: --patch-size does not divide --image-size: the last {rest} rows and columns are cut off")


def _as_flag(name: str, value) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {_as_text(value)}"


def _as_text(value) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class EpochLines(keras.callbacks.Callback):
    """Prints a line of at most 80 columns at the end of every epoch, of `images` training images."""

    def __init__(self, images: int, recorder: EpochRecorder):
        super().__init__()
        self.images, self.recorder = images, recorder

    def on_epoch_end(self, epoch, logs=None):
        logs, seconds = logs or {}, self.recorder.epochs[-1].train_s
        line = f"Epoch {epoch + 1}/{self.params['epochs']}: {seconds:.3g} s, {self.images / seconds:,.0f} images/s"
        line += f", loss {logs['loss']:.4g}, accuracy {_percent(logs['accuracy'])}"
        if "val_accuracy" in logs:
            line += f", val {_percent(logs['val_accuracy'])}"
        print(line, flush=True)

    def __enter__(self) -> "EpochLines":
        return self

    def __exit__(self, *exception) -> None:
        """Leave the terminal as it was, however the training ended."""


class EpochBar(EpochLines):
    """Shows a bar with images/s and the time left as well. It writes past W&B's copy of the console, where each of its
    states would be a line of its own. Without `logs` nothing waits for the device."""

    async_safe = True  # so that Keras does not wait for each step

    def __init__(self, images: int, recorder: EpochRecorder):
        super().__init__(images, recorder)
        text = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]:>7,.0f} images/s")
        terminal = Console(file=SteadyStream(sys.__stdout__))
        left = TimeRemainingColumn(), TextColumn("left")
        options = {"console": terminal, "transient": True, "refresh_per_second": 4}
        self._bar = Progress(*text, *left, **options, redirect_stdout=False, redirect_stderr=False)
        self._task = None

    def on_epoch_begin(self, epoch, logs=None):
        epochs, steps = self.params["epochs"], self.params["steps"]
        if self._task is None:
            self._task = self._bar.add_task("", total=(epochs - epoch) * steps, rate=0)
        self._bar.update(self._task, description=f"Epoch {epoch + 1}/{epochs}")
        self._bar.start()
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        images = self.images * (batch + 1) / self.params["steps"]
        self._bar.update(self._task, advance=1, rate=images / (time.perf_counter() - self._began))

    def on_epoch_end(self, epoch, logs=None):
        self._bar.stop()
        super().on_epoch_end(epoch, logs)

    def __exit__(self, *exception) -> None:
        self._bar.stop()


def epoch_lines(images: int, recorder: EpochRecorder) -> EpochLines:
    """A bar on a terminal and a line per epoch; in a log file the line alone."""
    return (EpochBar if sys.stdout.isatty() else EpochLines)(images, recorder)


def print_summary(results: dict, path: Path | None, upload: str | None) -> None:
    """Print the result in at most eight lines; `path` is the results file, `upload` says where W&B has the run."""
    lines = {
        "result": _quality(results),
        "training": _training(results),
        "time": _waiting(results),
        "latency": _latency(results["time"]),
        "memory": _memory(results["memory"]),
        "energy": _energy(results.get("energy", {})),
        "files": _files(results, path),
        "next": _next_steps(results, path, upload),
    }
    for label, reason in _gaps(results).items():
        lines[label] += f"{'; ' if lines[label] else ''}not measured: {reason}"
    for label, text in lines.items():
        if text:
            _print_paragraph(label, text, "bold" if label == "result" else "")


def _quality(results: dict) -> str:
    quality, epochs = results.get("quality", {}), results["what"]["config"]["num_epochs"]
    if results["status"] != "complete":
        done = len(quality.get("epochs", []))
        return f"{results['status']} after {done} of {epochs} epochs: {results['failure']}"
    test = quality["test"]
    accuracy, top_5 = _percent(test["test_accuracy"]), _percent(test["test_top-5-accuracy"])
    return f"test accuracy {accuracy}, top-5 {top_5}, with the weights of epoch {quality['best_epoch']} of {epochs}"


def _training(results: dict) -> str:
    what, rate = results["what"], results["time"].get("train_images_per_s")
    uncompiled = "graph" if what["backend"] == "tensorflow" else "eager"
    mode = f"{what['backend']}, {'compiled' if what.get('jit_compile') else uncompiled}, {what['dtype_policy']}"
    utilization = results["time"].get("model_flops_utilization")
    peak = f", {utilization:.0%} of the device's peak FLOP/s" if utilization else ""
    problems = results.get("load", {}).get("problems", [])
    return f"{_figure(rate, 'images/s')} ({mode}){peak}" + "".join(f"; {problem}" for problem in problems)


def _waiting(results: dict) -> str:
    quality, what = results.get("quality", {}), results["what"]
    parts = []
    if quality.get("best_epoch_s"):
        parts.append(f"{quality['best_epoch_s']:,.3g} s of training to the end of the best epoch")
    if total := results["time"].get("compile_s", {}).get("total"):
        parts.append(f"{total:,.3g} s to compile everything (cache: {what['compile_cache']['state']})")
    return ", ".join(parts)


def _latency(times: dict) -> str:
    latency, bare = times.get("latency_ms", {}), times.get("bare_latency_ms") or {}
    if latency.get("p50") is None:
        return ""
    tail = f" (p90 {latency['p90']:.3g})" if latency.get("p90") else ""
    without = f"; {bare['p50']:.3g} ms without Keras around the model" if bare.get("p50") else ""
    return f"{latency['p50']:.3g} ms for one image, the median of {latency['n']}{tail}{without}"


def _memory(memory: dict) -> str:
    device, host = memory.get("train_peak_device_bytes"), memory.get("peak_rss_bytes")
    parts = [f"{_bytes(device)} on the device"] if device else []
    parts += [f"{_bytes(host)} of the process"] if host else []
    return "at most " + ", ".join(parts) if parts else ""


def _energy(energy: dict) -> str:
    parts = []
    for part in ("accelerator", "cpu_package"):
        figures = energy.get(part) or {}
        if figures.get("joules_per_image") is not None:
            joules, watts, source = figures["joules_per_image"], figures["mean_w"], figures["source"]
            parts.append(f"{joules:.3g} J per image, {watts:.3g} W in training ({source})")
    return "; ".join(parts)


def _files(results: dict, path: Path | None) -> str:
    weights = results.get("files", {}).get("weights")
    parts = [f"best weights in {weights}" if weights else "best weights in no file"] if "quality" in results else []
    return ", ".join([*parts, f"results in {path}" if path else "results in no file: all figures follow"])


def _next_steps(results: dict, path: Path | None, upload: str | None) -> str:
    steps = [f"python benchmark.py --report {path.parent}" if path else "", upload or ""]
    return "; ".join(step for step in steps if step)


def _gaps(results: dict) -> dict[str, str]:
    """Why a line of the result lacks its figure, by the label of the line."""
    if results["status"] != "complete":
        return {}
    values, reasons = figures(results), results["missing"]
    has_energy = values.get("energy/cpu_package/joules_per_image") is not None
    named = {
        name: reasons.get(path, "--measure-seconds 0")
        for path, name in HEADLINES.items()
        if values.get(path) is None and not (name == "energy" and has_energy)
    }
    if "energy" in named and not results["what"]["is_gpu"]:  # then the CPU's sensor is the one that is missing
        named["energy"] = reasons.get("energy/cpu_package/joules_per_image", "no sensor")
    return named


def figures(results: dict) -> dict[str, float | None]:
    """Every figure of a run under one flat name, on the console and in W&B alike: `time/step_ms/p50`, `test_accuracy`."""
    flat: dict[str, float | None] = {}

    def add(prefix: str, value) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{prefix}/{name}", inner)
        elif not isinstance(value, list | str):
            flat[prefix] = value

    for section in ("time", "memory", "load", "energy"):
        add(section, results.get(section, {}))
    add("quality", {name: value for name, value in results.get("quality", {}).items() if name != "test"})
    return flat | results.get("quality", {}).get("test", {})


def print_all(results: dict) -> None:
    """Print every figure, and why one is missing."""
    what = results["what"]
    switches = f"TF32 {'on' if what['tf32'] else 'off'}, jit {'on' if what.get('jit_compile') else 'off'}"
    paths = f"{what.get('attention', 'unknown')} attention, {what['augmentation']} augmentation"
    print(f"results of {what['backend']} on {what['device']}: {what['dtype_policy']}, {switches}, {paths}")
    values = figures(results)
    for name, value in values.items():
        if value is not None:
            print(f"  {name:<42} {format(value, ',.5g' if value < 1e5 else ',.0f')}")
    gaps: dict[str, list[str]] = {}  # by reason, as a machine without a GPU lacks many figures for the same one
    for name, reason in results["missing"].items():
        if values.get(name) is None:
            gaps.setdefault(reason, []).append(name)
    for reason, names in gaps.items():
        print(f"  unavailable ({reason}): {', '.join(names)}")
    for part, energy in results.get("energy", {}).items():
        if not energy.get("source", UNAVAILABLE).startswith(UNAVAILABLE):
            print(f"  energy of {part} from: {energy['source']}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(value: float | None, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value else f"no {unit}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _print_paragraph(label: str, text: str, style: str) -> None:
    """Print a label and, beside it, text that is broken at spaces; a path or a command longer than a line stays whole."""
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    _print(f"{label:<{LABEL}}" + f"\n{' ' * LABEL}".join(lines), style)


def _print(text: str, style: str) -> None:
    """Print text, on a terminal in a style. It goes through sys.stdout, of which W&B keeps a copy."""
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(Text(text, style=style))
