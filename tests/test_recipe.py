"""Promises about recipes: the defaults they set, images that every backend sees alike, averages, schedules."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import INSTALLED, ROOT, TENSORFLOW_SLOW, TINY, environment_of_processes, only_results, weights_in

import vit
from deploy.keras_model import rebuild
from edgebench import cli, layers
from edgebench.cli import ExperimentError
from edgebench.compare import sets
from edgebench.datasets import ShuffledBatches
from edgebench.flags import check
from edgebench.measure import costs
from edgebench.mixing import MixedBatches, Mixing, boxes, one_hot

ALL = Mixing(label_smoothing=0.1, mixup=0.5, cutmix=0.5, random_erasing=0.25, rand_augment=5)


def test_a_recipe_sets_defaults_that_flags_override_and_the_published_one_is_that_of_the_class():
    """As people write it and as a W&B agent does; what is recorded is what runs."""

    def parse(*flags: str) -> vit.ViTConfig:
        return cli.parse(vit.ViTConfig, flags, presets={"recipe": vit.RECIPES})

    published, modern = parse(), parse("--recipe", "modern")
    assert published == vit.ViTConfig() == parse("--recipe=published")
    assert modern == vit.ViTConfig(recipe="modern", **vit.RECIPES["modern"])
    changed = parse("--recipe=modern", "--mixup=0", "--mlp_head_units=[64]", "--image_size=48").as_json()
    assert changed == modern.as_json() | {"mixup": 0.0, "mlp_head_units": [64], "image_size": 48}
    assert parse("--head", "mean", "--mlp-head-units").mlp_head_units == []
    assert costs.vit_size(modern.as_json(), 3, 100).parameters < 4_000_000
    assert set(vit.RECIPES["modern"]) == set(sets.SET_BY_A_RECIPE)


@pytest.mark.parametrize("backend", TENSORFLOW_SLOW)
def test_the_modern_recipe_trains_and_the_file_holds_the_weights_that_were_evaluated(
    backend, run_vit, digits, tmp_path
):
    """The average of the weights on real digits, evaluated here from the file; the training is measured as well."""
    flags = f"--no-use-wandb {TINY} --recipe modern --num-epochs 10 --keras-backend {backend} --ema 0.9"
    flags += " --learning-rate-schedule cosine --warmup-epochs 2 --measure-seconds 2 --learning-rate 0.003 --mlp-head-units --image-size 8 --patch-size 2 --checkpoint-path a.weights.h5"
    run = run_vit(*flags.split(), "--dataset", str(digits))
    assert run.status == 0, run
    results = only_results(tmp_path)
    config, test = vit.ViTConfig(**results["what"]["config"]), results["quality"]["test"]
    data = vit.load_dataset(config.dataset, config.validation_split, config.seed)
    model = rebuild(config, data, str(tmp_path / "a.weights.h5"))
    accuracy = np.mean(model.predict(data.x_test, verbose=0).argmax(-1) == data.y_test)
    assert accuracy == pytest.approx(test["test_accuracy"], abs=0.003)
    assert accuracy > 0.3  # by chance it is 0.1
    assert results["what"]["num_parameters"] == costs.vit_size(config.as_json(), 1, 10).parameters


def averages_and_weights(momentum: float) -> dict:
    """The best weights of a run of two epochs, and the weights after each of its steps."""
    rng = np.random.default_rng(0)
    np.savez("a.npz", x_train=rng.integers(0, 256, (32, 8, 8, 1), np.uint8), y_train=np.arange(32) % 2,
             x_test=rng.integers(0, 256, (4, 8, 8, 1), np.uint8), y_test=np.arange(4) % 2)  # fmt: skip
    config = vit.ViTConfig(dataset="a.npz", image_size=8, patch_size=4, projection_dim=8, num_heads=2, batch_size=16)
    config = replace(config, transformer_layers=1, mlp_head_units=[8], num_epochs=2, validation_split=0.0, ema=momentum)
    config = replace(config, use_wandb=False, measure_seconds=0.0, checkpoint_path=Path("a.weights.h5"))
    steps, ends = [], []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(
                [weight.tolist() for weight in map(keras.ops.convert_to_numpy, self.model.trainable_variables)]
            )

        def on_epoch_end(self, epoch, logs=None):  # the run's own callbacks have seen the average by now
            ends.append([weight.tolist() for weight in map(keras.ops.convert_to_numpy, self.model.trainable_variables)])

    vit.run_experiment(config, [Watch()])
    found = [value.tolist() for value in weights_in(Path("a.weights.h5")).values()]
    return {"steps": steps, "ends": ends, "file": found}


@pytest.mark.parametrize("backend", TENSORFLOW_SLOW)
def test_the_weights_that_are_kept_are_the_average_and_the_training_goes_on_with_its_own(backend, call_on):
    """The average is recomputed here from the weights after every step, by the formula of Keras' optimizers."""
    found = call_on(backend, averages_and_weights, 0.7).value
    steps = [[np.array(weight) for weight in step] for step in found["steps"]]
    averages = steps[0]
    for step in steps[1:]:
        averages = [0.7 * average + 0.3 * weight for average, weight in zip(averages, step, strict=True)]
    in_file = [*map(np.array, found["file"])]
    for average in averages:  # the names in the file depend on Keras, the values do not
        assert any(value.shape == average.shape and np.allclose(value, average, atol=1e-5) for value in in_file)
    for end, step in zip(found["ends"], (steps[1], steps[3]), strict=True):
        for after, before in zip(end, step, strict=True):
            np.testing.assert_allclose(after, before, atol=1e-5)


