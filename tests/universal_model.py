"""The CLIP-Driven Universal Model written out from its equations (Liu et al. 2023), for comparison only.

Nothing of `mome` is used. Names of modules are those of the published checkpoints; loops stand where the equations have
an index.
"""

from __future__ import annotations

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F


class Pair(nn.Module):
    """One convolution and the normalisation by the statistics of the batch, as `conv1` and `bn1`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        mean = y.mean(dim=(0, 2, 3, 4), keepdim=True)
        variance = (y - mean).square().mean(dim=(0, 2, 3, 4), keepdim=True)
        scale, shift = (p.view(1, -1, 1, 1, 1) for p in (self.bn1.weight, self.bn1.bias))
        return ((y - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)


class Stage(nn.Module):
    """A stage of the U-Net, `ops` and, on the way up, `up_conv`."""

    def __init__(self, inputs: int, middle: int, outputs: int, up: int | None = None) -> None:
        super().__init__()
        if up is not None:
            self.up_conv = nn.ConvTranspose3d(up, up, 2, stride=2)
        self.ops = nn.Sequential(Pair(inputs, middle), Pair(middle, outputs))


class GenesisUNet(nn.Module):
    """The U-Net of Models Genesis, 32 channels in its first convolution as published."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.down_tr64, self.down_tr128 = Stage(1, w, 2 * w), Stage(2 * w, 2 * w, 4 * w)
        self.down_tr256, self.down_tr512 = Stage(4 * w, 4 * w, 8 * w), Stage(8 * w, 8 * w, 16 * w)
        self.up_tr256 = Stage(24 * w, 8 * w, 8 * w, up=16 * w)
        self.up_tr128 = Stage(12 * w, 4 * w, 4 * w, up=8 * w)
        self.up_tr64 = Stage(6 * w, 2 * w, 2 * w, up=4 * w)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The deepest map and the finest one."""
        a = self.down_tr64.ops(x)
        b = self.down_tr128.ops(F.max_pool3d(a, 2))
        c = self.down_tr256.ops(F.max_pool3d(b, 2))
        deepest = self.down_tr512.ops(F.max_pool3d(c, 2))
        x = self.up_tr256.ops(torch.cat([self.up_tr256.up_conv(deepest), c], 1))
        x = self.up_tr128.ops(torch.cat([self.up_tr128.up_conv(x), b], 1))
        return deepest, self.up_tr64.ops(torch.cat([self.up_tr64.up_conv(x), a], 1))


class UniversalModel(nn.Module):
    """Backbone, text branch, image branch, controller and a head per class.

    Args:
        backbone: `unet` or `swinunetr`.
        width: Of the backbone: 32 and 48 as published.
        classes: 32 as published.
        swin: Further arguments of MONAI's SwinUNETR.
    """

    def __init__(self, backbone: str, width: int, classes: int = 32, **swin: object) -> None:
        super().__init__()
        self.kind = backbone
        if backbone == "unet":
            self.backbone, fine, deep = GenesisUNet(width), 2 * width, 16 * width
        else:
            self.backbone = SwinUNETR(in_channels=1, out_channels=1, feature_size=width, **swin)
            del self.backbone.out
            fine, deep = width, 16 * width
        self.precls_conv = nn.Sequential(nn.GroupNorm(16, fine), nn.ReLU(), nn.Conv3d(fine, 8, 1))
        self.GAP = nn.Sequential(nn.GroupNorm(16, deep), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Conv3d(deep, 256, 1))
        self.controller = nn.Conv3d(512, 153, 1)
        self.text_to_vision = nn.Linear(512, 256)
        self.register_buffer("organ_embedding", torch.randn(classes, 512))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The deepest and the finest map of the backbone."""
        if self.kind == "unet":
            return self.backbone(x)
        net = self.backbone
        hidden = net.swinViT(x, net.normalize)
        deepest = net.encoder10(hidden[4])
        y = net.decoder5(deepest, hidden[3])
        for decoder, encoder, level in ((4, 4, 2), (3, 3, 1), (2, 2, 0)):
            y = getattr(net, f"decoder{decoder}")(y, getattr(net, f"encoder{encoder}")(hidden[level]))
        return deepest, net.decoder1(y, net.encoder1(x))

    def forward(self, x: Tensor) -> Tensor:
        """Volume (B, 1, D, H, W) → logits (B, classes, D, H, W)."""
        deepest, finest = self.maps(x)
        image = self.GAP(deepest).flatten(1)
        text = torch.relu(self.text_to_vision(self.organ_embedding))
        before_head = self.precls_conv(finest)
        samples = []
        for b in range(x.shape[0]):
            logits = []
            for k in range(text.shape[0]):
                theta = self.controller(torch.cat([image[b], text[k]]).view(1, -1, 1, 1, 1)).flatten()
                w1, w2, w3 = theta[:64].view(8, 8), theta[64:128].view(8, 8), theta[128:136]
                b1, b2, b3 = theta[136:144], theta[144:152], theta[152]
                y = torch.einsum("oc,cdhw->odhw", w1, before_head[b]) + b1.view(8, 1, 1, 1)
                y = torch.einsum("oc,cdhw->odhw", w2, y.relu()) + b2.view(8, 1, 1, 1)
                logits.append(torch.einsum("c,cdhw->dhw", w3, y.relu()) + b3)
            samples.append(torch.stack(logits))
        return torch.stack(samples)
