"""Train a Vision Transformer on CIFAR-100 with Keras 3, on the backend asked for.

    python vit.py                                          # CIFAR-100, JAX, 10 epochs
    python vit.py --keras-backend torch --num-epochs 50    # the same on PyTorch
    python vit.py --dataset synthetic --no-use-wandb       # no network, no account
    python vit.py --dataset my_images.npz                  # x_train, y_train, x_test, y_test
    python vit.py --help                                   # every flag, its unit and its effect

The model, its defaults and its augmentation are those of the keras.io example "Image classification with
Vision Transformer" (Khalid Salama, 2021, https://keras.io/examples/vision/image_classification_with_vision_transformer/),
which reports 53 % top-1 and 80 % top-5 on CIFAR-100 after 50 epochs.

The file reads in the order of the run: configuration, backend, data, augmentation, model, W&B, experiment, main.

Exit status: 0 the run is complete; 1 an unexpected error, with its traceback; 2 wrong input (a flag, the data, a
folder that cannot be written, a backend that is not installed), with one line that says what is wrong.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import io
import itertools
import math
import operator
import os
import platform
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import tyro
from dotenv import load_dotenv

# --------------------------------------------------------------------------------------------------------------
# Configuration and command line
# --------------------------------------------------------------------------------------------------------------

BACKENDS = ("jax", "torch", "tensorflow")  # a Keras backend and the Python package behind it have the same name
CIFAR = ("cifar10", "cifar100")


class ExperimentError(Exception):
    """A failure that the user can mend: `_errors_in_one_line` turns it into one line and exit status 2."""


@dataclass
class ViTConfig:
    """Train and evaluate a Vision Transformer with Keras 3 on the backend asked for."""

    # Model
    image_size: int = 72
    """Side in pixels to which images are resized before they are cut into patches."""
    patch_size: int = 6
    """Side of a square patch in pixels; what is left over at the right and lower edge is cut off."""
    projection_dim: int = 64
    """Width of the token embedding, and of each attention head."""
    num_heads: int = 4
    """Attention heads in each transformer block."""
    transformer_layers: int = 8
    """Number of transformer blocks."""
    transformer_units: list[int] = field(default_factory=list)
    """Widths of the MLP in each block; the last one equals projection_dim. Empty: 2 * projection_dim, projection_dim."""
    mlp_head_units: list[int] = field(default_factory=lambda: [2048, 1024])
    """Widths of the hidden layers of the classifier head."""

    # Training
    learning_rate: float = 0.001
    """AdamW's learning rate, constant over the run."""
    weight_decay: float = 0.0001
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """Images in a training step, and in a step of evaluation."""
    num_epochs: int = 10
    """Passes over the training images."""
    validation_split: float = 0.1
    """Share of the training images set apart for validation, drawn evenly from every class; 0 for none."""
    seed: int = 0
    """Seed of the split, the weights, the order of the images, augmentation and dropout."""

    # Where things come from and go to
    dataset: str = "cifar100"
    """cifar100, cifar10, synthetic (made in memory, needs no network), or the path of an .npz file with x_train, y_train, x_test and y_test."""
    keras_backend: str = field(default_factory=lambda: os.environ.get("KERAS_BACKEND") or "jax")
    """jax, torch or tensorflow. The environment variable KERAS_BACKEND wins over this flag."""
    checkpoint_path: Path = Path("/tmp/checkpoint.weights.h5")
    """File for the weights of the best epoch by validation accuracy; ends in .weights.h5."""
    node_name: str = field(default_factory=platform.node)
    """Name of this machine in everything that is recorded. Default: the host's name."""

    # Weights & Biases
    use_wandb: bool = True
    """Log to Weights & Biases; without an API key the run is logged offline, for `wandb sync`."""
    wandb_project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT") or "keras3_edge_baseline")
    """W&B project. Default: the environment variable WANDB_PROJECT, else keras3_edge_baseline."""
    wandb_entity: str | None = field(default_factory=lambda: os.environ.get("WANDB_ENTITY") or None)
    """W&B user or team. Default: the environment variable WANDB_ENTITY, else the account's own."""
    wandb_run_name: str | None = None
    """Name of the run in W&B. Default: one that W&B makes up."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B."""

    def __post_init__(self) -> None:
        if not self.transformer_units:
            self.transformer_units = [2 * self.projection_dim, self.projection_dim]

    @property
    def num_patches(self) -> int:
        """Patches, hence tokens, an image."""
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        """Raise ExperimentError for the first value that cannot work, without importing Keras or loading data."""
        for f in fields(self):
            value = getattr(self, f.name)
            sizes = {"int": [value], "list[int]": value}.get(f.type, []) if f.name != "seed" else []
            _require(all(size > 0 for size in sizes), f"{_flag(f.name)} must be positive, not {value}")
        _require(
            self.patch_size <= self.image_size,
            f"--patch-size {self.patch_size} is larger than --image-size {self.image_size}",
        )
        _require(
            self.transformer_units[-1] == self.projection_dim,
            f"--transformer-units must end in --projection-dim {self.projection_dim}, as a block adds its output to its "
            f"input, not in {self.transformer_units[-1]}",
        )
        lr, decay, split = self.learning_rate, self.weight_decay, self.validation_split
        _require(0 < lr < math.inf, f"--learning-rate must be positive and finite, not {lr}")
        _require(0 <= decay < math.inf, f"--weight-decay must be finite and not negative, not {decay}")
        _require(0 <= split < 1, f"--validation-split must lie in [0, 1), not {split}")
        _require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2**32), not {self.seed}")
        if self.dataset not in (*CIFAR, "synthetic"):
            known = "cifar100, cifar10, synthetic or the path of an .npz file"
            _require(self.dataset.endswith(".npz"), f"--dataset must be {known}, not {self.dataset!r}")
            _require(_is_file(self.dataset), f"--dataset {self.dataset!r}: there is no such file")
        backend = self.keras_backend
        _require(
            _is_installed(backend), f"the backend {backend} is not installed: pip install -c constraints.txt {backend}"
        )
        _require(
            not self.use_wandb or _is_installed("wandb"),
            "W&B is not installed: pip install wandb, or run with --no-use-wandb",
        )
        for tag in self.wandb_tags:
            _require(1 <= len(tag) <= 64, f"--wandb-tags must have 1 to 64 characters each, not {len(tag)}")
        path = self.checkpoint_path
        _require(path.name.endswith(".weights.h5"), f"--checkpoint-path must end in .weights.h5, not {str(path)!r}")
        _require(not path.is_dir(), f"--checkpoint-path {str(path)!r} is a folder")
        _require_writable_folder(path.parent, "--checkpoint-path")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ExperimentError(message)


