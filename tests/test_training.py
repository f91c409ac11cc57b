"""Promises about training: it learns real images on every backend, keeps the best weights, and repeats itself."""

import re
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TENSORFLOW_SLOW, TINY, environment_of_processes

import vit
from edgebench import datasets, layers
from edgebench.callbacks import EpochSeeds
from edgebench.measure import costs

MODEL = vit.ViTConfig(
    image_size=16, patch_size=4, projection_dim=32, transformer_layers=1, mlp_head_units=[128]
)  # TINY


def create_model(config: vit.ViTConfig, images: np.ndarray, num_classes: int) -> keras.Model:
    augmentation = vit.create_data_augmentation(
        config.augmentation, config.image_size, datasets.channel_moments(images)
    )
    return vit.create_vit_classifier(config, images.shape[1:], num_classes, augmentation)


@pytest.mark.parametrize("backend", TENSORFLOW_SLOW)
def test_a_small_vit_learns_handwritten_digits(backend, run_vit, digits, tmp_path):
    """At least 90 % of the test digits are classified correctly, and the file holds the very weights that were evaluated."""
    checkpoint = tmp_path / "new" / "digits.weights.h5"
    flags = f"--no-use-wandb {TINY} --learning-rate 0.003 --num-epochs 12 --keras-backend {backend}"
    run = run_vit(*flags.split(), "--dataset", str(digits), "--checkpoint-path", str(checkpoint))
    assert run.status == 0, run
    accuracy = float(re.search(r"test accuracy ([\d.]+)", run.stdout)[1])
    assert accuracy >= 90, run.stdout
    assert f"{backend} " in run.stdout.splitlines()[0]
    assert len(re.findall(r"^Epoch \d+/12", run.stdout, re.MULTILINE)) == 12
    left = sorted(re.sub(r"\.[0-9a-f]{8}\.", ".ID.", path.name) for path in checkpoint.parent.iterdir())
    assert left == ["digits.ID.complete.npz", "digits.weights.h5"]

    # Weights are portable: this process reads them, whichever backend wrote them.
    with np.load(digits) as data:
        model = create_model(MODEL, data["x_train"], num_classes=10)
        model.load_weights(checkpoint)
        found = model.predict(data["x_test"], verbose=0).argmax(-1)
        assert np.mean(found == data["y_test"]) == pytest.approx(accuracy / 100, abs=0.003)


def test_the_default_model_has_the_published_size():
    config, images = vit.ViTConfig(), np.zeros((1, 32, 32, 3), np.uint8)
    model = create_model(config, images, num_classes=100)
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == 21_759_012
    assert costs.vit_size(config.as_json(), 3, 100).parameters == 21_759_012


