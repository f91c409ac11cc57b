"""The part of a sweep that needs W&B's Python client. sweep.sh and W&B's agent start it, in the container or without one.

    python sweeps/sweep.py create --device ook --backend jax --parameters JSON [-- FLAGS of vit.py]
    python sweeps/sweep.py join ENTITY/PROJECT/ID --device ook --backend jax
    python sweeps/sweep.py trial vit.py --learning_rate=0.001 ...

`create` and `join` print one line to stdout: the sweep's path, ENTITY/PROJECT/ID. The agent runs `trial` for each run, as
configured in sweep_config.json. It starts the program as a process of its own and records how that process ends.
"""

# This folder has no __init__.py on purpose. W&B's own library is a package named `sweeps`; without an __init__.py here,
# `import sweeps` finds that library even from the repository root.

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

CONFIG = Path("sweep_config.json")
KERAS_NAMES = {"jax": "jax", "pytorch": "torch"}  # the launchers' name of a backend -> Keras' name


def main() -> None:
    arguments, flags = sys.argv[1:], []
    if arguments[:1] == ["trial"]:  # the rest is the program's command line
        sys.exit(trial(arguments[1:]))
    if "--" in arguments:
        separator = arguments.index("--")
        arguments, flags = arguments[:separator], arguments[separator + 1 :]
    commands = {"create": create, "join": join}
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    parser.add_argument("sweep", nargs="?", help="the sweep to join, as ENTITY/PROJECT/ID")
    parser.add_argument("--device", required=True, help="ook or ojo, recorded as node_name with every run")
    parser.add_argument("--backend", required=True, choices=KERAS_NAMES)
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON that replaces parameters of the file")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # wandb prints to stdout, which is reserved for the path
        path = commands[options.command](options, flags)
    print(path)


def sweep_config(device: str, backend: str, parameters: dict, flags: list[str]) -> dict:
    """Adapt sweep_config.json to a device and backend. `flags` of vit.py become constants, which W&B records."""
    try:
        config = json.loads(CONFIG.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"sweep.py: cannot read {CONFIG} ({error})")
    constants = parse_flags(flags) | {"keras_backend": KERAS_NAMES[backend], "node_name": device}
    config["name"] = f"vit-{device}-{backend}"
    config["parameters"] |= parameters | {name: {"value": value} for name, value in constants.items()}
    return config


def parse_flags(flags: list[str]) -> dict:
    """Parse `--num-epochs 1 --no-tf32 --mlp-head-units 8 4` into {"num_epochs": 1, "tf32": False, "mlp_head_units": [8, 4]}."""
    values: dict[str, list] = {}
    name = None
    for word in flags:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            values[name] = [_parse_value(value)] if has_value else []
        elif name is None:
            sys.exit(f"sweep.py: a flag of vit.py begins with --, not {word!r}")
        else:
            values[name].append(_parse_value(word))

    parsed = {}
    for name, items in values.items():
        if not items:  # a switch
            parsed[name.removeprefix("no_")] = not name.startswith("no_")
        elif len(items) == 1:
            parsed[name] = items[0]
        else:
            parsed[name] = items
    return parsed


def _parse_value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def create(options: argparse.Namespace, flags: list[str]) -> str:
    """Create the sweep, unless the program rejects `flags`."""
    config = sweep_config(options.device, options.backend, options.parameters, flags)
    check = subprocess.run([sys.executable, config["program"], *flags, "--help"], stdout=subprocess.DEVNULL)
    if check.returncode:  # the program has printed what is wrong
        sys.exit(check.returncode)
    import wandb

    entity, project = os.environ["WANDB_ENTITY"], os.environ.get("WANDB_PROJECT") or config["project"]
    return f"{entity}/{project}/{wandb.sweep(config, entity=entity, project=project)}"


def join(options: argparse.Namespace, flags: list[str]) -> str:
    """Check that the sweep was created for this device and backend, so that its runs are recorded correctly."""
    import wandb

    try:
        sweep = wandb.Api().sweep(options.sweep)
    except (wandb.errors.Error, ValueError) as error:
        sys.exit(f"sweep.py: cannot read the sweep {options.sweep} ({' '.join(str(error).split())})")
    expected = {"keras_backend": KERAS_NAMES[options.backend], "node_name": options.device}
    for name, value in expected.items():
        actual = sweep.config["parameters"].get(name, {}).get("value")
        if actual != value:
            sys.exit(
                f"sweep.py: the sweep {options.sweep} has {name} {actual}, not {value}: its runs would be recorded wrongly"
            )
    print(f"Sweep URL: {sweep.url}")
    return options.sweep


def trial(command: list[str]) -> int:
    """Run one trial and record in the file $SWEEP_LEDGER how it ends.

    `wandb agent` does not report how its runs end. It also counts a run that Hyperband stopped as failed, and gives up
    after too many failures. Therefore such a run ends with status 0 here.
    """
    record("started")
    die_with_parent(signal.SIGTERM)  # if the agent is killed, the run ends and frees the GPU
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    stop_requested = False

    def stop(number, frame):
        nonlocal stop_requested
        stop_requested = True
        process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    reason = ""
    for line in process.stderr:
        sys.stderr.write(line)
        if line.startswith("vit.py: error: "):
            reason = line.removeprefix("vit.py: error: ").strip()
    status = process.wait()
    if status < 0:  # killed by a signal: use the status that a shell reports
        reason, status = f"killed by {signal.Signals(-status).name}", 128 - status

    if stop_requested and status in (130, 143):
        outcome = "stopped"
    elif status:
        outcome = "failed"
    else:
        outcome = "finished"
    record(outcome, status)
    if outcome == "failed" and (status > 128 or not run_folders("run")):
        report_failure(status, reason or f"exit status {status} before W&B started")
    for folder in run_folders("offline-run"):
        print(f"sweep.py: uploading {folder}, which was logged offline", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)])
    return 0 if outcome == "stopped" else status


def run_folders(kind: str) -> list[Path]:
    """Find the folders in which W&B's client keeps this trial: of kind `run` (online) or `offline-run`."""
    return list(Path(os.environ.get("WANDB_DIR") or ".", "wandb").glob(f"{kind}-*-{os.environ.get('WANDB_RUN_ID')}"))


def report_failure(status: int, reason: str) -> None:
    """Tell W&B why a run failed that could not do so itself: it was killed, or ended before W&B started."""
    import wandb

    try:
        run = wandb.init(resume="allow", settings=wandb.Settings(console="off", init_timeout=30))
        run.summary["failure"] = reason
        run.finish(exit_code=status)
    except wandb.errors.Error as error:
        print(f"sweep.py: warning: cannot report the failure to W&B ({error})", file=sys.stderr)


def record(outcome: str, status: int | None = None) -> None:
    """Print the run's state and append a line to $SWEEP_LEDGER: sweep, run, exit status, outcome."""
    run = os.environ.get("WANDB_RUN_ID", "")
    suffix = "" if status is None else f", exit status {status}"
    print(f"sweep.py: run {run} {outcome}{suffix}", file=sys.stderr)
    if ledger := os.environ.get("SWEEP_LEDGER"):
        # Created here, not by the launcher: root may have started that one in a user's folder.
        Path(ledger).parent.mkdir(exist_ok=True)
        columns = (os.environ.get("WANDB_SWEEP_ID", ""), run, "-" if status is None else status, outcome)
        with open(ledger, "a") as file:
            print(*columns, sep="\t", file=file)


def die_with_parent(number: int) -> None:
    """Have Linux send this process the signal `number` when its parent ends, for whatever reason."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    main()