def _flag(name: str) -> str:
    """The command-line flag of a field of ViTConfig."""
    return "--" + name.replace("_", "-")


def _is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it. A folder of that name (./wandb, of offline runs) cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _is_file(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        return Path(path).is_file()
    return False


def _require_writable_folder(folder: Path, flag: str) -> None:
    """Make `folder` if need be and prove by a scratch file that it can be written (permission bits do not tell for root)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as scratch:
            scratch.write(b"\0")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(f"{flag}: the folder {str(folder)!r} cannot be written ({reason})") from error


def _parse_command_line(argv: Sequence[str]) -> ViTConfig:
    """Parse flags into a ViTConfig, unchecked; raise ExperimentError with one line where tyro would print a box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                ViTConfig, args=_as_typed_by_people(argv), prog="vit.py", config=(tyro.conf.HelptextFromCommentsOff,)
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        rows = [line.strip("│ ").strip("╭─╮╰╯-") for line in box.getvalue().splitlines()[1:]]  # below the box's title
        message = itertools.takewhile(bool, itertools.dropwhile(operator.not_, rows))  # from one rule to the next
        raise ExperimentError(" ".join(message) + " (see --help)") from None


def _as_typed_by_people(argv: Sequence[str]) -> list[str]:
    """Rewrite the spellings of a W&B agent into those that tyro reads.

    `--use_wandb=False` becomes `--no-use-wandb`, `--mlp_head_units=[8, 4]` becomes `--mlp-head-units 8 4`, and
    `--batch_size=64.0` becomes `--batch-size=64`. Raises ExperimentError for a flag that does not exist.
    """
    kinds = {f.name: f.type for f in fields(ViTConfig)}  # the annotations, as text
    tokens: list[str] = []
    name = kind = None
    for token in argv:
        if token.startswith("--") and not token.startswith(("--help", "--tyro-")):
            spelling, equals, value = token.partition("=")
            name = spelling[2:].replace("-", "_")
            if name.startswith("no_") and kinds.get(name[3:]) == "bool" and not equals:
                tokens.append(_flag(name))
                continue
            if name not in kinds:
                close = difflib.get_close_matches(name.rpartition(".")[2], kinds, n=1)
                hint = f"; did you mean {_flag(close[0])}?" if close else " (see --help)"
                raise ExperimentError(f"unknown flag {spelling!r}{hint}")
            kind = kinds[name]
            tokens.append(_flag(name))
            if not equals:
                continue
        else:
            value, equals = token, ""
        if kind == "bool" and tokens[-1] == _flag(name):
            if value.lower() not in ("true", "false"):
                raise ExperimentError(f"{_flag(name)} takes True or False, not {value!r}")
            if value.lower() == "false":
                tokens[-1] = _flag("no_" + name)
        elif kind in ("list[int]", "list[str]"):
            items = _list_items(name, value)
            tokens += map(_whole, items) if kind == "list[int]" else items
        else:
            value = _whole(value) if kind == "int" else value
            if equals:  # one token, as a value may begin with a dash
                tokens[-1] += "=" + value
            else:
                tokens.append(value)
    return tokens


def _whole(text: str) -> str:
    """`64.0` as `64`; whatever is no whole number as it is."""
    with contextlib.suppress(ValueError, OverflowError):
        if not text.isdecimal() and float(text).is_integer():
            return str(int(float(text)))
    return text


def _list_items(name: str, value: str) -> list[str]:
    """The items of a list given as one JSON or Python literal, or the value itself."""
    if not value.startswith("["):
        return [value]
    try:
        return [str(item) for item in ast.literal_eval(value)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ExperimentError(f"{_flag(name)}: {value!r} is not a list") from None


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """The one place where an expected failure becomes a line for people and an exit status."""
    try:
        yield
    except ExperimentError as error:
        message = " ".join(str(error).split())
        print(f"vit.py: error: {message}", file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------------------------------------------
# Backend: KERAS_BACKEND wins over the flag, the flag over the default. Keras reads the variable when it is imported.
# --------------------------------------------------------------------------------------------------------------


def _set_backend_from_env_or_cli(argv: Sequence[str]) -> ViTConfig:
    """Parse and check `argv`, set KERAS_BACKEND, and return the configuration with the backend that really runs.

    Reads `.env` in the current folder first; it never overrides the real environment. Raises ExperimentError for
    any wrong flag or value.
    """
    try:
        load_dotenv(Path(".env"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f".env cannot be read ({error})") from error
    config = _parse_command_line(argv)
    backend = os.environ.get("KERAS_BACKEND") or config.keras_backend
    for name in (config.keras_backend, backend):
        _require(name in BACKENDS, f"the backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if backend != config.keras_backend:
        print(
            f"vit.py: warning: KERAS_BACKEND={backend} wins over --keras-backend {config.keras_backend}",
            file=sys.stderr,
        )
    config = replace(config, keras_backend=backend)
    config.check()
    os.environ["KERAS_BACKEND"] = backend
    return config


if __name__ == "__main__":
    with _errors_in_one_line():
        _config = _set_backend_from_env_or_cli(sys.argv[1:])
else:  # imported by a test or a notebook, whose command line is not ours
    os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up chatter; must be set before the import

import keras
import numpy as np
from keras import layers, ops

keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says

# --------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Images (N, height, width, channels), uint8 or float, and labels (N,), integers below `num_classes`.

    With a validation split of 0, `x_val` and `y_val` have length 0.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image as it is stored, before any resizing."""
        return self.x_train.shape[1:]


def load_dataset(config: ViTConfig) -> Dataset:
    """Load `config.dataset` and set apart the validation part; raise ExperimentError if it cannot be used."""
    if config.dataset == "synthetic":
        arrays = _synthetic_arrays()
    elif config.dataset in CIFAR:
        arrays = _cifar_arrays(config.dataset)
    else:
        arrays = _read_npz(Path(config.dataset))
    x, y, x_test, y_test = (arrays[name] for name in ARRAY_NAMES)
    train, val = _stratified_split(y, config.validation_split, config.seed)
    num_classes = int(max(y.max(), y_test.max())) + 1
    return Dataset(x[train], y[train], x[val], y[val], x_test, y_test, num_classes)


ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")


def _stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training and the validation part; each class gives its share, give or take one image."""
    count = round(len(labels) * share)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    evenly_spaced = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(int)
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_class[evenly_spaced]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def _synthetic_arrays() -> dict[str, np.ndarray]:
    """2,048 training and 512 test images shaped as CIFAR-100's (32x32 RGB, 100 classes), the same on every machine.

    Every class has a random mosaic of 4x4 colours, symmetric so that a flip keeps the class; an image is its class's
    mosaic under strong noise. So the model has CIFAR-100's size, and its accuracy rises within a few epochs.
    """
    rng = np.random.default_rng(0)  # integers only: floats may differ in the last bit between machines
    mosaics = rng.integers(0, 256, (100, 4, 2, 3))
    mosaics = np.concatenate([mosaics, mosaics[:, :, ::-1]], axis=2)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(count) % 100
        images = mosaics[labels].repeat(8, axis=1).repeat(8, axis=2)
        noisy = images + rng.integers(-110, 111, images.shape)
        return noisy.clip(0, 255).astype(np.uint8), labels

    return dict(zip(ARRAY_NAMES, (*draw(2048), *draw(512)), strict=True))


def _cifar_arrays(name: str) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 from a cache of ours, or once through keras.datasets.

    keras.datasets hashes and unpacks the archive at every call, into a folder that all processes share: that takes
    seconds, and a second process can read half-written files. So the arrays are kept as one uncompressed .npz that
    appears whole, and only one process at a time goes through Keras.
    """
    import fcntl
    import socket

    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    cache = folder / f"vit-{name}.npz"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written: no lock and no cache, but still the data
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f".vit-{name}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.exists():
            with contextlib.suppress(ExperimentError):  # damaged: made anew below
                return _read_npz(cache)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte, so that a download that stalls ends
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a bare Exception when a download fails
            archive = {"cifar10": "cifar-10-batches-py-target_archive", "cifar100": "cifar-100-python-target_archive"}[
                name
            ]
            url = f"https://www.cs.toronto.edu/~kriz/{name.replace('cifar', 'cifar-')}-python.tar.gz"
            raise ExperimentError(
                f"{name} could not be loaded ({error}); without a network, put {url} at {folder / archive}, "
                "or run with --dataset synthetic"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        arrays = dict(zip(ARRAY_NAMES, (x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)), strict=True))
        with contextlib.suppress(OSError), _replacing(cache) as scratch:
            np.savez(scratch, **arrays)
        return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz, labels flattened to (N,); raise ExperimentError with the first thing that is wrong."""
    _require(zipfile.is_zipfile(path), f"{path} is not an .npz file, a zip archive of NumPy arrays, or is cut short")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAY_NAMES if name not in archive]
            arrays = {} if missing else {name: archive[name] for name in ARRAY_NAMES}
    except Exception as error:  # zipfile, zlib and numpy between them raise a dozen types for a damaged file
        raise ExperimentError(f"{path} cannot be read as an .npz file ({error or type(error).__name__})") from error

    _require(not missing, f"{path}: {' and '.join(missing)} missing; needed are {', '.join(ARRAY_NAMES)}")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        images, labels = f"{path}: x_{part}", f"{path}: y_{part}"
        _require(x.ndim == 4, f"{images} must have the shape (images, height, width, channels), not {x.shape}")
        _require(x.size > 0, f"{images} is empty, of shape {x.shape}")
        _require(x.dtype.kind in "uif", f"{images} must hold numbers, not {x.dtype}")
        _require(x.dtype.kind != "f" or bool(np.isfinite(x).all()), f"{images} holds values that are not finite")
        _require(y.dtype.kind in "ui", f"{labels} must hold integers, not {y.dtype}")
        _require(y.shape in ((len(x),), (len(x), 1)), f"{labels} must hold one label an image, {len(x)}, not {y.shape}")
        _require(y.min() >= 0, f"{labels} holds negative labels")
        arrays[f"y_{part}"] = y.reshape(-1).astype(np.int64)
    train, test = arrays["x_train"].shape, arrays["x_test"].shape
    _require(train[1:] == test[1:], f"{path}: images differ in shape: x_train {train}, x_test {test}")
    label = max(arrays["y_train"].max(), arrays["y_test"].max())
    _require(label < train[0], f"{path}: labels go up to {label}, but there are only {train[0]} training images")
    return arrays


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place once the block has ended without an error.

    So whatever stands at `path` is whole, old or new, at every instant; nothing is left behind after a failure.
    """
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------
# Augmentation and model
# --------------------------------------------------------------------------------------------------------------


def create_data_augmentation(config: ViTConfig, x_train: np.ndarray) -> keras.Sequential:
    """Images (B, H, W, C) as stored -> (B, image_size, image_size, C), normalized; flip, rotation, zoom in training only."""
    normalization = layers.Normalization()
    normalization.adapt(x_train)
    augmentation = keras.Sequential(
        [
            normalization,
            layers.Resizing(config.image_size, config.image_size),
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(factor=0.02),
            layers.RandomZoom(height_factor=0.2, width_factor=0.2),
        ],
        name="data_augmentation",
    )
    # Keras marks rotation and zoom as not compilable, for the sake of TensorFlow's XLA. One such layer makes it run the
    # whole model uncompiled, op by op, although JAX compiles both (a step of a small ViT on a CPU: 0.07 s against 0.5 s).
    if keras.backend.backend() == "jax":
        for layer in augmentation.layers:
            layer.supports_jit = True
    return augmentation


@keras.saving.register_keras_serializable(package="vit")
class Patches(layers.Layer):
    """Cut images (B, H, W, C) into patches (B, H//p * W//p, p * p * C), row by row; the rest at the edges is dropped."""

    def __init__(self, patch_size: int, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        _, height, width, channels = images.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        images = images[:, : rows * p, : columns * p]
        patches = ops.reshape(images, (-1, rows, p, columns, p, channels))
        patches = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
        return ops.reshape(patches, (-1, rows * columns, p * p * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable(package="vit")
class PatchEncoder(layers.Layer):
    """Patches (B, N, P) -> tokens (B, N, D): a linear projection plus a learned embedding of the position."""

    def __init__(self, num_patches: int, projection_dim: int, **kwargs):
        super().__init__(**kwargs)
        self.num_patches = num_patches
        self.projection_dim = projection_dim
        self.projection = layers.Dense(projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def build(self, input_shape):
        self.projection.build(input_shape)
        self.position_embedding.build((self.num_patches,))

    def call(self, patches):
        return self.projection(patches) + self.position_embedding(ops.arange(self.num_patches))

    def get_config(self):
        return {**super().get_config(), "num_patches": self.num_patches, "projection_dim": self.projection_dim}


def _mlp(x, hidden_units: Sequence[int], dropout_rate: float):
    for units in hidden_units:
        x = layers.Dense(units, activation=keras.activations.gelu)(x)
        x = layers.Dropout(dropout_rate)(x)
    return x


def create_vit_classifier(
    config: ViTConfig, image_shape: tuple[int, int, int], num_classes: int, data_augmentation: keras.Sequential
) -> keras.Model:
    """Images (B, *image_shape) as stored -> logits (B, num_classes). The keras.io ViT: see the head of the file."""
    inputs = keras.Input(shape=image_shape)
    tokens = Patches(config.patch_size)(data_augmentation(inputs))
    tokens = PatchEncoder(config.num_patches, config.projection_dim)(tokens)
    for _ in range(config.transformer_layers):
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        attention = layers.MultiHeadAttention(config.num_heads, key_dim=config.projection_dim, dropout=0.1)
        tokens = layers.Add()([attention(normed, normed), tokens])
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        tokens = layers.Add()([_mlp(normed, config.transformer_units, dropout_rate=0.1), tokens])
    features = layers.LayerNormalization(epsilon=1e-6)(tokens)
    features = layers.Dropout(0.5)(layers.Flatten()(features))
    features = _mlp(features, config.mlp_head_units, dropout_rate=0.5)
    return keras.Model(inputs, layers.Dense(num_classes)(features), name="vit")


# --------------------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------------------


class CustomWandbCallback(keras.callbacks.Callback):
    """Log whatever Keras reports for an epoch. (wandb.integration.keras needs TensorFlow: wandb issue 7186.)

    It has no batch hooks, which would make JAX and torch wait for the device in every step.
    """

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch, logs=None):
        self.run.log({"epoch": epoch + 1, **(logs or {})})


def _start_wandb(config: ViTConfig):
    """Start a W&B run without ever prompting; where it cannot be online it is offline, and one line says so."""
    import wandb

    mode, reason = wandb.setup().settings.mode, None
    if mode in ("online", "shared"):
        try:
            if not wandb.login(prompt=False):
                reason = "no API key (set WANDB_API_KEY or run `wandb login`)"
        except wandb.errors.Error as error:  # malformed or rejected key, server out of reach
            reason = str(error)
    settings = {
        "project": config.wandb_project,
        "entity": config.wandb_entity,
        "name": config.wandb_run_name,
        "tags": config.wandb_tags or None,
        "config": {**_plain(config), "num_patches": config.num_patches},
    }
    if reason is None:
        try:
            return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **settings)
        except wandb.errors.Error as error:
            reason = str(error)
    reason = " ".join(reason.split())
    print(f"vit.py: warning: W&B logs offline: {reason}; upload later with `wandb sync`", file=sys.stderr)
    if os.environ.get("WANDB_SWEEP_ID"):
        print(
            "vit.py: warning: the SWEEP SEES NOTHING of this run: its search and early stopping need it online",
            file=sys.stderr,
        )
    return wandb.init(mode="offline", **settings)


def _plain(config: ViTConfig) -> dict:
    """The configuration as JSON takes it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


# --------------------------------------------------------------------------------------------------------------
# Experiment
# --------------------------------------------------------------------------------------------------------------


class BestWeights(keras.callbacks.Callback):
    """Keep the weights of the best epoch by validation accuracy, in memory and as a file that is whole at every instant.

    The copy in memory is what the run evaluates: other runs may share the file's path. (keras.callbacks.ModelCheckpoint
    writes in place.) Without validation images every epoch counts as better than the one before.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.weights: list[np.ndarray] = []
        self.epoch = 0
        self.accuracy = -math.inf

    def on_epoch_end(self, epoch, logs=None):
        accuracy = (logs or {}).get("val_accuracy")
        if accuracy is not None and accuracy <= self.accuracy:
            return
        self.epoch, self.weights = epoch + 1, self.model.get_weights()
        if accuracy is not None:
            self.accuracy = accuracy
        try:
            with _replacing(self.path) as scratch:
                self.model.save_weights(scratch)
        except OSError as error:
            print(
                f"\nvit.py: warning: the best weights stay in memory, {self.path} cannot be written ({error})",
                file=sys.stderr,
            )


def _device() -> str:
    """The device on which the backend computes by default."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        name, is_cpu = device.device_kind, device.platform == "cpu"
    elif backend == "torch":
        import torch

        is_cpu = not torch.cuda.is_available()
        name = "" if is_cpu else torch.cuda.get_device_name()
    else:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        is_cpu = not gpus
        name = "" if is_cpu else tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"CPU ({_cpu_name()})" if is_cpu else name


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _seed_everything(seed: int) -> None:
    """As keras.utils.set_random_seed, but that imports TensorFlow, for seconds, wherever it is installed."""
    random.seed(seed)  # Keras' layers and initializers draw their seeds from it
    np.random.seed(seed)  # the order of the images
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.random.set_seed(seed)


def run_experiment(config: ViTConfig) -> dict[str, float]:
    """Train on `config.dataset`, evaluate the best epoch's weights on the test images, and return what was found."""
    import importlib.metadata

    config = replace(config, keras_backend=keras.backend.backend())
    _seed_everything(config.seed)
    print(
        f"Python {platform.python_version()}, Keras {keras.__version__}, "
        f"{config.keras_backend} {importlib.metadata.version(config.keras_backend)} on {_device()}, node {config.node_name}"
    )
    print("config: " + " ".join(f"{name}={value}" for name, value in _plain(config).items()))

    data = load_dataset(config)
    print(
        f"data: {config.dataset}, {data.num_classes} classes, train {data.x_train.shape}, "
        f"validation {data.x_val.shape}, test {data.x_test.shape}"
    )
    if rest := config.image_size % config.patch_size:
        print(
            f"note: patches of {config.patch_size} do not fill {config.image_size} pixels; the last {rest} rows and columns are cut off"
        )

    model = create_vit_classifier(
        config, data.image_shape, data.num_classes, create_data_augmentation(config, data.x_train)
    )
    num_parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    print(
        f"model: {num_parameters:,} trainable parameters, {config.num_patches} patches of {config.patch_size}x{config.patch_size} pixels"
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=config.learning_rate, weight_decay=config.weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(min(5, data.num_classes), name="top-5-accuracy"),
        ],
    )

    best = BestWeights(config.checkpoint_path)
    callbacks: list[keras.callbacks.Callback] = [best]
    wandb_run = _start_wandb(config) if config.use_wandb else None
    if wandb_run:
        wandb_run.summary["num_parameters"] = num_parameters
        callbacks.append(CustomWandbCallback(wandb_run))
    verbose = 1 if sys.stdout.isatty() else 2  # a progress bar for people, a line an epoch for a log file
    exit_code = 1
    try:
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=config.batch_size,
            epochs=config.num_epochs,
            validation_data=(data.x_val, data.y_val) if len(data.x_val) else None,
            callbacks=callbacks,
            verbose=verbose,
        )
        model.set_weights(best.weights)
        test = model.evaluate(data.x_test, data.y_test, batch_size=config.batch_size, verbose=0, return_dict=True)
        results = {
            "best_epoch": best.epoch,
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "test_top-5-accuracy": test["top-5-accuracy"],
        }
        if wandb_run:
            wandb_run.summary.update(results)
        exit_code = 0
    finally:
        if wandb_run:
            wandb_run.finish(exit_code=exit_code)
    print(f"best weights: epoch {best.epoch}, in {config.checkpoint_path}")
    print(f"test accuracy {test['accuracy']:.4f}, top-5 {test['top-5-accuracy']:.4f}, loss {test['loss']:.4f}")
    return results


def main(config: ViTConfig) -> None:
    """Run one experiment; an expected failure becomes one line and exit status 2."""
    with _errors_in_one_line():
        run_experiment(config)


if __name__ == "__main__":
    main(_config)
