"""The model and training of vit.py, written by hand in PyTorch, to compare vit.py on torch with.

    python peers/native_torch.py --dataset synthetic --num-epochs 2 --no-use-wandb    # the flags of vit.py
    python benchmark.py --backends torch native-torch

How it is made fast: the images lie on the device once, as bytes; augmentation, model, loss and metrics are one compiled
graph, on a GPU replayed as a CUDA graph; attention is torch's fused kernel, which on a GPU takes the dropout itself;
AdamW is one fused kernel; nothing is read back before the epoch has ended. --jit off runs the same eagerly.

The file reads in the order of the run: augmentation, model, the object that peers/experiment.py drives, main.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"
sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vit
from edgebench.layers import attention_path
from peers import experiment

ROTATION = 2 * math.pi * vit.ROTATION  # radians
COMPUTE = {"float32": torch.float32, "mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


# --------------------------------------------------------------------------------------------------------------
# Augmentation: vit.FusedAugmentation
# --------------------------------------------------------------------------------------------------------------


def resize(images, size: int):
    """Images (B, H, W, C) -> (B, size, size, C), as in evaluation."""
    return F.interpolate(images.permute(0, 3, 1, 2), (size, size), mode="bilinear").permute(0, 2, 3, 1)


def augment(images, size: int):
    """Resize, flip, rotate and zoom by one bilinear gather: for every output pixel, compute where it comes from."""
    batch, height, width, channels = images.shape
    flip, turn, zoom_y, zoom_x = 2 * torch.rand(4, batch, 1, 1, device=images.device) - 1
    center = (size - 1) / 2
    pixel = torch.arange(size, device=images.device) - center
    y = reflect(pixel[None, :, None] * (1 + vit.ZOOM * zoom_y) + center, size) - center
    x = reflect(pixel[None, None, :] * (1 + vit.ZOOM * zoom_x) + center, size) - center
    cos, sin = torch.cos(ROTATION * turn), torch.sin(ROTATION * turn)
    x, y = reflect(cos * x - sin * y + center, size), reflect(sin * x + cos * y + center, size)
    x = torch.where(flip < 0, size - 1 - x, x)
    y = ((y + 0.5) * (height / size) - 0.5).clamp(0, height - 1)
    x = ((x + 0.5) * (width / size) - 0.5).clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, aside = (y - top)[..., None], (x - left)[..., None]
    pixels, first = images.reshape(-1, channels), torch.arange(batch, device=images.device)[:, None, None] * height

    def at(row, column):
        return pixels[(first + row) * width + column]

    upper = at(top, left) * (1 - aside) + at(top, right) * aside
    lower = at(bottom, left) * (1 - aside) + at(bottom, right) * aside
    return upper * (1 - down) + lower * down


def reflect(coordinate, size: int):
    around = torch.remainder(coordinate + 0.5, 2 * size)
    return torch.minimum(around, 2 * size - around) - 0.5


# --------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------


def dense(width: int, units: int, limit: float | None = None) -> nn.Linear:
    """With Keras' initial values: a Glorot-uniform kernel, a bias of 0."""
    layer = nn.Linear(width, units)
    limit = limit or (6 / (width + units)) ** 0.5
    nn.init.uniform_(layer.weight, -limit, limit)
    nn.init.zeros_(layer.bias)
    return layer


class Dropout(nn.Dropout):
    """torch's dropout, but hashed where it is compiled for a CPU, on which inductor's generator is slow.

    There a hash of an element's index and two random words (Wellons' lowbias32) decides, in the loop that uses it. The
    integers are signed: hence the masks after shifts to the right, and the negative constant.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.is_cuda or not torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32)
        bits = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) ^ words[0]
        bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D + words[1]
        bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
        bits = bits ^ ((bits >> 16) & 0xFFFF)
        return torch.where(bits >= int(self.p * 2**32) - 2**31, x / (1 - self.p), 0.0)


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden_units: list[int], rate: float):
        pairs = zip([width, *hidden_units], hidden_units, strict=False)
        super().__init__(*(layer for a, b in pairs for layer in (dense(a, b), nn.GELU(), Dropout(rate))))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, rate: float):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(rate)
        self.qkv = dense(dim, 3 * heads * dim, vit.attention_limit((dim, heads, dim)))
        self.out = dense(heads * dim, dim, vit.attention_limit((heads, dim, dim)))

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        # torch has no kernel of attention with dropout for a CPU.
        if rate and not x.is_cuda and torch.compiler.is_compiling():
            mixed = self.dropout(F.softmax(q @ k.transpose(2, 3) / dim**0.5, -1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * dim))


class Block(nn.Module):
    def __init__(self, config: vit.ViTConfig):
        super().__init__()
        dim = config.projection_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, config.num_heads, config.attention_dropout)
        self.mlp = MLP(dim, config.transformer_units, vit.BLOCK_DROPOUT)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images (B, size, size, C), normalized -> logits (B, classes) in float32."""

    def __init__(self, config: vit.ViTConfig, channels: int, num_classes: int):
        super().__init__()
        dim, tokens, self.p = config.projection_dim, config.num_patches, config.patch_size
        self.patches = dense(self.p**2 * channels, dim)
        self.positions = nn.Parameter(torch.empty(tokens, dim).uniform_(-0.05, 0.05))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.transformer_layers)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(Dropout(vit.HEAD_DROPOUT), MLP(tokens * dim, config.mlp_head_units, vit.HEAD_DROPOUT))
        self.logits = dense(config.mlp_head_units[-1], num_classes)

    def forward(self, images):
        (batch, height, width, _), p = images.shape, self.p
        rows, columns = height // p, width // p
        patches = images[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, -1).transpose(2, 3)
        x = self.patches(patches.reshape(batch, rows * columns, -1)) + self.positions
        x = self.head(self.norm(self.blocks(x)).flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(x.float())


# --------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------


def statistics(logits, labels):
    """Sums over a batch: cross-entropy, hits, hits among the best five."""
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (rank < 1).sum(), (rank < 5).sum()])


