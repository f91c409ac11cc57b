"""Whether a deployed file agrees with Keras, from the logits of both on the test images. Imports no Keras."""

import numpy as np

# Logits may differ by this share of the largest one. Other orders of summing in float32 leave 1e-6 of it; a wrong operator,
# weight or normalization moves them by more than a tenth. Products in TF32 have 10 bits of mantissa instead of 23.
TOLERANCE, TOLERANCE_TF32 = 1e-3, 3e-2
INT8_MOST_LOST = 0.02  # share of the test images, by which the accuracy of int8 may lie below that of Keras


def quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and top-5 of logits (N, classes) under the names that results files have."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    of_label = np.take_along_axis(shifted, labels[:, None], axis=1)
    loss = np.log(np.exp(shifted).sum(axis=1)) - of_label[:, 0]
    rank = (shifted > of_label).sum(axis=1)
    found = {
        "loss": loss.mean(),
        "accuracy": (logits.argmax(axis=1) == labels).mean(),
        "top-5-accuracy": (rank < 5).mean(),
    }
    return {f"test_{name}": float(value) for name, value in found.items()}


def compare(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How the logits (N, classes) of a file differ from Keras' `reference`."""
    return {
        "images": len(labels),
        "largest_logit": float(np.abs(reference).max()),
        "largest_logit_difference": float(np.abs(logits - reference).max()),
        "top_1_agreement": float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        "accuracy": quality(logits, labels)["test_accuracy"],
        "keras_accuracy": quality(reference, labels)["test_accuracy"],
    }


def disagreement(parity: dict[str, float], int8: bool, tf32: bool) -> str:
    """Why a file with this parity must not be kept; empty if it agrees.

    int8 moves the logits by design, so its accuracy decides. In float32 the logits do: where they differ by d at most, only
    images whose two largest logits are within 2 d can change their class. The comparison fails for NaN as well.
    """
    if int8:
        lost = parity["keras_accuracy"] - parity["accuracy"]
        if lost <= INT8_MOST_LOST:
            return ""
        return f"its accuracy is {100 * lost:.1f} points below Keras' {_percent(parity['keras_accuracy'])}, more than {100 * INT8_MOST_LOST:g}"
    difference, tolerance = parity["largest_logit_difference"], TOLERANCE_TF32 if tf32 else TOLERANCE
    limit = tolerance * max(1.0, parity["largest_logit"])
    if difference <= limit:
        return ""
    agreement = f"top-1 agrees on {_percent(parity['top_1_agreement'])} of the test images"
    return f"its logits differ from Keras' by up to {difference:.2g}, more than {limit:.2g}; {agreement}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
