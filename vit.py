"""Train a Vision Transformer on CIFAR-100 with Keras 3, on the requested backend.

    python vit.py                                          # CIFAR-100, JAX, 10 epochs
    python vit.py --keras-backend torch --num-epochs 50    # the same on PyTorch
    python vit.py --dataset synthetic --no-use-wandb       # no network, no account
    python vit.py --dataset my_images.npz                  # x_train, y_train, x_test, y_test

The model, its defaults and its augmentation are those of the keras.io example "Image classification with
Vision Transformer" (Khalid Salama, 2021, https://keras.io/examples/vision/image_classification_with_vision_transformer/),
in its first version. That reports 55.1 % top-1 and 81.9 % top-5 on CIFAR-100 after 100 epochs, with a weight decay that is
--weight-decay 0.1 in today's terms. --recipe modern has other values.

The file reads in the order of the run. Every choice that changes what is learned is made here; edgebench/ measures, protects
and records it. results.schema.json explains every figure.

Exit status: 0 complete; 1 unexpected error; 2 wrong input, or nothing to run on; 3 out of memory; 4 the loss is not finite;
129, 130 and 143 stopped by SIGHUP, SIGINT (Ctrl-C) and SIGTERM. One line says what is wrong; --debug shows where.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from edgebench import cli, flags, process, streams
from edgebench.cli import BACKENDS, require
from edgebench.files import WeightsFile, require_replaceable
from edgebench.flags import (
    device_flag,
    file_flag,
    from_environment,
    measuring_flag,
    model_flag,
    training_flag,
    wandb_flag,
)

# ------------ Configuration: the fields are the flags, their docstrings the help ------------

RECIPES = {
    "published": {},  # the keras.io example: the defaults below
    "modern": {
        "image_size": 32,
        "patch_size": 4,
        "projection_dim": 128,
        "transformer_layers": 9,
        "head": "mean",
        "mlp_head_units": [],
        "attention_dropout": 0.0,
        "stochastic_depth": 0.1,
        "weight_decay": 0.05,
        "num_epochs": 100,
        "label_smoothing": 0.1,
        "ema": 0.999,
        "mixup": 0.1,
        "cutmix": 0.2,
        "random_erasing": 0.1,
        "rand_augment": 2.0,
    },
}


@dataclass
class ViTConfig:
    """Train and evaluate a Vision Transformer with Keras 3 on the requested backend."""

    image_size: Annotated[int, model_flag(within=flags.SIZE)] = 72
    """Side in pixels to which images are resized before they are cut into patches."""
    patch_size: Annotated[int, model_flag(within=flags.SIZE)] = 6
    """Side of a square patch in pixels; what is left over at the right and lower edge is cut off."""
    projection_dim: Annotated[int, model_flag(within=flags.SIZE)] = 64
    """Width of the token embedding, and of each attention head."""
    num_heads: Annotated[int, model_flag(within=flags.SIZE)] = 4
    """Attention heads in each transformer block."""
    transformer_layers: Annotated[int, model_flag(within=flags.SIZE)] = 8
    """Number of transformer blocks."""
    transformer_units: Annotated[list[int], model_flag(within=flags.SIZE)] = field(default_factory=list)
    """Widths of the MLP in each block; the last one equals projection_dim. Empty: 2 * projection_dim, projection_dim."""
    head: Annotated[Literal["flatten", "mean"], model_flag()] = "flatten"
    """What the classifier sees: all tokens one after the other, with a dropout of 0.5, or their mean."""
    mlp_head_units: Annotated[list[int], model_flag(within=flags.SIZE)] = field(default_factory=lambda: [2048, 1024])
    """Widths of the hidden layers of the classifier head; none: `--mlp-head-units` without a number."""
    attention_dropout: Annotated[float, model_flag(within=flags.SHARE)] = 0.1
    """Share of the attention weights dropped in training. Above 0, JAX and TensorFlow cannot use their fused attention."""
    stochastic_depth: Annotated[float, model_flag(within=flags.SHARE)] = 0.0
    """Share of the images for which a residual branch of the last block is left out in training; it falls to 0 at the first."""
    initial_weights: Annotated[Literal["published", "glorot"], model_flag()] = "published"
    """Range of attention's initial kernels. published: that of the keras.io example and of Keras before 3.15; glorot: that of
    Keras 3.15, up to five times as wide."""

    recipe: Annotated[
        Literal["published", "modern"], training_flag(comparison=flags.CANNOT_MATTER, may_change=True)
    ] = "published"
    """Defaults of the other flags: published for the keras.io example, modern for RECIPES["modern"] (docs/training.md)."""
    learning_rate: Annotated[float, training_flag(within=flags.ABOVE_ZERO)] = 0.001
    """AdamW's learning rate; with a schedule the highest one."""
    learning_rate_schedule: Annotated[Literal["constant", "cosine"], training_flag()] = "constant"
    """cosine: rises over warmup_epochs, then falls to 0 at the end of the run."""
    warmup_epochs: Annotated[float, training_flag(within=flags.NOT_NEGATIVE)] = 0.0
    """Epochs in which the cosine schedule rises from 0 to learning_rate."""
    weight_decay: Annotated[float, training_flag(within=flags.NOT_NEGATIVE)] = 0.0001
    """AdamW's decoupled weight decay: a step subtracts learning_rate * weight_decay * w, as in Keras, torch and optax. TensorFlow
    Addons, with which keras.io's log of 2021 was made, left the learning rate out: that log has 0.1 here."""
    batch_size: Annotated[int, training_flag(within=flags.SIZE)] = 256
    """Images in a training step; evaluation takes as many at a time as go through the model at once."""
    gradient_accumulation_steps: Annotated[int, training_flag(within=flags.SIZE)] = 1
    """Parts of a batch, run one by one to save memory; AdamW takes a step with their mean gradient. Must divide batch_size.
    Parts left over at the end of an epoch, too few for a batch, go into the first step of the next epoch."""
    num_epochs: Annotated[int, training_flag(within=flags.SIZE, may_change=True)] = 10
    """Passes over the training images."""
    label_smoothing: Annotated[float, training_flag(within=flags.SHARE)] = 0.0
    """Share of a label that is spread evenly over all classes."""
    ema: Annotated[float, training_flag(within=flags.SHARE)] = 0.0
    """Momentum, a step, of the moving average of the weights that is evaluated and kept; 0 for none."""
    mixup: Annotated[float, training_flag(within=flags.ALL_OR_LESS)] = 0.0
    """Share of the images that are blended with another one, as are their labels."""
    cutmix: Annotated[float, training_flag(within=flags.ALL_OR_LESS)] = 0.0
    """Share of the images that get a part of another one, and as much of its label."""
    random_erasing: Annotated[float, training_flag(within=flags.ALL_OR_LESS)] = 0.0
    """Share of the images that lose a random rectangle."""
    rand_augment: Annotated[float, training_flag(within=flags.UP_TO_TEN)] = 0.0
    """Magnitude, up to 10, of RandAugment's changes of colour; 0 for none."""
    augmentation: Annotated[Literal["fused", "stock"], training_flag()] = "fused"
    """fused: flip, rotation, zoom and resizing in one gather; stock: Keras' own layers, the same geometry, slower."""
    validation_split: Annotated[float, training_flag(within=flags.SHARE)] = 0.1
    """Share of the training images set apart for validation, drawn evenly from every class; 0 for none."""
    resume: Annotated[bool, training_flag(comparison=flags.CANNOT_MATTER, may_change=True)] = False
    """Continue the run with this configuration and checkpoint_path after its last complete epoch, or start it if there is none.
    Only a run that was started with --resume keeps its state once it is complete, so that more epochs can follow."""
    seed: Annotated[int, training_flag(within=flags.UINT32, comparison=flags.CANNOT_MATTER)] = 0
    """Seed of the split, the weights, the order of the images, augmentation and dropout."""

    keras_backend: Annotated[str, device_flag()] = from_environment("KERAS_BACKEND", "jax", str.lower)
    """jax, torch or tensorflow. The environment variable KERAS_BACKEND wins over this flag."""
    device: Annotated[Literal["auto", "gpu", "cpu"], device_flag(may_change=True)] = from_environment(
        "VIT_DEVICE", "auto", str.lower
    )
    """gpu: end at once where there is none that works. Default: the environment variable VIT_DEVICE, else auto, what there is."""
    jit: Annotated[Literal["auto", "on", "off"], device_flag()] = "auto"
    """Compile the training step. auto: JAX always, TensorFlow and torch on a GPU (torch compiles for a minute or two on a CPU)."""
    compile_cache: Annotated[bool, device_flag(may_change=True)] = True
    """Keep what JAX and torch compile for the next run, in ~/.cache/vit (XDG_CACHE_HOME)."""
    dtype_policy: Annotated[
        Literal["float32", "mixed_bfloat16", "mixed_float16"], device_flag(comparison=flags.MUST_AGREE)
    ] = "float32"
    """Number format of the computation; weights stay float32. mixed_float16 scales the loss."""
    tf32: Annotated[bool, device_flag(comparison=flags.MUST_AGREE)] = True
    """Let NVIDIA GPUs multiply float32 matrices in TensorFloat-32; set alike on every backend."""

    measure_seconds: Annotated[float, measuring_flag(within=flags.NOT_NEGATIVE)] = 60.0
    """Longest time in seconds for each measurement outside the epochs (step time, latency, evaluation); 0 leaves them out."""

    dataset: Annotated[str, file_flag(comparison=flags.MUST_AGREE, may_change=False)] = "cifar100"
    """cifar100, cifar10, synthetic (made in memory, needs no network), or the path of an .npz file with x_train, y_train, x_test and y_test."""
    checkpoint_path: Annotated[Path, file_flag()] = Path("/tmp/checkpoint.weights.h5")
    """File for the weights of the best epoch by validation accuracy; ends in .weights.h5."""
    results_dir: Annotated[Path, file_flag()] = Path("results")
    """Folder for the run's results, one JSON file per run; results.schema.json explains every figure."""
    verbose: Annotated[bool, file_flag()] = False
    """Print every figure at the end, as the results file has them, not only the most important ones."""
    debug: Annotated[bool, file_flag()] = False
    """Show the traceback of a failure that is otherwise one line."""
    check: Annotated[bool, file_flag()] = False
    """Check the flags and end: nothing is trained or written, and Keras is not imported."""
    node_name: Annotated[str, file_flag(within=flags.SHORT)] = field(default_factory=platform.node)
    """Name of this machine in everything that is recorded. Default: the host's name."""

    use_wandb: Annotated[bool, wandb_flag(comparison=flags.NOTED)] = True
    """Log to Weights & Biases; without an API key the run is logged offline, for `wandb sync`."""
    wandb_project: Annotated[str, wandb_flag()] = from_environment("WANDB_PROJECT", "keras3_edge_baseline")
    """W&B project. Default: the environment variable WANDB_PROJECT, else keras3_edge_baseline."""
    wandb_entity: Annotated[str | None, wandb_flag()] = from_environment("WANDB_ENTITY", None)
    """W&B user or team. Default: the environment variable WANDB_ENTITY, else the account's own."""
    wandb_run_name: Annotated[str | None, wandb_flag()] = None
    """Name of the run in W&B. Default: what runs, as in ook-torch-b256-bf16."""
    wandb_tags: Annotated[list[str], wandb_flag(within=flags.SHORT)] = field(default_factory=list)
    """Tags of the run in W&B, besides the backend and the device."""
    wandb_group: Annotated[str | None, wandb_flag()] = from_environment("WANDB_RUN_GROUP", None)
    """Group of the run in W&B. Default: the environment variable WANDB_RUN_GROUP, else node_name."""
    wandb_job_type: Annotated[str, wandb_flag()] = from_environment("WANDB_JOB_TYPE", "train")
    """Job type of the run in W&B. Default: the environment variable WANDB_JOB_TYPE, else train."""
    wandb_artifact: Annotated[bool, wandb_flag()] = False
    """Upload the best weights as an artifact as well (87 MB for the default model)."""

    def __post_init__(self) -> None:
        if not self.transformer_units:
            self.transformer_units = [2 * self.projection_dim, self.projection_dim]
        for name in ("dataset", "checkpoint_path", "results_dir"):  # a shell leaves ~ alone in --results-dir=~/results
            value = getattr(self, name)
            setattr(self, name, type(value)(os.path.expanduser(value)))

    @property
    def num_patches(self) -> int:
        """Patches, hence tokens, an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def micro_batch_size(self) -> int:
        """Images that go through the model at a time."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def has_soft_labels(self) -> bool:
        """Whether an image in training may belong to several classes."""
        return max(self.label_smoothing, self.mixup, self.cutmix) > 0

    def as_json(self) -> dict:
        """The configuration in types that JSON has."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


FLAGS = flags.flags_of(ViTConfig)  # a field that says nothing of its flag is an error here


# ------------ Backend ------------


def read_config(argv: Sequence[str]) -> ViTConfig:
    """The checked configuration that flags, environment and `.env` give; `keras_backend` is the backend that really runs.

    `.env` never overrides the environment, and KERAS_BACKEND wins over the flag. Raises ExperimentError for a wrong value.
    """
    cli.read_env_file(Path(".env"))
    groups = {name: known.group for name, known in FLAGS.items()}
    config = cli.parse(ViTConfig, argv, "\n\n".join(__doc__.split("\n\n")[:2]), groups, {"recipe": RECIPES})
    variable, flag, known = cli.setting("KERAS_BACKEND").lower(), config.keras_backend, ", ".join(BACKENDS)
    require(variable in ("", *BACKENDS), f"KERAS_BACKEND must be one of {known}, not {variable!r}")
    require(flag in BACKENDS, f"--keras-backend must be one of {known}, not {flag!r}")
    if (backend := variable or flag) != config.keras_backend:
        cli.warn(f"KERAS_BACKEND={backend} wins over --keras-backend {config.keras_backend}")
    config = replace(config, keras_backend=backend)
    flags.check(config)
    return config


def require_places(config: ViTConfig) -> None:
    """Create the folders of the run, and raise ExperimentError where its files cannot be written."""
    require_replaceable(config.checkpoint_path, "--checkpoint-path")
    cli.require_writable_folder(config.results_dir, "--results-dir")


def _set_backend_from_env_or_cli(argv: Sequence[str]) -> tuple[ViTConfig, dict[str, str]]:
    """Set everything that Keras and its backend read when they are imported -> the configuration, the user's variables."""
    config = read_config(argv)
    if config.check:
        sys.exit()
    require_places(config)  # now, as importing Keras takes seconds
    os.environ["KERAS_BACKEND"] = config.keras_backend
    environment = process.clear_environment()
    process.set_environment(config.device, config.compile_cache)
    return config, environment


