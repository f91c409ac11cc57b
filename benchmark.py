"""Which Keras 3 backend trains and runs this model best on this device? Run vit.py on each, repeatedly, and compare.

    python benchmark.py                                              # every installed backend, 3 runs each
    python benchmark.py --backends jax torch --repeats 5 -- --dataset synthetic --num-epochs 2
    python benchmark.py --backends jax native-jax torch native-torch # what Keras costs: peers/ does the same without it
    python benchmark.py --report results-orin results-desktop        # no new runs: compare existing results

Every run is a process of its own, so nothing is warm and no memory is carried over. The order is reversed from round to
round (A B, B A, A B), so that a device which heats up or throttles does not favour the backend that comes first.

It writes report.md (and prints it), report.csv (one row per run) and report.png (with matplotlib). It forms ratios only
between runs that agree in number format, batch, model, data and training. It puts a difference into words only if the
ranges of the repeats do not overlap.

Exit status: 0 the report is written; 1 no run succeeded; 2 wrong input; 130 or 143 stopped by Ctrl-C or SIGTERM (the
report covers the runs that finished before).
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from edgebench.cli import ExperimentError, Interrupted, one_line, require, require_writable_folder
from edgebench.compare import launch
from edgebench.compare.report import write_report
from edgebench.compare.runs import read_failures, read_results


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the checked arguments of benchmark.py, and the flags for vit.py, which follow `--`."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = launch.OneLineParser(
        prog="benchmark.py",
        description="Run vit.py on several Keras backends, repeatedly, and compare them; or report on earlier runs.",
        epilog="Flags after -- go to vit.py unchanged (see python vit.py --help). benchmark.py sets "
        f"{', '.join(launch.RESERVED_FLAGS)} itself. It adds --no-use-wandb unless you give --use-wandb or --no-use-wandb, "
        "because logging to W&B is not part of any measurement.",
        usage="%(prog)s [options] [-- FLAGS FOR vit.py]\n       %(prog)s --report DIR [DIR ...] [--baseline NAME] [--out DIR]",
        allow_abbrev=False,
    )
    backends_help = "jax, torch, tensorflow (default: those that are installed), native-jax, native-torch"
    out_help = "folder for results and report (default: benchmark-results/<UTC time>, with --report its first DIR); "
    out_help += "the report includes runs that are already there"
    parser.add_argument("--backends", nargs="+", metavar="NAME", help=backends_help)
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="runs of each backend (default: 3); a statement needs at least 2"
    )
    parser.add_argument("--baseline", metavar="NAME", help="compare the others with this backend (default: the first)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="DIR", help="run nothing; report on the results below DIR"
    )
    args = parser.parse_args(argv[:split])
    flags = argv[split + 1 :]
    if args.report:
        runs_something = flags or args.backends or args.repeats is not None
        require(not runs_something, "--report runs nothing: it goes with --baseline and --out only")
        return args, []
    args.repeats = 3 if args.repeats is None else args.repeats
    require(args.repeats >= 1, f"--repeats must be positive, not {args.repeats}")
    args.backends = launch.choose_backends(args.backends)
    args.baseline = args.baseline or args.backends[0]
    backends = ", ".join(args.backends)
    require(args.baseline in args.backends, f"--baseline: {args.baseline!r} is none of the backends {backends}")
    return args, launch.complete_flags(flags)


def report_on(folders: Sequence[Path], out: Path, baseline: str | None) -> int:
    """Report on existing results and return the exit status."""
    runs = read_results(folders)
    require(bool(runs), f"no results of vit.py below {', '.join(map(str, folders))}")
    names = sorted({run.backend for run in runs})
    require(baseline in (None, *names), f"--baseline: {baseline!r} has no results; there are {', '.join(names)}")
    write_report(out, runs, read_failures(folders), baseline)
    return 0


def benchmark(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run everything, then report, and return the exit status."""
    out = args.out or Path("benchmark-results") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    require_writable_folder(out, "--out")
    try:
        with launch.interruptible():
            status = 0 if launch.run_all(args.backends, args.repeats, flags, out) else 1
    except Interrupted as interruption:
        status = interruption.exit_status
    write_report(out, read_results([out]), read_failures([out]), args.baseline)
    return status


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    sys.stdout.reconfigure(errors="replace")  # a console without × prints ?
    try:
        args, flags = parse(argv)
        if not args.report:
            return benchmark(args, flags)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has read enough
        return report_on(args.report, args.out or args.report[0], args.baseline)
    except ExperimentError as error:
        print(f"benchmark.py: error: {one_line(error)}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
