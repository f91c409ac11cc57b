"""Promises about data: anyone's images work or are refused with one line; CIFAR is fetched once and never read in part."""

import hashlib
import http.server
import io
import pickle
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from conftest import ROOT

import vit
from edgebench import cli, datasets

IMAGES = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 1))


def arrays(**changes) -> dict:
    rng = np.random.default_rng(0)
    valid = {
        "x_train": rng.integers(0, 256, (20, 8, 8, 1), np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (8, 8, 8, 1), np.uint8),
        "y_test": np.arange(8)[:, None] % 4,
    }
    return {name: value for name, value in {**valid, **changes}.items() if value is not None}


def test_anyones_images_are_loaded_with_shape_and_classes_from_the_data(tmp_path):
    np.savez(tmp_path / "own.npz", **arrays())
    data = vit.load_dataset(str(tmp_path / "own.npz"), validation_split=0.2, seed=0)
    assert data.image_shape == (8, 8, 1) and data.num_classes == 4
    assert data.y_test.shape == (8,) and len(data.x_train) == 16 and len(data.x_val) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "x_test": None}, "x_test and y_test missing"),
        ({"x_train": np.zeros((20, 64))}, "x_train must have the shape (images, height, width, channels)"),
        ({"x_train": np.zeros((20, 8, 8, 1), "U1")}, "x_train must hold real numbers"),
        ({"x_train": np.zeros((20, 8, 8, 1), complex)}, "x_train must hold real numbers, not complex128"),
        ({"x_train": np.zeros((20, 8, 8, 1), "M8[s]")}, "x_train must hold real numbers"),
        ({"x_train": np.full((20, 8, 8, 1), np.nan)}, "not finite"),
        (
            {"x_test": np.where(IMAGES[:8] == IMAGES[0, 0, 0, 0], np.nan, IMAGES[:8])},
            "x_test holds values that are not finite",
        ),
        ({"x_train": IMAGES * 1e300}, "too large for float32"),
        ({"x_train": IMAGES * np.longdouble("1e4000")}, "too large for float32"),
        ({"x_train": IMAGES + 2**50}, "too close for float32: subtract the mean"),
        ({"x_train": -IMAGES - 2.0**40}, "too close for float32: subtract the mean"),
        ({"x_train": IMAGES.reshape(20, 1, 8, 8), "x_test": np.zeros((8, 1, 8, 8))}, "channels first"),
        ({"x_train": np.zeros((20, 3, 9, 9)), "x_test": np.zeros((8, 3, 9, 9))}, "x.transpose(0, 2, 3, 1)"),
        ({"x_test": np.zeros((0, 8, 8, 1)), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"x_test": np.zeros((8, 9, 8, 1))}, "images differ in shape"),
        ({"y_train": np.zeros(19, int)}, "one label per image"),
        ({"y_train": np.zeros(20)}, "y_train must hold integers"),
        ({"y_train": np.array("a")}, "y_train must hold integers"),
        ({"y_train": np.eye(20, dtype=int)}, "one label per image"),  # one-hot
        ({"y_test": np.full(8, -1)}, "negative"),
        ({"y_test": np.full(8, 2**64 - 1, np.uint64)}, "labels go up to 18446744073709551615"),
        ({"y_test": np.full(8, 20)}, "labels go up to 20, but there are only 20 training images"),
        ({"y_train": np.full(20, 10**12)}, "labels go up to"),
        ({"x_train": np.array([object()])}, "cannot be read"),
    ],
)
def test_wrong_arrays_are_one_clear_line(changes, message, tmp_path):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(cli.ExperimentError, match="own.npz") as refused:
        datasets.load_arrays(str(tmp_path / "own.npz"))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.full((20, 8, 8, 1), 7)}, "standard deviations [0.], which cannot be normalized"),
        ({"x_train": IMAGES * 1e36}, "which cannot be normalized in float32: scale the images"),
        ({"x_train": IMAGES * 1e-14, "x_test": IMAGES[:8] * 1e-14}, "which cannot be normalized in float32"),
        ({"x_train": IMAGES * [1, 1e-14], "x_test": IMAGES[:8] * [1, 1e-14]}, "which cannot be normalized"),
        ({"x_test": IMAGES[:8] / 255}, "x_test lies"),
        ({"x_train": IMAGES / 255}, "scale both alike"),
        ({"x_train": IMAGES / 127.5 - 1}, "scale both alike"),
        ({"x_test": IMAGES[:8].astype(np.uint16) * 257}, "scale both alike"),
        ({"x_test": np.zeros((8, 8, 8, 1))}, "scale both alike"),
        # A constant channel has no deviation that another value could be normalized by.
        ({"x_train": IMAGES * [1, 0] + [0, 255], "x_test": IMAGES[:8] * [1, 0] + [0, 254]}, "scale both alike"),
        ({"y_train": np.full(20, 3)}, "all training images have the label 3"),
    ],
)
def test_data_that_cannot_be_learned_from_are_one_clear_line(changes, message, tmp_path):
    """No normalization in float32, another scale of the test images, one class: never trained without a word."""
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(cli.ExperimentError, match="own.npz") as refused:
        vit.load_dataset(str(tmp_path / "own.npz"), validation_split=0.1, seed=0)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y_train": np.arange(20) % 4 + 1, "y_test": np.arange(8) % 4 + 1},
            "1 of 5 classes have no training image (label 0)",
        ),
        ({"y_test": np.arange(8)}, "4 of 8 classes have no training image (label 4, 5, 6, 7), and 4 test images"),
        ({"y_train": np.arange(20) % 2 * 19}, "(label 1, 2, 3, 4, 5, ...), and 6 test images"),
        ({"x_test": IMAGES[:8] // 16}, "are both scaled alike?"),
        ({"x_train": IMAGES // 16}, "are both scaled alike?"),
        (
            {"x_train": np.tile(IMAGES, (1, 1, 1, 5))[:, :3], "x_test": np.tile(IMAGES, (1, 1, 1, 5))[:8, :3]},
            "channels first",
        ),
    ],
)
def test_suspicious_data_cost_one_warning(changes, message, tmp_path, capsys):
    """They could be meant: a class that only other data have, another camera, a flat image of many bands."""
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    vit.load_dataset(str(tmp_path / "own.npz"), validation_split=0, seed=0)
    stderr = capsys.readouterr().err
    assert stderr.startswith("vit.py: warning: ") and stderr.count("\n") == 1 and message in stderr


@pytest.mark.parametrize(
    ("images", "dtype"),
    [
        (IMAGES.astype(np.uint8), np.uint8),
        (np.asfortranarray(IMAGES.astype(np.uint8)), np.uint8),
        (IMAGES[..., 0].astype(np.uint8), np.uint8),  # gray, without channels
        (IMAGES > 127, np.uint8),
        *(
            (IMAGES.astype(dtype), np.float32)
            for dtype in ("i2", ">u2", "u4", "i8", "u8", ">i8", "f2", ">f4", "f8", "g")
        ),
        (IMAGES + 2**33 * (IMAGES > 127), np.float32),
        (IMAGES * [[1, 0]] + [[0, 255]], np.float32),  # a constant channel, as of opacity
        (IMAGES * 1e16, np.float32),
        (IMAGES * 1e-7 - 1e-6, np.float32),
    ],
)
def test_every_type_of_image_becomes_one_that_all_backends_take(images, dtype, tmp_path, capsys):
    """Bytes stay bytes, all other numbers become float32, in the machine's byte order and the order of C; values stay."""
    labels = {"y_train": (np.arange(20) % 2).astype(">u8"), "y_test": np.arange(8) % 2 == 1}
    np.savez(tmp_path / "own.npz", **arrays(x_train=images, x_test=images[:8], **labels))
    loaded = datasets.load_arrays(str(tmp_path / "own.npz"))
    assert (
        loaded["x_train"].dtype == dtype and loaded["x_train"].dtype.isnative and loaded["x_train"].flags.c_contiguous
    )
    np.testing.assert_array_equal(loaded["x_train"].reshape(images.shape), images.astype(dtype))
    assert loaded["y_train"].dtype == loaded["y_test"].dtype == np.int64 and loaded["y_train"].dtype.isnative
    data = vit.load_dataset(str(tmp_path / "own.npz"), validation_split=0.1, seed=0)
    exact = loaded["x_train"].astype(np.longdouble)
    np.testing.assert_allclose(data.moments[0], exact.mean((0, 1, 2)).astype(float), rtol=1e-9)
    np.testing.assert_allclose(data.moments[1], exact.var((0, 1, 2)).astype(float), rtol=1e-9)
    assert capsys.readouterr().err == ""


def test_cifar_needs_no_home(tmp_path, monkeypatch):
    """As in a container whose user has neither HOME nor an entry in passwd; Keras then takes /tmp."""
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr(datasets.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(datasets.keras.datasets.cifar10, "load_data", lambda: 1 / 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.ExperimentError, match="at /tmp/.keras/datasets/cifar-10-batches-py-target_archive"):
        datasets.load_arrays("cifar10")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_and_never_a_traceback(tmp_path):
    """Cut short or with a bit flipped at 200 places: refused, or read as arrays that passed every check."""
    np.savez_compressed(tmp_path / "good.npz", **arrays())
    good, rng, refused = (tmp_path / "good.npz").read_bytes(), np.random.default_rng(0), 0
    for number in range(200):
        place = int(rng.integers(len(good)))
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "bad.npz").write_bytes(good[:place] if number % 2 else damaged)
        try:
            datasets.load_arrays(str(tmp_path / "bad.npz"))
        except cli.ExperimentError:
            refused += 1
    assert refused >= 150


def test_a_refused_file_ends_the_run_with_status_2(run_vit, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    run = run_vit("--dataset", "bad.npz", "--no-use-wandb", "--checkpoint-path", "a.weights.h5")
    assert "bad.npz is not an .npz file" in run.error_line


def test_the_validation_part_is_stratified_seeded_and_disjoint():
    labels = np.sort(np.random.default_rng(0).integers(0, 10, 1003))  # sorted: the last rows would be one class
    train, val = datasets.stratified_split(labels, 0.1, seed=3)
    assert len(val) == 100 and np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1003))
    share = np.bincount(labels[val], minlength=10) - np.bincount(labels) * 0.1
    assert np.abs(share).max() <= 1
    assert np.array_equal(val, datasets.stratified_split(labels, 0.1, seed=3)[1])
    assert not np.array_equal(val, datasets.stratified_split(labels, 0.1, seed=4)[1])
    assert len(datasets.stratified_split(labels, 0.0, seed=3)[1]) == 0


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    np.savez(tmp_path / "own.npz", **arrays())
    with pytest.raises(cli.ExperimentError, match="leaves none of the 20 images"):
        vit.load_dataset(str(tmp_path / "own.npz"), validation_split=0.99, seed=0)


def test_synthetic_images_are_the_same_everywhere_and_shaped_as_cifar100():
    first, second = (vit.load_dataset("synthetic", validation_split=0.1, seed=0) for _ in range(2))
    assert first.image_shape == (32, 32, 3) and first.num_classes == 100 and first.x_train.dtype == np.uint8
    np.testing.assert_array_equal(first.x_train, second.x_train)
    assert hashlib.sha256(first.x_test).hexdigest().startswith("ab2c23ae052c9bb3")


def test_without_a_network_the_line_says_where_the_archive_goes(run_vit):
    run = run_vit(
        "--dataset", "cifar100", "--no-use-wandb", "--checkpoint-path", "a.weights.h5", "--keras-backend", "jax"
    )
    assert "cifar-100-python-target_archive" in run.error_line and "--dataset synthetic" in run.error_line


@pytest.fixture
def cifar_archive():
    """A CIFAR-100 archive in the published layout (60 + 20 random images) behind a local HTTP server that counts."""
    rng = np.random.default_rng(0)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for split, count in (("train", 60), ("test", 20)):
            content = {
                b"data": rng.integers(0, 256, (count, 3072), np.uint8),
                b"fine_labels": rng.integers(0, 60, count).tolist(),
            }
            member = tarfile.TarInfo(f"cifar-100-python/{split}")
            pickled = pickle.dumps(content)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))

    class Handler(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed.getvalue())))
            self.end_headers()
            self.wfile.write(packed.getvalue())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", Handler
    server.shutdown()