if __name__ == "__main__":
    streams.steady_streams()
    with cli.errors_in_one_line("--debug" in sys.argv):
        _config, ENVIRONMENT = _set_backend_from_env_or_cli(sys.argv[1:])
else:  # imported by a test, a notebook or a hand-written model of peers/, whose command line is not ours
    os.environ["KERAS_BACKEND"] = cli.setting("KERAS_BACKEND").lower() or "jax"
    ENVIRONMENT = process.clear_environment()

# Only now, as Keras chooses its backend, and the backend its device, when they are imported.
with cli.errors_in_one_line("--debug" in sys.argv), process.importing_keras(is_program=__name__ == "__main__"):
    import keras
    import numpy as np
    from keras import layers, ops

    from edgebench import data_checks, datasets, device
    from edgebench.averages import AverageInValidation, averaged_weights
    from edgebench.callbacks import EpochSeeds, ReturnFreedMemory, require_finite
    from edgebench.layers import Attention, Dropout, StochasticDepth, random_uniform
    from edgebench.measure import costs
    from edgebench.measure.epochs import EpochRecorder, energy_of_epoch
    from edgebench.measure.latency import timed
    from edgebench.measure.steps import Workload, before_training, evaluation
    from edgebench.mixing import batches_for, one_hot
    from edgebench.record import console
    from edgebench.record.recorder import Program, Recorder
    from edgebench.record.resume import ResumableRun
    from edgebench.torch_graphs import FusedAdamW, with_graphs

