"""Text-prompted CT segmentation with mixtures of experts.

```python
from mome import MoME, create_model, list_models, segment
```
Importing this package is cheap: torch and transformers load when something that needs them is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "MoME": "mome.modeling",
    "MoMEConfig": "mome.configuration",
    "MoMEProcessor": "mome.processing",
    "WholeModel": "mome.experts.whole_model",
    "create_model": "mome.zoo",
    "list_models": "mome.zoo",
    "list_parts": "mome.part_lists",
    "card": "mome.cards",
    "preset_processor": "mome.zoo",
    "upcycle": "mome.upcycling",
    "segment": "mome.inference",
    "Segmenter": "mome.inference",
    "read_volume": "mome.volumes",
    "load_table": "mome.labels",
    "InputError": "mome.errors",
    "OutputError": "mome.errors",
    "ENCODERS": "mome.registry",
    "TEXT_ENCODERS": "mome.registry",
    "EXPERTS": "mome.registry",
    "ROUTERS": "mome.registry",
    "FUSIONS": "mome.registry",
    "HEADS": "mome.registry",
    "LOSSES": "mome.registry",
}
__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from mome.cards import card
    from mome.configuration import MoMEConfig
    from mome.errors import InputError, OutputError
    from mome.experts.whole_model import WholeModel
    from mome.inference import Segmenter, segment
    from mome.labels import load_table
    from mome.modeling import MoME
    from mome.part_lists import list_parts
    from mome.processing import MoMEProcessor
    from mome.registry import ENCODERS, EXPERTS, FUSIONS, HEADS, LOSSES, ROUTERS, TEXT_ENCODERS
    from mome.upcycling import upcycle
    from mome.volumes import read_volume
    from mome.zoo import create_model, list_models, preset_processor


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mome' has no attribute {name!r}")
    if name in ("MoME", "MoMEConfig"):
        importlib.import_module("mome.auto")  # so that AutoModel knows it too
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if "transformers" in sys.modules:  # already paid for: register with its Auto classes at once
    importlib.import_module("mome.auto")
