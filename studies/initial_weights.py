"""Draw the initial weights of attention as Keras draws them before and since 3.15.

    python studies/initial_weights.py docs/initial-weights.png

The layer is Keras' own, `MultiHeadAttention(num_heads=4, key_dim=64)` on a width of 64, with the two initializers of vit.py.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
sys.path[:0] = [str(Path(__file__).parents[1])]

import keras
import matplotlib.pyplot as plt
import numpy as np

import vit

HEADS, WIDTH = 4, 64
PANELS = {"query": "query, key and value", "attention_output": "output projection"}
STARTS = {"published": "Keras before 3.15, vit.py", "glorot": "Keras 3.15"}


def kernels(initial_weights: str) -> dict[str, np.ndarray]:
    """The kernels of an attention layer by their names."""
    initializer = vit.INITIAL_ATTENTION[initial_weights]
    layer = keras.layers.MultiHeadAttention(HEADS, WIDTH, kernel_initializer=initializer)
    layer.build((None, 1, WIDTH), (None, 1, WIDTH))
    drawn = [weight for weight in layer.weights if weight.path.endswith("kernel")]
    return {weight.path.split("/")[-2]: keras.ops.convert_to_numpy(weight) for weight in drawn}


def main(path: str) -> None:
    drawn = {start: kernels(start) for start in STARTS}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True, layout="constrained")
    bins = np.linspace(-0.15, 0.15, 61)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for (start, label), style in zip(STARTS.items(), ("-", "--"), strict=True):
            values = drawn[start][name].ravel()
            print(f"{title}, {label}: ±{abs(values).max():.4f}, standard deviation {values.std():.4f}")
            text = f"{label}: ±{abs(values).max():.3f}"
            axis.hist(values, bins, density=True, histtype="step", linestyle=style, linewidth=1.8, label=text)
        axis.set(title=title, xlabel="initial weight")
        axis.legend(loc="upper right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("density")
    axes[0].set_ylim(0, 19)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
