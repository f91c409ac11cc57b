"""Keras' dropout and attention with the same results, faster; stochastic depth; random numbers for which torch does not wait."""

import math

import keras
from keras import layers, ops

from edgebench import torch_graphs
from edgebench.device import BACKEND, find_device

if BACKEND == "torch":
    import torch


def random_uniform(shape: tuple, like, seed: keras.random.SeedGenerator):
    """Numbers in [-1, 1) of `shape`, on the device of `like`. Keras' own wait for the device at every draw on torch."""
    if BACKEND == "torch":
        return 2 * torch.rand(shape, device=like.device) - 1
    return keras.random.uniform(shape, -1, 1, seed=seed)


def _random_words(like, seed: keras.random.SeedGenerator):
    """Two random 32-bit integers, drawn as in `random_uniform`."""
    if BACKEND == "torch":
        return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=like.device)
    return keras.random.randint((2,), -(2**31), 2**31 - 1, "int32", seed=seed)


def _hash_is_faster(tensor) -> bool:
    """Whether hashing is faster than the backend's random bits: on JAX, and in a graph that torch compiles for a CPU."""
    return BACKEND == "jax" or (BACKEND == "torch" and torch_graphs.is_tracing() and tensor.device.type == "cpu")


@keras.saving.register_keras_serializable(package="vit")
class Dropout(layers.Dropout):
    """Keras' dropout; where it is faster, a hash of an element's index decides whether it is kept (Wellons' lowbias32).

    The compiler computes the hash inside the loop that uses it, whereas random bits are generated, written and read: on a
    CPU they took a quarter of a step. Two random words make the hash another one at every call. The integers are signed,
    as torch has no unsigned ones: hence the masks after shifts to the right, and the negative constant.
    """

    def call(self, inputs, training=False):
        if not training or not self.rate or not _hash_is_faster(inputs):
            return super().call(inputs, training=training)
        first, second = _random_words(inputs, self.seed_generator)
        shape = ops.shape(inputs)
        bits = ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape) ^ first
        bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D + second
        bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
        bits = bits ^ ((bits >> 16) & 0xFFFF)
        return ops.where(bits >= int(self.rate * 2**32) - 2**31, inputs / (1 - self.rate), 0.0)


@keras.saving.register_keras_serializable(package="vit")
class StochasticDepth(layers.Layer):
    """Leaves a residual branch (B, ...) out for a share `rate` of the images in training (Huang et al., 2016).

    The others are scaled, so that the mean stays. (Keras' Dropout with a noise_shape does the same, but torch waits for it.)
    """

    def __init__(self, rate: float, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.seed_generator = rate, keras.random.SeedGenerator()

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        shape = (ops.shape(inputs)[0], *[1] * (len(inputs.shape) - 1))
        draws = random_uniform(shape, inputs, self.seed_generator)
        return ops.where(draws >= 2 * self.rate - 1, inputs / (1 - self.rate), 0.0)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(package="vit")
class Attention(layers.MultiHeadAttention):
    """Keras' attention, but with dropout torch keeps its fused kernel, which applies the dropout itself.

    Keras changes from its fused `dot_product_attention` to explicit einsums, and to their memory, once there is dropout.
    """

    def _build_attention(self, rank):
        super()._build_attention(rank)
        self._dropout_layer = Dropout(self._dropout, dtype=self.dtype_policy, seed=self.seed)

    def _compute_attention(self, query, key, value, attention_mask=None, training=None, scores=False, **options):
        dropout = self._dropout if training else 0.0
        # On a CPU torch has no fused kernel with dropout, and the einsums compile to faster code.
        if BACKEND == "torch" and attention_mask is None and not (dropout and _hash_is_faster(query)):
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(*heads_first, dropout_p=dropout, scale=self._inverse_sqrt_key_dim).transpose(1, 2), None
        # Asked for the scores, Keras takes the explicit form.
        scores = scores or _lacks_fused_attention(self.compute_dtype)
        return super()._compute_attention(query, key, value, attention_mask, training, scores, **options)


def _lacks_fused_attention(compute_dtype: str) -> bool:
    """Whether the backend has no fused attention for this number format on this device: JAX in float16 on a CPU."""
    return BACKEND == "jax" and compute_dtype == "float16" and not find_device().is_gpu


def attention_path(shape: tuple[int, int, int, int], dropout: float, compute_dtype: str, is_compiled: bool) -> str:
    """The implementation of attention that a training step runs, for queries of `shape` (B, heads, tokens, dim)."""
    if BACKEND != "torch":
        is_explicit = dropout > 0 or _lacks_fused_attention(compute_dtype)
        return "explicit einsums" if is_explicit else "dot_product_attention"
    is_gpu = find_device().is_gpu
    if dropout > 0 and is_compiled and not is_gpu:
        return "explicit einsums"
    options = {"device": "cuda" if is_gpu else "cpu", "dtype": getattr(torch, compute_dtype), "requires_grad": True}
    query = torch.empty(1, **options).expand(shape)
    kernel = torch._fused_sdp_choice(query, query, query, None, dropout, False)
    return "scaled_dot_product_attention, " + ("math", "flash", "memory-efficient", "cuDNN")[kernel]
