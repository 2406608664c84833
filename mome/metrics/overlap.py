"""Dice."""

from __future__ import annotations

import numpy as np


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P ∩ R| / (|P| + |R|) of two binary masks of the same shape.

    Both empty: NaN, to be left out of means. One empty: 0.

    Raises:
        ValueError: The shapes differ.
    """
    prediction, reference = _pair(prediction, reference)
    size = int(prediction.sum()) + int(reference.sum())
    return float("nan") if size == 0 else 2.0 * int((prediction & reference).sum()) / size


def _pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of different shapes: {prediction.shape} and {reference.shape}")
    return np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
