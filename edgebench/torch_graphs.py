"""A compiled training step and a fused AdamW for Keras on torch.

Why this file exists: Keras runs torch eagerly, op by op from Python. `torch.compile` of Keras' own step recompiles step after
step (keras issue 21851), and it breaks the model into many graphs; Keras' AdamW passes over the weights a dozen times.
When Keras compiles torch well, delete this file, its imports in `vit.py`, and `is_tracing` in `edgebench/layers.py`.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from edgebench.cli import one_line, warn
from edgebench.device import BACKEND, is_out_of_memory

if BACKEND == "torch":
    import torch

_tracing = False


def is_tracing() -> bool:
    """Whether a graph is being traced, so that what runs now will be compiled."""
    return _tracing


def trace(function: Callable, *arguments):
    """The flat graph of a call of `function`, which must get all that it reads as tensors in its arguments.

    A NumPy array or a Python number becomes a constant of the graph. The random numbers that the call draws are given back,
    so that a training is the same whenever it is traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    global _tracing
    _tracing = True
    try:
        # pre_dispatch: traced before dropout and attention are taken apart, which inductor compiles better. On a CPU torch
        # 2.13 gives NaN for the parts of dropout, empty_like and bernoulli_.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return make_fx(lambda *values: function(*values), pre_dispatch=True)(*arguments)
    finally:
        _tracing = False