device.reset_keras()
IMPORT_S = process.age_s()


# ------------ Data ------------


@dataclass(frozen=True)
class Dataset:
    """Images (N, height, width, channels), uint8 or float32, and labels (N,) below `num_classes`; `val` may be empty.

    `moments` are mean and variance of every channel, over training and validation as in the keras.io example: were they
    those of the split, JAX would compile again for every seed.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    moments: tuple[np.ndarray, np.ndarray]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image as it is stored, before any resizing."""
        return self.x_train.shape[1:]

    def with_soft_labels(self) -> Dataset:
        """The same with labels (N, num_classes), as an image may belong to several classes in part."""
        soft = {name: one_hot(getattr(self, name), self.num_classes) for name in ("y_train", "y_val", "y_test")}
        return replace(self, **soft)

    def describe(self) -> dict:
        """What the results say of the data."""
        counts = {"train": len(self.x_train), "validation": len(self.x_val), "test": len(self.x_test)}
        return {"images": counts, "image_shape": list(self.image_shape), "num_classes": self.num_classes}


def load_dataset(dataset: str, validation_split: float, seed: int) -> Dataset:
    """Load cifar100, cifar10, synthetic or an .npz file, and set apart the validation part; ExperimentError if it cannot be used."""
    x, y, x_test, y_test = map(datasets.load_arrays(dataset).get, datasets.ARRAY_NAMES)
    train, val = datasets.stratified_split(y, validation_split, seed)
    require(len(train) > 0, f"--validation-split {validation_split} leaves none of the {len(y)} images for training")
    num_classes = data_checks.count_classes(dataset, y[train], y[val], y_test)
    moments = datasets.channel_moments(x)
    data_checks.check_moments(dataset, moments, datasets.channel_moments(x_test))
    return Dataset(x[train], y[train], x[val], y[val], x_test, y_test, num_classes, moments)


