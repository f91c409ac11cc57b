"""The model of a run as Keras has it, and the files written from it. Imports Keras: the backend is chosen before."""

import importlib.metadata
from pathlib import Path

import keras
import numpy as np

import vit
from deploy import parity
from edgebench.cli import ExperimentError, one_line, require

# By how much the loss of the weights on the test images may differ from the one that the run recorded, relatively: float32
# on another device in TF32 differs by 1e-3, half precision by 1e-2. Another run's weights differ by more.
LOSS_TOLERANCE = {"float32": 5e-3}
LOSS_TOLERANCE_HALF = 3e-2


def build(request: dict) -> dict:
    """Write everything into the folder of the request -> what has to be recorded of it.

    The files take images as they were stored. Beside them come the test images (images.npy), their labels (labels.npy) and
    Keras' logits (logits.npy).
    """
    results, folder = request["results"], Path(request["folder"])
    try:
        config = vit.ViTConfig(**results["what"]["config"])
    except TypeError as error:
        raise ExperimentError(f"the run has another configuration than this version of vit.py ({error})") from error
    data = vit.load_dataset(config.dataset, config.validation_split, config.seed)
    model = rebuild(config, data, request["weights"])
    logits = model.predict(data.x_test, config.micro_batch_size, verbose=0)
    require_same_run(parity.quality(logits, data.y_test), results, request["weights"])
    for name, array in (("images", data.x_test), ("labels", data.y_test), ("logits", logits)):
        np.save(folder / f"{name}.npy", array)

    dtype, facts = str(data.x_test.dtype), {}
    for batch_size, path in request["files"]:
        facts |= write_file(model, request["format"], request["int8"], Path(path), batch_size, data.image_shape, dtype)
    backend = keras.backend.backend()
    versions = {"Keras": keras.__version__, backend: importlib.metadata.version(backend)}
    return {"versions": versions, **facts}


def rebuild(config: vit.ViTConfig, data: vit.Dataset, weights: str) -> keras.Model:
    """The model of a run with its best weights, in float32 whatever the run computed in: its weights are float32."""
    augmentation = vit.create_data_augmentation(config.augmentation, config.image_size, data.moments)
    model = vit.create_vit_classifier(config, data.image_shape, data.num_classes, augmentation)
    try:
        model.load_weights(weights)
    except (ValueError, OSError, KeyError) as error:
        reason = f"{weights} does not hold the weights of this model"
        raise ExperimentError(
            f"{reason}: another run has replaced it, or it is damaged ({one_line(error)[:200]})"
        ) from error
    return model


def require_same_run(quality: dict[str, float], results: dict, weights: str) -> None:
    """Raise ExperimentError unless weights and data are those of the run: the default path is the same for all runs."""
    recorded, found = results["quality"]["test"]["test_loss"], quality["test_loss"]
    tolerance = LOSS_TOLERANCE.get(results["what"]["dtype_policy"], LOSS_TOLERANCE_HALF)
    reason = (
        f"with the weights in {weights} the loss on the test images is {found:.4g}; the run recorded {recorded:.4g}"
    )
    cause = "another run has replaced the weights, or the data have changed (--checkpoint-path gives a run a file of its own)"
    require(abs(found - recorded) <= tolerance * max(1.0, recorded), f"{reason}: {cause}")


def write_file(
    model: keras.Model,
    form: str,
    int8: bool,
    path: Path,
    batch_size: int,
    image_shape: tuple[int, int, int],
    dtype: str,
) -> dict:
    """Write one file and return what its format tells of it."""
    if form == "onnx":
        from deploy import onnx_file

        whole = path.with_name(f"float32-{path.name}") if int8 else path
        facts = onnx_file.write(model, whole, batch_size, image_shape, dtype)
        if int8:
            onnx_file.quantize(whole, path)
        return facts
    from deploy import tensorflow_file

    folder = path.with_suffix(".folder") if form == "litert" else path
    tensorflow_file.write_saved_model(model, folder, batch_size, image_shape, dtype)
    if form == "litert":
        tensorflow_file.write_litert(folder, path, int8)
    return {}
