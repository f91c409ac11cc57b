"""Images and labels that are changed before they reach a backend: colours, erasing, Mixup, CutMix, label smoothing.

In NumPy on the stored bytes: so all backends train on the same pixels, and none has to compile or run anything for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import keras
import numpy as np

from edgebench.cli import flag, require
from edgebench.datasets import ShuffledBatches

COLOUR_OPERATIONS_PER_IMAGE = 2  # N of RandAugment
MIXUP_ALPHA = 0.8  # of the beta distribution of an image's share; that of CutMix is 1, so any share is as likely
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # as shares of an image's area, and height by width


@dataclass(frozen=True)
class Mixing:
    """How images and labels are changed; 0 leaves one out.

    `label_smoothing` is the share of a label that is spread evenly over all classes: here and not in the loss, so that the
    losses of validation and test stay cross-entropies. `mixup`, `cutmix` and `random_erasing` are the shares of the images
    that are blended, cut and erased, `rand_augment` is a magnitude of 0 to 10. Sources: Zhang et al. 2018 (Mixup), Yun et
    al. 2019 (CutMix), Zhong et al. 2020 (erasing), Cubuk et al. 2020 (RandAugment, here without its geometry, equalizing
    and sharpening).
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0
    rand_augment: float = 0.0

    def require_bytes(self, dtype: np.dtype) -> None:
        """Raise ExperimentError where the images, of this type, would have to be bytes."""
        wanted = [name for name in ("random_erasing", "rand_augment") if getattr(self, name)]
        message = f"the images have to be bytes (uint8), not {dtype}, for {' and '.join(map(flag, wanted))}"
        require(dtype == np.uint8 or not wanted, message)

    def apply(self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Changed copies of images (B, H, W, C) and labels (B, classes), which come out with the shares of their classes."""
        if self.rand_augment:
            images = change_colours(images, self.rand_augment, rng)
        if self.random_erasing:
            images = erase(images, self.random_erasing, rng)
        if self.mixup or self.cutmix:
            images, labels = mix(images, labels, self.mixup, self.cutmix, rng)
        if self.label_smoothing:
            labels = labels * (1 - self.label_smoothing) + self.label_smoothing / labels.shape[1]
        return images, labels


class MixedBatches(ShuffledBatches):
    """ShuffledBatches whose images are changed by `mixing`: by draws of their own in every batch of every epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, mixing: Mixing):
        super().__init__(x, y, batch_size)
        self._mixing, self._seeds = mixing, (0, 0)

    def shuffle(self, seed: int, epoch: int) -> None:
        super().shuffle(seed, epoch)
        self._seeds = seed, epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # The 1 keeps these draws apart from those of the order: NumPy fills a shorter seed up with zeros.
        rng = np.random.default_rng((*self._seeds, index, 1))
        return self._mixing.apply(*super().__getitem__(index), rng)


def batches_for(flags: Mapping[str, Any], dtype: np.dtype) -> Callable[[np.ndarray, np.ndarray, int], ShuffledBatches]:
    """What makes batches from images, labels and a batch size; `flags` are those of vit.ViTConfig, `dtype` is that of the images.

    Raises ExperimentError where the images would have to be bytes.
    """
    mixing = Mixing(**{field.name: flags[field.name] for field in fields(Mixing)})
    mixing.require_bytes(dtype)
    return ShuffledBatches if mixing == Mixing() else partial(MixedBatches, mixing=mixing)


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels (N,) as (N, num_classes) float32."""
    return keras.utils.to_categorical(labels, num_classes).astype(np.float32)


def boxes(centers: np.ndarray, heights: np.ndarray, widths: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where rectangles (B) lie in images of `shape`, cut off at the edges: (B, H, W) bool. All sizes are shares of the image."""
    inside = [
        abs((np.arange(size) + 0.5)[None] - size * center[:, None]) < size * length[:, None] / 2
        for size, center, length in zip(shape, centers, (heights, widths), strict=True)
    ]
    return inside[0][:, :, None] & inside[1][:, None, :]