# ------------ Augmentation ------------

# Fixed, as in the keras.io example: the largest rotation, in full turns, and the largest change of height and width.
ROTATION, ZOOM = 0.02, 0.2


def create_data_augmentation(augmentation: str, image_size: int, moments: Sequence[np.ndarray]) -> keras.Sequential:
    """All preprocessing: images (B, H, W, C) as stored -> (B, image_size, image_size, C), normalized by mean and variance.

    In training they are also flipped, rotated by up to ROTATION and zoomed by up to ZOOM, at random.
    """
    mean, variance = moments
    normalization = layers.Normalization(mean=mean.tolist(), variance=variance.tolist())
    if augmentation == "fused":
        return keras.Sequential(
            [normalization, FusedAugmentation(image_size, ROTATION, ZOOM)], name="data_augmentation"
        )
    stock = [
        layers.Resizing(image_size, image_size),
        layers.RandomFlip("horizontal"),
        layers.RandomRotation(ROTATION),
        layers.RandomZoom(ZOOM, ZOOM),
    ]
    # Keras marks rotation and zoom as not compilable, for the sake of TensorFlow's XLA. One such layer makes it run the
    # whole model uncompiled, op by op, although JAX compiles both (a step of a small ViT on a CPU: 0.07 s against 0.5 s).
    if keras.backend.backend() == "jax":
        for layer in stock:
            layer.supports_jit = True
    return keras.Sequential([normalization, *stock], name="data_augmentation")


