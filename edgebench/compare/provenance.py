"""The small print of a report: where its numbers come from, and what differs between runs that are compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgebench.compare.items import PEERS, packages_of
from edgebench.compare.runs import NONE, Run, distinct, plain
from edgebench.compare.sets import MODEL, NOTED_PATHS, NOTED_WITHIN_A_NAME


def provenance(group: list[Run], names: Mapping[str, list[Run]]) -> list[str]:
    """List what a reader should know about the runs before trusting their numbers."""
    run = group[0]

    def value(path: str) -> str:
        return distinct(group, f"what/{path}")

    def count(path: str) -> str:
        number = run.number(f"what/{path}")
        return NONE if number is None else f"{number:,.0f}"

    software = [
        f"{name} {distinct(_with(name, group), f'what/versions/{name}')}" for name in ("Python", "Keras", "CUDA")
    ]
    packages = dict.fromkeys(packages_of(each.backend)[0] for each in group)
    for package in packages:
        users = [each for each in group if packages_of(each.backend)[0] == package]
        software.append(f"{plain(package)} {distinct(users, f'what/versions/{package}')}")
    tf32 = f", TF32 {value('config/tf32')}" if run.get("what/is_gpu") else ""
    model = ", ".join(f"{name} {value(f'config/{name}')}" for name in MODEL)
    images = ", ".join(f"{count(f'images/{part}')} {part}" for part in ("train", "validation", "test"))
    counts = ", ".join(f"{len(runs)} {name}" for name, runs in names.items())
    dates = sorted({each.text("what/started") for each in group})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    datasets = ", ".join(dict.fromkeys(Path(each.text("what/config/dataset")).name for each in group))
    return [
        f"Device: {run.device.name}; node {run.device.node}; power mode {run.device.power_mode}; "
        f"CPU cores {distinct(group, 'load/cores')}",
        f"Software: {', '.join(software)}",
        f"Number format: {value('config/dtype_policy')}{tf32}",
        f"Model: {count('num_parameters')} parameters; {model}",
        f"Data: {datasets}; images: {images}; shape {value('image_shape')}, {value('num_classes')} classes",
        f"Training: batch {value('config/batch_size')}, {value('config/num_epochs')} epochs, learning rate "
        f"{value('config/learning_rate')}, weight decay {value('config/weight_decay')}, augmentation "
        f"{value('config/augmentation')}, seeds {value('config/seed')}",
        f"Code: {', '.join(dict.fromkeys(each.commit for each in group))}",
        f"Runs: {len(group)} ({counts}), {period}",
    ]


def _with(software: str, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have a version of `software`: peers have none of Keras."""
    return [run for run in runs if software != "Keras" or run.backend not in PEERS]


def notes(group: list[Run], names: Mapping[str, list[Run]]) -> list[str]:
    """List what differs between runs that are compared nevertheless, and the runs that are unstable."""
    found = []
    for path in NOTED_PATHS:
        field = path.rpartition("/")[2]
        if len({run.text(path) for run in _with(field, group)}) > 1:
            values = [f"{name} {distinct(runs, path)}" for name, runs in names.items()]
            found.append(f"Note: the runs differ in {field}: {'; '.join(values)}")
    for name, runs in names.items():
        for path in (*NOTED_WITHIN_A_NAME, f"what/versions/{packages_of(runs[0].backend)[0]}"):
            if len({run.text(path) for run in runs}) > 1:
                found.append(
                    f"Note: runs of {name} are put together that differ in {plain(path[5:])}: {distinct(runs, path)}"
                )
        if failure := {run.text("what/jit_failure") for run in runs} - {NONE}:
            found.append(f"Note: {name} was asked to compile and could not: {'; '.join(sorted(failure))}")
        for run in runs:
            if run.instabilities:
                reasons = "; ".join(run.instabilities)
                found.append(f"Unstable (!): {plain(run.path.name)}, {name}, seed {run.seed}: {reasons}")
    return found
