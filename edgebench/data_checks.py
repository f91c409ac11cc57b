"""What images and labels must be like: made fit for every backend, refused if they cannot be meant, warned about if they could be."""

from pathlib import Path

import keras
import numpy as np

from edgebench.cli import require, warn

FLOAT32_MAX = float(np.finfo(np.float32).max)
Moments = tuple[np.ndarray, np.ndarray]  # mean and variance of every channel


def usable_images(x: np.ndarray, name: str) -> np.ndarray:
    """Images as (N, height, width, channels) of uint8 if they are bytes or bool, else of float32: every backend takes these."""
    require(x.ndim in (3, 4), f"{name} must have the shape (images, height, width, channels), not {x.shape}")
    require(x.size > 0, f"{name} is empty, of shape {x.shape}")
    require(x.dtype.kind in "buif", f"{name} must hold real numbers, not {x.dtype}")
    if x.ndim == 3:  # gray
        x = x[..., None]
    if x.dtype in (np.uint8, bool):
        return np.ascontiguousarray(x, np.uint8)
    low, high = float(x.min()), float(x.max())  # NaN if one value is
    is_finite = -FLOAT32_MAX <= low <= high <= FLOAT32_MAX
    require(is_finite, f"{name} holds values that are not finite, or too large for float32")
    is_resolved = low == high or high - low > 2**-20 * max(-low, high)
    require(is_resolved, f"{name} lies between {low} and {high}, too close for float32: subtract the mean")
    return np.ascontiguousarray(x, np.float32)


def usable_labels(y: np.ndarray, name: str, images: int, most: int) -> np.ndarray:
    """Labels as (N,) of int64, one for each of `images`, below `most`, the number of training images."""
    require(y.dtype.kind in "bui", f"{name} must hold integers, not {y.dtype}")
    require(y.shape in ((images,), (images, 1)), f"{name} must hold one label per image, {images}, not {y.shape}")
    require(int(y.min()) >= 0, f"{name} holds negative labels")
    require(int(y.max()) < most, f"{name}: labels go up to {y.max()}, but there are only {most} training images")
    return y.reshape(-1).astype(np.int64)


def check_shapes(train: tuple[int, ...], test: tuple[int, ...], path: Path) -> None:
    """Raise ExperimentError for images that differ in shape or have the channels first; warn where that is only likely."""
    require(train[1:] == test[1:], f"{path}: images differ in shape: x_train {train}, x_test {test}")
    _, height, width, channels = train
    if height <= 4 < min(width, channels):
        order = f"{path}: images of the shape {train[1:]} look like channels first; needed is (height, width, channels)"
        require(width != channels, f"{order}, as by x.transpose(0, 2, 3, 1)")
        warn(order)


def check_moments(dataset: str, train: Moments, test: Moments) -> None:
    """Raise ExperimentError for training images that cannot be normalized, and for test images on another scale."""
    (mean, variance), (test_mean, test_variance) = train, test
    spread, least = np.sqrt(variance), keras.config.epsilon()  # Normalization divides by no less
    is_usable = (spread == 0) | ((spread >= least) & (variance <= FLOAT32_MAX))  # 0: a constant channel, as opacity
    deviations = f"{dataset}: the channels of x_train have the standard deviations {spread}, which cannot be normalized"
    require(bool(spread.any() and is_usable.all()), f"{deviations} in float32: scale the images, for example to 0-255")

    distance = np.max(np.sqrt(test_variance + (test_mean - mean) ** 2) / np.maximum(spread, least))
    contrast = np.sqrt(test_variance.sum() / variance.sum())
    scales = f"{dataset}: x_test lies {distance:.2g} standard deviations from the mean of x_train"
    scales += f" and has {contrast:.2g} times its contrast"
    require(bool(distance < 50 and contrast > 1 / 50), f"{scales}: scale both alike")
    if distance > 4 or contrast < 1 / 4:
        warn(f"{scales}; are both scaled alike?")


def count_classes(dataset: str, y_train: np.ndarray, y_val: np.ndarray, y_test: np.ndarray) -> int:
    """The number of classes, from label 0 on; raise ExperimentError if the training images are all of one class."""
    count = int(np.concatenate([y_train, y_val, y_test]).max()) + 1
    is_trained = np.bincount(y_train, minlength=count) > 0
    require(is_trained.sum() > 1, f"{dataset}: all training images have the label {y_train[0]}: nothing can be learned")
    if not is_trained.all():
        empty, unknown = np.flatnonzero(~is_trained), int((~is_trained[y_test]).sum())
        names = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        counts = f"{dataset}: {len(empty)} of {count} classes have no training image (label {names})"
        warn(f"{counts}, and {unknown} test images are of these" if unknown else counts)
    return count
