"""Promises about the fused augmentation: it does what Keras' own layers do, in each transformation and in all together."""

import keras
import numpy as np
import pytest
from keras import layers

import vit

SIZE, ROTATION, ZOOM = 72, vit.ROTATION, vit.ZOOM


@pytest.fixture(scope="module")
def images():
    """Smooth images, for which resampling once or three times is nearly the same; not symmetric, so that direction matters."""
    rng, axis = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 32)
    waves = [np.sin(axis[:, None] * a + b) * np.cos(axis[None] * c + d) for a, b, c, d in rng.uniform(0.5, 2, (18, 4))]
    return np.stack(waves).reshape(6, 3, 32, 32).transpose(0, 2, 3, 1).astype("float32")


def fused(images, flip=1.0, turn=0.0, zoom_y=0.0, zoom_x=0.0):
    draw = np.array([flip, turn, zoom_y, zoom_x], "float32")
    draws = np.broadcast_to(draw[:, None, None, None], (4, len(images), 1, 1))
    layer = vit.FusedAugmentation(SIZE, ROTATION, ZOOM)
    return np.asarray(layer.transform(*map(keras.ops.convert_to_tensor, (images, draws))))


def stock(images, *steps):
    images = layers.Resizing(SIZE, SIZE)(images)
    for step in steps:
        images = step(keras.ops.convert_to_tensor(images), training=True)
    return keras.ops.convert_to_numpy(images)


def mirror(images, training):
    return images[:, :, ::-1]


def rotation(share):
    return layers.RandomRotation((share * ROTATION, share * ROTATION))


def zoom(y, x):
    return layers.RandomZoom((y * ZOOM, y * ZOOM), (x * ZOOM, x * ZOOM))


@pytest.mark.parametrize(
    ("draws", "steps"),
    [
        ({}, []),
        ({"flip": -1}, [mirror]),
        ({"turn": 1}, [rotation(1)]),
        ({"turn": -1}, [rotation(-1)]),
        ({"zoom_y": 1}, [zoom(1, 0)]),
        ({"zoom_y": -1}, [zoom(-1, 0)]),
        ({"zoom_x": 1}, [zoom(0, 1)]),
        ({"zoom_x": -1}, [zoom(0, -1)]),
        ({"flip": -1, "turn": 1, "zoom_y": 1, "zoom_x": -0.5}, [mirror, rotation(1), zoom(1, -0.5)]),
    ],
)
def test_each_transformation_is_that_of_the_stock_layers(draws, steps, images):
    difference = np.abs(fused(images, **draws) - stock(images, *steps))
    # Values lie in [-1, 1]; a wrong direction gives 0.3 and 1.3.
    assert difference.mean() < 0.005 and difference.max() < 0.08
    if not steps or steps == [mirror]:
        assert difference.max() < 1e-5


class Recording(vit.FusedAugmentation):
    """Keeps what it draws for every batch."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.all_draws = []

    def transform(self, images, draws):
        self.all_draws.append(np.asarray(draws))
        return super().transform(images, draws)


def test_outside_training_it_only_resizes_and_in_training_its_draws_span_the_ranges(images):
    layer = Recording(SIZE, ROTATION, ZOOM, seed=1)
    np.testing.assert_allclose(layer(images), stock(images), atol=1e-6)
    for _ in range(100):
        augmented = np.asarray(layer(images, training=True))
    assert augmented.shape == (6, SIZE, SIZE, 3) and np.isfinite(augmented).all()
    draws = np.stack(layer.all_draws)  # every batch has draws of its own
    assert draws.shape == (100, 4, 6, 1, 1)
    assert draws.min() < -0.98 and draws.max() > 0.98 and abs(draws.mean()) < 0.05 and len(np.unique(draws[:, 0])) > 500
