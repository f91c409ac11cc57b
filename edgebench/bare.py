"""The model's forward pass without Keras around it: what is left of the latency once somebody takes Keras' Python away."""

from collections.abc import Callable

import keras
import numpy as np

from edgebench import torch_graphs
from edgebench.device import BACKEND

if BACKEND == "jax":
    import jax
elif BACKEND == "tensorflow":
    import tensorflow as tf

NOTHING_COMPILED = "JAX compiles nothing with --jit off"


def bare_predict(model: keras.Model, images: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """A function from images to logits (B, classes), both NumPy arrays, for the weights as they are now.

    Its images must have the shape (B, H, W, C) of `images`.

    It runs in the mode of the model: compiled by XLA or by torch, or as TensorFlow's plain graph or torch's single
    operations. None where JAX runs the model op by op, as there is nothing without Keras then.
    """
    if BACKEND == "torch":
        return torch_graphs.bare_predict(model, images)
    if BACKEND == "tensorflow":
        graph = tf.function(lambda images: model(images, training=False), jit_compile=bool(model.jit_compile))
        return lambda images: graph(tf.constant(images)).numpy()
    if not model.jit_compile:
        return None
    # Copies, because Keras' own calls take the variables' memory over.
    trainable, others = (
        [jax.numpy.copy(variable.value) for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    program = jax.jit(lambda a, b, images: model.stateless_call(a, b, images, training=False)[0])
    return lambda images: np.asarray(program(trainable, others, images))
