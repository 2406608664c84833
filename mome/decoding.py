"""The prompts' half of a model: from the features of a volume and text rows to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mome.configuration import MoMEConfig
from mome.encoders.base import Encoder
from mome.extra_experts import WithExtraExperts
from mome.forward_observer import ForwardObserver
from mome.layers.average_pool import average_pool
from mome.layers.heads.base import Head
from mome.layers.predict import predict, predict_one_scale
from mome.layers.scale_expert import ScaleExpert
from mome.layers.scale_stack import stack_scales
from mome.layers.text_bank import TextBank
from mome.layers.trilinear import resize
from mome.map_context import MapContext
from mome.model_inputs import check_text
from mome.outputs import Decoded, Features
from mome.routers.fusion.base import Fusion
from mome.routers.fusion.shown import shown_weights
from mome.routers.routing import Routing


class WithDecoding(WithExtraExperts):
    """The part of `MoME` that runs once for each chunk of prompts.

    Attributes:
        config, encoder, scale_experts, first_scale, fusion, head, text_bank: Set by the subclass; see
            `mome.parts.Parts`.
        observer: Looks at forward passes while it is set; it changes no result.
        dtype: Type of the model's floating-point weights, from the subclass.
    """

    config: MoMEConfig
    encoder: Encoder
    scale_experts: nn.ModuleList
    first_scale: int
    fusion: Fusion
    head: Head
    text_bank: TextBank
    dtype: torch.dtype
    observer: ForwardObserver | None = None

    def decode(self, features: Features, text_PT: Tensor) -> Tensor:
        """Expert maps and prompts → logits (B, P, D, H, W) at the input's resolution.

        Raises:
            InputError: The text rows have another width than the model was built for.
        """
        return self._decode(features, text_PT).logits

    def _decode(self, features: Features, text_PT: Tensor, coarse_scales: int = 0) -> Decoded:
        """Decodes prompts.

        Args:
            features, text_PT: As for `decode`.
            coarse_scales: Largest number of coarser scales whose logits are returned, too.
        """
        given_PT, text_PT, numbers_PE = self._split_rows(text_PT)
        routings: list[Routing | None] = []
        if features.scales_BSCDHW is not None and not self.extra_experts:
            self._show_fusion(features.scales_BSCDHW, text_PT, range(text_PT.shape[0]))
            logits = self._predict(features.scales_BSCDHW, text_PT, features.bottleneck)
            coarse = self._scale_logits(features.scales_BSCDHW, text_PT, features.bottleneck, coarse_scales)
        else:
            parts: dict[int, Tensor] = {}
            coarse_parts: dict[int, tuple[Tensor, ...]] = {}
            for members, own_BSCDHW, routed in self._scale_sets(features, given_PT, text_PT):
                routings += routed
                for p in members:  # one by one, so that the other prompts do not even change how a logit is rounded
                    scales, present_1S = self.with_extra_scales(own_BSCDHW, features.extra_maps, numbers_PE[p : p + 1])
                    self._show_fusion(scales, text_PT, [p], present_1S)
                    text_1T = text_PT[p : p + 1]
                    parts[p] = self._predict(scales, text_1T, features.bottleneck, present_1S)
                    coarse_parts[p] = self._scale_logits(own_BSCDHW, text_1T, features.bottleneck, coarse_scales)
            prompts = range(text_PT.shape[0])
            logits = torch.cat([parts[p] for p in prompts], dim=1)
            coarse = tuple(torch.cat(scale, dim=1) for scale in zip(*(coarse_parts[p] for p in prompts), strict=True))
        stride = self.encoder.strides[-1]
        if any(step > 1 for step in stride):
            full = [side * step for side, step in zip(logits.shape[2:], stride, strict=True)]
            logits = resize(logits, full)
        return Decoded(logits, routings, coarse)

    def _scale_logits(self, own_BSCDHW: Tensor, text_PT: Tensor, bottleneck: Tensor, count: int) -> tuple[Tensor, ...]:
        """Returns the logits (B, P, D_s, H_s, W_s) of the model's own coarser scales, from fine to coarse.

        The stack holds every scale at the finest resolution; means over voxels bring a scale back to its own.
        """
        strides = self.encoder.strides[self.first_scale :]
        found = []
        for scale in range(len(strides) - 2, max(len(strides) - 2 - count, -1), -1):
            step = [own // finest for own, finest in zip(strides[scale], strides[-1], strict=True)]
            map_BCDHW = average_pool(own_BSCDHW[:, scale], step, step)
            logits_BPV = predict_one_scale(self.head, map_BCDHW.flatten(2), text_PT, bottleneck)
            found.append(logits_BPV.unflatten(-1, map_BCDHW.shape[2:]))
        return tuple(found)

    def fusion_weights(self, features: Features, text_PT: Tensor) -> Tensor:
        """The weights (B, P, S + E, D, H, W) of the scales, then of the whole-model experts, at the finest resolution.

        Args:
            features: What `encode` returned.
            text_PT: As for `decode`.

        Raises:
            NotImplementedError: The fusion does not say how it weighs; see `Fusion.weights`.
        """
        given_PT, text_PT, numbers_PE = self._split_rows(text_PT)
        parts: dict[int, Tensor] = {}
        for members, own_BSCDHW, _ in self._scale_sets(features, given_PT, text_PT):
            for p in members:
                scales, present_1S = self.with_extra_scales(own_BSCDHW, features.extra_maps, numbers_PE[p : p + 1])
                weights = self.fusion.weights(scales.flatten(3), text_PT[p : p + 1], present_1S)
                weights = weights.expand(scales.shape[0], -1, -1, scales[0, 0, 0].numel())
                parts[p] = weights.unflatten(-1, scales.shape[3:])
        return torch.cat([parts[p] for p in range(text_PT.shape[0])], dim=1)

    def _split_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of prompts → text rows (P, T) as given and as scaled, and class numbers (P, E) of whole models."""
        width = cast("int", self.config.text_dim)
        check_text(rows, width, len(self.extra_experts))
        given_PT = rows[:, :width]
        return given_PT, self.text_bank(given_PT).to(self.dtype), rows[:, width:].long()

    def _scale_sets(
        self, features: Features, given_PT: Tensor, text_PT: Tensor
    ) -> Iterator[tuple[list[int], Tensor, list[Routing | None]]]:
        """The sets of prompts that share the model's own scales, with these (B, S, C, D, H, W) and their routings."""
        if features.scales_BSCDHW is not None:
            yield list(range(text_PT.shape[0])), features.scales_BSCDHW, []
            return
        prompts = self._describe(given_PT, text_PT)
        mixers = [expert.mix for expert in self._own_scales()]
        finest = features.expert_inputs[-1].shape[1:4]
        for members in self._sharing_prompts(prompts):
            context = prompts.of_prompt(members[0], features.bottleneck.shape[0], features.origin_B3)
            scales_BSCDHW, routed = self._mix(mixers, features.expert_inputs, finest, context)
            yield members, scales_BSCDHW, routed

    def _describe(self, given_PT: Tensor, text_PT: Tensor) -> MapContext:
        """What routers and experts may know of the prompts: one row for each, with its label where a router asks."""
        if not any(expert.reads_labels for expert in self._own_scales()):
            return MapContext(text_BT=text_PT)
        return MapContext(
            text_BT=text_PT, label_B=self.text_bank.nearest(given_PT), labels=tuple(self.text_bank.labels)
        )

    def _sharing_prompts(self, prompts: MapContext) -> list[list[int]]:
        """The sets of prompts that share one pass of the experts of all scales.

        An exported program runs the experts once per prompt: the sets depend on values, and its graph must not.
        """
        assert prompts.text_BT is not None
        numbers_P = (
            [] if torch.compiler.is_exporting() else [expert.prompt_groups(prompts) for expert in self._own_scales()]
        )
        shared_P = [number_P for number_P in numbers_P if number_P is not None]
        if not shared_P or len(shared_P) < len(self.scale_experts):
            return [[p] for p in range(prompts.text_BT.shape[0])]
        sets: dict[tuple[int, ...], list[int]] = {}
        for p, numbers in enumerate(torch.stack(shared_P, dim=1).tolist()):
            sets.setdefault(tuple(numbers), []).append(p)
        return list(sets.values())

    def _mix(
        self,
        mixers: Sequence[Callable[..., Any]],
        inputs: Sequence[Tensor],
        finest: torch.Size,
        context: MapContext,
    ) -> tuple[Tensor, list[Routing | None]]:
        """Runs the experts of every scale and brings their maps to the finest size: (B, S, C, D, H, W)."""
        features: list[Tensor] = []
        routings: list[Routing | None] = []
        for mixer, x, stride in zip(mixers, inputs, self.encoder.strides[self.first_scale :], strict=True):
            feature, routing = self._checkpointed(mixer, x, context.with_stride(stride))
            features.append(feature)
            del feature  # else the last one would be held beside the list
            routings.append(routing)
        return stack_scales(features, finest), routings

    @torch.no_grad()
    def _show_fusion(
        self, scales_BSCDHW: Tensor, text_PT: Tensor, prompts: Sequence[int], present_1S: Tensor | None = None
    ) -> None:
        """Shows the observer, where there is one, how these prompts weigh the scales; one prompt at a time."""
        if self.observer is None:
            return
        sides = scales_BSCDHW.shape[3:]
        for p in prompts:
            weights_BSV = shown_weights(self.fusion, scales_BSCDHW.flatten(3), text_PT[p : p + 1], present_1S)
            self.observer.on_fusion(p, None if weights_BSV is None else weights_BSV.unflatten(-1, sides))

    def _predict(
        self, scales_BSCDHW: Tensor, text_PT: Tensor, bottleneck: Tensor, present_PS: Tensor | None = None
    ) -> Tensor:
        logits_BPV = predict(self.fusion, self.head, scales_BSCDHW.flatten(3), text_PT, bottleneck, present_PS)
        return logits_BPV.unflatten(-1, scales_BSCDHW.shape[3:])

    def _own_scales(self) -> list[ScaleExpert]:
        return cast("list[ScaleExpert]", list(self.scale_experts))

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function, with activation checkpointing where the subclass has switched it on."""
        raise NotImplementedError