def rates_of(schedule: str, parts: int) -> list[float]:
    config = vit.ViTConfig(image_size=8, patch_size=4, projection_dim=8, transformer_layers=1, mlp_head_units=[8])
    config = replace(config, num_heads=2, learning_rate_schedule=schedule, warmup_epochs=1.0, num_epochs=4)
    config = replace(config, gradient_accumulation_steps=parts, batch_size=8)
    model = vit.create_vit_classifier(config, (8, 8, 1), 3, keras.Sequential([keras.layers.Identity()]))
    x, y = np.zeros((32, 8, 8, 1), np.float32), np.zeros(32, int)
    vit.compile_model(model, config, 3, 4 * parts)
    rates = [float(model.optimizer.learning_rate)]
    for _ in range(4):
        model.fit(x, y, batch_size=8 // parts, verbose=0)
        rates.append(float(model.optimizer.learning_rate))
    return rates


@pytest.mark.parametrize("parts", [1, 2])
def test_the_cosine_rises_and_ends_at_zero_with_accumulated_gradients_as_well(parts):
    expected = [0.0, *(0.0005 * (1 + math.cos(math.pi * share)) for share in (0, 1 / 3, 2 / 3, 1))]
    assert rates_of("cosine", parts) == pytest.approx(expected, abs=1e-8)


def batches_of(mixing: Mixing | None, seed: int, epoch: int) -> list:
    images, labels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), np.uint8), one_hot(np.arange(40) % 4, 4)
    batches = MixedBatches(images, labels, 16, mixing) if mixing else ShuffledBatches(images, labels, 16)
    batches.shuffle(seed, epoch)
    return [batches[index] for index in range(len(batches))]


def test_images_are_changed_alike_whenever_an_epoch_is_drawn_and_anew_in_the_next_one():
    first, again, next_epoch = (batches_of(ALL, 7, epoch) for epoch in (0, 0, 1))
    for (x, y), (same_x, same_y), (other_x, _) in zip(first, again, next_epoch, strict=True):
        assert x.dtype == np.uint8 and y.dtype == np.float32
        np.testing.assert_array_equal(x, same_x)
        np.testing.assert_array_equal(y, same_y)
        assert (x != other_x).mean() > 0.5
        np.testing.assert_allclose(y.sum(1), 1, atol=1e-6)
    for (x, y), (plain_x, plain_y) in zip(batches_of(Mixing(), 7, 0), batches_of(None, 7, 0), strict=True):
        assert np.array_equal(x, plain_x) and np.array_equal(y, plain_y)


