"""The items of --backends: a backend or a hand-written peer, with the flags of vit.py that it runs with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgebench.cli import BACKENDS, flag, is_installed, require
from edgebench.compare.runs import Run, read_benchmarks, title, warn

ROOT = Path(__file__).resolve().parents[2]
VIT = ROOT / "vit.py"
PEERS = {  # hand-written programs for the same training, with the packages they need, that of the backend first
    "native-jax": (ROOT / "peers" / "native_jax.py", ("jax", "optax")),
    "native-torch": (ROOT / "peers" / "native_torch.py", ("torch",)),
}
# What runs the files that export.py writes, with the package whose version counts.
RUNTIMES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "saved_model": "tensorflow"}
RESERVED_FLAGS = ("--keras-backend", "--results-dir", "--checkpoint-path")  # launch.run_all sets them, and --seed
BOTH_MODES = ("jit=off", "jit=on")  # plain torch is measured in both
BETWEEN_FLAGS = re.compile(r",(?![^\[]*\])")  # a comma outside of brackets


@dataclass(frozen=True)
class Item:
    """One entry of --backends."""

    text: str  # as it is written, with plain torch expanded
    backend: str
    flags: tuple[tuple[str, str], ...] = ()  # (field, value)

    @property
    def package(self) -> str:
        """The Python package of the backend."""
        return packages_of(self.backend)[0]

    @property
    def command(self) -> list[str]:
        """The program and the item's flags for it."""
        script = PEERS[self.backend][0] if self.backend in PEERS else VIT
        return [str(script), *(f"{flag(field)}={value}" for field, value in self.flags)]


def packages_of(backend: str) -> tuple[str, ...]:
    """Return the Python packages that a backend, a peer or a runtime needs, that of the backend first."""
    return PEERS[backend][1] if backend in PEERS else (RUNTIMES.get(backend, backend),)


def parse_item(text: str) -> Item:
    """Read `jax` or `jax:dtype_policy=mixed_bfloat16,attention_dropout=0`; raise ExperimentError for anything else."""
    known = (*BACKENDS, *PEERS)
    backend, colon, rest = text.partition(":")
    require(backend in known, f"--backends: {backend!r} is none of {', '.join(known)}")
    flags: dict[str, str] = {}
    for part in BETWEEN_FLAGS.split(rest) if colon else []:
        name, equals, value = part.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        is_well_formed = field.isidentifier() and equals and value and field not in flags
        require(bool(is_well_formed), f"--backends: {text!r} is not NAME or NAME:FLAG=VALUE,FLAG=VALUE")
        is_reserved = flag(field) in (*RESERVED_FLAGS, "--seed")
        require(not is_reserved, f"--backends: {text!r}: benchmark.py sets {flag(field)} itself")
        flags[field] = value
    for package in packages_of(backend):
        require(is_installed(package), f"--backends: {package} is not installed")
    return Item(text, backend, tuple(flags.items()))


def choose_items(texts: Sequence[str] | None, flags: Sequence[str]) -> list[Item]:
    """Return the items of --backends, by default all installed backends; plain torch in both modes unless `flags` say one."""
    chosen = texts or [backend for backend in BACKENDS if is_installed(backend)]
    require(bool(chosen), f"no backend is installed: pip install one of {', '.join(BACKENDS)}")
    says_mode = "--jit" in names_of(flags)
    items = []
    for text in chosen:
        is_both = text == "torch" and not says_mode
        items += [parse_item(f"torch:{mode}") for mode in BOTH_MODES] if is_both else [parse_item(text)]
    meanings = [(item.backend, frozenset(item.flags)) for item in items]
    for i, item in enumerate(items):
        require(
            meanings[i] not in meanings[:i], f"--backends: {item.text} is named twice (torch alone means both modes)"
        )
    return items


def names_of(flags: Sequence[str]) -> list[str]:
    """Return the names of the flags among a command line's arguments, as in --batch-size."""
    return [flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")]


def varied_fields(items: Sequence[Item]) -> list[str]:
    """Return the flags that differ between the items and hence belong to their names; the mode says jit."""
    return list(dict.fromkeys(field for item in items for field, _ in item.flags if field != "jit"))


def take_seed(flags: Sequence[str]) -> tuple[int, list[str]]:
    """Return the seed among the flags, 0 if there is none, and the other flags."""
    seed, others = "0", []
    arguments = iter(flags)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--seed":
            seed = value if equals else next(arguments, "")
        else:
            others.append(argument)
    require(seed.isdecimal(), f"--seed must be a whole number, not {seed!r}")
    return int(seed), others


def complete_flags(flags: Sequence[str]) -> list[str]:
    """Return the user's flags for vit.py, with W&B turned off unless they mention it. Refuse reserved flags."""
    names = names_of(flags)
    for name in names:
        require(name not in RESERVED_FLAGS, f"{name} is set by benchmark.py; use --backends and --out")
    require("--help" not in names, "for the flags of vit.py: python vit.py --help")
    mentions_wandb = "--use-wandb" in names or "--no-use-wandb" in names
    return [*flags] if mentions_wandb else [*flags, "--no-use-wandb"]


def check_baseline(baseline: str, items: Sequence[Item]) -> None:
    """Raise ExperimentError if `baseline` can be neither an item nor the name that one of them will have in the report."""
    can_be = [item for item in items if baseline == item.text or baseline.startswith(f"{title(item.backend)} (")]
    texts = ", ".join(item.text for item in items)
    require(bool(can_be), f"--baseline: {baseline!r} is none of {texts}, nor a name as in the report")


def find_baseline(given: str | None, runs: Sequence[Run], folders: Sequence[Path]) -> str | None:
    """Return the name in the report of the baseline that is given, or else of the one that benchmark.py recorded.

    It is given as a name, as an item of --backends, or as a backend that has one name only. Raises ExperimentError if there
    is no such run; a recorded one that left no results costs a warning.
    """
    benchmarks = read_benchmarks(folders)
    items = {file: item for benchmark in benchmarks for file, item in benchmark["runs"].items()}
    recorded = [benchmark["baseline"] for benchmark in benchmarks if benchmark["baseline"]]
    wanted = given or (recorded[0] if recorded and runs else None)
    names = list(dict.fromkeys(run.name for run in runs))
    if wanted is None or wanted in names:
        return wanted
    found = {run.name for run in runs if items.get(run.path.name) == wanted}
    found = found or {run.name for run in runs if run.backend == wanted}
    if len(found) == 1:
        return found.pop()
    problem = (
        f"--baseline: {wanted!r} {'is ambiguous' if found else 'has no results'}; there are {', '.join(sorted(names))}"
    )
    require(not given, problem)
    warn(problem)
    return None
