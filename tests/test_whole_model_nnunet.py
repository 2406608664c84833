"""The adapter of nnU-Net's folders: axes, normalisation and classes, against nnU-Net itself where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from small_models import small
from torch import nn

from mome.errors import InputError
from mome.experts import nnunet, nnunet_plans
from mome.processing import MoMEProcessor

HAS_NNUNET = importlib.util.find_spec("nnunetv2") is not None
needs_nnunet = pytest.mark.skipif(
    not HAS_NNUNET, reason="nnunetv2 is not installed: the adapter was not run on a folder"
)
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
        nnunet.checked_class(name, nnunet_plans.NETWORKS)
    with pytest.raises(InputError, match="which is not imported"):
        nnunet.checked_class("os.system", nnunet_plans.ARGUMENTS)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"init_args": None},
        {"init_args": 3},
        {"init_args": ["configuration"]},
        {"init_args": {"configuration": ["3d_fullres"]}},
        {"init_args": {"configuration": {}}},
        {"network_weights": None},
        {"network_weights": [torch.ones(2)]},
    ],
)
def test_damaged_checkpoints_are_the_users_to_mend(tmp_path: Path, changes: dict[str, Any]) -> None:
    good = {"network_weights": {"w": torch.ones(2)}, "init_args": {"configuration": "3d_fullres"}}
    torch.save({**good, **changes}, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match="network_weights or init_args|name no configuration"):
        nnunet._weights(tmp_path / "checkpoint.pth")


@pytest.mark.skipif(HAS_NNUNET, reason="nnunetv2 is installed")
def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an nnU-Net folder needs nnunetv2, which is not installed"):
        nnunet.nnunet_folder(tmp_path, hu_window=[-1000, 1000])


# -- against nnU-Net itself, where it is installed --------------------------------------------------------------------

HU_WINDOW = [-1000.0, 1000.0]
LABELS = {"spleen": 2, "background": 0, "liver": 1}  # not in the order of the maps
REGIONS = {"background": 0, "kidney_left": [1, 2], "kidney_right": 2}
# The keys of older plans.json files, which nnU-Net converts, for the same network as `ARCHITECTURE`.
OLD_ARCHITECTURE = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "num_pool_per_axis": [2, 2, 1],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3], [3, 3, 1], [3, 3, 3]],
}
ARCHITECTURE = {
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": OLD_ARCHITECTURE["conv_kernel_sizes"],
            "strides": OLD_ARCHITECTURE["pool_op_kernel_sizes"],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
}
RESAMPLING = "resample_data_or_seg_to_shape"
KEYWORDS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def plans_of(transpose: list[int], architecture: dict) -> dict:
    """The plans of a data set whose voxels are 3 × 2 × 1.5 mm in (z, y, x), on patches of 8 × 12 × 16 voxels."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [[8, 12, 16][axis] for axis in transpose],
        "spacing": [[3.0, 2.0, 1.5][axis] for axis in transpose],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_data_kwargs": KEYWORDS,
        "resampling_fn_seg_kwargs": {**KEYWORDS, "is_seg": True},
        "batch_dice": False,
        **architecture,
    }
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": transpose,
        "transpose_backward": np.argsort(transpose).tolist(),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
        "configurations": {"3d_fullres": configuration},
    }


