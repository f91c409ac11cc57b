"""Promises about training: it learns real images on every backend, keeps the best weights, and repeats itself."""

import json
import re

import keras
import numpy as np
import pytest
from conftest import INSTALLED, TINY

import vit

SMALL = "--no-use-wandb --image-size 16 --patch-size 4 --projection-dim 32 --transformer-layers 2 --mlp-head-units 128 --measure-seconds 0"
MODEL = vit.ViTConfig(image_size=16, patch_size=4, projection_dim=32, transformer_layers=2, mlp_head_units=[128])


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_small_vit_learns_handwritten_digits(backend, run_vit, digits, tmp_path):
    """The heart: 90 % of the test digits right, and the file holds the very weights that were judged."""
    checkpoint = tmp_path / "new" / "digits.weights.h5"
    flags = f"{SMALL} --batch-size 32 --learning-rate 0.003 --num-epochs 20 --keras-backend {backend}"
    run = run_vit(*flags.split(), "--dataset", str(digits), "--checkpoint-path", str(checkpoint))
    assert run.status == 0, run
    accuracy = float(re.search(r"test accuracy ([\d.]+)", run.stdout)[1])
    assert accuracy >= 0.9, run.stdout
    assert (
        f"{backend} " in run.stdout.splitlines()[0]
        and len(re.findall(r"^Epoch \d+/20", run.stdout, re.MULTILINE)) == 20
    )
    assert [path.name for path in checkpoint.parent.iterdir()] == ["digits.weights.h5"]

    # Weights are portable: whatever backend wrote them, this process reads them.
    with np.load(digits) as data:
        augmentation = vit.create_data_augmentation(MODEL, data["x_train"])
        model = vit.create_vit_classifier(MODEL, (8, 8, 1), 10, augmentation)
        model.load_weights(checkpoint)
        found = model.predict(data["x_test"], verbose=0).argmax(-1)
        assert np.mean(found == data["y_test"]) == pytest.approx(accuracy, abs=0.003)


def test_the_same_seed_gives_the_same_numbers(run_vit, digits):
    """On every backend: test_faults.py, where a run that was killed ends as one that was not."""

    def numbers(seed: int) -> list[str]:
        flags = f"--no-use-wandb {TINY} --num-epochs 1 --seed {seed} --checkpoint-path a.weights.h5"
        run = run_vit(*flags.split(), "--dataset", str(digits))
        assert run.status == 0, run
        return re.findall(r"(?:loss|accuracy):? ([\d.]+)", run.stdout)

    first = numbers(1)
    assert len(first) >= 8 and numbers(1) == first and numbers(2) != first


def test_the_default_model_has_the_published_size_and_loads_again(tmp_path):
    """Every layer serialises: a saved model gives the same answers after loading."""
    config = vit.ViTConfig()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    model = vit.create_vit_classifier(config, (32, 32, 3), 100, vit.create_data_augmentation(config, images))
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == 21_759_012
    model.save(tmp_path / "vit.keras")
    again = keras.saving.load_model(tmp_path / "vit.keras")
    np.testing.assert_array_equal(model(images), again(images))


def test_augmentation_acts_in_training_only():
    config = vit.ViTConfig(image_size=24)
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    augmentation = vit.create_data_augmentation(config, images)
    calm = np.asarray(augmentation(images, training=False))
    assert (
        calm.shape == (64, 24, 24, 3) and abs(calm.mean()) < 0.05 and 0.5 < calm.std() < 1.1
    )  # normalized, then resized
    np.testing.assert_array_equal(calm, augmentation(images, training=False))
    lively = np.asarray(augmentation(images, training=True))
    changed = np.abs(lively - calm).max(axis=(1, 2, 3)) > 0.1
    assert changed.all() and not np.allclose(lively, augmentation(images, training=True))


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


def test_sizes_that_do_not_divide_are_said_and_no_validation_keeps_the_last_weights(run_vit, tmp_path):
    flags = f"--dataset synthetic --no-use-wandb {TINY} --patch-size 5 --num-epochs 1 --validation-split 0"
    run = run_vit(*flags.split(), "--checkpoint-path", "a.weights.h5")
    assert run.status == 0 and "the last 1 rows and columns are cut off" in run.stdout, run
    assert "best weights: epoch 1" in run.stdout and (tmp_path / "a.weights.h5").exists()


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
    folder.rmdir()  # nothing can be written from here on, for root neither
    end_epoch(2, 3.0, 0.6)
    assert best.epoch == 3 and best.weights[0] == 3.0 and "cannot be written" in capsys.readouterr().err


def test_the_first_bad_step_is_named_although_keras_reads_the_losses_in_several_threads():
    finite = vit.FiniteLoss(images=np.zeros((1, 16, 16, 1)))
    finite.on_epoch_begin(0)
    for batch in (2, 1, 3):
        finite.on_train_batch_end(batch, {"loss": float("nan")})
    with pytest.raises(vit.Diverged, match="from step 2 of epoch 1 on"):
        finite.on_epoch_end(0, {"val_loss": float("nan")})


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ("", "the loss is not a finite number from step 2 of epoch 1 on"),
        # The only step spoils the weights, and no loss is computed from them.
        ("--validation-split 0 --batch-size 2048", "the model's answers are not finite numbers after epoch 1"),
    ],
)
def test_a_run_that_diverges_still_leaves_its_results(more, where, run_vit, tmp_path):
    """One line that says where, a status of its own, no weights, and a results file that says why it is not complete."""
    flags = f"--dataset synthetic --no-use-wandb {TINY} --learning-rate 1e30 --num-epochs 2 {more}"
    run = run_vit(*flags.split(), "--checkpoint-path", "a.weights.h5")
    assert run.status == 4 and run.stderr.count("\n") == 1 and where in run.stderr, run
    assert not list(tmp_path.glob("*a.*"))
    (file,) = (tmp_path / "results").iterdir()
    results = json.loads(file.read_text())
    assert results["status"] == "failed" and where in results["failure"]
