"""From the best weights of a run to the device: write the model for a runtime, prove that it agrees with Keras, measure it.

    python export.py results/NAME.json --format onnx          # onnxruntime, TensorRT: results/NAME.onnx, results/NAME.b256.onnx
    python export.py results/NAME.json --format onnx --int8   # int8 weights: a quarter of the size
    python export.py results/NAME.json --format litert        # LiteRT: results/NAME.tflite
    python benchmark.py --report results                      # the runtimes beside predict of JAX, torch and TensorFlow

A file has the resizing and the normalization in it and takes images as they were stored. It is for a fixed number of images:
one file takes one, another --batch. Each is run in its own runtime on all test images and kept only if it agrees with Keras.

Exit status: 0 the files are written; 1 a file does not agree with Keras, or an unexpected error; 2 wrong input, or something
is not installed; 3 out of memory; 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from deploy.formats import FORMATS, check_format
from deploy.pipeline import Options, export
from deploy.record import describe
from deploy.source import read_source
from edgebench.cli import errors_in_one_line, require
from edgebench.compare.launch import OneLineParser, folder, interruptible
from edgebench.streams import steady_streams

MEASURE_SECONDS = 60.0  # where the run measured nothing


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the checked arguments; those that depend on the run are None where they are not given."""
    parser = OneLineParser(
        prog="export.py", description=__doc__.partition("\n")[0], epilog="README.md has examples.", allow_abbrev=False
    )
    parser.add_argument("results", type=folder, metavar="RESULTS.json", help="results file of a complete run of vit.py")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="what runs the file: onnxruntime or TensorRT, LiteRT, TensorFlow",
    )
    parser.add_argument("--int8", action="store_true", help="int8 weights; kept only if the accuracy holds")
    batch_help = "images that the second file takes at a time (default: as many as went through the model in the run); 1: no second file"
    parser.add_argument("--batch", type=int, metavar="N", help=batch_help)
    parser.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where it is checked and measured; gpu: onnxruntime's CUDA",
    )
    parser.add_argument("--weights", type=folder, metavar="PATH", help="the run's weights, if they were moved")
    parser.add_argument(
        "--output-dir", type=folder, metavar="DIR", help="folder for the files (default: that of RESULTS.json)"
    )
    parser.add_argument(
        "--results-dir", type=folder, metavar="DIR", help="folder for what was measured (default: that of RESULTS.json)"
    )
    seconds_help = "longest time for the latency of one image (default: as in the run)"
    parser.add_argument("--measure-seconds", type=float, metavar="S", help=seconds_help)
    args = parser.parse_args(argv)
    require(args.batch is None or args.batch >= 1, f"--batch must be positive, not {args.batch}")
    seconds = args.measure_seconds
    require(seconds is None or 0 < seconds < math.inf, f"--measure-seconds must be positive and finite, not {seconds}")
    check_format(args.format, args.int8, args.device)
    return args


def main(argv: Sequence[str]) -> None:
    """Run the command line; an expected failure becomes one line and an exit status."""
    with errors_in_one_line(program="export.py"), interruptible():
        args = parse(argv)
        source = read_source(args.results, args.weights)
        beside = args.results.parent
        options = Options(
            format=args.format,
            int8=args.int8,
            batch_size=args.batch or source.micro_batch_size,
            device=args.device,
            measure_seconds=args.measure_seconds or source.what["config"]["measure_seconds"] or MEASURE_SECONDS,
            output_dir=args.output_dir or beside,
            results_dir=args.results_dir or beside,
        )
        results, path = export(source, options)
        print(f"{describe(results)}\nresults in {path}\nnext: python benchmark.py --report {path.parent}")


if __name__ == "__main__":
    steady_streams()
    main(sys.argv[1:])