LOAD = """
import sys
sys.path.insert(0, ROOT)
from keras.src.datasets import cifar100
from edgebench import datasets

fetch = cifar100.get_file
cifar100.get_file = lambda fname, origin, file_hash, **rest: fetch(fname=fname, origin=URL, **rest)
arrays = datasets.load_arrays("cifar100")
print()
print(len(arrays["x_train"]), len(arrays["x_test"]), int(arrays["x_test"].sum()))
"""


def test_two_first_runs_at_once_fetch_once_and_the_next_start_is_quick(cifar_archive, tmp_path, monkeypatch):
    """Download, hash and unpacking are Keras' own; only address and hash are those of the small archive."""
    url, handler = cifar_archive
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    command = [sys.executable, "-c", LOAD.replace("ROOT", repr(str(ROOT))).replace("URL", repr(url))]

    def figures(arrays: dict) -> list[int]:
        return [len(arrays["x_train"]), len(arrays["x_test"]), int(arrays["x_test"].sum())]

    together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = ([*map(int, run.communicate(timeout=300)[0].splitlines()[-1].split())] for run in together)
    seconds = []  # the best of up to ten, as the machine that tests may be busy
    while len(seconds) < 10 and not (seconds and min(seconds) < 1):
        began = time.perf_counter()
        third = figures(datasets.load_arrays("cifar100"))  # from the cache: Keras would refuse the archive
        seconds.append(time.perf_counter() - began)
    assert handler.requests == 1
    assert first[:2] == [60, 20] and first == second == third
    assert min(seconds) < 1, seconds
    cache = tmp_path / "datasets" / "vit-cifar100.npz"
    cache.write_bytes(b"damaged")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [*map(int, done.stdout.splitlines()[-1].split())] == first and figures(datasets.read_npz(cache)) == first
