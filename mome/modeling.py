"""MoME: decoder layers as experts, fused voxel by voxel under the guidance of text.

After *MoME: Mixture of Visual Language Medical Experts for Medical Imaging Segmentation* (arXiv 2510.26996).
Known from the paper: decoder layers are the experts, text guides a voxel-wise fusion of them, heads are class
specific, training is partially labelled. Everything else is our choice and a config value.

Shapes: B batch, P prompts, S scales, C head channels, T text width, D H W voxels, V = D·H·W.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mome.bank import first_bank, rows_by_name
from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.layers.scale_expert import ScaleExpert
from mome.losses.bce_dice import masked_bce_dice
from mome.outputs import Features, MoMEOutput
from mome.processing import MoMEProcessor
from mome.registry import ENCODERS, FUSIONS, HEADS
from mome.saving import SavedModel

# What transformers' Trainer and callers of any Hugging Face model pass; it changes nothing here.
_IGNORED = ("return_dict", "return_loss", "output_attentions", "output_hidden_states", "num_items_in_batch")


class MoME(SavedModel):
    """A text-prompted mixture-of-experts CT segmenter.

    The model sees numbers only: `text_PT` are embeddings of the prompts (`MoME.bank_rows` for known labels,
    `mome.prompts.embed_prompts` for anything else). The text tower is never part of the model.

    Attributes:
        processor: The settings of the network grid, where they are known (`create_model` knows them). No part of the
            weights.
        loaded_processor: What lay beside the weights that were loaded; `processor`, where it is set, comes first.
    """

    processor: MoMEProcessor | None = None
    loaded_processor: MoMEProcessor | None = None

    config: MoMEConfig
    config_class = MoMEConfig
    base_model_prefix = ""
    main_input_name = "volume"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScaleExpert", "ConvStack"]
    _keep_in_fp32_modules_strict = ["router"]
    # The expert modules live in other files than this class, where transformers does not look for them.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__(config)
        self.encoder = ENCODERS.build(config.encoder, in_channels=config.in_channels)
        _check_patch(config, self.encoder.size_divisor)
        fusion_class, _ = FUSIONS.resolve(config.fusion)
        scales = len(self.encoder.channels)
        first = scales - 1 if fusion_class.finest_only else 0
        self.scale_experts = nn.ModuleList(
            ScaleExpert(
                channels,
                dim=config.dim,
                head_channels=config.head_channels,
                experts=config.experts,
                router=config.router,
            )
            for channels in self.encoder.channels[first:]
        )
        self.fusion = FUSIONS.build(
            config.fusion,
            channels=config.head_channels,
            text_dim=config.text_dim,
            scales=len(self.scale_experts),
        )
        self.head = HEADS.build(
            config.head,
            channels=config.head_channels,
            text_dim=config.text_dim,
            bottleneck_channels=self.encoder.bottleneck_channels,
        )
        # Embeddings of the labels, and what centres and scales every text row before the model reads it.
        self.register_buffer("text_bank", torch.empty(len(config.labels), config.text_dim))
        self.register_buffer("text_mean", torch.empty(config.text_dim))
        self.register_buffer("text_scale", torch.empty(()))
        self.gradient_checkpointing = False
        self.post_init()

    # -- text ---------------------------------------------------------------------------------------------

    def bank_rows(self, names: list[str]) -> Tensor:
        """Stored embeddings (P, T) of known labels.

        Raises:
            InputError: A name is not in the bank, or its row was never set.
        """
        missing = [name for name in names if name not in self.config.labels]
        if missing:
            raise InputError(
                f"{missing[0]!r} is not one of the {len(self.config.labels)} labels this model stores",
                hint="embed it with the model's text tower (mome.prompts.embed_prompts)",
            )
        rows_PT = self.text_bank[[self.config.labels.index(name) for name in names]]
        unset = [name for name, row in zip(names, rows_PT, strict=True) if not row.any()]
        if unset:
            raise InputError(
                f"the bank has no embedding of {unset[0]!r} yet: its row is all zeros",
                hint="fill it with model.set_bank(…), or load a trained checkpoint",
            )
        return rows_PT

    @torch.no_grad()
    def set_bank(self, bank_LT: Tensor, *, centre_on: Tensor | None = None) -> None:
        """Stores the embeddings of `config.labels`.

        Args:
            bank_LT: One row per label.
            centre_on: Rows (N, T) whose mean and scale every text row is brought to zero and one by; usually those
                of the trained labels. None leaves text rows as they are (one-hot rows, say). Prompts' embeddings
                share most of their direction; without this their differences would be lost. Our choice.

        Raises:
            InputError: The shape is not (labels, text_dim).
        """
        expected = tuple(self.text_bank.shape)
        if tuple(bank_LT.shape) != expected:
            raise InputError(f"the bank has shape {tuple(bank_LT.shape)}, the config asks for {expected}")
        self.text_bank.copy_(bank_LT)
        if centre_on is not None and centre_on.shape[0] > 1:
            mean_T = centre_on.mean(0)
            self.text_mean.copy_(mean_T)
            self.text_scale.copy_(1 / (centre_on - mean_T).square().mean().sqrt().clamp(min=1e-6))

    @torch.no_grad()
    def reset_bank(self) -> None:
        """The bank of a new model: one-hot rows for a text encoder that numbers its labels, else none yet."""
        self.text_bank.copy_(first_bank(self.config, self.text_bank))
        self.text_mean.zero_()
        self.text_scale.fill_(1.0)

    def relabel(self, labels: list[str], trained_labels: list[str] | None = None) -> list[str]:
        """Changes the list of labels; the bank's rows follow their names.

        Args:
            labels: The new list.
            trained_labels: Those that the weights know; the present ones that stay where None.

        Returns:
            Names that had no row: theirs are zeros, or one-hot rows that no other label uses.

        Raises:
            InputError: See `MoMEConfig.check_labels`.
        """
        before = list(self.config.labels)
        trained = self.config.trained_labels if trained_labels is None else trained_labels
        if trained_labels is None:
            trained = [name for name in trained if name in labels]
        self.config.set_labels(labels, trained)
        self.text_bank = rows_by_name(self.text_bank, before, self.config.labels, one_hot=self.config.has_one_hot_text)
        return [name for name in self.config.labels if name not in before]

    # -- the two halves of the model: once per volume, then once per chunk of prompts -------------------------

    def encode(self, volume_B1DHW: Tensor) -> Features:
        """Volume (B, 1, D, H, W) → expert maps at the finest scale. Costs the same for any prompts.

        Raises:
            InputError: A side of the volume is not a multiple of the encoder's `size_divisor`.
        """
        divisor = self.encoder.size_divisor
        if any(side % divisor for side in volume_B1DHW.shape[2:]):
            raise InputError(
                f"the volume's sides {tuple(volume_B1DHW.shape[2:])} are not multiples of {divisor}",
                hint="pad it, or let mome.inference.segment do so",
            )
        pyramid = self._checkpointed(self.encoder, volume_B1DHW)
        maps, routings = [], []
        finest = pyramid.maps[-1].shape[2:]
        for map_BCDHW, expert in zip(pyramid.maps[-len(self.scale_experts) :], self.scale_experts, strict=True):
            feature, routing = self._checkpointed(expert, map_BCDHW)
            if feature.shape[2:] != finest:
                feature = F.interpolate(feature, size=finest, mode="trilinear", align_corners=False)
            maps.append(feature)
            routings.append(routing)
        return Features(torch.stack(maps, dim=1), pyramid.bottleneck, tuple(routings))

    def decode(self, features: Features, text_PT: Tensor) -> Tensor:
        """Expert maps and prompts → logits (B, P, D, H, W) at the input's resolution."""
        text_PT = (text_PT.to(self.text_mean) - self.text_mean) * self.text_scale
        text_PT = text_PT.to(self.dtype)
        weights = self.fusion(text_PT)
        logits_BPV = self.head(features.scales_BSCDHW.flatten(3), text_PT, features.bottleneck, weights)
        size = features.scales_BSCDHW.shape[3:]
        logits = logits_BPV.unflatten(-1, size)
        stride = self.encoder.strides[-1]
        if stride > 1:
            full = [side * stride for side in size]
            logits = F.interpolate(logits, size=full, mode="trilinear", align_corners=False)
        return logits

    def forward(
        self,
        volume: Tensor,
        text_PT: Tensor,
        targets: Tensor | None = None,
        supervised_BP: Tensor | None = None,
        **kwargs: Any,
    ) -> MoMEOutput:
        """Volume (B, 1, D, H, W) in [0, 1] and text rows (P, T) → logits, and the loss where targets are given.

        Args:
            volume: Windowed HU on the network grid.
            text_PT: Embeddings of the P prompts.
            targets: (B, P, D, H, W), 0 or 1.
            supervised_BP: True where prompt p is annotated in case b; all of them where None.

        Raises:
            InputError: An argument that is none of these, or a volume whose sides do not fit the encoder.
        """
        for key in kwargs:
            if key not in _IGNORED:
                raise InputError(
                    f"MoME.forward has no argument '{key}'",
                    hint="arguments: volume, text_PT, targets, supervised_BP",
                )
        features = self.encode(volume)
        logits = self.decode(features, text_PT)
        losses = [routing.aux_loss for routing in features.routings if routing is not None]
        aux_loss = torch.stack(losses).mean() if losses else logits.new_zeros((), dtype=torch.float32)
        if targets is None:
            return MoMEOutput(logits=logits, aux_loss=aux_loss)
        segmentation = masked_bce_dice(logits, targets, supervised_BP)
        return MoMEOutput(
            loss=segmentation + aux_loss, logits=logits, segmentation_loss=segmentation, aux_loss=aux_loss
        )

    def _checkpointed(self, module: nn.Module, x: Tensor) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(module.__call__, x)
        return module(x)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # For classes outside transformers the base class skips modules whose own parameters are all loaded, and so
        # every module that only has children. Ours initialise through guarded functions: nothing need be skipped.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A complete recipe: every parameter and buffer, as loading on the meta device demands."""
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm3d | nn.GroupNorm):
            if module.affine:
                init.ones_(module.weight)
                init.zeros_(module.bias)
        elif isinstance(module, MoME):
            init.copy_(module.text_bank, first_bank(self.config, module.text_bank))
            init.zeros_(module.text_mean)
            init.ones_(module.text_scale)
        else:
            super()._init_weights(module)
        own = getattr(module, "init_weights_", None)
        if own is not None:
            own(init, self.config.initializer_range)


def _check_patch(config: MoMEConfig, divisor: int) -> None:
    """An encoder halves the sides of a patch until the bottleneck, which must keep more than one voxel."""
    patch = list(config.patch_size)
    steps = [max(1, math.ceil(side / divisor)) for side in patch]
    fits = [step * divisor * (2 if max(steps) == 1 else 1) for step in steps]
    name = config.encoder["name"]
    if any(side % divisor for side in patch):
        raise InputError(
            f"patch_size {patch} does not fit encoder '{name}': its sides are multiples of {divisor}",
            hint=f"patch_size={fits}",
        )
    if max(steps) == 1:
        raise InputError(
            f"patch_size {patch} leaves encoder '{name}' one voxel at its bottleneck of stride {divisor}",
            hint=f"patch_size={fits}, or an encoder of fewer stages",
        )
