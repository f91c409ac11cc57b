"""Where the four arrays of a data set come from: CIFAR, an .npz file, or memory."""

import contextlib
import fcntl
import os
import socket
import zipfile
from pathlib import Path

import keras
import numpy as np

from edgebench.cli import ExperimentError, OutOfMemory, require
from edgebench.data_checks import check_shapes, usable_images, usable_labels
from edgebench.files import replacing

ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")
# The names under which Keras keeps the downloaded files.
CIFAR_ARCHIVES = {"cifar10": "cifar-10-batches-py-target_archive", "cifar100": "cifar-100-python-target_archive"}
STALLED_S = 30  # seconds without a byte after which a download ends


def load_arrays(dataset: str) -> dict[str, np.ndarray]:
    """The four arrays of `dataset` by name: x (N, height, width, channels) uint8 or float32, y (N,) int64.

    `dataset` is cifar10, cifar100, synthetic or the path of an .npz file. Raises ExperimentError if it cannot be used.
    """
    if dataset == "synthetic":
        return make_synthetic()
    return load_cifar(dataset) if dataset in CIFAR_ARCHIVES else read_npz(Path(dataset))


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation part; each class gives its share, give or take one image."""
    count = round(len(labels) * share)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    evenly_spaced = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(int)
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[by_class[evenly_spaced]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def image_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Indices of `count` images in the order of an epoch, counted from 0: the same on every backend and in a resumed run."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class ShuffledBatches(keras.utils.PyDataset):
    """Batches of images and labels: as they are stored, and once `shuffle` is called in the `image_order` of an epoch.

    Left to Keras, every backend draws another order, and TensorFlow repeats one order in every epoch when its global seed is
    set again. (PyDataset.on_epoch_begin is no place to shuffle: Keras also calls it when it only looks at the first batch.)
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int):
        super().__init__()
        self._x, self._y, self._batch_size, self._order = x, y, batch_size, np.arange(len(x))

    def __len__(self) -> int:
        return -(-len(self._x) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._x[chosen], self._y[chosen]

    def shuffle(self, seed: int, epoch: int) -> None:
        """Take the order of this epoch, counted from 0."""
        self._order = image_order(seed, epoch, len(self._x))


def channel_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every channel of (N, H, W, C), as Normalization.adapt computes them, which takes seconds on JAX."""
    count, origin = images[..., 0].size, images[0, 0, 0].astype(np.float64)[:, None]
    total = square = 0.0
    step = max(1, 65536 // images[0, ..., 0].size)  # as many images as a processor's cache holds as float64
    for start in range(0, len(images), step):
        part = images[start : start + step].reshape(-1, images.shape[3]).T.astype(np.float64, order="C")
        part -= origin  # nothing is lost where the mean is large, and the variance of a constant is 0
        total, square = total + part.sum(1), square + np.einsum("cn,cn->c", part, part)
    return origin[:, 0] + total / count, np.maximum(square / count - (total / count) ** 2, 0)


def make_synthetic() -> dict[str, np.ndarray]:
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


def load_cifar(name: str) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 from a cache of our own, or once through keras.datasets.

    keras.datasets hashes and unpacks the archive at every call, into a folder that all processes share: that takes
    seconds, and a second process can read half-written files. So the arrays are cached as one uncompressed .npz, and only
    one process at a time calls Keras.
    """
    home = os.path.expanduser("~")
    home = "/tmp" if home == "~" else home  # without a home, that is Keras' choice
    folder = Path(os.environ.get("KERAS_HOME") or f"{home}/.keras", "datasets")
    cache, timeout = folder / f"vit-{name}.npz", socket.getdefaulttimeout()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written has no lock and no cache
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f".vit-{name}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.exists():
            with contextlib.suppress(ExperimentError):  # a damaged cache is made anew below
                return read_npz(cache)
        socket.setdefaulttimeout(STALLED_S)
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a bare Exception when a download fails
            url = f"https://www.cs.toronto.edu/~kriz/cifar-{name[5:]}-python.tar.gz"
            remedy = f"put {url} at {folder / CIFAR_ARCHIVES[name]}, or run with --dataset synthetic"
            raise ExperimentError(f"{name} could not be loaded ({error}); without a network, {remedy}") from error
        finally:
            socket.setdefaulttimeout(timeout)
        arrays = dict(zip(ARRAY_NAMES, (x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)), strict=True))
        with contextlib.suppress(OSError), replacing(cache) as scratch:
            np.savez(scratch, **arrays)
        return arrays


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz, labels flattened to (N,); raise ExperimentError with the first thing that is wrong."""
    require(zipfile.is_zipfile(path), f"{path} is not an .npz file, a zip archive of NumPy arrays, or is cut short")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAY_NAMES if name in archive}
    except MemoryError as error:
        raise OutOfMemory(f"{path} is too large for this machine's memory, or damaged ({error})") from error
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for a damaged file
        raise ExperimentError(f"{path} cannot be read as an .npz file ({error or type(error).__name__})") from error

    missing = [name for name in ARRAY_NAMES if name not in arrays]
    require(not missing, f"{path}: {' and '.join(missing)} missing; needed are {', '.join(ARRAY_NAMES)}")
    for part in ("train", "test"):
        x = usable_images(arrays[f"x_{part}"], f"{path}: x_{part}")
        y = usable_labels(arrays[f"y_{part}"], f"{path}: y_{part}", len(x), len(arrays["x_train"]))
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    check_shapes(arrays["x_train"].shape, arrays["x_test"].shape, path)
    return arrays
