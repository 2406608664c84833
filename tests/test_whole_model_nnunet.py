"""The adapter of nnU-Net's folders: axes, normalisation, classes, and a minimal folder where nnunetv2 is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mome.errors import InputError
from mome.experts import nnunet

HAS_NNUNET = importlib.util.find_spec("nnunetv2") is not None
INTENSITIES = {"mean": 50.0, "std": 100.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0}


def test_hu_and_axes_are_those_of_nnunet() -> None:
    """Against the steps of nnU-Net: an array (z, y, x), its transpose_forward, clip, subtract, divide."""
    seen = []
    inner = nn.Module()
    inner.forward = lambda x: seen.append(x) or torch.cat([x, 2 * x], dim=1)
    adapter = nnunet.NNUNetNetwork(inner, hu_window=[-1000, 1000], intensities=INTENSITIES, transpose_forward=[1, 0, 2])
    volume = torch.rand(1, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0))  # x, y, z
    maps = adapter(volume)
    image = (volume[0, 0].numpy() * 2000 - 1000).transpose(2, 1, 0)  # z, y, x, as SimpleITK reads it
    image = (np.clip(image.transpose(1, 0, 2), -200, 300) - 50) / 100
    np.testing.assert_allclose(seen[0][0, 0].numpy(), image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(maps[0, 1].numpy(), (2 * image).transpose(1, 0, 2).transpose(2, 1, 0), atol=1e-4)


@pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_spacing_is_brought_back_from_the_transposed_order(transpose: list[int]) -> None:
    zyx = np.array([3.0, 2.0, 1.0])
    assert nnunet.spacing_xyz(zyx[transpose].tolist(), transpose) == [1.0, 2.0, 3.0]


def test_classes_are_in_the_order_of_the_maps() -> None:
    labels = {"spleen": 2, "background": 0, "liver": 1, "ignore": 3}
    assert nnunet.classes_of({"labels": labels}) == (["background", "liver", "spleen"], "softmax")
    regions = {"background": 0, "liver": [1, 2], "liver tumor": 2, "ignore": 3}
    assert nnunet.classes_of({"labels": regions}) == (["liver", "liver tumor"], "sigmoid")


def configuration(**changes: object) -> SimpleNamespace:
    values = {"patch_size": [8, 8, 8], "previous_stage_name": None, "normalization_schemes": ["CTNormalization"]}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "channels", "words"),
    [
        ({"patch_size": [8, 8]}, 1, "is 2-D"),
        ({"previous_stage_name": "3d_lowres"}, 1, "is a stage of a cascade"),
        ({}, 2, "reads 2 channels"),
        ({"normalization_schemes": ["ZScoreNormalization"]}, 1, "normalises by .*ZScoreNormalization.*, not as CT"),
    ],
)
def test_other_configurations_are_refused(changes: dict, channels: int, words: str) -> None:
    dataset = {"channel_names": {str(i): "CT" for i in range(channels)}}
    nnunet.check_configuration(configuration(), {"channel_names": {"0": "CT"}}, "here")
    with pytest.raises(InputError, match=words):
        nnunet.check_configuration(configuration(**changes), dataset, "here")


def test_a_window_that_cuts_off_hu_is_refused() -> None:
    nnunet.check_window([-200, 300], INTENSITIES, "here")
    with pytest.raises(InputError, match=r"nnU-Net reads -200 to 300 HU, the window \[-150, 300\] cuts some of it off"):
        nnunet.check_window([-150, 300], INTENSITIES, "here")


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Conv3d", "dynamic_network_architectures_evil.x", 7])
def test_plans_import_no_class_of_another_package(name: object) -> None:
    with pytest.raises(InputError, match=r"plans.json names the class .* which is not imported"):
        nnunet.checked_class(name, nnunet._NETWORKS)
    with pytest.raises(InputError, match="which is not imported"):
        nnunet.checked_class("os.system", nnunet._ARGUMENTS)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_weights_are_read_without_running_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        "network_weights": {"w": torch.ones(2)},
        "init_args": {"configuration": "3d_fullres", "device": torch.device("cpu")},
        "_best_ema": np.float64(0.5),
        "logging": {"mean_fg_dice": [np.float32(0.1), 0.2]},
    }
    torch.save(good, tmp_path / "good.pth")
    assert nnunet._weights(tmp_path / "good.pth")["_best_ema"] == 0.5
    torch.save({**good, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read without running code of it"):
        nnunet._weights(tmp_path / "evil.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="lacks network_weights or init_args"):
        nnunet._weights(tmp_path / "other.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.skipif(HAS_NNUNET, reason="nnunetv2 is installed")
def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an nnU-Net folder needs nnunetv2, which is not installed"):
        nnunet.nnunet_folder(tmp_path, hu_window=[-1000, 1000])


PLANS = {
    "dataset_name": "Dataset001_Test",
    "plans_name": "nnUNetPlans",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
    "configurations": {
        "3d_fullres": {
            "patch_size": [16, 16, 16],
            "spacing": [3.0, 2.0, 1.5],
            "normalization_schemes": ["CTNormalization"],
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2,
                    "features_per_stage": [4, 8],
                    "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
                    "strides": [[1, 1, 1], [2, 2, 2]],
                    "n_conv_per_stage": [1, 1],
                    "n_conv_per_stage_decoder": [1],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    },
}


@pytest.mark.skipif(not HAS_NNUNET, reason="nnunetv2 is not installed: the adapter was not run on a folder here")
def test_a_minimal_folder_becomes_an_expert(tmp_path: Path) -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = PLANS["configurations"]["3d_fullres"]["architecture"]
    network = get_network_from_plans(
        *(architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")),
        1, 3, deep_supervision=False,
    )  # fmt: skip
    dataset = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "channel_names": {"0": "CT"}}
    (tmp_path / "plans.json").write_text(json.dumps(PLANS))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    (tmp_path / "fold_0").mkdir()
    saved = {"network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres"}}
    torch.save({**saved, "trainer_name": "nnUNetTrainer"}, tmp_path / "fold_0/checkpoint_final.pth")
    expert = nnunet.nnunet_folder(tmp_path, hu_window=[-1000, 1000])
    assert expert.classes == ("background", "liver", "spleen") and expert.spacing == [1.5, 2.0, 3.0]
    expert.check_output(1, [16, 16, 16])
    x = torch.rand(1, 1, 16, 16, 16)
    hu = ((x * 2000 - 1000).clamp(-200, 300) - 50) / 100
    with torch.no_grad():
        want = network.eval()(hu.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    torch.testing.assert_close(expert.run(x), want)
