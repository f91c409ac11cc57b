"""The model and training of vit.py, written by hand in JAX and optax, to compare vit.py on JAX with.

    python peers/native_jax.py --dataset synthetic --num-epochs 2 --no-use-wandb    # the flags of vit.py
    python benchmark.py --backends jax native-jax

How it is made fast: the images lie on the device once, as bytes; a training step is one compiled program that gathers its
batch, augments it, and updates weights, optimizer and metrics in place (donated); nothing is read back before the epoch
has ended. Dropout draws its bits by a hash that XLA fuses with the multiplication.

The file reads in the order of the run: augmentation, model, step, the object that peers/experiment.py drives, main.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
sys.path[:0] = [str(Path(__file__).parents[1])]

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vit
from peers import experiment

ROTATION = 2 * np.pi * vit.ROTATION  # radians
COMPUTE = {"float32": jnp.float32, "mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}


# --------------------------------------------------------------------------------------------------------------
# Augmentation: vit.FusedAugmentation
# --------------------------------------------------------------------------------------------------------------


def resize(images, size: int):
    """Images (B, H, W, C) -> (B, size, size, C), as in evaluation."""
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, size, size, channels), "bilinear", antialias=False)


def augment(key, images, size: int):
    """Resize, flip, rotate and zoom by one bilinear gather: for every output pixel, compute where it comes from."""
    batch, height, width, channels = images.shape
    flip, turn, zoom_y, zoom_x = jax.random.uniform(key, (4, batch, 1, 1), minval=-1.0, maxval=1.0)
    center = (size - 1) / 2
    pixel = jnp.arange(size) - center
    y = reflect(pixel[None, :, None] * (1 + vit.ZOOM * zoom_y) + center, size) - center
    x = reflect(pixel[None, None, :] * (1 + vit.ZOOM * zoom_x) + center, size) - center
    cos, sin = jnp.cos(ROTATION * turn), jnp.sin(ROTATION * turn)
    x, y = reflect(cos * x - sin * y + center, size), reflect(sin * x + cos * y + center, size)
    x = jnp.where(flip < 0, size - 1 - x, x)
    y = jnp.clip((y + 0.5) * (height / size) - 0.5, 0, height - 1)
    x = jnp.clip((x + 0.5) * (width / size) - 0.5, 0, width - 1)
    top, left = y.astype(jnp.int32), x.astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, aside = (y - top)[..., None].astype(images.dtype), (x - left)[..., None].astype(images.dtype)
    pixels, first = images.reshape(-1, channels), jnp.arange(batch)[:, None, None] * height

    def at(row, column):
        return pixels.at[(first + row) * width + column].get(mode="promise_in_bounds")

    upper = at(top, left) * (1 - aside) + at(top, right) * aside
    lower = at(bottom, left) * (1 - aside) + at(bottom, right) * aside
    return upper * (1 - down) + lower * down


def reflect(coordinate, size: int):
    around = jnp.mod(coordinate + 0.5, 2 * size)
    return jnp.minimum(around, 2 * size - around) - 0.5


# --------------------------------------------------------------------------------------------------------------
# Model: parameters are a dictionary of arrays, layers are functions
# --------------------------------------------------------------------------------------------------------------


def init_params(config: vit.ViTConfig, channels: int, num_classes: int, seed: int) -> dict:
    """The initial values of vit.py: Glorot-uniform kernels but for attention's, biases of 0, embeddings in +-0.05."""
    rng = np.random.default_rng(seed)
    dim, heads = config.projection_dim, config.num_heads

    def uniform(limit: float, *shape: int):
        return jnp.asarray(rng.uniform(-limit, limit, shape), jnp.float32)

    def dense(width: int, units: int, limit: float | None = None) -> dict:
        return {"w": uniform(limit or (6 / (width + units)) ** 0.5, width, units), "b": jnp.zeros(units)}

    def norm() -> dict:
        return {"scale": jnp.ones(dim), "shift": jnp.zeros(dim)}

    def mlp(width: int, hidden_units: list[int]) -> list[dict]:
        return [dense(a, b) for a, b in zip([width, *hidden_units], hidden_units, strict=False)]

    def block() -> dict:
        return {
            "norm1": norm(),
            "qkv": dense(dim, 3 * heads * dim, vit.attention_limit((dim, heads, dim))),
            "out": dense(heads * dim, dim, vit.attention_limit((heads, dim, dim))),
            "norm2": norm(),
            "mlp": mlp(dim, config.transformer_units),
        }

    tokens = config.num_patches
    return {
        "patches": dense(config.patch_size**2 * channels, dim),
        "positions": uniform(0.05, tokens, dim),
        "blocks": [block() for _ in range(config.transformer_layers)],
        "norm": norm(),
        "head": mlp(tokens * dim, config.mlp_head_units),
        "logits": dense(config.mlp_head_units[-1], num_classes),
    }


