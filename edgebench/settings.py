"""Which values of the flags can work; without importing Keras or loading data. The flags themselves are vit.ViTConfig."""

import math
import os
import sys
from typing import Any

from edgebench.cli import flag, is_installed, require, require_writable_folder
from edgebench.files import require_replaceable

DATASETS = ("cifar100", "cifar10", "synthetic")
POSITIVE = (
    *("image_size", "patch_size", "projection_dim", "num_heads", "transformer_layers", "transformer_units"),
    *("mlp_head_units", "batch_size", "gradient_accumulation_steps", "num_epochs"),
)
SHARE = (0, 1, "lie in [0, 1)")
ALL_OR_LESS = (0, math.nextafter(1, 2), "lie in [0, 1]")
NOT_NEGATIVE = (0, math.inf, "be finite and not negative")
INTERVALS = {  # [low, high)
    "attention_dropout": SHARE,
    "stochastic_depth": SHARE,
    "validation_split": SHARE,
    "label_smoothing": SHARE,
    "ema": SHARE,
    "random_erasing": ALL_OR_LESS,
    "rand_augment": (0, math.nextafter(10, 11), "lie in [0, 10]"),
    "mixup": ALL_OR_LESS,
    "cutmix": ALL_OR_LESS,
    "learning_rate": (sys.float_info.min, math.inf, "be positive and finite"),
    "warmup_epochs": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "measure_seconds": NOT_NEGATIVE,
    "seed": (0, 2**32, "lie in [0, 2**32)"),
}


def check(config: Any) -> None:
    """Raise ExperimentError for the first value of a vit.ViTConfig that cannot work."""
    for name in POSITIVE:
        value = getattr(config, name)
        sizes = value if isinstance(value, list) else [value]
        require(all(size > 0 for size in sizes), f"{flag(name)} must be positive, not {value}")
        require(all(size < 2**31 for size in sizes), f"{flag(name)} must be below 2**31, not {value}")
    for name, (low, high, text) in INTERVALS.items():
        value = getattr(config, name)
        require(low <= value < high, f"{flag(name)} must {text}, not {value}")
    mixed = config.mixup + config.cutmix
    require(mixed <= 1, f"--mixup and --cutmix are shares of the same images, and must not add up to {mixed}")
    patch, image = config.patch_size, config.image_size
    require(patch <= image, f"--patch-size {patch} is larger than --image-size {image}")
    batch, parts = config.batch_size, config.gradient_accumulation_steps
    require(batch % parts == 0, f"--gradient-accumulation-steps {parts} does not divide --batch-size {batch}")
    width, last = config.projection_dim, config.transformer_units[-1]
    reason = "as a block adds its output to its input"
    require(width == last, f"--transformer-units must end in --projection-dim {width}, {reason}, not in {last}")
    warmup, epochs = config.warmup_epochs, config.num_epochs
    is_constant = config.learning_rate_schedule == "constant"
    require(not is_constant or not warmup, f"--warmup-epochs {warmup} needs --learning-rate-schedule cosine")
    require(
        is_constant or warmup < epochs, f"--warmup-epochs {warmup} leaves none of --num-epochs {epochs} for the cosine"
    )
    # tyro does not check a default, which may come from VIT_DEVICE.
    require(config.device in ("auto", "gpu", "cpu"), f"VIT_DEVICE must be auto, gpu or cpu, not {config.device!r}")
    if config.dataset not in DATASETS:
        known = f"{', '.join(DATASETS)} or the path of an .npz file"
        require(config.dataset.endswith(".npz"), f"--dataset must be {known}, not {config.dataset!r}")
        require(os.path.isfile(config.dataset), f"--dataset {config.dataset!r}: there is no such file")
    backend = config.keras_backend
    install = f"pip install -c constraints.txt {backend}"
    require(is_installed(backend), f"the backend {backend} is not installed: {install}")
    has_wandb = not config.use_wandb or is_installed("wandb")
    require(has_wandb, "W&B is not installed: pip install wandb, or run with --no-use-wandb")
    for name, text in (("node_name", config.node_name), *(("wandb_tags", tag) for tag in config.wandb_tags)):
        require(1 <= len(text) <= 64, f"{flag(name)} must have 1 to 64 characters, not {len(text)}")
    path = config.checkpoint_path
    require(path.name.endswith(".weights.h5"), f"--checkpoint-path must end in .weights.h5, not {str(path)!r}")
    require_replaceable(path, "--checkpoint-path")
    require_writable_folder(config.results_dir, "--results-dir")
