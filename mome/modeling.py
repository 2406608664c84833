"""MoME: decoder layers as experts, fused voxel by voxel under the guidance of text.

After *MoME: Mixture of Visual Language Medical Experts for Medical Imaging Segmentation* (arXiv 2510.26996).
Known from the paper: decoder layers are the experts, text guides a voxel-wise fusion of them, heads are class
specific, training is partially labelled. Everything else is our choice and a config value.

Shapes: B batch, P prompts, S scales, C head channels, T text width, D H W voxels, V = D·H·W.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.hub import AUTO_MAP, STUB, STUB_NAME, locate
from mome.labels import load_table
from mome.layers.scale_expert import ScaleExpert
from mome.losses.bce_dice import masked_bce_dice
from mome.registry import ENCODERS, FUSIONS, HEADS
from mome.routers.routing import Routing

logger = logging.get_logger(__name__)
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def stored_labels(config: MoMEConfig) -> dict[str, Any]:
    """`labels.json`: the entries of the class table that a checkpoint's bank holds."""
    table = load_table()
    entries = {entry["name"]: entry for entry in table.to_json()["labels"]}
    return {
        "version": table.version,
        "trained": list(config.trained_labels),
        "labels": [entries.get(name, {"name": name}) for name in config.labels],
    }


class Features(NamedTuple):
    """What a volume becomes before any prompt is looked at.

    Attributes:
        scales_BSCDHW: Expert maps of the S scales at the finest resolution.
        bottleneck: (B, C_b, D_b, H_b, W_b).
        routings: How the tokens of each scale were routed; None where a scale has one expert.
    """

    scales_BSCDHW: Tensor
    bottleneck: Tensor
    routings: tuple[Routing | None, ...]


@dataclass
class MoMEOutput(ModelOutput):
    """Result of `MoME.forward`.

    Attributes:
        logits: (B, P, D, H, W), independent per prompt (sigmoid).
        loss: Scalar, where targets were given: segmentation loss plus routers' auxiliary losses.
        segmentation_loss: Masked cross entropy + Dice.
        aux_loss: Mean of the routers' auxiliary losses, zero in eval.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    segmentation_loss: Tensor | None = None
    aux_loss: Tensor | None = None


class MoME(PreTrainedModel):
    """A text-prompted mixture-of-experts CT segmenter.

    The model sees numbers only: `text_PT` are embeddings of the prompts (`MoME.bank_rows` for known labels,
    `mome.prompts.embed_prompts` for anything else). The text tower is never part of the model.
    """

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

    # -- loading and saving --------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> MoME:  # type: ignore[override]
        """Loads a model from a folder, by the name of a bundled checkpoint, or from the Hub.

        Args:
            name: As in "runs/a/model", "mome-ct-tiny" or "org/mome-ct".
            kwargs: Values of the config override the saved ones, as in `experts="swiglu(n=8)"`: weights whose
                name and shape still fit are kept, the rest are new, and a report says which. Everything else goes
                to `PreTrainedModel.from_pretrained` (`revision`, `dtype`, `device_map`, …). Weights are loaded in
                float32 unless `dtype` says otherwise, however they are stored.

        Raises:
            InputError: Not a MoME checkpoint, one of another architecture, or a Hub id that cannot be reached.
        """
        place = locate(name)
        kwargs.setdefault("dtype", torch.float32)
        fields = set(MoMEConfig.__dataclass_fields__) - {"dtype"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        report = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        config = kwargs.pop("config", None)
        try:
            if config is None:
                raw, _ = MoMEConfig.get_config_dict(place, **hub)
                if raw.get("model_type") != "mome":
                    raise InputError(
                        f"this is a checkpoint of '{raw.get('model_type', 'an unknown architecture')}', not of mome",
                        where=str(name),
                    )
                config = MoMEConfig(**{**raw, **overrides})
            model, info = super().from_pretrained(
                place,
                *args,
                config=config,
                ignore_mismatched_sizes=bool(overrides) or kwargs.pop("ignore_mismatched_sizes", False),
                output_loading_info=True,
                **kwargs,
            )
        except OSError as error:
            raise InputError(
                f"'{name}' cannot be loaded: {str(error).splitlines()[0][:160]}",
                hint="check the id and the network; HF_HUB_OFFLINE=1 reads the local cache only",
            ) from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise InputError(
                "the checkpoint's weights do not fit its config: it is of another architecture",
                where=str(name),
            ) from error
        # Weights leave the mapped file: saving over it must not change them, and the aligned copies make the same
        # sums, bit for bit, as the model that was saved.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
        total = len(model.state_dict())
        if not overrides and len(new) > total // 2:
            raise InputError(
                f"{len(new)} of {total} weights are not in the checkpoint: it is of another architecture",
                where=str(name),
            )
        if new:
            shown = ", ".join(new[:4]) + (", …" if len(new) > 4 else "")
            logger.warning(f"{len(new)} of {total} tensors are new and untrained: {shown}")
        return (model, info) if report else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes safetensors, `config.json`, the label table and the stub that remote-code loading needs."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        (folder / STUB_NAME).write_text(STUB)
        (folder / "labels.json").write_text(json.dumps(stored_labels(self.config), indent=1) + "\n")

    # -- text ---------------------------------------------------------------------------------------------

    def bank_rows(self, names: list[str]) -> Tensor:
        """Stored embeddings (P, T) of known labels.

        Raises:
            InputError: A name is not in the bank.
        """
        missing = [name for name in names if name not in self.config.labels]
        if missing:
            raise InputError(
                f"{missing[0]!r} is not one of the {len(self.config.labels)} labels this model stores",
                hint="embed it with the model's text tower (mome.prompts.embed_prompts)",
            )
        return self.text_bank[[self.config.labels.index(name) for name in names]]

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
        """
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
            init.zeros_(module.text_bank)
            init.zeros_(module.text_mean)
            init.ones_(module.text_scale)
        else:
            super()._init_weights(module)
        own = getattr(module, "init_weights_", None)
        if own is not None:
            own(init, self.config.initializer_range)