def dense(params: dict, x):
    return x @ params["w"].astype(x.dtype) + params["b"].astype(x.dtype)


def layer_norm(params: dict, x):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    normed = (x32 - mean) * jax.lax.rsqrt(variance + 1e-6) * params["scale"] + params["shift"]
    return normed.astype(x.dtype)


def dropout(words, x, rate: float):
    """Drop a share of `x` if there are random words, as in training.

    A hash of an element's index and two random words (Wellons' lowbias32) decides. XLA computes it in the loop that uses
    it, whereas on a CPU JAX's own generator takes longer than the attention that it drops from.
    """
    if words is None or rate == 0:
        return x
    bits = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) ^ next(words)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + next(words)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits ^= bits >> 16
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1 - rate), 0)


def attention(params: dict, x, heads: int, rate: float, words):
    batch, tokens, dim = x.shape
    # Three products: one product that is then taken apart costs copies, on a CPU a sixth of a step.
    kernel, bias = (params["qkv"][name].astype(x.dtype) for name in "wb")
    kernel, bias = kernel.reshape(dim, 3, heads, dim), bias.reshape(3, heads, dim)
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, kernel[:, i]) + bias[i] for i in range(3))
    on_gpu = jax.default_backend() == "gpu"
    if (words is None or rate == 0) and (on_gpu or x.dtype != jnp.float16):  # jax.nn's has no float16 on a CPU
        # cuDNN's flash attention takes half precision alone, and heads of a multiple of 8.
        on_cudnn = on_gpu and x.dtype != jnp.float32 and dim % 8 == 0
        mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if on_cudnn else None)
    else:  # jax.nn's has no dropout
        # The query is scaled rather than the scores, as it is smaller. The softmax has the number format of the rest, as in Keras.
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * dim**-0.5, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", dropout(words, weights, rate), v)
    return dense(params["out"], mixed.reshape(batch, tokens, heads * dim))


def mlp(params: list[dict], x, rate: float, words):
    for layer in params:
        x = dropout(words, jax.nn.gelu(dense(layer, x), approximate=False), rate)
    return x


def vision_transformer(params: dict, images, config: vit.ViTConfig, words=None):
    """Images (B, size, size, C), normalized -> logits (B, classes) in float32. `words`: random words for dropout in training."""
    batch, size, p = len(images), config.image_size // config.patch_size, config.patch_size
    patches = images[:, : size * p, : size * p].reshape(batch, size, p, size, p, -1).transpose(0, 1, 3, 2, 4, 5)
    x = dense(params["patches"], patches.reshape(batch, size * size, -1)) + params["positions"].astype(images.dtype)
    for block in params["blocks"]:
        normed = layer_norm(block["norm1"], x)
        x = x + attention(block, normed, config.num_heads, config.attention_dropout, words)
        x = x + mlp(block["mlp"], layer_norm(block["norm2"], x), vit.BLOCK_DROPOUT, words)
    x = dropout(words, layer_norm(params["norm"], x).reshape(batch, -1), vit.HEAD_DROPOUT)
    return dense(params["logits"], mlp(params["head"], x, vit.HEAD_DROPOUT, words).astype(jnp.float32))


# --------------------------------------------------------------------------------------------------------------
# Step
# --------------------------------------------------------------------------------------------------------------


def statistics(logits, labels):
    """Sums over a batch: cross-entropy, hits, hits among the best five."""
    of_label = jnp.take_along_axis(logits, labels[:, None], 1)
    losses = jax.nn.logsumexp(logits, axis=-1) - of_label[:, 0]
    rank = (logits > of_label).sum(-1)
    return jnp.stack([losses.sum(), (rank < 1).sum(), (rank < 5).sum()]).astype(jnp.float32)


def scale_after(finite, scale, good_steps):
    """Dynamic loss scaling as in Keras: half the scale after an overflow, twice the scale after 2,000 good steps."""
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grown = jnp.where(good_steps >= 2000, scale * 2, scale)
    return jnp.where(finite, grown, scale / 2), jnp.where(good_steps >= 2000, 0, good_steps)


