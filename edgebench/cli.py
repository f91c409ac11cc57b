"""The command line: flags as people and W&B agents write them, errors in one line, exit statuses. Imports no Keras."""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro
from dotenv import load_dotenv

PROGRAM = "vit.py"
BACKENDS = ("jax", "torch", "tensorflow")  # a Keras backend and its Python package have the same name
Config = TypeVar("Config")


class ExperimentError(Exception):
    """An expected failure, with a message for people; `errors_in_one_line` turns it into one line and an exit status."""

    exit_status = 2


class OutOfMemory(ExperimentError):
    """The device or the host has too little memory for the run."""

    exit_status = 3


class Diverged(ExperimentError):
    """The loss is NaN or infinite."""

    exit_status = 4


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP has arrived. Not an Exception, so that code which survives errors does not survive this.

    `left` says what the run leaves and how to continue it.
    """

    def __init__(self, number: int, left: str = ""):
        super().__init__(signal.Signals(number).name)
        self.number, self.left, self.exit_status = number, left, 128 + number


def require(condition: bool, message: str) -> None:
    """Raise ExperimentError with `message` unless `condition` holds."""
    if not condition:
        raise ExperimentError(message)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"{PROGRAM}: warning: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def errors_in_one_line(debug: bool = False, program: str = PROGRAM) -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit status; with `debug`, print its traceback as well."""
    try:
        yield
    except (ExperimentError, MemoryError, RecursionError) as error:
        if debug:
            traceback.print_exception(error)
        if isinstance(error, RecursionError):
            error = ExperimentError("the model is deeper than Keras can build: lower --transformer-layers")
        if isinstance(error, MemoryError):  # outside of the training, whose line says more
            error = OutOfMemory(f"out of memory: the data need too much ({one_line(error)})")
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"{program}: stopped by {stop}{stop.left}", file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:  # before the training there is nothing to finish
        sys.exit(128 + signal.SIGINT)


def setting(name: str) -> str:
    """The value of an environment variable, empty where it is not set, without the line end that some env files leave in it."""
    return os.environ.get(name, "").strip()


def read_env_file(path: Path) -> None:
    """Set the variables in a file that the environment does not have; raise ExperimentError if it cannot be read."""
    try:
        load_dotenv(path)
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read ({error})") from error


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it. A mere folder of that name (./wandb) does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def require_writable_folder(folder: Path, flag: str) -> None:
    """Create `folder` if need be and write a scratch file into it: permission bits say nothing to root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as scratch:
            scratch.write(b"\0")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(f"{flag}: the folder {str(folder)!r} cannot be written ({reason})") from error


def flag(name: str) -> str:
    """The command-line flag of a configuration field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def help_of(config_class: type) -> dict[str, str]:
    """The docstring of every field, on one line."""
    parameters = docstring_parser.parse_from_object(config_class).params
    return {parameter.arg_name: " ".join(parameter.description.split()) for parameter in parameters}


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    description: str = "",
    groups: Mapping[str, str] | None = None,
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> Config:
    """Parse `argv` into a `config_class`, unchecked; raise ExperimentError with one line where tyro would print a box.

    --help begins with `description`, and shows the flags by their `groups`. The value of a flag in `presets` chooses other
    defaults, by name, which every flag overrides.
    """
    argv = _as_tyro_reads_it(get_type_hints(config_class), argv)
    group_of = groups or {}

    def parse_with(defaults: Mapping[str, Any]) -> Config:
        groups = vars(_tyro(_grouped(config_class, group_of, defaults), argv, description))
        return config_class(**{name: value for group in groups.values() for name, value in vars(group).items()})

    config = parse_with({})
    for name, choices in (presets or {}).items():
        if defaults := choices[getattr(config, name)]:
            config = parse_with(defaults)
    return config


