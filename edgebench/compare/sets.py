"""Which runs may be compared: those that agree in all that decides what is trained and how much work it is."""

from collections.abc import Sequence
from pathlib import Path

from edgebench.cli import BACKENDS
from edgebench.compare.items import PEERS, RUNTIMES
from edgebench.compare.runs import NONE, Device, Run

# Every field of vit.ViTConfig has one of three rules; a test fails for a field without one.
MUST_AGREE = "must agree"  # runs that differ in it are not compared, unless benchmark.py was asked to vary it
NOTED = "noted"  # runs that differ in it are compared, and the report says so
CANNOT_MATTER = "cannot matter"  # it has no effect on what is compared, or another figure tells the effect apart
MODEL = (
    *("image_size", "patch_size", "projection_dim", "num_heads", "transformer_layers"),
    *("transformer_units", "head", "mlp_head_units", "attention_dropout", "stochastic_depth"),
)
# What a file that was written before there were recipes stands for, as the report shows it.
WITHOUT_SCHEDULE = {"learning_rate_schedule": "constant", "warmup_epochs": "0.0"}
WITHOUT_ELEMENTS = {"head": "flatten"} | dict.fromkeys(("stochastic_depth", "label_smoothing", "ema"), "0.0")
WITHOUT_ELEMENTS |= dict.fromkeys(("mixup", "cutmix", "random_erasing", "rand_augment"), "0.0")
BEFORE_RECIPES = WITHOUT_SCHEDULE | WITHOUT_ELEMENTS
SET_BY_A_RECIPE = (
    *("image_size", "patch_size", "projection_dim", "transformer_layers", "mlp_head_units", "attention_dropout"),
    *("weight_decay", "num_epochs", *WITHOUT_ELEMENTS),
)
FIELD_RULES = {
    **dict.fromkeys(MODEL, MUST_AGREE),
    "initial_weights": MUST_AGREE,
    **dict.fromkeys(("learning_rate", "batch_size", "augmentation", *WITHOUT_SCHEDULE, *SET_BY_A_RECIPE), MUST_AGREE),
    "recipe": CANNOT_MATTER,  # a name for values of those fields
    **dict.fromkeys(("gradient_accumulation_steps", "validation_split", "dataset"), MUST_AGREE),
    "resume": CANNOT_MATTER,  # only if the run was resumed, which `resumed` below tells
    "seed": CANNOT_MATTER,  # runs are paired by it
    # The device and how the numbers are computed
    "dtype_policy": MUST_AGREE,
    "tf32": MUST_AGREE,  # on a GPU
    "jit": CANNOT_MATTER,  # whether the step was compiled, what/jit_compile, is part of the name
    "keras_backend": CANNOT_MATTER,  # part of the name
    "device": CANNOT_MATTER,  # runs on different devices are reported apart, by what/device
    "node_name": CANNOT_MATTER,  # likewise
    "compile_cache": CANNOT_MATTER,  # matters to compile times only, which what/compile_cache tells apart
    # Measuring and recording
    "measure_seconds": NOTED,  # decides how long is measured, not what
    "use_wandb": NOTED,  # logging takes time between the epochs
    **dict.fromkeys(("checkpoint_path", "results_dir", "debug"), CANNOT_MATTER),
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_run_name", "wandb_tags"), CANNOT_MATTER),
    **dict.fromkeys(("wandb_group", "wandb_job_type", "wandb_artifact", "verbose"), CANNOT_MATTER),
}
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
    *(f"what/config/{field}" for field, rule in FIELD_RULES.items() if rule == NOTED),
    "load/cores",
)
NOTED_WITHIN_A_NAME = ("what/attention", "what/jit_failure", "what/deployed/trained_on")


def conditions(run: Run) -> dict[str, str]:
    """Return everything that has to agree, by name.

    A data file counts by its name, because its folder differs between devices. TF32 counts on GPUs only: a CPU
    multiplies float32 in full precision, as a GPU does without TF32.
    """
    varied = {*run.varied, *(SET_BY_A_RECIPE if "recipe" in run.varied else ())}
    fields = [field for field, rule in FIELD_RULES.items() if rule == MUST_AGREE and field not in varied]
    values = {field: run.text(f"what/config/{field}") for field in fields}
    values |= {field: text for field, text in BEFORE_RECIPES.items() if values.get(field) == NONE}
    if values.get("initial_weights") == NONE:  # a run from before the flag: its Keras decided
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
