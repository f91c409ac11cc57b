"""What the sweep launchers do through W&B's client, in the container or in the current environment.

    python sweep.py create --device ook --backend jax --parameters JSON [-- FLAGS of vit.py]
    python sweep.py join ENTITY/PROJECT/ID --device ook --backend jax
    python sweep.py trial vit.py --learning_rate=0.001 ...

`create` and `join` print the sweep's path, ENTITY/PROJECT/ID, as the only line of stdout. `trial` is what the agent runs,
as sweep_config.json says: the program in a process of its own, whose end it notes for the launcher.
"""

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
KERAS_NAMES = {"jax": "jax", "pytorch": "torch"}  # what the launchers call a backend -> what Keras calls it


def main() -> None:
    commands = {"create": create, "join": join}
    if sys.argv[1:2] == ["trial"]:  # everything else on its line belongs to the program
        sys.exit(trial(sys.argv[2:]))
    arguments, _, flags = _partition(sys.argv[1:], "--")
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    parser.add_argument("sweep", nargs="?", help="ENTITY/PROJECT/ID, to join")
    parser.add_argument("--device", required=True, help="ook or ojo: the node_name of every run")
    parser.add_argument("--backend", required=True, choices=KERAS_NAMES)
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON in place of the file's parameters")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # wandb prints
        path = commands[options.command](options, flags)
    print(path)


def _partition(items: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    at = items.index(separator) if separator in items else len(items)
    return items[:at], items[at : at + 1], items[at + 1 :]


def sweep_config(device: str, backend: str, parameters: dict, flags: list[str]) -> dict:
    """sweep_config.json for one device and backend; `flags` of vit.py become constants, so that W&B records them."""
    try:
        config = json.loads(CONFIG.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"sweep.py: {CONFIG} cannot be read ({error})")
    config["name"] = f"vit-{device}-{backend}"
    config["parameters"] |= parameters | {name: {"value": value} for name, value in constants(flags).items()}
    config["parameters"] |= {"keras_backend": {"value": KERAS_NAMES[backend]}, "node_name": {"value": device}}
    return config


def constants(flags: list[str]) -> dict:
    """`--num-epochs 1 --no-tf32 --mlp-head-units 8 4` as {"num_epochs": 1, "tf32": False, "mlp_head_units": [8, 4]}."""
    values: dict[str, list] = {}
    for token in flags:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            given = values[name.replace("-", "_")] = [_value(value)] if equals else []
        elif not values:
            sys.exit(f"sweep.py: a flag of vit.py begins with --, not {token!r}")
        else:
            given.append(_value(token))
    switches = {name.removeprefix("no_"): not name.startswith("no_") for name, given in values.items() if not given}
    return switches | {name: given[0] if len(given) == 1 else given for name, given in values.items() if given}


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def create(options: argparse.Namespace, flags: list[str]) -> str:
    config = sweep_config(options.device, options.backend, options.parameters, flags)
    known = subprocess.run([sys.executable, config["program"], *flags, "--help"], stdout=subprocess.DEVNULL)
    if known.returncode:  # it has said in one line what is wrong, and no sweep was made
        sys.exit(known.returncode)
    import wandb

    entity, project = os.environ["WANDB_ENTITY"], os.environ.get("WANDB_PROJECT") or config["project"]
    return f"{entity}/{project}/{wandb.sweep(config, entity=entity, project=project)}"


def join(options: argparse.Namespace, flags: list[str]) -> str:
    """Refuse a sweep whose runs would be recorded as another device's or backend's."""
    import wandb

    try:
        sweep = wandb.Api().sweep(options.sweep)
    except (wandb.errors.Error, ValueError) as error:
        sys.exit(f"sweep.py: the sweep {options.sweep} cannot be had ({' '.join(str(error).split())})")
    wanted = {"keras_backend": KERAS_NAMES[options.backend], "node_name": options.device}
    for name, value in wanted.items():
        theirs = sweep.config["parameters"].get(name, {}).get("value")
        if theirs != value:
            sys.exit(
                f"sweep.py: the sweep {options.sweep} has {name} {theirs}, not {value}: its records would be wrong"
            )
    print(f"Sweep URL: {sweep.url}")
    return options.sweep


def trial(command: list[str]) -> int:
    """Run one trial and note how it ends in the file $SWEEP_LEDGER: a line `sweep, run, exit status, outcome` a state.

    `wandb agent` tells nobody how its runs end. It also counts a run that it stopped itself (Hyperband) as failed and
    gives up when too many have: such a run's status is 0 here.
    """
    note("-", "started")
    die_with_parent(signal.SIGTERM)  # if the agent is killed, the run ends and frees the GPU
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    stopped = False

    def stop(number, frame):
        nonlocal stopped
        stopped = True
        process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    reason = ""
    for line in process.stderr:
        sys.stderr.write(line)
        if line.startswith("vit.py: error: "):
            reason = line.removeprefix("vit.py: error: ").strip()
    status = process.wait()
    if status < 0:  # ended by a signal: the number that a shell gives
        reason, status = f"killed by {signal.Signals(-status).name}", 128 - status
    was_stopped = stopped and status in (130, 143)
    note(status, "finished" if status == 0 else "stopped" if was_stopped else "failed")
    if not was_stopped and (status > 128 or (status and not run_folders("run"))):
        mark_failed(status, reason or f"exit status {status} before W&B was started")
    for folder in run_folders("offline-run"):
        print(f"sweep.py: uploading {folder}, which was logged offline", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)])
    return 0 if was_stopped else status


def run_folders(kind: str) -> list[Path]:
    """What W&B's client has kept of this trial: `run` online, `offline-run` offline."""
    return list(Path(os.environ.get("WANDB_DIR") or ".", "wandb").glob(f"{kind}-*-{os.environ.get('WANDB_RUN_ID')}"))


def mark_failed(status: int, reason: str) -> None:
    """Tell W&B why a run failed that could not do so itself: it was killed, or ended before it had reached W&B."""
    import wandb

    try:
        run = wandb.init(resume="allow", settings=wandb.Settings(console="off", init_timeout=30))
        run.summary["failure"] = reason
        run.finish(exit_code=status)
    except wandb.errors.Error as error:
        print(f"sweep.py: warning: W&B does not know of the failure ({error})", file=sys.stderr)


def note(status: int | str, outcome: str) -> None:
    run = os.environ.get("WANDB_RUN_ID", "")
    print(f"sweep.py: run {run} {outcome}" + (f", exit status {status}" if status != "-" else ""), file=sys.stderr)
    if ledger := os.environ.get("SWEEP_LEDGER"):
        Path(ledger).parent.mkdir(exist_ok=True)  # not in the launcher, which root may have started in a user's folder
        with open(ledger, "a") as file:
            print(os.environ.get("WANDB_SWEEP_ID", ""), run, status, outcome, sep="\t", file=file)


def die_with_parent(number: int) -> None:
    """Have Linux send this process the signal when its parent ends, however that happens."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    main()
