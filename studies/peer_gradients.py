"""Compare vit.py's Keras model with a hand-written peer on the same weights and the same batch.

    python studies/peer_gradients.py jax

prints as JSON, each of the peer first: parameters; sums over the batch of loss, hits and top-5 hits before and after a step
of AdamW; and the largest difference of any gradient (relative to its tensor's largest) and of any logit. A process of its
own, as Keras takes one backend only. Dropout and augmentation are off: their random numbers differ.
"""

import json
import math
import os
import sys
from pathlib import Path

backend = os.environ["KERAS_BACKEND"] = sys.argv[1]
sys.path[:0] = [str(Path(__file__).parents[1])]

import keras
import numpy as np

import vit
from edgebench import datasets
from peers import experiment

CONFIG = vit.ViTConfig(
    **{"image_size": 18, "patch_size": 6, "projection_dim": 16, "num_heads": 2, "transformer_layers": 2},
    **{"mlp_head_units": [32, 16], "attention_dropout": 0.0, "jit": "off", "keras_backend": backend, "batch_size": 32},
)
rng = np.random.default_rng(0)
X, Y = rng.integers(0, 256, (32, 8, 8, 3)).astype("uint8"), rng.integers(0, 7, 32)
DATA = vit.Dataset(X, Y, X[:0], Y[:0], X, Y, 7, datasets.channel_moments(X))


def params_of(weights: list[np.ndarray]) -> dict:
    """Keras' weights, or their gradients, in its order -> the same by name, as native_jax.py keeps them."""
    weights = iter(weights)
    dim, width = CONFIG.projection_dim, CONFIG.num_heads * CONFIG.projection_dim

    def dense() -> dict:
        return {"w": next(weights), "b": next(weights)}

    def norm() -> dict:
        return {"scale": next(weights), "shift": next(weights)}

    def block() -> dict:
        first, three, out = norm(), [dense() for _ in "qkv"], dense()
        kernel = np.concatenate([part["w"].reshape(dim, width) for part in three], 1)
        qkv = {"w": kernel, "b": np.concatenate([part["b"].reshape(width) for part in three])}
        out = {"w": out["w"].reshape(width, dim), "b": out["b"]}
        return {"norm1": first, "qkv": qkv, "out": out, "norm2": norm(), "mlp": [dense(), dense()]}

    params = {"patches": dense(), "positions": next(weights), "blocks": [block(), block()], "norm": norm()}
    params |= {"head": [dense(), dense()], "logits": dense()}
    assert next(weights, None) is None
    return params


def torch_state(params, name: str = "") -> dict:
    """The same under the names of native_torch.py."""
    if isinstance(params, np.ndarray):
        is_kernel = name.endswith(".w")
        for ours, theirs in ((".w", ".weight"), (".b", ".bias"), (".scale", ".weight"), (".shift", ".bias")):
            name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
        for ours, theirs in ((".qkv", ".attention.qkv"), (".out", ".attention.out"), ("head.", "head.1.")):
            name = name.replace(ours, theirs)
        return {name: (params.T if is_kernel else params).copy()}
    if isinstance(params, dict):
        items = [(f"{name}.{key}".lstrip("."), value) for key, value in params.items()]
    else:  # between the dense layers of an MLP stand an activation and a dropout
        stride = 1 if name == "blocks" else 3
        items = [(f"{name}.{stride * i}", value) for i, value in enumerate(params)]
    return {key: array for inner, value in items for key, array in torch_state(value, inner).items()}


def numpy(tensor) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(tensor))


def keras_model() -> keras.Model:
    model = vit.create_vit_classifier(
        CONFIG, X.shape[1:], 7, vit.create_data_augmentation(CONFIG.augmentation, CONFIG.image_size, DATA.moments)
    )
    for variable in model.trainable_weights:
        if len(variable.shape) == 1:  # biases of 0 and scales of 1 would not tell
            variable.assign(variable + rng.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def keras_sums(model) -> list[float]:
    logits, top_5 = numpy(model(X, training=False)), keras.metrics.SparseTopKCategoricalAccuracy(5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(Y, logits)
    return [len(X) * float(loss), float((logits.argmax(1) == Y).sum()), len(X) * float(top_5(Y, logits))]


def keras_gradients(model) -> list:
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    values = [variable.value for variable in model.trainable_variables]
    if backend == "jax":
        import jax

        others = [variable.value for variable in model.non_trainable_variables]
        return jax.jit(jax.grad(lambda values: loss_of(Y, model.stateless_call(values, others, X)[0])))(values)
    loss_of(Y, model(X, training=False)).backward()
    return [value.grad for value in values]


def jax_peer(params: dict):
    """The peer, its sums before and after a step, and the gradients of that step, in a fixed order."""
    import jax
    import optax

    from peers.native_jax import NativeJax, resize

    native = NativeJax(CONFIG, DATA, *experiment.normalization(DATA.moments))
    native.set_params(jax.tree.map(jax.numpy.asarray, params))
    params, state, test = native.snapshot(), native.state["optimizer"], native.on_device(X, Y)
    images, labels = resize(native.normalized(test[0]), CONFIG.image_size), test[1]
    gradients = jax.jit(jax.grad(lambda params: native.loss(params, images, labels)[0]))(params)
    updates, _ = jax.jit(native.optimizer.update)(gradients, state, params)
    sums = [native.evaluate(params, *test), native.evaluate(optax.apply_updates(params, updates), *test)]
    return native, sums, jax.tree.leaves(gradients)


def torch_peer(params: dict):
    import torch

    from peers.native_torch import NativeTorch, statistics

    native = NativeTorch(CONFIG, DATA, *experiment.normalization(DATA.moments))
    native.set_params({name: torch.from_numpy(array) for name, array in torch_state(params).items()})
    images, labels = test = native.on_device(X, Y)
    sums = [native.evaluate(native.snapshot(), *test)]
    (statistics(native.logits(images), labels)[0] / len(images)).backward()
    native.optimizer.step()
    sums.append(native.evaluate(native.snapshot(), *test))
    native.set_params({name: torch.from_numpy(array) for name, array in torch_state(params).items()})
    gradients = {name: parameter.grad for name, parameter in native.model.named_parameters()}
    return native, sums, [gradients[name] for name in torch_state(params)]


def leaves(params: dict) -> list[np.ndarray]:
    if backend == "torch":
        return list(torch_state(params).values())
    import jax

    return jax.tree.leaves(params)


def main() -> None:
    model = keras_model()
    params = params_of([numpy(variable) for variable in model.trainable_weights])
    native, sums, gradients = (jax_peer if backend == "jax" else torch_peer)(params)
    of_keras = keras_gradients(model)
    pairs = zip(gradients, leaves(params_of([numpy(gradient) for gradient in of_keras])), strict=True)
    before, logits = keras_sums(model), numpy(model(X, training=False))
    optimizer = keras.optimizers.AdamW(CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.stop_gradient(gradient) for gradient in of_keras])
    figures = {
        "parameters": [native.num_parameters, sum(math.prod(weight.shape) for weight in model.trainable_weights)],
        "before": [list(map(float, sums[0])), before],
        "after": [list(map(float, sums[1])), keras_sums(model)],
        "gradients": max(float(np.abs(numpy(a) - b).max() / (np.abs(b).max() + 1e-4)) for a, b in pairs),
        "logits": float(np.abs(native.predict(X) - logits).max()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
