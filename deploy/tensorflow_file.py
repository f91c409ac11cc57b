"""The model as TensorFlow's SavedModel and as a LiteRT file. Needs Keras on TensorFlow."""

from pathlib import Path

import keras
import tensorflow as tf


def write_saved_model(
    model: keras.Model, path: Path, batch_size: int, image_shape: tuple[int, int, int], dtype: str
) -> None:
    """Write a folder with the model for a fixed batch; `serve` takes images and returns logits."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = tf.TensorSpec((batch_size, *image_shape), dtype, name="images")
    archive.add_endpoint("serve", lambda images: model(images, training=False), input_signature=[spec])
    archive.write_out(str(path), verbose=False)


def write_litert(saved_model: Path, path: Path, int8: bool) -> None:
    """Convert a SavedModel; with `int8` the weights are int8, and activations are quantized as they come.

    Keras 3.13 has an export of its own. This one is its way as well, and works with older ones.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    path.write_bytes(converter.convert())
