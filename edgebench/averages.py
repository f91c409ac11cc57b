"""The moving average of the weights that an optimizer of Keras keeps with `use_ema`, in place of the weights.

keras.callbacks.SwapEMAWeights exchanges both through NumPy arrays. JAX takes such an array's memory over and gives it to the
next step, which has crashed (JAX 0.4.35 on a CPU); on TensorFlow it adds and subtracts, and the weights change by rounding.
"""

import contextlib
from collections.abc import Iterator

import keras

from edgebench.device import assign_copies, copy_values


def averages(model: keras.Model) -> list[keras.Variable]:
    """The averages of the model's trainable variables, in their order; none where no optimizer keeps any."""
    if not model.compiled:
        return []
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # LossScaleOptimizer has one inside
    return [variable for variable in optimizer.variables if variable.name.endswith("_average")]


@contextlib.contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """In this block the model has the average of its weights, if there is one."""
    if not (kept := averages(model)):
        yield
        return
    own = copy_values(model.trainable_variables)
    assign_copies(model.trainable_variables, copy_values(kept))
    try:
        yield
    finally:
        assign_copies(model.trainable_variables, own)


class AverageInValidation(keras.callbacks.Callback):
    """Lets the validation, and nothing else, see the average of the weights."""

    def on_test_begin(self, logs=None):
        self._block = averaged_weights(self.model)
        self._block.__enter__()

    def on_test_end(self, logs=None):
        self._block.__exit__(None, None, None)
