"""The range of a volume's values, and a sorted sample of them in which shares and quantiles are looked up."""

from __future__ import annotations

from functools import cached_property

import numpy as np

# Values of a large array that are looked at (our choice).
_SAMPLE = 2_000_000


class SortedValues:
    """Values in ascending order. A share of them is found by bisection, without a pass over all of them.

    Numbers are compared as in `values >= number`: in the type of the values where that is a floating-point type.

    Args:
        values: (n,), in ascending order, without NaN.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @property
    def size(self) -> int:
        """Returns the number of values."""
        return int(self.values.size)

    def below(self, number: float) -> int:
        """Returns how many values are smaller than a number."""
        return int(self.values.searchsorted(self._as_value(number), "left"))

    def up_to(self, number: float) -> int:
        """Returns how many values are at most a number."""
        return int(self.values.searchsorted(self._as_value(number), "right"))

    def share(self, low: float, high: float) -> float:
        """Returns the share of values from `low` to `high`; 0 where there is no value."""
        return max(0, self.up_to(high) - self.below(low)) / self.size if self.size else 0.0

    def above(self, number: float) -> SortedValues:
        """Returns the values that are larger than a number."""
        return SortedValues(self.values[self.up_to(number) :])

    def histogram(self, bins: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns counts and edges of `np.histogram(values, bins, (low, high))`."""
        edges = np.histogram_bin_edges(self.values[:0], bins, (low, high))
        if edges.dtype != self.values.dtype:
            return np.histogram(self.values, bins, (low, high))
        # Every bin includes its lower edge, and the last one its upper edge, too.
        places = [self.below(edge) for edge in edges[:-1]]
        return np.diff([*places, self.up_to(edges[-1])]), edges

    def _as_value(self, number: float) -> np.generic | float:
        return self.values.dtype.type(number) if self.values.dtype.kind == "f" else number


class ValueSample:
    """The range of the values of an array, and a sample of them, each of which is found once.

    Args:
        values: Any shape, at least one value, without NaN.

    Attributes:
        low: The smallest value.
        high: The largest value.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.low, self.high = float(values.min()), float(values.max())
        self._values = values

    @cached_property
    def sorted(self) -> SortedValues:
        """Returns every n-th value of a large array in ascending order."""
        step = -(-self._values.size // _SAMPLE)
        # An odd step does not stay in the same columns of an image.
        return SortedValues(np.sort(self._values.reshape(-1)[:: step + 1 - step % 2]))
