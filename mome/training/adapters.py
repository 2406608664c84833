"""Fine-tuning by low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the matrices of experts, through PEFT.

PEFT 0.17 or later adapts bare parameters (`target_parameters`). Its limits are ours: only matrices are adapted, (E, in,
out) of E experts or one (out, in), each expert with the whole rank; no dropout, bias or DoRA; one set of adapters. The
weights of convolutions, and so the experts `conv`, have no adapters. The saved models are plain ones, with the adapters
merged into the weights; only training states hold the adapters themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from mome.errors import InputError, did_you_mean
from mome.experts.base import Experts
from mome.spec import brief
from mome.training.config import LoraSettings

if TYPE_CHECKING:
    from mome.modeling import MoME


class Adapters:
    """Adapters in a model, whose other weights are frozen but for the modules of `also_train`.

    Args:
        model: The model; it is changed in place.
        settings: Rank, scale, and what is trained beside the adapters.

    Raises:
        InputError: PEFT is not installed or too old, no expert has matrices, or the model has no such module.
    """

    def __init__(self, model: MoME, settings: LoraSettings) -> None:
        targets = expert_matrices(model)
        if not targets:
            raise InputError(
                f"experts={brief(model.config.experts)} have no matrices that LoRA could adapt",
                hint="lora.rank=0 trains all weights",
            )
        modules = [_module(model, name) for name in settings.also_train]
        lora = _peft_config(rank=settings.rank, alpha=settings.alpha, targets=targets)
        from peft import LoraModel

        self._tuner: Any = LoraModel(cast("Any", model), {"default": lora}, "default")
        for module in modules:
            module.requires_grad_(True)

    def merged(self, model: nn.Module) -> MoME:
        """Returns a plain copy of a model with these adapters, or of its moving average, with the adapters merged."""
        tuner = copy.deepcopy(self._tuner)
        tuner.model.load_state_dict(model.state_dict())
        plain = cast("MoME", tuner.merge_and_unload())
        return cast("MoME", plain.requires_grad_(True))


def expert_matrices(model: nn.Module) -> list[str]:
    """Returns the names of the parameters of all experts that are matrices, stacked by expert or of one `nn.Linear`."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for inner, child in module.named_modules(prefix=name):
            for key, parameter in child.named_parameters(recurse=False):
                # A bias of E experts has two dimensions, too, and no row or column space to adapt.
                if parameter.ndim == 3 or (parameter.ndim == 2 and isinstance(child, nn.Linear)):
                    found.append(f"{inner}.{key}")
    return list(dict.fromkeys(found))


def _module(model: nn.Module, name: str) -> nn.Module:
    """Returns a module of the model by its name, such as `head`.

    Raises:
        InputError: There is none.
    """
    modules = dict(model.named_modules())
    if name not in modules or not name:
        known = [key for key, _ in model.named_children()]
        raise InputError(
            f"lora.also_train names {name!r:.60}, no module of the model{did_you_mean(name, known)}",
            hint="modules: " + ", ".join(known),
        )
    return modules[name]


def _peft_config(*, rank: int, alpha: float, targets: list[str]) -> Any:
    """Returns PEFT's configuration.

    Raises:
        InputError: PEFT is not installed, or older than 0.17.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"lora.rank={rank} needs the package peft, which is not installed", hint='pip install "mome[peft]"'
        )
    import peft

    if "target_parameters" not in {field.name for field in dataclasses.fields(peft.LoraConfig)}:
        raise InputError(
            f"lora.rank={rank} needs peft 0.17 or later, got {peft.__version__}", hint='pip install -U "mome[peft]"'
        )
    return peft.LoraConfig(r=rank, lora_alpha=cast("int", alpha), target_modules=[], target_parameters=targets)
