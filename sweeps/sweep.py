"""The part of a sweep that needs W&B's Python client. sweep.sh and W&B's agent start it, in the container or without one.

    python sweeps/sweep.py create --device ook --backend jax --parameters JSON [-- FLAGS of vit.py]
    python sweeps/sweep.py join ENTITY/PROJECT/ID --device ook --backend jax
    python sweeps/sweep.py agent [--count N] ENTITY/PROJECT/ID
    python sweeps/sweep.py trial vit.py --learning_rate=0.001 ...

`create` and `join` print one line to stdout: the sweep's path, ENTITY/PROJECT/ID. `agent` runs W&B's agent and ends it. The
agent runs `trial` for each run, as configured in sweep_config.json. It starts the program as a process of its own and
records how that process ends.
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
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only what lies beside it

from edgebench.streams import steady_streams

CONFIG = Path("sweep_config.json")
KERAS_NAMES = {"jax": "jax", "pytorch": "torch"}  # the launchers' name of a backend -> Keras' name
STOP, STOP_AT_ONCE = {signal.SIGTERM, signal.SIGINT}, signal.SIGUSR1  # what the launchers send to `agent`
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> None:
    steady_streams()
    arguments, flags = sys.argv[1:], []
    if arguments[:1] == ["trial"]:  # the rest is the program's command line
        sys.exit(trial(arguments[1:]))
    if arguments[:1] == ["agent"]:  # the rest is W&B's
        sys.exit(agent(arguments[1:]))
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


def read_config() -> dict:
    """Read sweep_config.json, or end with one line that says what is wrong with it."""
    try:
        config = json.loads(CONFIG.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f"sweep.py: cannot read {CONFIG} ({error})")
    kinds = {"program": str, "project": str, "command": list, "parameters": dict}
    for name, kind in kinds.items():
        if not isinstance(config, dict) or not isinstance(config.get(name), kind):
            sys.exit(f"sweep.py: {CONFIG} must be a JSON object whose {name!r} is {kind.__name__!r}")
    return config


def sweep_config(device: str, backend: str, parameters: dict, flags: list[str]) -> dict:
    """Adapt sweep_config.json to a device and backend. `flags` of vit.py become constants, which W&B records."""
    config = read_config()
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
    with wandb_errors_in_one_line("create a sweep"):
        return f"{entity}/{project}/{wandb.sweep(config, entity=entity, project=project)}"


def join(options: argparse.Namespace, flags: list[str]) -> str:
    """Check that the sweep was created for this device and backend, and that it runs what this folder would run.

    Whoever may write to the W&B project decides what a sweep contains, and the agent runs any command that it names.
    """
    import wandb

    with wandb_errors_in_one_line(f"read the sweep {options.sweep}"):
        sweep = wandb.Api().sweep(options.sweep)
        actual, url = dict(sweep.config), sweep.url
    own = read_config()
    for name in ("command", "program"):
        if actual.get(name) != own[name]:
            sys.exit(
                f"sweep.py: the sweep {options.sweep} has the {name} {actual.get(name)!r}, not that of {CONFIG}: "
                "it could run anything on this machine"
            )
    for name, value in {"keras_backend": KERAS_NAMES[options.backend], "node_name": options.device}.items():
        if (found := constants_of(actual).get(name)) != value:
            sys.exit(
                f"sweep.py: the sweep {options.sweep} has {name} {found}, not {value}: its runs would be recorded wrongly"
            )
    print(f"Sweep URL: {url}")
    return options.sweep


def constants_of(config: dict) -> dict:
    """The parameters of a sweep that have one value. Others may have written the sweep, in any form."""
    parameters = config.get("parameters")
    items = parameters.items() if isinstance(parameters, dict) else ()
    return {name: item.get("value") for name, item in items if isinstance(item, dict)}


@contextlib.contextmanager
def wandb_errors_in_one_line(purpose: str):
    """End with one line where W&B's client cannot do something: its server is out of reach, or refuses."""
    try:
        yield
    except Exception as error:  # many types, also those of the libraries below it
        sys.exit(f"sweep.py: cannot {purpose} ({' '.join(str(error).split()) or type(error).__name__})")