@keras.saving.register_keras_serializable(package="vit")
class FusedAugmentation(layers.Layer):
    """Resize, flip, rotate and zoom images (B, H, W, C) -> (B, size, size, C) by one bilinear gather from the small source.

    The geometry is that of Resizing, RandomFlip("horizontal"), RandomRotation(rotation) and RandomZoom(zoom, zoom), which
    resample the enlarged image three times: for every output pixel, go back through zoom, rotation, flip and resizing to
    where it comes from, reflecting at the edges. Outside of training it only resizes.
    """

    def __init__(self, size: int, rotation: float, zoom: float, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.rotation, self.zoom, self.seed = size, rotation, zoom, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        if not training:
            return ops.image.resize(images, (self.size, self.size), interpolation="bilinear")
        return self.transform(images, random_uniform((4, ops.shape(images)[0], 1, 1), images, self.seed_generator))

    def transform(self, images, draws):
        """Apply `draws` (4, B, 1, 1) in [-1, 1): a negative first one flips; the others scale rotation and both zooms."""
        flip, turn, zoom_y, zoom_x = ops.unstack(draws)
        center = (self.size - 1) / 2
        pixel = ops.arange(self.size, dtype="float32") - center
        y = self._reflect(ops.reshape(pixel, (1, -1, 1)) * (1 + self.zoom * zoom_y) + center) - center
        x = self._reflect(ops.reshape(pixel, (1, 1, -1)) * (1 + self.zoom * zoom_x) + center) - center
        angle = 2 * math.pi * self.rotation * turn
        cos, sin = ops.cos(angle), ops.sin(angle)
        x, y = self._reflect(cos * x - sin * y + center), self._reflect(sin * x + cos * y + center)
        x = ops.where(flip < 0, self.size - 1 - x, x)
        return self._gather(images, y, x)

    def _reflect(self, coordinate):
        """Fold a pixel coordinate back into the image, whose edges lie half a pixel beyond the outermost centers."""
        around = ops.mod(coordinate + 0.5, 2 * self.size)
        return ops.minimum(around, 2 * self.size - around) - 0.5

    def _gather(self, images, y, x):
        """Pixels of `images` (B, H, W, C) at output coordinates y, x (B, size, size), interpolated between four neighbours."""
        _, height, width, channels = images.shape
        y = ops.clip((y + 0.5) * (height / self.size) - 0.5, 0, height - 1)
        x = ops.clip((x + 0.5) * (width / self.size) - 0.5, 0, width - 1)
        top, left = ops.floor(y), ops.floor(x)
        weight_y, weight_x = (ops.cast(share, images.dtype)[..., None] for share in (y - top, x - left))
        top, left = ops.cast(top, "int32"), ops.cast(left, "int32")
        bottom, right = ops.minimum(top + 1, height - 1), ops.minimum(left + 1, width - 1)
        first_row = ops.reshape(ops.arange(ops.shape(images)[0], dtype="int32"), (-1, 1, 1)) * height
        pixels = ops.reshape(images, (-1, channels))

        def at(row, column):
            return ops.take(pixels, (first_row + row) * width + column, axis=0)

        upper = at(top, left) * (1 - weight_x) + at(top, right) * weight_x
        lower = at(bottom, left) * (1 - weight_x) + at(bottom, right) * weight_x
        return upper * (1 - weight_y) + lower * weight_y

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size, self.size, input_shape[3])

    def get_config(self):
        config = {"size": self.size, "rotation": self.rotation, "zoom": self.zoom, "seed": self.seed}
        return {**super().get_config(), **config}


