"""The Dice coefficient of two binary masks."""

from __future__ import annotations

import numpy as np


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """The Dice coefficient 2 |P ∩ R| / (|P| + |R|).

    Args:
        prediction, reference: Binary masks of the same shape.

    Returns:
        From 0 to 1; NaN if both masks are empty, which means leave out.

    Raises:
        ValueError: The shapes differ.
    """
    prediction, reference = as_binary_pair(prediction, reference)
    size = int(prediction.sum()) + int(reference.sum())
    return float("nan") if size == 0 else 2.0 * int((prediction & reference).sum()) / size


def as_binary_pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both masks as bool.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of different shapes: {prediction.shape} and {reference.shape}")
    return np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