def agent(arguments: list[str]) -> int:
    """Run W&B's agent. Return when no process that it started is left.

    On SIGTERM, or when the agent ends, what still runs is told to end; after $WANDB_AGENT_KILL_DELAY seconds, or on SIGUSR1,
    it is killed. W&B's agent itself would need two SIGINTs, which a process from a script's background ignores.
    """
    awaited = STOP | {STOP_AT_ONCE, signal.SIGCHLD}

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        die_with_parent(signal.SIGTERM)

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the run of an agent that has ended becomes this one's child
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    os.environ["SWEEP_PROGRAM"] = read_config()["program"]
    command = [sys.executable, "-m", "wandb", "agent", *arguments]
    # The agent would end if it could not print.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare)
    relays = [
        threading.Thread(target=relay, args=pair, daemon=True) for pair in ((process.stdout, 1), (process.stderr, 2))
    ]
    for thread in relays:
        thread.start()
    received = signal.SIGCHLD
    while received == signal.SIGCHLD and process.poll() is None:
        received = signal.sigwait(awaited)

    patience_s = 0 if received == STOP_AT_ONCE else int(os.environ.get("WANDB_AGENT_KILL_DELAY") or 300)
    kill_at = time.monotonic() + patience_s
    told = set()
    while running := children():
        is_late = time.monotonic() >= kill_at
        for child in running - (set() if is_late else told):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if is_late else signal.SIGTERM)
        told |= running
        signalled = signal.sigtimedwait(awaited, 1)
        if signalled and signalled.si_signo == STOP_AT_ONCE:
            kill_at = 0
    for thread in relays:
        thread.join(10)  # longer only if who reads has stopped reading
    return process.wait()


def children() -> set[int]:
    """The running processes whose parent is this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(path.parent.name))
    return found


def trial(command: list[str]) -> int:
    """Run one trial and record in the file $SWEEP_LEDGER how it ends.

    `wandb agent` does not report how its runs end. It also counts a run that Hyperband stopped as failed, and gives up
    after too many failures. Therefore such a run ends with status 0 here.
    """
    # W&B's server names the program anew for each run.
    if (program := os.environ.get("SWEEP_PROGRAM")) and command[:1] != [program]:
        sys.exit(f"sweep.py: a run of the sweep names the program {command[:1]}, not {program}")
    process, stop_requested, is_told = None, False, False

    def stop(number=None, frame=None) -> None:
        nonlocal stop_requested, is_told
        stop_requested = True
        if process and not is_told:  # the program would take a second signal as the order to end at once
            is_told = True
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    die_with_parent(signal.SIGTERM)  # if the agent is killed, the run ends and frees the GPU
    record("started")
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, preexec_fn=lambda: die_with_parent(signal.SIGKILL)
    )
    if stop_requested:
        stop()
    reason = ""
    for line in process.stderr:
        write(2, line)
        if line.startswith(b"vit.py: error: "):
            reason = line.decode(errors="replace").removeprefix("vit.py: error: ").strip()
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
        say(f"sweep.py: uploading {folder}, which was logged offline")
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)])
    return 0 if outcome == "stopped" else status


def run_folders(kind: str) -> list[Path]:
    """Find the folders in which W&B's client keeps this trial: of kind `run` (online) or `offline-run`."""
    return list(Path(os.environ.get("WANDB_DIR") or ".", "wandb").glob(f"{kind}-*-{os.environ.get('WANDB_RUN_ID')}"))


def report_failure(status: int, reason: str) -> None:
    """Tell W&B why a run failed that could not do so itself: it was killed, or ended before W&B started."""
    try:
        import wandb

        run = wandb.init(resume="allow", settings=wandb.Settings(console="off", init_timeout=30))
        run.summary["failure"] = reason
        run.finish(exit_code=status)
    except Exception as error:
        say(f"sweep.py: warning: cannot report the failure to W&B ({error})")


def record(outcome: str, status: int | None = None) -> None:
    """Print the run's state and append a line to $SWEEP_LEDGER: sweep, run, exit status, outcome."""
    run = os.environ.get("WANDB_RUN_ID", "")
    suffix = "" if status is None else f", exit status {status}"
    say(f"sweep.py: run {run} {outcome}{suffix}")
    if ledger := os.environ.get("SWEEP_LEDGER"):
        columns = (os.environ.get("WANDB_SWEEP_ID", ""), run, "-" if status is None else status, outcome)
        try:
            # Created here, not by the launcher: root may have started that one in a user's folder.
            Path(ledger).parent.mkdir(exist_ok=True)
            with open(ledger, "a") as file:
                print(*columns, sep="\t", file=file)
        except OSError as error:
            say(f"sweep.py: warning: {ledger} cannot be written ({error}), so the launcher cannot count this run")


def relay(source, number: int) -> None:
    """Copy the lines of a stream to the standard stream with this number."""
    for line in source:
        write(number, line)


def say(line: str) -> None:
    """Print a line to stderr."""
    write(2, f"{line}\n".encode(errors="replace"))


def write(number: int, data: bytes) -> None:
    """Write to a standard stream, and survive that nobody can read it: its disk is full, or its reader has left."""
    with contextlib.suppress(OSError):
        os.write(number, data)  # unbuffered: nothing is left that could fail when the process ends


def die_with_parent(number: int) -> None:
    """Have Linux send this process the signal `number` when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    main()
