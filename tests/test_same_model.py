"""Promises about what is learned: the same on every Keras, on every backend and in the hand-written peers.

`make test` runs this file on today's Keras, `make test-floor` on the oldest one. Both compare with the same figures, so a
default of Keras, JAX or torch that changes under vit.py fails here. docs/same-model.md lists what such defaults decide.
"""

import keras
import numpy as np
import pytest
from conftest import INSTALLED
from test_peers import PEERS

import vit
from edgebench import datasets, device
from peers import experiment

SMALL = {"image_size": 18, "patch_size": 6, "projection_dim": 16, "num_heads": 2, "transformer_layers": 2}
RECIPES = {
    "published": vit.ViTConfig(**SMALL, mlp_head_units=[32, 16], attention_dropout=0.0, weight_decay=0.1),
    "modern": vit.ViTConfig(**vit.RECIPES["modern"] | SMALL | {"stochastic_depth": 0.0}),
}
# Of JAX 0.10.2 with Keras 3.15.1. The others that were tried differ by 1e-5 at most.
LOSSES = {
    "published": [3.36621, 2.96944, 2.60854, 2.28817, 2.01302, 1.78408, 1.59642, 1.44292, 1.31680, 1.21219],
    "modern": [2.12951, 2.06310, 2.00075, 1.94263, 1.88880, 1.83917, 1.79349, 1.75138, 1.71238, 1.67601],
}
TOLERANCE = 5e-5
# Largest initial weights of the published model: with width 64 and 4 heads in attention, widths 128 and 64 in the MLP.
RANGES = {"query": 0.0371, "key": 0.0371, "value": 0.0371, "output": 0.1083, "first": 0.1768, "second": 0.1768}
RANGES |= {"patches": 0.1868, "positions": 0.05, "head": 0.0744, "logits": 0.1936}
RANGED = vit.ViTConfig(transformer_layers=1, head="flatten", mlp_head_units=[60], image_size=24, patch_size=6)


class FixedDraws(vit.FusedAugmentation):
    """Flips, turns and zooms every image in its own way, which is the same in every step."""

    def call(self, images, training=False):
        draws = np.random.RandomState(1).uniform(-1, 1, (4, 32, 1, 1)).astype("float32")
        return self.transform(images, keras.ops.convert_to_tensor(draws))


def ten_losses(recipe: str, change=None) -> list[float]:
    """Losses of ten training steps on 32 images, from fixed weights and without any randomness.

    `change` is called with the model before it is trained.
    """
    config, draws = RECIPES[recipe], np.random.RandomState(0)
    images = draws.randint(0, 256, (32, 8, 8, 3)).astype("uint8")
    labels = draws.randint(0, 7, 32)
    if config.has_soft_labels:
        labels = 0.9 * np.eye(7, dtype="float32")[labels] + 0.1 / 7
    moments = images.mean((0, 1, 2)), images.var((0, 1, 2))
    normalization = keras.layers.Normalization(mean=moments[0].tolist(), variance=moments[1].tolist())
    augmentation = keras.Sequential([normalization, FixedDraws(config.image_size, vit.ROTATION, vit.ZOOM)])
    model = vit.create_vit_classifier(config, images.shape[1:], 7, augmentation)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    vit.compile_model(model, config, 7, 1)
    for weight in model.trainable_weights:
        is_kernel = len(weight.shape) > 1
        limit = (3 / weight.shape[-1]) ** 0.5 if is_kernel else 0.1
        middle = 1.0 if weight.path.endswith("gamma") else 0.0
        weight.assign(draws.uniform(middle - limit, middle + limit, weight.shape).astype("float32"))
    if change:
        change(model)
    history = model.fit(images, labels, batch_size=32, epochs=10, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", INSTALLED)
def test_ten_steps_lose_the_same_on_every_keras_and_backend(backend, recipe, call_on):
    assert call_on(backend, ten_losses, recipe).value == pytest.approx(LOSSES[recipe], abs=TOLERANCE)


def in_layers(kind: type, **values):
    """A change of these attributes in all layers of a kind."""

    def change(model: keras.Model) -> None:
        for layer in model._flatten_layers():
            for name, value in values.items():
                if isinstance(layer, kind):
                    assert hasattr(layer, name)
                    setattr(layer, name, value)

    return change


def in_optimizer(**values):
    return lambda model: [setattr(model.optimizer, name, value) for name, value in values.items()]


def tanh_gelu(x):
    return keras.activations.gelu(x, approximate=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        in_layers(keras.layers.LayerNormalization, epsilon=1e-3),  # Keras' own default
        in_layers(keras.layers.Dense, activation=tanh_gelu),  # that of JAX
        in_layers(keras.layers.MultiHeadAttention, _inverse_sqrt_key_dim=0.26),  # 0.25
        in_layers(vit.FusedAugmentation, zoom=0.19),
        in_optimizer(epsilon=1e-8),  # that of torch and optax
        in_optimizer(beta_2=0.99),
        in_optimizer(weight_decay=0.05),
    ],
)
def test_a_value_that_is_changed_by_hand_is_found(change):
    """The test above would fail if one of these changed in Keras."""
    losses = np.array(ten_losses("published", change))
    assert abs(losses - LOSSES["published"]).max() > TOLERANCE