@keras.saving.register_keras_serializable(package="vit")
class GraphModel(keras.Model):
    """A functional model, made by `with_graphs`, that runs its steps as compiled graphs, one for each function and batch size.

    Batches of other sizes, as the partial one at the end of an epoch, are not worth a compilation and run eagerly. So does
    everything once torch has failed to compile; `failure` then says why.
    """

    _batch_sizes: set[int] = set()
    _augment: Callable | None = None  # in training this runs eagerly, and the graph begins behind it
    _rest: Callable | None = None  # what of the model follows it
    failure: str | None = None

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        trainable = [variable.value for variable in self.trainable_variables]
        others = [variable.value for variable in self._other_variables]
        for value in trainable:
            value.grad = None
        result = self._run(self._stateless_loss, x, y, trainable, others, first=self._augment, then=self._backward)
        if result is None:
            return super().train_step(data)
        for variable, value in zip(self._other_variables, result[1], strict=True):
            variable.assign(value)
        with torch.no_grad():
            self.optimizer.apply([value.grad for value in trainable], self.trainable_variables)
        return self.get_metrics_result()

    def test_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        logits = self.predict_step(data)
        self._loss_tracker.update_state(self.compute_loss(x, y, logits, training=False), sample_weight=len(x))
        return self.compute_metrics(x, y, logits)

    def predict_step(self, data):
        x = ops.convert_to_tensor(keras.utils.unpack_x_y_sample_weight(data)[0])
        logits = self._run(self._stateless_logits, x, [variable.value for variable in self._weights])
        return self(x, training=False) if logits is None else logits

    def _run(
        self, function: Callable, x, *arguments, first: Callable | None = None, then: Callable = lambda result: None
    ):
        """Run `function(first(x), *arguments)`, the function as a graph, then `then` on its result.

        None where the batch has to run eagerly.
        """
        if self.failure or len(x) not in self._batch_sizes:
            return None
        if first:
            x = first(x, training=True)
        key = function.__name__, x.dtype, tuple(x.shape)
        try:
            if key not in self._compiled:
                self._compiled[key] = torch.compile(trace(function, x, *arguments))
            result = self._compiled[key](x, *arguments)
            then(result)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.failure = f"{type(error).__name__}: {one_line(error)[:200]}"
            warn(f"torch could not compile the model and runs eagerly ({self.failure})")
            return None
        return result

    @property
    def _weights(self) -> list[keras.Variable]:
        return [*self.trainable_variables, *self.non_trainable_variables]

    @property
    def _other_variables(self) -> list[keras.Variable]:
        """All that a training step changes besides the weights and the optimizer."""
        return [*self.non_trainable_variables, *self.metrics_variables]

    def _stateless_loss(self, x, y, trainable: Sequence, others: Sequence):
        """Loss of a batch, and the new values of `_other_variables`, given the values of all variables."""
        mapping = zip([*self.trainable_variables, *self._other_variables], [*trainable, *others], strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            logits = (self._rest or self)(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=logits, training=True)
            self._loss_tracker.update_state(loss, sample_weight=len(x))
            self.compute_metrics(x, y, logits)
        return loss, [ops.stop_gradient(scope.get_current_value(variable)) for variable in self._other_variables]

    def _backward(self, result) -> None:
        self.optimizer.scale_loss(result[0]).backward()

    def _stateless_logits(self, x, values: Sequence):
        with keras.StatelessScope(state_mapping=zip(self._weights, values, strict=True)):
            return self(x, training=False)


def bare_predict(model: keras.Model, images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The model's answers to batches shaped as `images`, without the Python of its layers.

    A flat graph of its operations computes them, and where the model is compiled its own step.
    """
    values = [variable.value for variable in model.weights]

    def logits(x, values: Sequence):
        with keras.StatelessScope(state_mapping=zip(model.weights, values, strict=True)):
            return model(x, training=False)

    with torch.no_grad():
        graph = None if is_compiled(model) else trace(logits, ops.convert_to_tensor(images), values)

    def predict(images: np.ndarray) -> np.ndarray:
        x = ops.convert_to_tensor(images)
        with torch.no_grad():
            return ops.convert_to_numpy(graph(x, values) if graph else model.predict_step((x,)))

    return predict


def is_compiled(model: keras.Model) -> bool:
    """Whether the model's steps are compiled, on any backend."""
    return model.failure is None if isinstance(model, GraphModel) else bool(model.jit_compile)


def with_graphs(model: keras.Model, batch_sizes: set[int], augmentation: keras.Layer | None = None) -> GraphModel:
    """The same functional model, with the same layers, that runs batches of these sizes as graphs.

    `augmentation` is a layer of the model that cannot be traced in training, as Keras' random layers read their seeds as
    Python numbers: it runs eagerly, and the graph of a training step begins behind it.
    """
    graph_model = GraphModel(model.input, model.output, name=model.name)
    graph_model._batch_sizes, graph_model._compiled = batch_sizes, {}
    if augmentation:
        # Their calls, as Keras would count the layers themselves, and with them their weights, a second time.
        graph_model._augment = augmentation.__call__
        graph_model._rest = keras.Model(model.get_layer(augmentation.name).output, model.output).__call__
    return graph_model


@keras.saving.register_keras_serializable(package="vit")
class FusedAdamW(keras.optimizers.AdamW):
    """Keras' AdamW by torch's fused kernel: one pass over all weights, where Keras' own makes a dozen (5 to 10 times the time).

    The kernel adds epsilon after the bias correction, Keras before it, which over the first hundred steps makes the updates of
    weights with small gradients smaller. So that torch learns what the other backends learn, the kernel gets a step number at
    which its own correction is 1, and the correction is part of the learning rate, as in Keras. The weight decay, which has to
    be without it, is a pass of its own. `amsgrad` and `exclude_from_weight_decay` are not supported.
    """

    def _apply_weight_decay(self, variables):
        if self.weight_decay:
            rate = ops.convert_to_tensor(self.learning_rate)
            torch._foreach_mul_([variable.value for variable in variables], 1 - rate * self.weight_decay)

    def _backend_update_step(self, grads, variables, learning_rate):
        indices = [self._get_variable_index(variable) for variable in variables]
        momentums = [self._momentums[i].value for i in indices]
        velocities = [self._velocities[i].value for i in indices]
        weights = [variable.value for variable in variables]
        step = ops.cast(self.iterations, "float32") + 1
        rate = ops.convert_to_tensor(learning_rate) * ops.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        corrected = [torch.full_like(step, 1e9)] * len(indices)
        options = {"lr": rate, "beta1": self.beta_1, "beta2": self.beta_2, "weight_decay": 0.0, "eps": self.epsilon}
        torch._fused_adamw_(
            weights, list(grads), momentums, velocities, [], corrected, amsgrad=False, maximize=False, **options
        )

    def _update_model_variables_moving_average(self, trainable_variables):
        """A few passes over all weights: Keras' own adds 10.9 ms to a step of 2.9 ms, this 5.4 ms (3 million, two CPU cores)."""
        if not self.use_ema:
            return
        momentum = ops.where(ops.equal(self.iterations, 0), 0.0, self.ema_momentum)
        averages = [average.value for average in self._model_variables_moving_average]
        with torch.no_grad():
            torch._foreach_mul_(averages, momentum)
            torch._foreach_add_(
                averages, torch._foreach_mul([weight.value for weight in trainable_variables], 1 - momentum)
            )