def test_the_labels_have_the_shares_of_the_pixels():
    """Images of one colour a class: the mean colour of a mixed image is the mixture of its labels."""
    labels = one_hot(np.arange(2000) % 2, 2)
    images = np.broadcast_to(labels[:, :1, None, None] * 255, (2000, 16, 16, 1)).astype(np.uint8)
    for mixing in (Mixing(mixup=1.0), Mixing(cutmix=1.0), Mixing(mixup=0.5, cutmix=0.5), Mixing(mixup=0.2, cutmix=0.1)):
        x, y = mixing.apply(images, labels, np.random.default_rng(0))
        np.testing.assert_allclose(x.mean((1, 2, 3)) / 255, y[:, 0], atol=2e-3)
        is_mixed = ((y > 0) & (y < 1)).all(1)
        expected = (mixing.mixup + mixing.cutmix) / 2  # a partner is as often of the same class
        assert abs(is_mixed.mean() - expected) < 0.03
    assert images.max() == 255 and set(np.unique(images)) == {0, 255}  # the stored images are as they were


def test_a_box_covers_its_share_and_erasing_and_colours_change_the_images_that_they_should():
    half = boxes(np.full((2, 1), 0.5), np.array([0.5]), np.array([0.5]), (8, 8))
    assert half.sum() == 16 and half[0, 2:6, 2:6].all()
    images = np.full((400, 16, 16, 3), 128, np.uint8)
    erased, _ = Mixing(random_erasing=0.25).apply(images, None, np.random.default_rng(0))
    share = (erased != images).any((1, 2, 3)).mean()
    assert 0.18 < share < 0.32
    photos = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), np.uint8)
    weak, strong = (
        Mixing(rand_augment=magnitude).apply(photos, None, np.random.default_rng(0))[0].astype(int)
        for magnitude in (1, 9)
    )
    change = [abs(changed - photos).mean() for changed in (weak, strong)]
    assert 1 < change[0] < change[1]


def kept_and_mean(rate: float) -> list[float]:
    x = np.ones((4000, 2, 3), np.float32)
    layer = layers.StochasticDepth(rate)
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    assert (y == y[:, :1, :1]).all()  # an image is kept or dropped as a whole
    assert (keras.ops.convert_to_numpy(layer(x)) == 1).all()
    return [float((y[:, 0, 0] > 0).mean()), float(y.mean())]


@pytest.mark.parametrize("backend", INSTALLED)
def test_stochastic_depth_drops_its_share_of_the_images_and_keeps_the_mean(backend, call_on):
    kept, mean = call_on(backend, kept_and_mean, 0.3).value
    assert kept == pytest.approx(0.7, abs=0.04) and mean == pytest.approx(1, abs=0.06)


def test_images_that_are_not_bytes_and_a_warm_up_without_end_are_refused_in_one_line(run_vit, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32), np.arange(16) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    flags = f"{TINY} --no-use-wandb --dataset a.npz --recipe modern".split()
    assert "bytes (uint8), not float32, for --random-erasing and --rand-augment" in run_vit(*flags).error_line
    cosine = ["--learning-rate-schedule=cosine", "--warmup-epochs=5"]
    assert "--warmup-epochs 5.0 leaves none of --num-epochs 5" in run_vit(*flags, *cosine, "--num-epochs=5").error_line
    assert "5.0 needs --learning-rate-schedule cosine" in run_vit(*flags, cosine[1]).error_line
    with pytest.raises(ExperimentError, match="--rand-augment must lie in"):
        check(vit.ViTConfig(rand_augment=11.0))


@pytest.mark.slow
def test_a_run_of_the_modern_recipe_can_be_deployed(run_vit, digits, tmp_path):
    """Its loss on the test images is the recorded one, and onnxruntime gives Keras' answers."""
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    flags = f"--no-use-wandb {TINY} --recipe modern --num-epochs 2 --ema 0.9 --checkpoint-path a.weights.h5"
    assert run_vit(*flags.split(), "--dataset", str(digits)).status == 0
    (results,) = (tmp_path / "results").glob("*.json")
    command = [sys.executable, str(ROOT / "export.py"), str(results), "--format", "onnx", "--measure-seconds", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment_of_processes())
    assert done.returncode == 0 and "top-1 agrees on 100.00%" in done.stdout, done
