"""Sparse upcycling: a sparse model that starts with the outputs of a dense one (Komatsuzaki et al. 2022)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from mome.configuration import MoMEConfig, keys_of_file
from mome.errors import InputError
from mome.layers.dense_weights import check_same_outputs, dense_weights, fill_experts
from mome.layers.moe import MixtureOfExperts
from mome.layers.sparse import SparseReplacement
from mome.map_context import MapContext
from mome.module_objects import is_reference
from mome.registry import ENCODERS
from mome.spec import brief

_Model = TypeVar("_Model", bound=PreTrainedModel)


@torch.no_grad()
def upcycle(dense: _Model, **overrides: Any) -> _Model:
    """Builds a model whose experts start as the dense feed-forward layers that they replace.

    ```python
    dense = MoME.from_pretrained("my-dense-model")  # encoder="swin_unetr(feature_size=48)"
    sparse = upcycle(
        dense, encoder="swin_unetr(feature_size=48, feed_forward=moe(experts=mlp(n=8), router=topk(k=2), every=2))"
    )
    ```
    `MoME.from_pretrained("my-dense-model", encoder=…, upcycle=True)` does the same. All other weights, the labels and
    the processor are those of the dense model. The routers are new; they train from random weights. A scale expert of
    one `mlp`, `swiglu` or `geglu` can be multiplied in the same way.

    Args:
        dense: The dense `MoME`.
        overrides: Values of the config that differ, as in `encoder=…` or `experts=…`.

    Returns:
        The sparse model, in the data type of the dense one and in eval. Its logits equal those of the dense model up to
        rounding.

    Raises:
        InputError: Nothing becomes sparse, experts do not have the form and width of the layer they replace, the
            router's weights do not sum to one, or other parts or settings of the model change too.
    """
    config = MoMEConfig(**{**keys_of_file(dense.config.to_dict(), "the dense model"), **overrides})
    sparse: Any = type(dense)(config).eval()
    sparse.to(device=dense.device)
    _match_types(sparse, dense)
    sparse.load_state_dict(_fitting(dense, sparse), strict=False)
    filled = _filled(sparse, dense)
    if not filled:
        raise InputError(
            "no dense layer of the model becomes sparse",
            hint="encoder='vit3d(feed_forward=moe(experts=swiglu(n=8), router=topk(k=2)))'",
        )
    _check_rest(sparse, dense, filled)
    _check_settings(config, cast("MoMEConfig", dense.config), filled)
    was_training = dense.training
    dense.eval()
    try:
        for name in filled:
            module = sparse.get_submodule(name)
            mixture = module.layer if isinstance(module, SparseReplacement) else module
            check_same_outputs(
                cast("MixtureOfExperts", mixture), dense.get_submodule(name), name, _first_prompt(sparse)
            )
    finally:
        dense.train(was_training)
    for carried in ("processor", "loaded_processor", "card_sections"):
        setattr(sparse, carried, getattr(dense, carried))
    return sparse


def _first_prompt(model: Any) -> MapContext:
    """The first label as the prompt of one map, for routers that read prompts."""
    text_1T = model.text_bank(model.text_bank())[:1].to(model.dtype)
    label_1 = torch.zeros(1, dtype=torch.int64, device=text_1T.device)
    return MapContext(text_BT=text_1T, label_B=label_1, labels=tuple(model.config.labels))


def _filled(sparse: nn.Module, dense: nn.Module) -> list[str]:
    """Fills the mixtures whose counterpart in the dense model is dense, and returns their names."""
    others = dict(dense.named_modules())
    filled = []
    for name, module in sparse.named_modules():
        other = others.get(name)
        if isinstance(module, SparseReplacement) and other is not None:
            if not isinstance(other, SparseReplacement):
                fill_experts(module.layer, dense_weights(other, name), name)
                _fill_registers(sparse, name, other)
                filled.append(name)
        elif isinstance(module, MixtureOfExperts) and isinstance(other, MixtureOfExperts):
            if module.experts.num_experts > 1 and other.experts.num_experts == 1:
                fill_experts(module, dense_weights(other, name), name)
                filled.append(name)
    return filled


def _fill_registers(sparse: nn.Module, name: str, dense: nn.Module) -> None:
    """Copies the dense layer for the register tokens too, which take no expert."""
    block = sparse.get_submodule(name.rpartition(".")[0])
    for_registers = getattr(block, "register_feed_forward", None)
    if for_registers is not None:
        for_registers.load_state_dict(dense.state_dict())


def _check_rest(sparse: nn.Module, dense: nn.Module, filled: list[str]) -> None:
    """Refuses a change of anything but the layers that became sparse."""
    inside = tuple(f"{name}." for name in filled)
    inside += tuple(f"{name.rpartition('.')[0]}.register_feed_forward." for name in filled)
    before, after = (
        {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if not key.startswith(inside)}
        for model in (dense, sparse)
    )
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        key = changed[0]
        raise InputError(
            f"{len(changed)} tensors have no counterpart in the dense model: '{key}' is {before.get(key, 'absent')} "
            f"there, {after.get(key, 'absent')} in the new one",
            where="upcycling, which changes dense feed-forward layers only",
            hint="a residual layer after stages replaces none: load the model with MoME.from_pretrained and train it",
        )


def _check_settings(config: MoMEConfig, dense: MoMEConfig, filled: list[str]) -> None:
    """Refuses a change of settings that leaves the shapes of the tensors alone, such as another window or activation.

    The sparse layers of the encoder may differ, and the experts and the router of scales that became sparse.
    """
    after, before = (keys_of_file(c.to_dict(), "the model") for c in (config, dense))
    may_differ = {"experts", "router"} if any(name.startswith("scale_experts.") for name in filled) else set()
    for key in after:
        own, given = after[key], before.get(key)
        if key == "encoder":
            own, given = _without_layers(own), _without_layers(given)
        if own != given and key not in may_differ:
            changed = f"{key}, {_first_difference(own, given)}" if isinstance(own, dict) else key
            raise InputError(
                f"the new model differs from the dense one in {changed}, so that its outputs would differ",
                where="upcycling, which changes dense feed-forward layers only",
                hint=f"write {key} as in the dense model",
            )


def _without_layers(spec: dict[str, Any] | None) -> dict[str, Any]:
    """An encoder without its sparse layers."""
    if spec is None or is_reference(spec):
        return spec or {}
    layers = {f.name for f in fields(ENCODERS.part_class(spec["name"]).Config) if f.metadata.get("part") == "layers"}
    return {key: value for key, value in spec.items() if key not in layers}


def _first_difference(own: dict[str, Any], given: Any) -> str:
    given = given if isinstance(given, dict) else {}
    key = next(key for key in (*own, *given) if own.get(key) != given.get(key))
    return f"where {key} is {brief(own.get(key))} instead of {brief(given.get(key))}"


def _fitting(dense: nn.Module, sparse: nn.Module) -> dict[str, torch.Tensor]:
    own = sparse.state_dict()
    return {key: t for key, t in dense.state_dict().items() if key in own and own[key].shape == t.shape}


def _match_types(sparse: nn.Module, dense: Any) -> None:
    """Gives the new model the data type of the dense one; routers and the bank stay in float32."""
    for name, tensor in (*sparse.named_parameters(), *sparse.named_buffers()):
        kept = any(f"{part}." in name for part in dense._keep_in_fp32_modules_strict)
        if tensor.is_floating_point() and not kept:
            tensor.data = tensor.data.to(dense.dtype)
