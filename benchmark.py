"""Which Keras 3 backend trains and runs this model best on this device? Run vit.py on each, repeatedly, and compare.

    python benchmark.py                                              # every installed backend, 4 runs each
    python benchmark.py --backends jax torch:jit=on --repeats 6 -- --dataset synthetic --num-epochs 2
    python benchmark.py --backends jax jax:dtype_policy=mixed_bfloat16,attention_dropout=0
    python benchmark.py --backends jax native-jax torch native-torch # what Keras costs: peers/ does the same without it
    python benchmark.py --report results-orin results-desktop        # no new runs: compare existing results
    python benchmark.py --report results/20260101T000000-orin-jax-0123abcd.json # the learning curve of one run

Every run is a process of its own, so nothing is warm and no memory is carried over. Run k of every backend has the same
seed, and the next run another one. The order is reversed from round to round (A B, B A), so that a device which heats up
or throttles does not favour the backend that comes first: an even number of rounds is balanced.

It writes report.md (and prints it), report.csv (one row per run) and report.png (with matplotlib). It forms ratios only
between runs that agree in number format, batch, model, data and training, except for what --backends varies. It claims a
difference only if the spread of the runs supports it; docs/verdicts.md says how.

Exit status: 0 the report is written; 1 no run succeeded; 2 wrong input, or a report that cannot be written; 130 or 143
stopped by Ctrl-C or SIGTERM (the report covers the runs that finished before).
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from edgebench.cli import ExperimentError, Interrupted, one_line, require, require_writable_folder
from edgebench.compare import items, launch
from edgebench.compare.report import folder_for, write_report
from edgebench.compare.runs import read_failures, read_results
from edgebench.compare.sentences import DEFAULT_REPEATS
from edgebench.streams import steady_streams

EPILOG = f"""Flags after -- go to vit.py (see python vit.py --help). benchmark.py sets {", ".join(items.RESERVED_FLAGS)} itself,
and counts --seed up from round to round. It adds --no-use-wandb unless you give --use-wandb or --no-use-wandb, because
logging to W&B is not part of any measurement."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the checked arguments of benchmark.py, with `items` and `seed`, and the flags for all runs, which follow `--`."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = launch.OneLineParser(
        prog="benchmark.py",
        description="Run vit.py on several Keras backends, repeatedly, and compare them; or report on earlier runs.",
        epilog=EPILOG,
        usage="%(prog)s [options] [-- FLAGS FOR vit.py]\n       %(prog)s --report PATH [PATH ...] [--baseline NAME] [--out DIR]",
        allow_abbrev=False,
    )
    backends_help = "jax, torch, tensorflow (default: those that are installed), native-jax, native-torch; with flags "
    backends_help += (
        "of vit.py for it alone, as in jax:dtype_policy=mixed_bfloat16,attention_dropout=0. torch alone means "
    )
    backends_help += "torch:jit=off torch:jit=on, on a CPU too, unless --jit stands after --"
    cold_help = "compile from scratch in every run (--no-compile-cache), not only in the first of each backend"
    out_help = "folder for results and report (default: benchmark-results/<UTC time>, with --report its first PATH); "
    out_help += "the report includes runs that are already there"
    repeats_help = f"runs of each (default: {DEFAULT_REPEATS}); an even number balances the order"
    baseline_help = "compare the others with this one, as in --backends or as in a report (default: the first)"
    parser.add_argument("--backends", nargs="+", metavar="NAME[:FLAG=VALUE,...]", help=backends_help)
    parser.add_argument("--repeats", type=int, metavar="N", help=repeats_help)
    parser.add_argument("--cold", action="store_true", help=cold_help)
    parser.add_argument("--baseline", metavar="NAME", help=baseline_help)
    parser.add_argument("--out", type=launch.folder, metavar="DIR", help=out_help)
    report_help = "run nothing; report on the results in a file, or below a folder"
    parser.add_argument("--report", nargs="+", type=launch.folder, metavar="PATH", help=report_help)
    args = parser.parse_args(argv[:split])
    flags = argv[split + 1 :]
    if args.report:
        runs_something = flags or args.backends or args.cold or args.repeats is not None
        require(not runs_something, "--report runs nothing: it goes with --baseline and --out only")
        return args, []
    args.repeats = DEFAULT_REPEATS if args.repeats is None else args.repeats
    require(args.repeats >= 1, f"--repeats must be positive, not {args.repeats}")
    args.seed, flags = items.take_seed(items.complete_flags(flags))
    args.items = items.choose_items(args.backends, flags)
    if args.baseline:
        items.check_baseline(args.baseline, args.items)
    return args, [*flags, *(["--no-compile-cache"] if args.cold else [])]


def benchmark(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run everything, then report, and return the exit status."""
    launch.check_flags(args.items, flags)
    out = args.out or Path("benchmark-results") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    require_writable_folder(out, "--out")
    if args.repeats % 2:
        print(f"note: --repeats {args.repeats} is odd: A B comes once more often than B A, and a drift may favour one")
    baseline = args.baseline or args.items[0].text
    try:
        with launch.interruptible():
            status = 0 if launch.run_all(args.items, args.repeats, args.seed, flags, out, baseline) else 1
    except Interrupted as interruption:
        status = interruption.exit_status
    runs = read_results([out])
    write_report(out, runs, read_failures([out]), items.find_baseline(None, runs, [out]))
    return status


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    sys.stdout.reconfigure(errors="replace")  # a console without × prints ?
    try:
        args, flags = parse(argv)
        if not args.report:
            return benchmark(args, flags)
        runs = read_results(args.report)
        require(bool(runs), f"no results of vit.py in {', '.join(map(str, args.report))}")
        baseline = items.find_baseline(args.baseline, runs, args.report)
        write_report(args.out or folder_for(args.report[0]), runs, read_failures(args.report), baseline)
        return 0
    except ExperimentError as error:
        print(f"benchmark.py: error: {one_line(error)}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    steady_streams()  # `benchmark.py | head` must not lose the runs that are left
    sys.exit(main(sys.argv[1:]))