# ------------ Model ------------

BLOCK_DROPOUT, HEAD_DROPOUT = 0.1, 0.5  # fixed, as in the keras.io example


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
        self.num_patches, self.projection_dim = num_patches, projection_dim
        self.projection = layers.Dense(projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def build(self, input_shape):
        self.projection.build(input_shape)
        self.position_embedding.build((self.num_patches,))

    def call(self, patches):
        return self.projection(patches) + self.position_embedding(ops.arange(self.num_patches))

    def get_config(self):
        return {**super().get_config(), "num_patches": self.num_patches, "projection_dim": self.projection_dim}


def attention_limit(shape: Sequence[int]) -> float:
    """The largest initial weight of an attention kernel, (width, heads, width) or (heads, width, width), in the published model.

    Glorot's rule, with the fans of a convolution: the last two axes count as units, those before them as the places of a
    receptive field. That is what Keras did until 3.14, hence what the example of 2021 started from. Keras 3.15 takes
    the axes of the matrix product, as Glorot meant it (keras pull request 22789), and the same model then learns half
    as much in its first epoch (docs/initial-weights.md). So the range is set here and does not follow Keras.
    """
    *places, units_in, units_out = shape
    return math.sqrt(6 / (math.prod(places) * (units_in + units_out)))


@keras.saving.register_keras_serializable(package="vit")
class PublishedAttention(keras.initializers.RandomUniform):
    """Attention's initial kernels in the published model: uniform, up to `attention_limit`."""

    def __init__(self, seed: int | None = None):
        super().__init__(seed=seed)

    def __call__(self, shape, dtype=None):
        limit = attention_limit(shape)
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=self.seed)

    def get_config(self):
        return {"seed": super().get_config()["seed"]}