def mix(
    images: np.ndarray, labels: np.ndarray, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mix images with another one of the batch: blend a share `mixup` of them, and cut a part into a share `cutmix`."""
    draw, partner = rng.random(len(images)), rng.permutation(len(images))
    chosen = np.flatnonzero(draw < mixup + cutmix)
    cuts, partner = draw[chosen] < cutmix, partner[chosen]
    share = np.where(cuts, rng.random(len(chosen)), rng.beta(MIXUP_ALPHA, MIXUP_ALPHA, len(chosen)))
    side = np.sqrt(1 - share)
    box = boxes(rng.random((2, len(chosen))), side, side, images.shape[1:3])
    weight = np.where(cuts[:, None, None], ~box, share[:, None, None])[..., None].astype(np.float32)
    mixed = images[chosen] * weight + images[partner] * (1 - weight)
    mixed = np.rint(mixed) if images.dtype == np.uint8 else mixed
    # A box that is cut off at the edge takes less of the other image.
    of_label = weight.mean((1, 2), dtype=np.float32)
    mixed_labels = labels[chosen] * of_label + labels[partner] * (1 - of_label)
    images, labels = images.copy(), labels.copy()
    images[chosen], labels[chosen] = mixed, mixed_labels
    return images, labels


def erase(images: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Replace a random rectangle in a `share` of the images by random bytes."""
    chosen = np.flatnonzero(rng.random(len(images)) < share)
    count, shape = len(chosen), images.shape[1:3]
    area = rng.uniform(*ERASED_AREA, count)
    aspect = np.exp(rng.uniform(*np.log(ERASED_ASPECT), count))
    sides = np.sqrt([area * aspect, area / aspect]).clip(max=1)
    erased = boxes(sides / 2 + rng.random((2, count)) * (1 - sides), *sides, shape)  # inside the image
    images, whole = images.copy(), images[chosen]
    noise = np.frombuffer(rng.bytes(whole.size), np.uint8).reshape(whole.shape)
    images[chosen] = np.where(erased[..., None], noise, whole)
    return images


def change_colours(images: np.ndarray, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """Apply COLOUR_OPERATIONS_PER_IMAGE random operations to every image (B, H, W, C) of bytes."""
    images = images.copy()
    for _ in range(COLOUR_OPERATIONS_PER_IMAGE):
        which, sign = rng.integers(0, len(OPERATIONS), len(images)), rng.choice((-1.0, 1.0), len(images))
        for number, operation in enumerate(OPERATIONS):
            chosen = np.flatnonzero(which == number)
            strength = (magnitude / 10 * sign[chosen])[:, None, None, None].astype(np.float32)
            changed = operation(images[chosen].astype(np.float32), strength)
            images[chosen] = np.rint(changed).clip(0, 255).astype(np.uint8)
    return images


# Each takes images (B, H, W, C) and a strength (B, 1, 1, 1) from -1 to 1.


def _away_from(reference: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """An operation that moves every pixel away from its reference, or, where the strength is negative, towards it."""

    def operation(x: np.ndarray, strength: np.ndarray) -> np.ndarray:
        return x + 0.9 * strength * (x - reference(x))

    return operation


def _gray(x: np.ndarray) -> np.ndarray:
    return x.mean(3, keepdims=True)


def _autocontrast(x: np.ndarray, strength: np.ndarray) -> np.ndarray:
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    return np.where(high > low, (x - low) * (255 / np.maximum(high - low, 1)), x)


def _posterize(x: np.ndarray, strength: np.ndarray) -> np.ndarray:
    step = 2 ** np.rint(4 * abs(strength))
    return np.floor(x / step) * step


def _solarize(x: np.ndarray, strength: np.ndarray) -> np.ndarray:
    return np.where(x >= 255 * (1 - abs(strength)), 255 - x, x)


OPERATIONS = (
    lambda x, strength: x,
    _away_from(lambda x: 0),  # brightness
    _away_from(lambda x: _gray(x).mean((1, 2), keepdims=True)),  # contrast
    _away_from(_gray),  # saturation
    _autocontrast,
    _posterize,
    _solarize,
)
