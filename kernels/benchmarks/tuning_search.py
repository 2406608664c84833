"""The candidates of a search and the rule that accepts one; this module uses neither device nor clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Config = dict[str, Any]

# The values of each key; neighbours have the next smaller or larger one.
_SIZES = (16, 32, 64, 128, 256)
VALUES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("BM", "BN", "BK", "BF", "BT"), _SIZES),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
    "walk": (1, 2, 4, 8, 16),
    "per_processor": (1, 2, 3, 4),
    "GROUP_M": (1, 2, 4, 8, 16),
}
# Further keys of a kernel, with all values to try; the first is the default.
EXTRA: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {"tma": (0, 1)},
    **{kernel: {"whole": (0, 1)} for kernel in ("mlp", "mlp_dx", "mlp_dw")},
}

FASTER, SLOWER = 1.03, 1.02  # a row changes for this gain in the mean and at most this loss in one case
HOPELESS = 1.5  # a candidate this much slower than the shipped row is not measured on further cases
_PROMISING = 1.005


def text_of(config: Config) -> str:
    """The text of a configuration, which is the key of its measurements."""
    return " ".join(f"{key}={value}" for key, value in config.items())


def moves(kernel: str, config: Config) -> Iterator[Config]:
    """Yields the changes of one step in one key."""
    for key, value in config.items():
        values = VALUES.get(key, ())
        lower, higher = [v for v in values if v < value], [v for v in values if v > value]
        yield from ({key: near} for near in lower[-1:] + higher[:1])
    for key, values in EXTRA.get(kernel, {}).items():
        yield from ({key: value} for value in values if value != config.get(key, values[0]))


def neighbours(kernel: str, config: Config) -> list[Config]:
    """The configurations that differ by one step in one key."""
    return [{**config, **move} for move in moves(kernel, config)]


def merges(config: Config, scores: Mapping[str, float], around: list[Config]) -> list[Config]:
    """Combinations of improving steps, ordered by gain: the best two, the best three, and so on.

    `scores` are relative times, 1 for the row as shipped, of the configurations by their text.
    """
    base = scores[text_of(config)]
    gains: dict[str, tuple[float, Any]] = {}
    for other in around:
        score = scores.get(text_of(other), math.inf)
        key = next(k for k in other if other[k] != config.get(k))
        if score * _PROMISING < min(base, gains.get(key, (math.inf, None))[0]):
            gains[key] = score, other[key]
    merged, found = dict(config), []
    for key in sorted(gains, key=lambda k: gains[k][0]):
        merged = {**merged, key: gains[key][1]}
        found.append(merged)
    return found[1:]


def mean_ratio(times: Mapping[str, float], shipped: Mapping[str, float]) -> float:
    """The geometric mean of the time relative to the shipped row over the cases; infinite if one is missing."""
    if not shipped or any(case not in times for case in shipped):
        return math.inf
    return math.exp(sum(math.log(times[case] / shipped[case]) for case in shipped) / len(shipped))


def takes_the_row(tuned: Mapping[str, float], shipped: Mapping[str, float]) -> bool:
    """Whether a candidate is fast enough in the mean and not too slow in any case, and so replaces the row."""
    gain = mean_ratio(tuned, shipped) * FASTER <= 1 + 1e-9
    return gain and all(tuned[case] <= SLOWER * shipped[case] for case in shipped)


def dump_table(table: Mapping[str, list[dict[str, Any]]]) -> str:
    """The JSON text of a table in the shipped format, with one row per line."""
    import json

    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        kernels.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(kernels) + "\n}\n"