def test_a_saved_model_gives_the_same_answers_after_loading(tmp_path):
    """Every layer can be serialized."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    model = create_model(MODEL, images, num_classes=100)
    model.save(tmp_path / "vit.keras")
    again = keras.saving.load_model(tmp_path / "vit.keras")
    np.testing.assert_array_equal(model(images), again(images))


def test_augmentation_acts_in_training_only():
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    augmentation = vit.create_data_augmentation("fused", 24, datasets.channel_moments(images))
    resized = np.asarray(augmentation(images, training=False))
    assert resized.shape == (64, 24, 24, 3)
    assert abs(resized.mean()) < 0.05 and 0.5 < resized.std() < 1.1  # normalized before
    np.testing.assert_array_equal(resized, augmentation(images, training=False))
    augmented = np.asarray(augmentation(images, training=True))
    changed = np.abs(augmented - resized).max(axis=(1, 2, 3)) > 0.1
    assert changed.all() and not np.allclose(augmented, augmentation(images, training=True))


@pytest.mark.parametrize(("size", "patch"), [(12, 4), (14, 4), (5, 5)])
def test_patches_are_the_image_cut_up_row_by_row(size, patch):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    patches = np.asarray(vit.Patches(patch)(images))
    across = size // patch
    expected = [
        images[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(2, -1)
        for row in range(across)
        for column in range(across)
    ]
    np.testing.assert_array_equal(patches, np.stack(expected, axis=1))


def test_sizes_that_do_not_divide_get_a_note_and_no_validation_keeps_the_last_weights(run_vit, tmp_path):
    flags = f"--dataset synthetic --no-use-wandb {TINY} --patch-size 5 --num-epochs 1 --validation-split 0"
    run = run_vit(*flags.split(), "--checkpoint-path", "a.weights.h5")
    assert run.status == 0 and "the last 1 rows and columns are cut off" in run.stdout, run
    assert "with the weights of epoch 1 of" in run.stdout and (tmp_path / "a.weights.h5").exists()


def test_the_recipe_of_the_readme_predicts_an_image_with_the_best_weights(run_vit, tmp_path):
    """ "From a run to a result", word for word, in a process of its own and on another backend than that of the run."""
    from PIL import Image

    run = run_vit(*f"--dataset synthetic --no-use-wandb {TINY} --num-epochs 3 --checkpoint-path a.weights.h5".split())
    assert run.status == 0, run
    data = vit.load_dataset("synthetic", 0.1, seed=0)
    Image.fromarray(data.x_test[0]).save(tmp_path / "my_image.png")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    backend = "torch" if "torch" in INSTALLED else "jax"
    env = {**environment_of_processes(), "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == data.y_test[0]


def test_the_best_epoch_is_kept_whole_even_where_it_cannot_be_written(tmp_path, capsys):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    folder = tmp_path / "folder"
    folder.mkdir()
    best = vit.BestWeights(folder / "a.weights.h5")
    best.set_model(model)

    def end_epoch(epoch: int, weight: float, accuracy: float):
        model.set_weights([np.full((1, 1), weight), np.zeros(1)])
        best.on_epoch_end(epoch, {"val_accuracy": accuracy})

    end_epoch(0, 1.0, 0.5)
    end_epoch(1, 2.0, 0.4)
    model.load_weights(folder / "a.weights.h5")
    assert model.get_weights()[0] == 1.0 and best.epoch == 1
    (folder / "a.weights.h5").unlink()
    folder.rmdir()  # from here on nothing can be written, not even by root
    end_epoch(2, 3.0, 0.6)
    assert best.epoch == 3 and best.weights[0] == 3.0 and "cannot be written" in capsys.readouterr().err


def weights_after_an_epoch(small_batches: int, optimizer: str) -> list[list[float]]:
    """The weights of a model before and after an epoch of two steps."""
    config = vit.ViTConfig(image_size=8, patch_size=4, projection_dim=8, num_heads=2, transformer_layers=1)
    config = replace(config, mlp_head_units=[16], attention_dropout=0.0, gradient_accumulation_steps=small_batches)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 8, 8, 1)).astype("float32"), rng.integers(0, 3, 24)
    keras.utils.set_random_seed(0)
    model = vit.create_vit_classifier(config, (8, 8, 1), 3, keras.Sequential([keras.layers.Identity()]))
    for layer in model.layers:
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0  # draws for a batch and for its parts would differ
    vit.compile_model(model, config, num_classes=3, steps_per_epoch=2)
    if optimizer == "SGD":  # at this rate a step is the gradient
        steps = small_batches if small_batches > 1 else None
        model.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps), model.loss)
    before = np.concatenate([weight.ravel() for weight in model.get_weights()])
    model.fit(x, y, batch_size=12 // small_batches, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 2
    return [before.tolist(), np.concatenate([weight.ravel() for weight in model.get_weights()]).tolist()]


@pytest.mark.parametrize("backend", INSTALLED)
def test_small_batches_take_the_very_steps_of_the_whole_batch(backend, call_on):
    """SGD, as AdamW would not show a gradient of another size. On torch also vit.py's own AdamW."""
    moved = ...
    for optimizer in ("SGD", "AdamW") if backend == "torch" else ("SGD",):
        before, whole = map(np.array, call_on(backend, weights_after_an_epoch, 1, optimizer).value)
        same_before, small = map(np.array, call_on(backend, weights_after_an_epoch, 4, optimizer).value)
        np.testing.assert_array_equal(before, same_before)
        # AdamW makes steps even of rounding errors, which are all the gradient that the biases of the keys have.
        assert np.abs(small - whole)[moved].max() < 1e-5 * np.abs(whole).max(), optimizer
        assert np.abs(whole - before).max() > 1e-3
        moved = np.abs(whole - before) > 1e-6


def orders_seen(seed: int, first_epoch: int) -> list[list[int]]:
    """The numbers of the images in the order in which two epochs of `fit` train on them."""
    seen: list[int] = []

    class Seeing(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def train_step(self, *arguments):
            data = arguments[-1]
            seen.extend(np.asarray(keras.ops.convert_to_numpy(data[0]))[:, 0].astype(int).tolist())
            return super().train_step(*arguments)

    numbers = np.arange(50, dtype="float32").reshape(-1, 1)
    model = Seeing()
    model.compile("sgd", "mse", run_eagerly=True)
    batches = datasets.ShuffledBatches(numbers, 0 * numbers, 16)
    epochs = {"initial_epoch": first_epoch, "epochs": first_epoch + 2}
    model.fit(batches, **epochs, shuffle=False, verbose=0, callbacks=[EpochSeeds(seed, batches)])
    return [seen[:50], seen[50:]]


@pytest.mark.parametrize("backend", INSTALLED)
def test_every_epoch_has_an_order_of_its_own_which_is_the_same_on_every_backend(backend, call_on):
    """A resumed run goes on with the order of its next epoch; another seed gives another order."""
    first, second = call_on(backend, orders_seen, 0, 0).value
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert [first, second] == [datasets.image_order(0, epoch, 50).tolist() for epoch in (0, 1)]
    assert call_on(backend, orders_seen, 0, 1).value[0] == second
    assert call_on(backend, orders_seen, 1, 0).value[0] != first