@keras.saving.register_keras_serializable(package="vit")
class GlorotAttention(PublishedAttention):
    """Attention's initial kernels since Keras 3.15: Glorot's range of the matrix (width, heads * width) or its transpose."""

    def __call__(self, shape, dtype=None):
        width = shape[-1]
        limit = math.sqrt(6 / (width + math.prod(shape) // width))
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=self.seed)


INITIAL_ATTENTION = {"published": PublishedAttention, "glorot": GlorotAttention}  # of --initial-weights


def mlp(x, hidden_units: Sequence[int], dropout_rate: float):
    """Dense layers of these widths with GELU, each followed by dropout."""
    for units in hidden_units:
        x = layers.Dense(units, activation=keras.activations.gelu)(x)
        x = Dropout(dropout_rate)(x)
    return x


def residual(tokens, branch, rate: float):
    """The sum of tokens and branch, which is left out for a share `rate` of the images in training."""
    return layers.Add()([StochasticDepth(rate)(branch) if rate else branch, tokens])


def create_vit_classifier(
    config: ViTConfig, image_shape: tuple[int, int, int], num_classes: int, data_augmentation: keras.Sequential
) -> keras.Model:
    """Images (B, *image_shape) as stored -> logits (B, num_classes). The keras.io ViT: see the head of the file."""
    inputs = keras.Input(shape=image_shape)
    tokens = Patches(config.patch_size)(data_augmentation(inputs))
    tokens = PatchEncoder(config.num_patches, config.projection_dim)(tokens)
    for rate in np.linspace(0, config.stochastic_depth, config.transformer_layers).tolist():
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        attention = Attention(
            num_heads=config.num_heads,
            key_dim=config.projection_dim,
            dropout=config.attention_dropout,
            kernel_initializer=INITIAL_ATTENTION[config.initial_weights],
        )
        tokens = residual(tokens, attention(normed, normed), rate)
        normed = layers.LayerNormalization(epsilon=1e-6)(tokens)
        tokens = residual(tokens, mlp(normed, config.transformer_units, BLOCK_DROPOUT), rate)
    features = layers.LayerNormalization(epsilon=1e-6)(tokens)
    if config.head == "mean":
        features = layers.GlobalAveragePooling1D()(features)
    else:
        features = Dropout(HEAD_DROPOUT)(layers.Flatten()(features))
    features = mlp(features, config.mlp_head_units, HEAD_DROPOUT)
    logits = layers.Dense(num_classes, dtype="float32")(features)  # the softmax of the loss needs the precision
    return keras.Model(inputs, logits, name="vit")


# ------------ Checkpoint and W&B ------------


class BestWeights(keras.callbacks.Callback):
    """Keeps the weights of the best epoch by validation accuracy, in memory and in `file`.

    The run evaluates the copy in memory, as other runs may share the file's path. (keras.callbacks.ModelCheckpoint writes
    in place.) Without validation images every epoch counts as better than the one before.
    """

    def __init__(self, path: Path, epoch: int = 0, accuracy: float | None = None, weights: Sequence[np.ndarray] = ()):
        super().__init__()
        self.file, self.epoch, self.accuracy, self.weights = WeightsFile(path), epoch, accuracy, weights

    @classmethod
    def of_run(cls, path: Path, resumable: ResumableRun, model: keras.Model) -> BestWeights:
        """Those that an interrupted run had, whose state is put into the model; none where there is nothing to continue."""
        progress = resumable.progress
        return cls(path, progress.best_epoch, progress.best_accuracy, resumable.restore(model))

    def on_epoch_end(self, epoch, logs=None):
        accuracy = (logs or {}).get("val_accuracy")
        if accuracy is not None:
            if self.accuracy is not None and accuracy <= self.accuracy:
                return
            self.accuracy = accuracy
        with averaged_weights(self.model):  # as the validation saw them
            self.epoch, self.weights = epoch + 1, device.copy_values(self.model.weights)
            self.file.write(self.model)

    def restore(self, model: keras.Model) -> None:
        """Give the model the best weights, and the file as well where it does not hold them any more."""
        device.assign_copies(model.weights, self.weights)
        if not self.file.current:  # not written by this process, replaced by another run, or /tmp was cleaned
            self.file.write(model)


class CustomWandbCallback(keras.callbacks.Callback):
    """Logs what Keras reports for an epoch of `images` training images, the learning rate, time and energy.

    Batch hooks would make JAX and torch wait in every step. (wandb.integration.keras needs TensorFlow: wandb issue 7186.)
    """

    def __init__(self, run, images: int, recorder: EpochRecorder):
        super().__init__()
        self.run, self.images, self.recorder = run, images, recorder

    def on_epoch_end(self, epoch, logs=None):
        record = self.recorder.epochs[-1]
        figures = {"epoch": epoch + 1, "train_s": record.train_s, "images_per_s": self.images / record.train_s}
        figures |= {**(logs or {}), "learning_rate": float(ops.convert_to_numpy(self.model.optimizer.learning_rate))}
        try:
            self.run.log(figures | energy_of_epoch(record, self.images))
        except Exception as error:  # a full disk, a service that has died: the training continues
            cli.warn(f"W&B did not take epoch {epoch + 1} ({cli.one_line(error)})")


# ------------ Experiment ------------


def learning_rate(config: ViTConfig, steps_per_epoch: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate, as Keras' optimizers take it; each part of an accumulated batch counts as a step."""
    peak, warmup = config.learning_rate, int(config.warmup_epochs * steps_per_epoch)
    if config.learning_rate_schedule == "constant":
        return peak
    decay = config.num_epochs * steps_per_epoch - warmup
    return keras.optimizers.schedules.CosineDecay(0.0, decay, warmup_target=peak, warmup_steps=warmup)


def compile_model(model: keras.Model, config: ViTConfig, num_classes: int, steps_per_epoch: int) -> None:
    """Give the model AdamW, the loss and the metrics."""
    is_torch = keras.backend.backend() == "torch"
    adamw = FusedAdamW if is_torch else keras.optimizers.AdamW  # Keras' own takes five times as long on torch
    parts, top = config.gradient_accumulation_steps, min(5, num_classes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracies = keras.metrics.SparseCategoricalAccuracy, keras.metrics.SparseTopKCategoricalAccuracy
    if config.has_soft_labels:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        accuracies = keras.metrics.CategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy
    model.compile(
        optimizer=adamw(
            learning_rate=learning_rate(config, steps_per_epoch),
            weight_decay=config.weight_decay,
            beta_1=0.9,
            beta_2=0.999,
            epsilon=1e-7,  # that of Keras; torch and optax have 1e-8, which tests/test_same_model.py can tell apart
            gradient_accumulation_steps=parts if parts > 1 else None,
            use_ema=config.ema > 0,
            ema_momentum=config.ema ** (1 / parts),  # Keras averages after every part
        ),
        loss=loss,
        metrics=[accuracies[0](name="accuracy"), accuracies[1](top, name="top-5-accuracy")],
        jit_compile=False if is_torch else {"auto": "auto", "on": True, "off": False}[config.jit],
    )


def build_model(config: ViTConfig, data: Dataset, is_gpu: bool) -> keras.Model:
    """The compiled model for these images; on torch its steps become graphs, by default on a GPU."""
    augmentation = create_data_augmentation(config.augmentation, config.image_size, data.moments)
    model = create_vit_classifier(config, data.image_shape, data.num_classes, augmentation)
    if keras.backend.backend() == "torch" and (config.jit == "on" or (config.jit == "auto" and is_gpu)):
        stock = augmentation if config.augmentation == "stock" else None
        one_for_the_latency = 1
        model = with_graphs(model, {config.micro_batch_size, one_for_the_latency}, stock)
    steps_per_epoch = math.ceil(len(data.x_train) / config.micro_batch_size)
    compile_model(model, config, data.num_classes, steps_per_epoch)
    return model


def run_experiment(config: ViTConfig, callbacks: Sequence[keras.callbacks.Callback] = ()) -> dict:
    """Train on `config.dataset`, evaluate the best epoch's weights on the test images, and return all that was measured.

    Once the data are loaded, the results, as results.schema.json describes them, are also printed, written to
    `config.results_dir` and sent to W&B, however the run ends. `callbacks` come after the run's own in every epoch. Raises
    ExperimentError for an expected failure, Interrupted for a signal, and otherwise whatever went wrong.
    """
    require_places(config)
    backend = keras.backend.backend()
    config = replace(config, keras_backend=backend)  # for callers that have imported this module
    machine = device.prepare(config.device, config.seed, config.dtype_policy, config.tf32)
    packages = {"Keras": keras.__version__, backend: importlib.metadata.version(backend)}
    program = Program(backend, packages, ENVIRONMENT, IMPORT_S)
    console.print_start(program.versions(machine), machine.name, config.as_json(), ViTConfig().as_json())

    # Data
    data, load_s = timed(load_dataset, config.dataset, config.validation_split, config.seed)
    size = costs.vit_size(config.as_json(), data.image_shape[2], data.num_classes)
    costs.require_memory(size, machine.memory_bytes)
    resumable = ResumableRun(config, FLAGS, data.x_train, data.y_train)
    if config.has_soft_labels:
        data = data.with_soft_labels()
    make_batches = batches_for(config.as_json(), data.x_train.dtype)
    batch_size = config.micro_batch_size

    # However this block ends, the recorder prints and writes the results and ends the W&B run.
    with Recorder(config, program, machine, size, resumable) as run:
        run.describe(**data.describe())
        run.add({"time": {"load_s": load_s}})

        # Model
        model, build_s = timed(build_model, config, data, machine.is_gpu)
        run.describe_model(model, build_s)

        # Measure; leaves the model unchanged
        workload = Workload(model, data, make_batches, batch_size, config.gradient_accumulation_steps)
        run.measure(before_training(workload, config.measure_seconds, run.sensors, run.signals.raise_if_received))

        # Train; an epoch that diverged leaves no record, and is not the best
        batches = make_batches(data.x_train, data.y_train, batch_size)
        predict_few = partial(model.predict_on_batch, data.x_train[:batch_size])
        recorder = run.record_epochs(len(data.x_train), partial(require_finite, predict=predict_few))
        best = BestWeights.of_run(config.checkpoint_path, resumable, model)
        run.claim(best.file)
        own_callbacks = [EpochSeeds(config.seed, batches), run.signals, recorder, best, ReturnFreedMemory()]
        own_callbacks += [AverageInValidation(), *resumable.callbacks(recorder, best, run.measured, run.wandb_id)]
        if run.wandb:
            own_callbacks.append(CustomWandbCallback(run.wandb, len(data.x_train), recorder))
        with console.epoch_lines(len(data.x_train), recorder) as lines:
            model.fit(
                batches,
                shuffle=False,  # EpochSeeds does
                epochs=config.num_epochs,
                initial_epoch=len(recorder.epochs),
                validation_data=(data.x_val, data.y_val) if len(data.x_val) else None,
                validation_batch_size=batch_size,
                callbacks=[*own_callbacks, lines, *callbacks],
                verbose=0,
            )

        # Evaluate
        best.restore(model)
        evaluate = partial(model.evaluate, data.x_test, data.y_test, batch_size, verbose=0, return_dict=True)
        run.add(evaluation(evaluate, len(data.x_test), config.measure_seconds))
        run.add({"quality": {"best_epoch": best.epoch, "best_epoch_s": recorder.epochs[best.epoch - 1].end_s}})
        run.signals.raise_if_received()
    resumable.finish()
    return run.results


def main(config: ViTConfig, callbacks: Sequence[keras.callbacks.Callback] = ()) -> None:
    """Run one experiment; an expected failure becomes one line and an exit status."""
    with cli.errors_in_one_line(config.debug):
        run_experiment(config, callbacks)


if __name__ == "__main__":
    main(_config)
