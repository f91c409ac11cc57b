"""What a field of vit.ViTConfig says about its flag, besides type, default and docstring, and what follows from it.

A field is written `batch_size: Annotated[int, training_flag(within=SIZE)] = 256`. From that come the group in --help, the check of
the value, whether a resumed run may change it, and whether runs with different values may be compared. Imports no Keras.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgebench.cli import ExperimentError, flag, help_of, is_installed, require, setting

MUST_AGREE = "must agree"  # runs that differ in it are not compared, unless benchmark.py was asked to vary it
NOTED = "noted"  # runs that differ in it are compared, and the report says so
CANNOT_MATTER = "cannot matter"  # it has no effect on what is compared, or another figure tells the effect apart
DATASETS = ("cifar100", "cifar10", "synthetic")  # those with a name


@dataclass(frozen=True)
class Range:
    """The values from `low` up to `high`, which is not among them; `text` follows on "must"."""

    low: float
    high: float
    text: str


SIZE = (Range(1, math.inf, "be positive"), Range(-math.inf, 2**31, "be below 2**31"))
SHARE = (Range(0, 1, "lie in [0, 1)"),)
ALL_OR_LESS = (Range(0, math.nextafter(1, 2), "lie in [0, 1]"),)
UP_TO_TEN = (Range(0, math.nextafter(10, 11), "lie in [0, 10]"),)
ABOVE_ZERO = (Range(sys.float_info.min, math.inf, "be positive and finite"),)
NOT_NEGATIVE = (Range(0, math.inf, "be finite and not negative"),)
UINT32 = (Range(0, 2**32, "lie in [0, 2**32)"),)
SHORT = (Range(1, 65, "have 1 to 64 characters"),)  # of a text, its length


@dataclass(frozen=True)
class Flag:
    """What is known of a flag. `comparison` is MUST_AGREE, NOTED or CANNOT_MATTER; a list has each of its items `within`."""

    group: str
    comparison: str
    may_change: bool  # whether a resumed run may have another value than the run that it continues
    within: tuple[Range, ...] = ()


# The groups of --help, with what holds for most of their flags.
model_flag = partial(Flag, "model", comparison=MUST_AGREE, may_change=False)
training_flag = partial(Flag, "training", comparison=MUST_AGREE, may_change=False)
device_flag = partial(Flag, "device", comparison=CANNOT_MATTER, may_change=False)
measuring_flag = partial(Flag, "measuring", comparison=NOTED, may_change=True)
file_flag = partial(Flag, "data and files", comparison=CANNOT_MATTER, may_change=True)
wandb_flag = partial(Flag, "Weights and Biases", comparison=CANNOT_MATTER, may_change=True)


def from_environment(variable: str, default: Any, convert: Callable[[str], Any] = str) -> Any:
    """A field whose default is an environment variable, read when a configuration is made, else `default`."""
    return dataclasses.field(default_factory=lambda: convert(setting(variable)) or default)


@functools.cache
def flags_of(config_class: type) -> Mapping[str, Flag]:
    """The Flag of every field, by its name; TypeError names a field without one."""
    found: dict[str, Flag] = {}
    for name, kind in get_type_hints(config_class, include_extras=True).items():
        flags = [item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Flag)]
        if len(flags) != 1:
            raise TypeError(
                f"{config_class.__name__}.{name} has no flag: write {name}: Annotated[..., training_flag()]"
            )
        found[name] = flags[0]
    return found


def check(config: Any) -> None:
    """Raise ExperimentError for the first value of a vit.ViTConfig that cannot work; nothing is written or imported."""
    _check_ranges(config)
    mixed = config.mixup + config.cutmix
    if mixed > 1:
        raise ExperimentError(f"--mixup and --cutmix are shares of the same images, and must not add up to {mixed}")
    if config.patch_size > config.image_size:
        raise ExperimentError(f"--patch-size {config.patch_size} is larger than --image-size {config.image_size}")
    parts = config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ExperimentError(f"--gradient-accumulation-steps {parts} does not divide --batch-size {config.batch_size}")
    last = config.transformer_units[-1]
    if last != config.projection_dim:
        reason = "as a block adds its output to its input"
        raise ExperimentError(
            f"--transformer-units must end in --projection-dim {config.projection_dim}, {reason}, not in {last}"
        )
    if config.warmup_epochs and config.learning_rate_schedule == "constant":
        raise ExperimentError(f"--warmup-epochs {config.warmup_epochs} needs --learning-rate-schedule cosine")
    if config.learning_rate_schedule == "cosine" and config.warmup_epochs >= config.num_epochs:
        epochs = f"--warmup-epochs {config.warmup_epochs} leaves none of --num-epochs {config.num_epochs}"
        raise ExperimentError(f"{epochs} for the cosine")
    if config.device not in ("auto", "gpu", "cpu"):  # tyro does not check a default, which may come from VIT_DEVICE
        raise ExperimentError(f"VIT_DEVICE must be auto, gpu or cpu, not {config.device!r}")
    if config.dataset not in DATASETS:
        if not config.dataset.endswith(".npz"):
            known = f"{', '.join(DATASETS)} or the path of an .npz file"
            raise ExperimentError(f"--dataset must be {known}, not {config.dataset!r}")
        if not os.path.isfile(config.dataset):
            raise ExperimentError(f"--dataset {config.dataset!r}: there is no such file")
    if not is_installed(config.keras_backend):
        install = f"pip install -c constraints.txt {config.keras_backend}"
        raise ExperimentError(f"the backend {config.keras_backend} is not installed: {install}")
    if config.use_wandb and not is_installed("wandb"):
        raise ExperimentError("W&B is not installed: pip install wandb, or run with --no-use-wandb")
    if not config.checkpoint_path.name.endswith(".weights.h5"):
        raise ExperimentError(f"--checkpoint-path must end in .weights.h5, not {str(config.checkpoint_path)!r}")


def _check_ranges(config: Any) -> None:
    """Raise ExperimentError for the first value of a configuration that is out of its range."""
    for name, known in flags_of(type(config)).items():
        value = getattr(config, name)
        for limits in known.within:
            for item in value if isinstance(value, list) else [value]:
                number = len(item) if isinstance(item, str) else item
                shown = number if isinstance(item, str) else value
                require(limits.low <= number < limits.high, f"{flag(name)} must {limits.text}, not {shown}")


def json_schema(config_class: type) -> dict:
    """The configuration of a run as it is in the results, for programs that know no ViTConfig, as a JSON schema.

    `comparison` and `group` are those of the flag; `default` is there where runs must agree.
    """
    defaults, texts = config_class(), help_of(config_class)
    properties = {}
    for (name, known), kind in zip(flags_of(config_class).items(), get_type_hints(config_class).values(), strict=True):
        properties[name] = {"description": texts[name], **_json_type(kind)}
        properties[name] |= {"group": known.group, "comparison": known.comparison}
        if known.comparison == MUST_AGREE:
            properties[name]["default"] = getattr(defaults, name)
    return properties


def _json_type(kind: Any) -> dict:
    """A type of a field in the words of JSON schema."""
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is list:
        return {"type": "array", "items": _json_type(get_args(kind)[0])}
    if get_origin(kind) in (Union, UnionType):
        return {"anyOf": [_json_type(each) for each in get_args(kind)]}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}
    return {"type": names[kind]}