def write_folder(folder: Path, plans: dict, labels: dict, folds: int) -> None:
    """Writes what nnU-Net's trainer writes: the checkpoints come from its own `save_checkpoint`."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    dataset = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}
    if labels is REGIONS:
        dataset["regions_class_order"] = [1, 2]
    folder.mkdir(exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for fold in range(folds):
        torch.manual_seed(fold)
        given = {**copy.deepcopy(plans), "continue_training": False}
        trainer = nnUNetTrainer(given, "3d_fullres", fold, dataset, torch.device("cpu"))
        heads = trainer.label_manager.num_segmentation_heads
        trainer.network = trainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, heads, enable_deep_supervision=True
        )
        trainer.optimizer, _ = trainer.configure_optimizers()
        sum(maps.square().mean() for maps in trainer.network(torch.randn(2, 1, *plan_patch(plans)))).backward()
        trainer.optimizer.step()  # the checkpoint then holds moments
        trainer.logger.log("mean_fg_dice", np.mean([0.5, 0.7]), 0)
        trainer.logger.log("val_losses", np.float32(0.25), 0)
        trainer._best_ema = np.float64(0.6)
        trainer.inference_allowed_mirroring_axes = (0, 1, 2)
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        trainer.save_checkpoint(str(folder / f"fold_{fold}/checkpoint_final.pth"))


def plan_patch(plans: dict) -> list[int]:
    return plans["configurations"]["3d_fullres"]["patch_size"]


def write_scan(path: Path) -> np.ndarray:
    """A scan of 16 × 12 × 8 voxels on RAS axes, with HU beyond those that nnU-Net keeps; returns the HU (x, y, z)."""
    hu = np.random.default_rng(0).normal(50, 250, (16, 12, 8)).clip(-1000, 1000).astype(np.float32)
    nib.save(nib.Nifti1Image(hu, np.diag([1.5, 2.0, 3.0, 1.0])), path)
    return hu


def predictor_of(folder: Path, folds: tuple[int, ...]) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, use_gaussian=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=folds)
    return predictor


@needs_nnunet
@pytest.mark.parametrize(
    ("transpose", "architecture", "labels", "folds"),
    [
        ([0, 1, 2], ARCHITECTURE, LABELS, (0,)),
        ([1, 0, 2], ARCHITECTURE, LABELS, (0, 1)),
        ([2, 0, 1], OLD_ARCHITECTURE, LABELS, (1,)),
        ([0, 1, 2], OLD_ARCHITECTURE, REGIONS, (0, 1)),
    ],
    ids=["one fold", "two folds, other axes", "old plans, cyclic axes", "old plans, regions, two folds"],
)
def test_probabilities_are_those_of_nnunets_own_predictor(
    transpose: list[int], architecture: dict, labels: dict, folds: tuple[int, ...],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """nnU-Net reads the file, preprocesses and predicts; the expert gets the model's volume of the same scan."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    folder, hu = tmp_path / "trained", write_scan(tmp_path / "ct.nii.gz")
    write_folder(folder, plans_of(transpose, architecture), labels, folds=2)
    predictor = predictor_of(folder, folds)
    image, properties = SimpleITKIO().read_images([str(tmp_path / "ct.nii.gz")])
    preprocessor = predictor.configuration_manager.preprocessor_class()
    data, _, _ = preprocessor.run_case_npy(
        image, None, properties, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    with torch.inference_mode():  # one patch; the average over folds is that of its predict_logits_…
        single = []
        for parameters in predictor.list_of_parameters:
            predictor.network.load_state_dict(parameters)
            predictor.network.eval()
            single.append(predictor._internal_maybe_mirror_and_predict(torch.as_tensor(data)[None])[0])
        logits = torch.stack(single).mean(0)
        half = predictor.predict_logits_from_preprocessed_data(torch.as_tensor(data))  # keeps its sums in float16
    assert (half - logits).abs().max() < 3e-3 * logits.abs().max()
    want = predictor.label_manager.apply_inference_nonlin(logits)
    want = want.permute(0, *[1 + axis for axis in predictor.plans_manager.transpose_backward])  # classes, z, y, x

    expert = nnunet.nnunet_folder(folder, hu_window=HU_WINDOW, fold=folds if len(folds) > 1 else folds[0])
    volume = MoMEProcessor(spacing=[1.5, 2.0, 3.0], hu_window=HU_WINDOW).window(torch.from_numpy(hu))[None, None]
    maps = expert.run(volume)[0]
    got = maps.softmax(0) if expert.activation == "softmax" else maps.sigmoid()
    assert (got.permute(0, 3, 2, 1) - want).abs().max() < 1e-4
    assert want.std() > 0.05  # probabilities that hardly vary would agree in any order
    # our order of the labels is that of nnU-Net's numbers, and `forward` gives each of them against the rest
    order = sorted(labels, key=lambda name: labels[name]) if labels is LABELS else list(labels)[1:]
    assert expert.classes == tuple(order) and expert.spacing == [1.5, 2.0, 3.0]
    names = [name for name in order if name != "background"]
    probabilities = torch.stack([want[order.index(name)] for name in names]).permute(0, 3, 2, 1)
    assert expert.names == tuple(names)
    torch.testing.assert_close(expert(volume)[0].sigmoid(), probabilities, rtol=0, atol=1e-4)
    expert.check_output(1, [16, 12, 8])


@needs_nnunet
def test_a_folder_becomes_a_part_of_a_model_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    folder = tmp_path / "trained"
    write_folder(folder, plans_of([0, 1, 2], ARCHITECTURE), LABELS, folds=2)
    load = partial(nnunet.nnunet_folder, folder, hu_window=HU_WINDOW)
    model = small(extra_experts=[load()], patch_size=[16, 16, 16])
    model.text_bank.set(torch.randn(3, 12))
    model.processor = MoMEProcessor(spacing=[1.5, 2.0, 3.0], hu_window=HU_WINDOW)
    rows = model.prompt_rows(model.text_bank.rows(["liver", "spleen", "aorta"]), ["liver", "spleen", "aorta"])
    assert rows[:, -1].tolist() == [1, 2, 0]
    assert model(torch.rand(1, 1, 16, 16, 16), rows).logits.isfinite().all()
    with pytest.raises(InputError, match="trained on voxels of 1.5 × 2 × 3 mm, the model's processor makes"):
        model.processor = MoMEProcessor(spacing=[1.5, 1.5, 3.0], hu_window=HU_WINDOW)
    with pytest.raises(InputError, match="the nnU-Net folder has no fold_4/checkpoint_final.pth") as caught:
        load(fold=[0, 4])
    assert "fold=" in str(caught.value)
    for wrong in ([], "../fold_0", -1, True, 0.5, None, [0, "best"]):
        with pytest.raises(InputError, match='fold is a number, "all" or a list of these'):
            load(fold=wrong)
    assert len(load(fold=["0", 1, 0]).network.network.networks) == 2

    file = folder / "fold_0/checkpoint_final.pth"
    saved = torch.load(file, weights_only=False)
    # what nnU-Net itself would read and run
    torch.save({**saved, "logging": Evil()}, file)
    with pytest.raises(InputError, match="cannot be read without running code of it") as caught:
        load(fold=[1, 0])
    assert "fold_0" in str(caught.value)
    # folds of two configurations are not averaged
    torch.save({**saved, "init_args": {**saved["init_args"], "configuration": "3d_lowres"}}, file)
    with pytest.raises(InputError, match="fold 0 was trained with configuration '3d_lowres', fold 1 with '3d_fullres'"):
        load(fold=[1, 0])
    with pytest.raises(InputError, match="plans.json has no configuration '3d_lowres'"):
        load(fold=0)
    torch.save({**saved, "network_weights": {"other": torch.ones(1)}}, file)
    with pytest.raises(InputError, match="the weights of fold 0 do not fit the network of plans.json"):
        load(fold=0)