class NativeTorch:
    """The interface to peers/experiment.py: steps, evaluation, prediction, and snapshots of the weights."""

    name = "native-torch"
    packages = ("torch",)

    @staticmethod
    def configure() -> None:
        """Do nothing: torch reads its environment when it first needs it."""

    def __init__(self, config: vit.ViTConfig, data: vit.Dataset, mean: np.ndarray, std: np.ndarray):
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (mean, std))
        self.train_images, self.train_labels = self.on_device(data.x_train, data.y_train)
        self.model = VisionTransformer(config, data.image_shape[2], data.num_classes).to(self.device)
        self.is_compiled = config.jit != "off"
        self.start_optimizer()
        self.begin_epoch(np.arange(len(self.train_images)), config.seed)
        # The last, partial batch of an epoch gets a graph of its own: one graph for any size would be slower.
        options = {"dynamic": False, "mode": "reduce-overhead" if self.device.type == "cuda" else None}
        if self.is_compiled:
            torch._dynamo.config.recompile_limit = 16  # sizes of a batch: whole, partial, one; in training and not
            self.loss = torch.compile(self.loss, **options)
            self.logits = torch.compile(self.logits, **options)

    def start_optimizer(self) -> None:
        """Reset AdamW and the loss scale. Keras adds epsilon before the bias correction, which moves early losses by less than 1e-4."""
        lr, decay = self.config.learning_rate, self.config.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=decay, eps=1e-7, fused=True)
        is_float16 = self.config.dtype_policy == "mixed_float16"
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**15, enabled=is_float16)

    @property
    def attention(self) -> str:
        config, compute_dtype = self.config, str(COMPUTE[self.config.dtype_policy]).removeprefix("torch.")
        shape = (config.batch_size, config.num_heads, config.num_patches, config.projection_dim)
        return attention_path(shape, config.attention_dropout, compute_dtype, self.is_compiled)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def set_params(self, params: dict) -> None:
        self.model.load_state_dict(params)
        self.start_optimizer()

    def snapshot(self) -> dict:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def on_device(self, images: np.ndarray, labels: np.ndarray) -> tuple:
        return torch.from_numpy(images).to(self.device), torch.from_numpy(labels).to(self.device)

    def normalized(self, images):
        return (images.float() - self.mean) / self.std

    def autocast(self):
        dtype = COMPUTE[self.config.dtype_policy]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def loss(self, images, labels):
        """Bytes and labels of a batch -> its mean loss, and the sums over it for the metrics."""
        batch = augment(self.normalized(images), self.config.image_size)
        with self.autocast():
            logits = self.model(batch)
        sums = statistics(logits, labels)
        return sums[0] / len(images), sums.detach()

    def logits(self, images):
        with self.autocast():
            return self.model(resize(self.normalized(images), self.config.image_size))

    def begin_epoch(self, order: np.ndarray, seed: int) -> None:
        """Take the training images in this order, and count the metrics from nothing."""
        torch.manual_seed(seed)
        self.order = torch.from_numpy(order).to(self.device)
        self.sums = torch.zeros(3, device=self.device)
        self.model.train()

    def train_step(self, start: int, size: int):
        """Launch a step on images start .. start + size of the order; its loss, on the device."""
        torch.compiler.cudagraph_mark_step_begin()
        rows = self.order[start : start + size]
        loss, sums = self.loss(self.train_images[rows], self.train_labels[rows])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # frees the CUDA graph's memory before the next replay
        self.sums += sums
        return sums[0] / size

    def totals(self) -> np.ndarray:
        """Sums of the epoch so far; waits for the device."""
        return self.sums.cpu().numpy()

    @torch.inference_mode()
    def evaluate(self, params: dict, images, labels) -> np.ndarray:
        """Sums over all images, which `on_device` has put there."""
        self.model.eval()
        current = self.snapshot()
        self.model.load_state_dict(params)
        sums = torch.zeros(3, device=self.device)
        for start in range(0, len(images), self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            sums += statistics(self.logits(images[rows]), labels[rows])
        self.model.load_state_dict(current)
        return sums.cpu().numpy()

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        self.model.eval()
        return self.logits(torch.from_numpy(images).to(self.device)).cpu().numpy()

    def arrays(self, params: dict) -> dict[str, np.ndarray]:
        """By name, for a file."""
        return {name: value.cpu().numpy() for name, value in params.items()}


if __name__ == "__main__":
    experiment.main(NativeTorch, sys.argv[1:])