class NativeJax:
    """The interface to peers/experiment.py: steps, evaluation, prediction, and snapshots of the weights."""

    name = "native-jax"
    packages = ("jax", "optax")
    is_compiled = True

    @staticmethod
    def configure() -> None:
        """Apply the environment that the flags have set: JAX read its own when vit.py was imported, before the flags."""
        for option in ("jax_platforms", "jax_compilation_cache_dir"):
            jax.config.update(option, os.environ.get(option.upper()))

    def __init__(self, config: vit.ViTConfig, data: vit.Dataset, mean: np.ndarray, std: np.ndarray):
        self.config, self.mean, self.std = config, mean, std
        self.has_scale = config.dtype_policy == "mixed_float16"
        # optax adds epsilon after the bias correction, Keras before it, which moves early losses by less than 1e-4.
        self.optimizer = optax.adamw(config.learning_rate, eps=1e-7, weight_decay=config.weight_decay)
        self.train_images, self.train_labels = self.on_device(data.x_train, data.y_train)
        self.set_params(init_params(config, data.image_shape[2], data.num_classes, config.seed))
        self._train_step = jax.jit(self._train_step, static_argnames="size", donate_argnames="state")
        self._evaluate = jax.jit(self._evaluate, static_argnames="size", donate_argnames="totals")
        self._predict = jax.jit(self._logits)

    @property
    def attention(self) -> str:
        return "explicit einsums" if self.config.attention_dropout else "dot_product_attention"

    @property
    def num_dropouts(self) -> int:
        config = self.config
        return config.transformer_layers * (1 + len(config.transformer_units)) + 1 + len(config.mlp_head_units)

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in jax.tree.leaves(self.state["params"]))

    def set_params(self, params: dict) -> None:
        scale = {"scale": jnp.float32(2**15), "good_steps": jnp.int32(0)} if self.has_scale else {}
        self.state = {"params": params, "optimizer": self.optimizer.init(params), "key": None, "totals": None, **scale}
        self.begin_epoch(np.arange(len(self.train_images)), self.config.seed)

    def snapshot(self):
        """The weights, copied: the next step overwrites them where they are."""
        return jax.tree.map(jnp.copy, self.state["params"])

    def on_device(self, images: np.ndarray, labels: np.ndarray) -> tuple:
        return jnp.asarray(images), jnp.asarray(labels, jnp.int32)

    def normalized(self, images):
        images = (images.astype(jnp.float32) - self.mean) / self.std
        return images.astype(COMPUTE[self.config.dtype_policy])

    def loss(self, params: dict, images, labels, words=None):
        """Mean loss of a batch that is normalized and in size, and the sums over it for the metrics."""
        sums = statistics(vision_transformer(params, images, self.config, words), labels)
        return sums[0] / len(images), sums

    def _train_step(self, state: dict, images, labels, order, start, size: int) -> tuple[dict, jax.Array]:
        rows = jax.lax.dynamic_slice(order, (start,), (size,))
        key, step_key, augmentation_key = jax.random.split(state["key"], 3)
        words = iter(jax.random.bits(step_key, (2 * self.num_dropouts,)))
        batch = augment(augmentation_key, self.normalized(images[rows]), self.config.image_size)
        scale = state.get("scale", 1.0)

        def scaled_loss(params):
            loss, sums = self.loss(params, batch, labels[rows], words)
            return loss * scale, sums

        gradients, sums = jax.grad(scaled_loss, has_aux=True)(state["params"])
        new = {"key": key, "totals": state["totals"] + sums}
        if self.has_scale:
            gradients = jax.tree.map(lambda g: g / scale, gradients)
            finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]).all()
            new["scale"], new["good_steps"] = scale_after(finite, scale, state["good_steps"])
        updates, new["optimizer"] = self.optimizer.update(gradients, state["optimizer"], state["params"])
        new["params"] = optax.apply_updates(state["params"], updates)
        if self.has_scale:
            for name in ("params", "optimizer"):
                new[name] = jax.tree.map(partial(jnp.where, finite), new[name], state[name])
        return new, sums[0] / size

    def begin_epoch(self, order: np.ndarray, seed: int) -> None:
        """Take the training images in this order, and count the metrics from nothing."""
        self.order = jnp.asarray(order, jnp.int32)
        self.state |= {"key": jax.random.key(seed), "totals": jnp.zeros(3)}

    def train_step(self, start: int, size: int):
        """Launch a step on images start .. start + size of the order; its loss, on the device."""
        self.state, loss = self._train_step(
            self.state, self.train_images, self.train_labels, self.order, np.int32(start), size=size
        )
        return loss

    def totals(self) -> np.ndarray:
        """Sums of the epoch so far; waits for the device."""
        return np.asarray(self.state["totals"])

    def _logits(self, params: dict, images):
        return vision_transformer(params, resize(self.normalized(images), self.config.image_size), self.config)

    def _evaluate(self, totals, params: dict, images, labels, start, size: int):
        images, labels = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in (images, labels))
        return totals + statistics(self._logits(params, images), labels)

    def evaluate(self, params, images, labels) -> np.ndarray:
        """Sums over all images, which `on_device` has put there."""
        totals, batch = jnp.zeros(3), self.config.batch_size
        for start in range(0, len(images), batch):
            size = min(batch, len(images) - start)
            totals = self._evaluate(totals, params, images, labels, np.int32(start), size=size)
        return np.asarray(totals)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._predict(self.state["params"], images))

    def arrays(self, params) -> dict[str, np.ndarray]:
        """By name, for a file."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


if __name__ == "__main__":
    experiment.main(NativeJax, sys.argv[1:])
