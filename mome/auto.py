"""Registers MoME with transformers' Auto classes and its kernels as an experts implementation.

`import mome` does this at once if transformers has been imported, otherwise on first use. Importing this module does it
explicitly.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoProcessor

from mome.configuration import MoMEConfig
from mome.hf_experts import register_experts_implementation
from mome.modeling import MoME
from mome.processing import MoMEProcessor

AutoConfig.register("mome", MoMEConfig, exist_ok=True)
AutoModel.register(MoMEConfig, MoME, exist_ok=True)
AutoProcessor.register(MoMEConfig, MoMEProcessor, exist_ok=True)
register_experts_implementation()

__all__ = ["MoME", "MoMEConfig", "MoMEProcessor"]
