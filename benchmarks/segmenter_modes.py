"""The settings of `Segmenter` that the inference benchmarks compare."""

from __future__ import annotations

import inspect
from typing import Any

from mome.inference import Segmenter

MODEL = "mome-ct-tiny"


def exact_settings() -> dict[str, Any]:
    """Arguments of `Segmenter` for float32 inside the network and every tile computed."""
    settings: dict[str, Any] = {"precision": "fp32"}
    if "exact" in inspect.signature(Segmenter).parameters:  # code before the body mask computes every tile
        settings["exact"] = True
    return settings


# A mode is a name of the benchmarks and the arguments of `Segmenter` that it stands for.
MODES: dict[str, dict[str, Any]] = {
    "exact": exact_settings(),
    "bf16": {**exact_settings(), "precision": "bf16"},
    "default": {},
    "default_fp32": {"precision": "fp32"},
    "compiled": {"compile": True},
}
