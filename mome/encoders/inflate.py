"""Turns a 2D convolutional network of timm into a 3D one (I3D, Carreira and Zisserman 2017, arXiv 1705.07750).

A kernel is repeated along the third axis and divided by the number of repetitions, so that a volume whose slices are
all the same gives the features of one slice, apart from the borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError

# Modules that compute the same for maps of two and three dimensions. Classes of timm go by their qualified names.
_CONTAINERS = {
    "timm.models._features.FeatureListNet",
    "timm.models.resnet.BasicBlock",
    "timm.models.resnet.Bottleneck",
    "timm.models.regnet.Bottleneck",
    "timm.models.regnet.RegStage",
    "timm.models.densenet.DenseBlock",
    "timm.models.densenet.DenseLayer",
    "timm.models.densenet.DenseTransition",
    "timm.layers.conv_bn_act.ConvNormAct",
    "timm.layers.drop.DropPath",
}
_ANY_DIMENSION = (nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU,
                  nn.GELU, nn.ELU, nn.Hardswish)  # fmt: skip
HINT = "mode='slices', or a network such as resnet18, resnext50_32x4d, regnetx_002, densenet121 or vgg11_bn"


def inflate(network: nn.Module, axis: int, name: str) -> nn.Module:
    """Replaces the 2D layers of a network by 3D ones of the same names; the network itself is changed.

    Args:
        network: A network of timm with `features_only=True`.
        axis: The axis of a map (D, H, W) along which kernels are repeated.
        name: The model's name, for the message.

    Raises:
        InputError: A layer of the network is not known to work in three dimensions, such as attention, squeeze and
            excitation, or a norm over channels.
    """
    unknown = {
        path: type(module).__name__
        for path, module in network.named_modules()
        if not (_is_inflatable(module) or type(module) in _ANY_DIMENSION or _qualified(module) in _CONTAINERS)
    }
    if unknown:
        path = next((path for path in unknown if path), "")  # a layer says more than the network around it
        raise InputError(
            f"the timm model '{name}' cannot be inflated to 3D: it has a layer of class {unknown[path]}",
            where=path or None,
            hint=HINT,
        )
    for path, module in list(network.named_modules()):
        if _is_inflatable(module):
            parent_path, _, child = path.rpartition(".")
            network.get_submodule(parent_path).register_module(child, _inflated(module, axis, name))
    return network


def inflated_kernels(network: nn.Module, axis: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the state of a 2D network as the state of its inflated form.

    Args:
        network: The 2D network.
        axis: See `inflate`.
    """
    kernels = {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    for key, tensor in network.state_dict().items():
        if key in kernels:
            size = max(tensor.shape[2:])
            tensor = (tensor / size).unsqueeze(2 + axis)
            tensor = tensor.expand(*tensor.shape[: 2 + axis], size, *tensor.shape[3 + axis :])
        yield key, tensor


class _BatchNormAct3d(nn.BatchNorm3d):
    """timm's batch norm that is followed by dropout and an activation."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_inflatable(module: nn.Module) -> bool:
    return _qualified(module) == "timm.layers.norm_act.BatchNormAct2d" or type(module) in (
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.MaxPool2d,
        nn.AvgPool2d,
    )


def _inflated(module: nn.Module, axis: int, name: str) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise InputError(f"the timm model '{name}' has a convolution with its own padding", hint=HINT)
        return nn.Conv3d(
            module.in_channels,
            module.out_channels,
            _third(module.kernel_size, axis),
            stride=_third(module.stride, axis),
            padding=_third(module.padding, axis),
            dilation=_third(module.dilation, axis),
            groups=module.groups,
            bias=module.bias is not None,
        )
    if type(module) is nn.BatchNorm2d:
        return nn.BatchNorm3d(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
    if isinstance(module, nn.MaxPool2d):
        return nn.MaxPool3d(
            _number(module.kernel_size),
            _number(module.stride),
            _number(module.padding),
            _number(module.dilation),
            ceil_mode=module.ceil_mode,
        )
    if isinstance(module, nn.AvgPool2d):
        return nn.AvgPool3d(
            _number(module.kernel_size),
            _number(module.stride),
            _number(module.padding),
            module.ceil_mode,
            module.count_include_pad,
        )
    with torch.device(next(module.parameters()).device):
        return _BatchNormAct3d(module)


def _third(pair: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """The two numbers of a plane with the larger one inserted at `axis`."""
    first, second = pair
    numbers = [first, second]
    numbers.insert(axis, max(pair))
    return numbers[0], numbers[1], numbers[2]


def _number(size: int | tuple[int, int]) -> int:
    """The size of a pooling window, which is a number or two equal ones in the networks that are inflated."""
    if isinstance(size, int):
        return size
    if size[0] != size[1]:
        raise InputError(f"a pooling window of {size[0]} × {size[1]} cannot be inflated to 3D", hint=HINT)
    return size[0]
