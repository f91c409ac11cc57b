"""What the model costs by arithmetic: parameters, FLOPs and bytes; and what a device can do at best."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from edgebench.cli import OutOfMemory

# Peak dense TFLOP/s by device and number format, from NVIDIA's specifications at the highest power and clock that the maker
# allows. A Jetson calls itself "Orin", which is several modules of different speed: no entry rather than a guess.
PEAK_TFLOPS = {
    # AD107: 2 x 2560 CUDA cores x 2.37 GHz at 115 W; its 80 tensor cores give twice that with float32 accumulation.
    "NVIDIA GeForce RTX 4050 Laptop GPU": {
        "float32": 12.1,
        "float32+tf32": 12.1,
        "mixed_bfloat16": 24.3,
        "mixed_float16": 24.3,
    },
}
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class ViTSize:
    """The sizes of a Vision Transformer that decide what it costs, as in vit.ViTConfig."""

    channels: int
    num_classes: int
    image_size: int
    patch_size: int
    projection_dim: int
    num_heads: int
    transformer_layers: int
    transformer_units: Sequence[int]
    head: str
    mlp_head_units: Sequence[int]

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def features(self) -> int:
        """Numbers that the head takes."""
        return self.projection_dim * (1 if self.head == "mean" else self.num_patches)

    @property
    def values_per_patch(self) -> int:
        return self.patch_size**2 * self.channels

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        d, inner = self.projection_dim, self.num_heads * self.projection_dim
        block = 3 * _dense(d, inner) + _dense(inner, d) + _dense(d, *self.transformer_units) + 4 * d
        head = _dense(self.features, *self.mlp_head_units, self.num_classes)
        return _dense(self.values_per_patch, d) + self.num_patches * d + self.transformer_layers * block + 2 * d + head

    @property
    def train_flops_per_image(self) -> int:
        """FLOPs of the matrix products alone: 2 for a multiply-add, once forward and twice backward.

        Backward the patch projection is computed once, as nobody needs the gradient of the images.
        """
        n, d, inner = self.num_patches, self.projection_dim, self.num_heads * self.projection_dim
        block = n * 4 * d * inner + 2 * n * n * inner + n * _dense(d, *self.transformer_units, biases=0)
        head = _dense(self.features, *self.mlp_head_units, self.num_classes, biases=0)
        return 2 * (2 * n * self.values_per_patch * d + 3 * (self.transformer_layers * block + head))

    def train_memory_bytes(self, images: int, dtype_policy: str = "float32", accumulates: bool = False) -> int:
        """An estimate of the device memory of training on `images` at a time.

        It counts weights, gradients, AdamW's two moments, accumulated gradients if `accumulates`, and the activations that
        the backward pass of explicit attention needs. A compiler keeps fewer; a backend's workspace comes on top.
        """
        n, d, inner = self.num_patches, self.projection_dim, self.num_heads * self.projection_dim
        scores = 3 * self.num_heads * n * n  # before and after softmax and dropout
        block = n * (4 * d + 5 * inner) + scores + 3 * n * sum(self.transformer_units)
        image = 4 * self.image_size**2 * self.channels + 2 * n * self.values_per_patch
        activations = image + self.transformer_layers * block + 3 * (n * d + sum(self.mlp_head_units))
        bytes_per_activation = 4 if dtype_policy == "float32" else 2
        bytes_per_parameter = BYTES_PER_PARAMETER + 4 if accumulates else BYTES_PER_PARAMETER
        return bytes_per_parameter * self.parameters + images * activations * bytes_per_activation


def vit_size(flags: Mapping[str, Any], channels: int, num_classes: int) -> ViTSize:
    """The sizes among the flags of vit.ViTConfig."""
    names = {field.name for field in fields(ViTSize)} - {"channels", "num_classes"}
    return ViTSize(channels, num_classes, **{name: flags[name] for name in names})


def _dense(*widths: int, biases: int = 1) -> int:
    """Parameters of dense layers from width to width; without biases that is also their multiply-adds for one row."""
    return sum((a + biases) * b for a, b in itertools.pairwise(widths))


def peak_flops(device: str, dtype_policy: str, tf32: bool) -> float | None:
    """Peak FLOP/s of a device in a number format; None where it is not listed."""
    number_format = "float32+tf32" if dtype_policy == "float32" and tf32 else dtype_policy
    tflops = PEAK_TFLOPS.get(device, {}).get(number_format)
    return None if tflops is None else tflops * 1e12


def require_memory(size: ViTSize, memory_bytes: int) -> None:
    """Raise OutOfMemory where what AdamW keeps for every parameter, in float32, cannot fit into so many bytes."""
    needed_gb, memory_gb = BYTES_PER_PARAMETER * size.parameters / 1e9, memory_bytes / 1e9
    if needed_gb > memory_gb:
        message = f"the model has {size.parameters:,} parameters, which take {needed_gb:,.0f} GB in training, of {memory_gb:,.0f} GB"
        raise OutOfMemory(f"{message}: lower --image-size, --projection-dim or --num-heads, or raise --patch-size")


def out_of_memory_message(size: ViTSize, images: int, batch_size: int, dtype_policy: str) -> str:
    """How much memory training on `images` of a batch at a time needs, by estimate, and the flags with which it needs less."""
    needed_gb = size.train_memory_bytes(images, dtype_policy, accumulates=images < batch_size) / 1e9
    more_parts = next(
        (n for n in range(2 * batch_size // images, min(batch_size, 2**16) + 1) if batch_size % n == 0), None
    )
    advice = f"try --gradient-accumulation-steps {more_parts}, or " if more_parts else ""
    advice += "lower --batch-size, --image-size or --projection-dim"
    return f"out of memory with {images} images at a time, which need an estimated {needed_gb:.1f} GB: {advice}"