def initial_ranges(with_peer: bool) -> dict[str, list[float]]:
    """The largest weight of every kernel of vit.py and, if asked for, of this backend's peer."""
    device.seed_everything(0)
    images, labels = np.zeros((7, 32, 32, 3), np.uint8), np.arange(7) + 93
    moments = datasets.channel_moments(np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3))
    data = vit.Dataset(images, labels, images[:0], labels[:0], images, labels, 100, moments)
    augmentation = vit.create_data_augmentation("fused", RANGED.image_size, moments)
    model = vit.create_vit_classifier(RANGED, images.shape[1:], 100, augmentation)
    drawn = [weight for weight in model.trainable_weights if weight.path.endswith(("kernel", "embeddings"))]
    kernels = [np.array(keras.ops.convert_to_numpy(weight)) for weight in drawn]
    names = ["patches", "positions", "query", "key", "value", "output", "first", "second", "head", "logits"]
    largest = {name: [float(abs(kernel).max())] for name, kernel in zip(names, kernels, strict=True)}
    if with_peer:
        for name, kernel in peer_kernels(data).items():
            largest[name].append(float(abs(np.array(kernel)).max()))
    return largest


def peer_kernels(data: vit.Dataset) -> dict[str, np.ndarray]:
    """The initial kernels of the peer on this backend, by the names above."""
    if keras.backend.backend() == "jax":
        from peers.native_jax import NativeJax

        params = NativeJax(RANGED, data, *experiment.normalization(data.moments)).state["params"]
        (block,) = params["blocks"]
        of_attention = block["qkv"]["w"], block["out"]["w"]
        kernels = [params["patches"]["w"], params["positions"], *(layer["w"] for layer in block["mlp"])]
        kernels += [params["head"][0]["w"], params["logits"]["w"]]
    else:
        from peers.native_torch import NativeTorch

        native = NativeTorch(RANGED, data, *experiment.normalization(data.moments)).snapshot()
        named = {name: value.numpy().T for name, value in native.items() if value.dim() > 1}
        of_attention = named.pop("blocks.0.attention.qkv.weight"), named.pop("blocks.0.attention.out.weight")
        positions, *kernels = named.values()
        kernels.insert(1, positions)
    qkv, out = of_attention
    query, key, value = np.split(np.array(qkv), 3, axis=1)
    names = ["patches", "positions", "first", "second", "head", "logits"]
    return {"query": query, "key": key, "value": value, "output": out} | dict(zip(names, kernels, strict=True))


@pytest.mark.parametrize("backend", INSTALLED)
def test_every_kernel_starts_in_its_range_on_every_keras_and_in_the_peers(backend, call_on):
    """Keras 3.15 draws attention from ±0.137 when it is left to."""
    for name, values in call_on(backend, initial_ranges, backend in PEERS).value.items():
        assert len(values) == (2 if backend in PEERS else 1)
        for value in values:  # of hundreds of draws the largest is close to the limit
            assert 0.97 * RANGES[name] < value < 1.002 * RANGES[name], name
