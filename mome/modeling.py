"""MoME: decoder layers as experts, fused voxel by voxel under the guidance of text.

After *MoME: Mixture of Visual Language Medical Experts for Medical Imaging Segmentation* (arXiv 2510.26996).
Known from the paper: decoder layers are the experts, text guides a voxel-wise fusion of them, heads are class
specific, training is partially labelled. Everything else is our choice and a config value.

Shapes: B batch, P prompts, S scales, C head channels, T text width, D H W voxels, V = D·H·W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import initialization as init

from mome.activation_checkpointing import checkpoint_contexts
from mome.configuration import MoMEConfig
from mome.decoding import WithDecoding
from mome.errors import InputError
from mome.expert_parallel import FSDP_PLAN, expert_plan
from mome.map_context import MapContext
from mome.model_inputs import check_bottleneck, check_pyramid, check_scalar, check_targets, check_text, check_volume
from mome.model_size import build_within_limits
from mome.outputs import Features, MoMEOutput
from mome.parts import build_parts
from mome.registry import LOSSES
from mome.routers.base import Router
from mome.routers.routing import Routing
from mome.saving import SavedModel

# Arguments that transformers' Trainer and generic callers pass to any model; they change nothing here.
_IGNORED = ("return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch")


class MoME(WithDecoding, SavedModel):
    """A text-prompted mixture-of-experts CT segmenter.

    The model sees numbers only: `text_PT` are embeddings of the prompts (`model.text_bank.rows` for known labels,
    `mome.prompts.embed_prompts` for anything else). The text tower is never part of the model.

    With whole-model experts (`extra_experts`) the rows of prompts also hold the numbers of their classes; see
    `prompt_rows`.
    """

    config: MoMEConfig
    config_class = MoMEConfig
    base_model_prefix = ""
    main_input_name = "volume"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    # These encoders add or join maps of several stages, so each of them stays on one device.
    _no_split_modules = [
        "ScaleExpert", "ConvStack", "SparseResidual", "SwinUNETR", "SegResNet", "MedNeXt", "ResEncUNet", "GenesisUNet",
        "MonaiNetwork", "ViT3D", "Timm",
    ]  # fmt: skip
    # The bank subtracts the mean of its rows, which half precision would lose.
    _keep_in_fp32_modules_strict = ["router", "text_bank"]
    # The expert modules live in other files than this class, where transformers does not look for them.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__(config)
        parts = build_within_limits(lambda: build_parts(config))
        self.first_scale = parts.first_scale
        self.encoder = parts.encoder
        self.scale_experts = parts.scale_experts
        self.fusion = parts.fusion
        self.head = parts.head
        self.text_bank = parts.text_bank
        self.extra_experts = parts.extra_experts
        self.segmentation_loss = LOSSES.build(config.loss)
        reads_scales = getattr(self.segmentation_loss, "reads_scales", False)
        self._compared_scales = int(self.segmentation_loss.scales) if reads_scales else 0
        if reads_scales and len(self.scale_experts) < 2:
            raise InputError(
                f"loss '{config.loss['name']}' compares several scales, and encoder '{config.encoder['name']}' with "
                f"fusion '{config.fusion['name']}' gives one",
                hint="an encoder of more stages with fusion=text_guided, or loss=bce_dice",
            )
        self._check_labels(config.labels)
        self.gradient_checkpointing = False
        self.post_init()
        self._ep_plan, self._fsdp_plan = expert_plan(self), dict(FSDP_PLAN)

    def relabel(self, labels: list[str], trained_labels: list[str] | None = None) -> list[str]:
        """Replaces the list of labels; each label keeps its row.

        Args:
            labels: The new list.
            trained_labels: The labels that the weights know. None keeps the current ones that are also in `labels`.

        Returns:
            Names that had no row: their rows are zeros, or one-hot rows that no other label uses.

        Raises:
            InputError: See `MoMEConfig.check_labels`; or a router that reads labels has no expert for one of them, or a
                whole-model expert has none of them. The model is then as it was.
        """
        self._check_labels(labels)
        if trained_labels is None:
            trained_labels = [name for name in self.config.trained_labels if name in labels]
        self.config.set_labels(labels, trained_labels)
        return self.text_bank.relabel(self.config.labels)

    def after_step(self) -> None:
        """Lets every router update the state that follows the optimiser; call it once after each optimiser step."""
        for router in self._routers():
            router.after_step()

    def _routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def _check_labels(self, labels: Sequence[str]) -> None:
        for router in self._routers():
            router.check_labels(labels)
        for scale in self._extra_scales():
            scale.expert.check_labels(labels)

    def encode(self, volume_B1DHW: Tensor, origin_B3: Tensor | None = None) -> Features:
        """Volume (B, 1, D, H, W) → expert maps at the finest scale. The cost does not depend on the prompts.

        Args:
            volume_B1DHW: Windowed HU on the network grid; it is cast to the type of the model.
            origin_B3: int64, the voxel of the network grid at which each patch begins; for routers that look at it.

        Raises:
            InputError: The volume has another shape, a side is not a multiple of the encoder's `size_divisor`, or the
                coarsest map has one voxel and an instance norm.
        """
        return self._encode(volume_B1DHW, origin_B3)

    def _encode(self, volume_B1DHW: Tensor, origin_B3: Tensor | None) -> Features:
        # FSDP2 wraps `encode` like `forward`, and must not begin a second forward pass inside one
        check_volume(volume_B1DHW, self.config.in_channels, self.encoder.size_divisor)
        check_bottleneck(volume_B1DHW, self.encoder.size_divisor, (self.encoder, self.scale_experts))
        context = MapContext(origin_B3)
        pyramid = self._checkpointed(self.encoder, volume_B1DHW.to(self.dtype), context)
        check_pyramid(pyramid, self.encoder, tuple(volume_B1DHW.shape[2:]))
        extra_maps = tuple(self._checkpointed(scale, volume_B1DHW) for scale in self.extra_experts)
        maps_BCDHW = pyramid.maps[self.first_scale :]
        experts = self._own_scales()
        if any(expert.reads_prompts for expert in experts):
            expert_inputs = tuple(
                expert.project(map_BCDHW) for expert, map_BCDHW in zip(experts, maps_BCDHW, strict=True)
            )
            return Features(None, pyramid.bottleneck, pyramid.routings, expert_inputs, origin_B3, extra_maps)
        scales_BSCDHW, routings = self._mix(experts, maps_BCDHW, maps_BCDHW[-1].shape[2:], context)
        return Features(scales_BSCDHW, pyramid.bottleneck, (*pyramid.routings, *routings), extra_maps=extra_maps)

    def forward(
        self,
        volume: Tensor,
        text_PT: Tensor,
        targets: Tensor | None = None,
        supervised_BP: Tensor | None = None,
        origin_B3: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> MoMEOutput:
        """Volume (B, 1, D, H, W) in [0, 1] and text rows (P, T) → logits, and the loss where targets are given.

        Args:
            volume: Windowed HU on the network grid.
            text_PT: Embeddings of the P prompts.
            targets: (B, P, D, H, W), 0 or 1.
            supervised_BP: True where prompt p is annotated in case b; all of them where None.
            origin_B3: See `encode`.
            return_loss: Whether the loss is computed where targets are given. transformers' Trainer looks for this
                argument before it reports `eval_loss`.

        Raises:
            InputError: An argument that is none of these, or a tensor whose shape does not fit the model or the others.
        """
        for key in kwargs:
            if key not in _IGNORED:
                raise InputError(
                    f"MoME.forward has no argument '{key}'",
                    hint="arguments: volume, text_PT, targets, supervised_BP, origin_B3, return_loss",
                )
        check_volume(volume, self.config.in_channels, self.encoder.size_divisor)
        check_text(text_PT, cast("int", self.config.text_dim), len(self.extra_experts))
        if targets is not None:
            check_targets(volume, text_PT.shape[0], targets, supervised_BP)
        features = self._encode(volume, origin_B3)
        coarse_scales = self._compared_scales if self.training else 0
        logits, prompt_routings, coarse = self._decode(features, text_PT, coarse_scales)
        routings = [routing for routing in (*features.routings, *prompt_routings) if routing is not None]
        if self.training:
            for routing in routings:
                routing.router.observe(routing)
            if self.observer is not None:
                self.observer.on_routings(routings)
        aux_loss, aux_losses = _auxiliary_losses(routings, logits)
        if targets is None or not return_loss:
            return MoMEOutput(logits=logits, aux_loss=aux_loss, aux_losses=aux_losses, scale_logits=coarse or None)
        segmentation = self.segmentation_loss((logits, *coarse) if coarse else logits, targets, supervised_BP)
        check_scalar(segmentation, self.segmentation_loss)
        return MoMEOutput(
            loss=segmentation + aux_loss,
            logits=logits,
            segmentation_loss=segmentation,
            aux_loss=aux_loss,
            aux_losses=aux_losses,
            scale_logits=coarse or None,
        )

    def get_input_embeddings(self) -> nn.Module:
        """Returns an empty module: the model embeds no tokens, but quantisers and adapters ask for their embeddings."""
        return nn.Identity()

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Switches activation checkpointing; called by `gradient_checkpointing_enable`.

        Raises:
            InputError: `use_reentrant` is true: reentrant checkpoints pass tensors only, not the records of our layers.
                Or `every_n_layers` is not 1: the encoder and each scale are checkpointed, which are no equal layers.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise InputError(
                "MoME has no reentrant gradient checkpointing",
                hint='gradient_checkpointing_enable({"use_reentrant": False})',
            )
        every = kwargs.pop("every_n_layers", 1)
        if enable and every != 1:
            raise InputError(
                f"MoME checkpoints its encoder and each scale, so every_n_layers={every} has no meaning",
                hint="leave every_n_layers out",
            )
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            run = self._gradient_checkpointing_func
            if torch.compiler.is_compiling():  # a compiled checkpoint takes contexts of another kind
                return run(function, *args)
            given = getattr(run, "keywords", {}).get("context_fn", noop_context_fn)
            return run(function, *args, context_fn=partial(checkpoint_contexts, self, given))
        return function(*args)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # The base class skips modules without parameters of their own. Our initialisers also fill child modules and
        # pass over loaded tensors, so every module is visited.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fills every parameter and buffer: a model that is loaded is built on the meta device, without values."""
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm3d | nn.GroupNorm):
            if module.affine:
                init.ones_(module.weight)
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        own = getattr(module, "init_weights_", None)
        # some initialisers compute with the tensors, which those that are spread over processes do not support
        if own is not None and not _is_loaded(module):
            own(init, self.config.initializer_range)


def _is_loaded(module: nn.Module) -> bool:
    """Whether every tensor of the module has its value from a checkpoint."""
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in (*module.parameters(), *module.buffers()))


def _auxiliary_losses(routings: Sequence[Routing], like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean over the routers of the sum of their losses, and of each loss by its name."""
    zero = like.new_zeros((), dtype=torch.float32)
    if not routings:
        return zero, {}
    routers: dict[int, list[dict[str, Tensor]]] = {}
    for routing in routings:  # a router that reads prompts has one routing for each of them
        routers.setdefault(id(routing.router), []).append(routing.losses)
    names = dict.fromkeys(name for routing in routings for name in routing.losses)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    total = mean([mean([sum(named.values(), zero) for named in losses]) for losses in routers.values()])
    by_name = {
        name: mean([mean([named.get(name, zero) for named in losses]) for losses in routers.values()]) for name in names
    }
    return total, by_name
