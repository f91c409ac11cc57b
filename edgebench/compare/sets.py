"""Which runs may be compared: those that agree in all that decides what is trained and how much work it is."""

import json
from collections.abc import Sequence
from pathlib import Path

from edgebench.cli import BACKENDS
from edgebench.compare.items import PEERS, ROOT, RUNTIMES
from edgebench.compare.runs import NONE, Device, Run, as_text
from edgebench.flags import MUST_AGREE, NOTED

# What vit.ViTConfig says about each flag. results.schema.json has it as well, since reports import neither vit.py nor Keras.
_SCHEMA = json.loads((ROOT / "results.schema.json").read_text(encoding="utf-8"))
FLAGS = _SCHEMA["properties"]["what"]["properties"]["config"]["properties"]
DEFAULTS = {name: flag["default"] for name, flag in FLAGS.items() if flag["comparison"] == MUST_AGREE}
MODEL = tuple(name for name, flag in FLAGS.items() if flag["group"] == "model")
SET_BY_A_RECIPE = tuple(name for name, flag in FLAGS.items() if "modern" in flag)
# Facts that must agree as well, with the flags that they follow from: where one of those is varied, so is the fact.
FACTS = {
    "image_shape": ("dataset",),
    "num_classes": ("dataset",),
    **{f"images/{part}": ("dataset", "validation_split") for part in ("train", "validation", "test")},
    "num_parameters": ("dataset", *MODEL),
    "config/transformer_units": ("projection_dim",),
}
NOTED_FACTS = (
    *("what/git_commit", "what/git_dirty", "what/environment"),
    *("what/versions/Python", "what/versions/Keras", "what/versions/CUDA"),
)
NOTED_PATHS = (
    *NOTED_FACTS,
    *(f"what/config/{name}" for name, flag in FLAGS.items() if flag["comparison"] == NOTED),
    "load/cores",
)
NOTED_WITHIN_A_NAME = ("what/attention", "what/jit_failure", "what/deployed/trained_on")


def conditions(run: Run) -> dict[str, str]:
    """Return everything that has to agree, by name.

    A data file counts by its name, because its folder differs between devices. TF32 counts on GPUs only: a CPU
    multiplies float32 in full precision, as a GPU does without TF32.
    """
    varied = {*run.varied, *(SET_BY_A_RECIPE if "recipe" in run.varied else ())}
    values = {name: run.text(f"what/config/{name}") for name in DEFAULTS if name not in varied}
    for name, value in values.items():
        if value == NONE:  # a run from before the flag has its default
            values[name] = as_text(DEFAULTS[name])
    if values.get("initial_weights") and run.get("what/config/initial_weights") is None:  # but here its Keras decided
        values["initial_weights"] = f"as in Keras {run.text('what/versions/Keras')}"
    for fact, flags in FACTS.items():
        if set(flags) & varied:
            values.pop(fact.removeprefix("config/"), None)
        else:
            values[fact.removeprefix("config/")] = run.text(f"what/{fact}")
    if "dataset" in values:
        values["dataset"] = Path(values["dataset"]).name
    if "tf32" in values and not run.get("what/is_gpu"):
        values["tf32"] = "off"
    values["resumed"] = "yes" if run.get("what/resumed_after_epochs") else "no"
    values["inference_batch"] = run.inference_batch
    return values


def differences(a: Run, b: Run) -> str:
    """Say what forbids a comparison, as in "batch_size 64 against 32"; empty if nothing does."""
    a_values, b_values = conditions(a), conditions(b)
    names = [name for name in a_values if a_values[name] != b_values[name]]
    return ", ".join(f"{name} {a_values[name]} against {b_values[name]}" for name in names)


def by_device(runs: Sequence[Run]) -> dict[Device, list[list[Run]]]:
    """Sort the runs of each device into sets of comparable runs: the set with the most names first, then by size."""
    devices: dict[Device, dict[tuple, list[Run]]] = {}
    for run in runs:
        sets = devices.setdefault(run.device, {})
        sets.setdefault(tuple(conditions(run).items()), []).append(run)

    def size(group: list[Run]) -> tuple[int, int]:
        return len({run.name for run in group}), len(group)

    return {device: sorted(devices[device].values(), key=size, reverse=True) for device in sorted(devices)}


def by_name(runs: Sequence[Run], baseline: str | None) -> dict[str, list[Run]]:
    """Sort the runs by name: the baseline first, if it has runs, then in the order of the backends."""
    known = [*BACKENDS, *PEERS, *RUNTIMES]

    def place(run: Run) -> tuple:
        rank = known.index(run.backend) if run.backend in known else len(known)
        return run.name != baseline, rank, run.name

    names = dict.fromkeys(run.name for run in sorted(runs, key=place))
    return {name: [run for run in runs if run.name == name] for name in names}