def _tyro(kind: type, argv: Sequence[str], description: str):
    """What tyro parses `argv` into; raises ExperimentError with one line where it would print a box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options = {"description": description, "config": (tyro.conf.OmitArgPrefixes,)}
            return tyro.cli(kind, args=argv, prog=PROGRAM, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # From the title to the next rule. Where the console has no Unicode, a box is drawn with spaces and dashes.
        inside = re.split("[─-]{9}", box.getvalue().partition("\n")[2].lstrip(" -\n"))[0]
        raise ExperimentError(" ".join(re.sub("[│╭╮╰╯─]", " ", inside).split()) + " (see --help)") from None


def _grouped(config_class: type, group_of: Mapping[str, str], defaults: Mapping[str, Any]) -> type:
    """A dataclass with a field for each group; these are dataclasses of the fields of `config_class`.

    tyro shows each of them in a box of its own. It cannot find the docstrings of fields that are made here, so they are
    passed on, without "(default: )" and "{None}|STR" for what is empty by default.
    """
    texts = help_of(config_class)
    groups: dict[str, list] = {}
    for field, kind in zip(dataclasses.fields(config_class), get_type_hints(config_class).values(), strict=True):
        group = groups.setdefault(group_of.get(field.name, "flags"), [])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = defaults.get(field.name, default)
        hint = "" if default in (None, []) else None
        metavar = "TEXT" if kind == str | None else None
        argument = tyro.conf.arg(help=texts[field.name], metavar=metavar, help_behavior_hint=hint)
        group.append((field.name, Annotated[kind, argument], dataclasses.field(default_factory=lambda d=default: d)))
    boxes = [(name.replace(" ", "_"), dataclasses.make_dataclass(name, members)) for name, members in groups.items()]
    return dataclasses.make_dataclass(
        "Flags", [(name, box, dataclasses.field(default_factory=box)) for name, box in boxes]
    )


def _as_tyro_reads_it(types: dict[str, type], argv: Sequence[str]) -> list[str]:
    """Rewrite the spellings of a W&B agent; `types` are those of the fields. Raises ExperimentError for an unknown flag.

    `--use_wandb=False` becomes `--no-use-wandb`, `--mlp_head_units=[8, 4]` becomes `--mlp-head-units 8 4`, and
    `--batch_size=64.0` becomes `--batch-size=64`.
    """
    tokens: list[str] = []
    name = ""  # of the field that the next values belong to
    for token in argv:
        equals, value = "", token
        if token.startswith("--") and not token.startswith(("--help", "--tyro-")):
            spelling, equals, value = token.partition("=")
            name = spelling[2:].replace("-", "_")
            is_negation = name.startswith("no_") and types.get(name[3:]) is bool and not equals
            if name not in types and not is_negation:
                close = difflib.get_close_matches(name.rpartition(".")[2], types, n=1)
                hint = f"; did you mean {flag(close[0])}?" if close else " (see --help)"
                raise ExperimentError(f"unknown flag {spelling!r}{hint}")
            tokens.append(flag(name))
            if not equals:
                continue
        kind = types.get(name)
        if kind is bool and tokens[-1] == flag(name):
            require(value.lower() in ("true", "false"), f"{flag(name)} takes True or False, not {value!r}")
            tokens[-1] = flag(name if value.lower() == "true" else f"no_{name}")
        elif kind in (list[int], list[str]):
            tokens += _list_items(name, value, kind)
        else:
            value = _without_fraction(value) if kind is int else value
            if equals:  # one token, as the value may begin with a dash
                tokens[-1] += "=" + value
            else:
                tokens.append(value)
    return tokens


def _without_fraction(text: str) -> str:
    """`64.0` as `64`; anything that is not a whole number unchanged."""
    with contextlib.suppress(ValueError):
        if not text.isdecimal() and float(text).is_integer():
            return str(int(float(text)))
    return text


def _list_items(name: str, value: str, kind: type) -> list[str]:
    """The items of a list that is written as one JSON or Python literal, or the value itself."""
    try:
        items = [str(item) for item in ast.literal_eval(value)] if value.startswith("[") else [value]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ExperimentError(f"{flag(name)}: {value!r} is not a list") from None
    return [_without_fraction(item) for item in items] if kind == list[int] else items
