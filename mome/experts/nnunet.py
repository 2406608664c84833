"""A trained folder of nnU-Net v2 or TotalSegmentator as a whole-model expert, through the installed `nnunetv2`.

Written against nnunetv2 2.8.1 (MIC-DKFZ/nnUNet at e495086): `PlansManager`, `ConfigurationManager` and
`get_network_from_plans`. The plain network runs on the model's own patch; nnU-Net's mirroring, its own sliding window
and its postprocessing are left out.

`tests/test_whole_model_nnunet.py` compares the probabilities with those of `nnUNetPredictor` without mirroring
(< 1e-4), on folders that nnU-Net's own trainer wrote with random weights. It was run with nnunetv2 2.8.1,
dynamic-network-architectures 0.4.4, torch 2.14.1 and NumPy 2.4.6. The adapter was not run on a published folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.nnunet_plans import (
    NETWORKS,
    check_configuration,
    check_window,
    checked_arguments,
    checked_class,
    classes_of,
    read_intensities,
    spacing_xyz,
)
from mome.experts.whole_model import WholeModel, path_of
from mome.text_file import read_json

# nnU-Net keeps scores as NumPy numbers in its checkpoints. To rebuild a number runs no code of the file. The older name
# is that of NumPy 1.
_scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
_NUMBERS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]


class NNUNetNetwork(nn.Module):
    """The model's volume in, nnU-Net's logits out: HU and axes are those that nnU-Net expects.

    Args:
        network: nnU-Net's network.
        hu_window: The HU that 0 and 1 of the volume stand for.
        intensities: `mean`, `std`, `percentile_00_5` and `percentile_99_5` of nnU-Net's plans, in HU.
        transpose_forward: The order in which nnU-Net reads the axes (z, y, x).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        hu_window: Sequence[float],
        intensities: dict[str, float],
        transpose_forward: Sequence[int],
    ) -> None:
        super().__init__()
        self.network = network
        self.low, self.high = map(float, hu_window)
        self.intensities = {key: float(value) for key, value in intensities.items()}
        # our axes are (x, y, z), those of its reader (z, y, x)
        self.order = [2 - axis for axis in transpose_forward]
        self.settings = (self.low, self.high, sorted(self.intensities.items()), self.order)

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        hu = self.low + (self.high - self.low) * volume_BCDHW
        hu = hu.clamp(self.intensities["percentile_00_5"], self.intensities["percentile_99_5"])
        x = (hu - self.intensities["mean"]) / max(self.intensities["std"], 1e-8)
        maps = self.network(x.permute(0, 1, *[axis + 2 for axis in self.order]))
        back = [self.order.index(axis) + 2 for axis in range(3)]
        return maps.permute(0, 1, *back)


class MeanOfFolds(nn.Module):
    """The mean of the logits of several folds, as nnU-Net's predictor averages them."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        total = self.networks[0](x_BCDHW)
        for network in self.networks[1:]:
            total = total + network(x_BCDHW)
        return total / len(self.networks)


def nnunet_folder(
    path: str | Path,
    *,
    hu_window: Sequence[float],
    fold: int | str | Sequence[int | str] = 0,
    checkpoint: str = "checkpoint_final.pth",
    classes: Sequence[str] | None = None,
    orientation: str = "RAS",
) -> WholeModel:
    """Reads a folder that nnU-Net trained, with `plans.json`, `dataset.json` and `fold_<fold>/<checkpoint>`.

    The folder is one that the user names; no config and no checkpoint can name one. Its weights are read with
    `torch.load(weights_only=True)`, which runs no code of the file. Of the classes that `plans.json` names, only
    networks of `dynamic_network_architectures` and layers of torch are imported.

    Args:
        path: The folder, as in ".../nnUNetTrainer__nnUNetPlans__3d_fullres".
        hu_window: The HU window of the processor of the model that the expert becomes a part of, as in
            [-1024, 1600]. It covers the range that nnU-Net reads.
        fold: The number of the fold, or "all"; a list of numbers for the mean of their logits, which costs the time of
            all of them.
        checkpoint: The file inside the folder of the fold.
        classes: Other names for the classes of `dataset.json`, in the same order.
        orientation: The orientation of the scans that nnU-Net was trained on; nnU-Net itself does not look at it.
            TotalSegmentator brings its scans to RAS.

    Raises:
        InputError: `nnunetv2` is not installed, a file is missing, the weights cannot be read without running code,
            or the network is of a kind that is not supported: 2-D, a stage of a cascade, several channels, another
            normalisation than that of CT, or a window that cuts off HU which the network reads.
    """
    folder = path_of(path, "folder of nnU-Net")
    try:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError as error:
        raise InputError(
            f"an nnU-Net folder needs {getattr(error, 'name', None) or 'nnunetv2'}, which is not installed",
            where=str(path),
            hint="pip install nnunetv2",
        ) from error
    dataset = read_json(_file(folder, "dataset.json"), "the data set of the nnU-Net folder")
    plans = read_json(_file(folder, "plans.json"), "the plans of the nnU-Net folder")
    saved = {number: _weights(_file(folder, f"fold_{number}", checkpoint)) for number in _folds(fold)}
    name = _configuration_name(saved, plans, where=str(path))
    manager = PlansManager(plans)
    configuration = manager.get_configuration(name)
    check_configuration(configuration, dataset, where=f"{path}, configuration {name!r:.60}")
    names, activation = classes_of(dataset)
    networks = []
    for number, checkpoint_of_fold in saved.items():
        network = get_network_from_plans(
            checked_class(configuration.network_arch_class_name, NETWORKS),
            checked_arguments(configuration),
            configuration.network_arch_init_kwargs_req_import,
            1,
            len(names),
            allow_init=False,
            deep_supervision=False,
        )
        try:
            network.load_state_dict(checkpoint_of_fold["network_weights"])
        except RuntimeError as error:
            trainer = checkpoint_of_fold.get("trainer_name")
            raise InputError(
                f"the weights of fold {number} do not fit the network of plans.json; trainer {trainer!r:.60} may build "
                "another one",
                where=str(path),
                hint="build the network yourself and pass WholeModel(network, classes, spacing=…)",
            ) from error
        networks.append(network)
    intensities = manager.foreground_intensity_properties_per_channel["0"]
    check_window(hu_window, intensities, where=str(path))
    adapter = NNUNetNetwork(
        networks[0] if len(networks) == 1 else MeanOfFolds(networks),
        hu_window=hu_window,
        intensities=read_intensities(intensities),
        transpose_forward=manager.transpose_forward,
    )
    return WholeModel(
        adapter,
        names if classes is None else classes,
        spacing=spacing_xyz(configuration.spacing, manager.transpose_forward),
        orientation=orientation,
        hu_window=hu_window,
        activation=activation,
        kind="nnunet",
    )


def _folds(fold: Any) -> list[int | str]:
    """The folds to read, in the order given, each once.

    Raises:
        InputError: There is none, or one is neither a number nor "all".
    """
    given = list(fold) if isinstance(fold, list | tuple) else [fold]
    folds = [int(one) if isinstance(one, str) and one.isdecimal() else one for one in given]
    if not folds or not all(one == "all" or (type(one) is int and one >= 0) for one in folds):
        raise InputError(
            f'fold is a number, "all" or a list of these, got {fold!r:.60}', hint="fold=0, or fold=[0, 1, 2, 3, 4]"
        )
    return list(dict.fromkeys(folds))


def _configuration_name(saved: dict[int | str, dict[str, Any]], plans: dict[str, Any], where: str) -> str:
    """The configuration that all folds were trained with.

    Raises:
        InputError: They differ, or plans.json has no such configuration.
    """
    names = {fold: checkpoint["init_args"]["configuration"] for fold, checkpoint in saved.items()}
    (first, name), *others = names.items()
    for fold, other in others:
        if other != name:
            raise InputError(
                f"fold {fold} was trained with configuration {other!r:.60}, fold {first} with {name!r:.60}",
                where=where,
                hint="folds of one configuration",
            )
    known = list(plans.get("configurations", {}))
    if name not in known:
        raise InputError(
            f"plans.json has no configuration {name!r:.60}, which the checkpoint was trained with",
            where=where,
            hint=f"the plans.json of the same training; this one has {', '.join(known) or 'none'}",
        )
    return name


def _file(folder: Path, *parts: str) -> Path:
    file = folder.joinpath(*parts)
    if not file.is_file():
        raise InputError(
            f"the nnU-Net folder has no {'/'.join(parts)}",
            where=str(folder),
            hint="a folder such as nnUNetTrainer__nnUNetPlans__3d_fullres; fold= and checkpoint= choose the weights",
        )
    return file


def _weights(file: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code of it.

    Raises:
        InputError: It holds more than tensors and plain values, or lacks what nnU-Net writes.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors of several types
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(
            f"the checkpoint cannot be read without running code of it: {first}",
            where=str(file),
            hint="where you trust it, save network_weights, init_args and trainer_name of it anew with torch.save",
        ) from error
    contents = saved if isinstance(saved, dict) else {}
    weights, arguments = contents.get("network_weights"), contents.get("init_args")
    if not isinstance(weights, dict) or not isinstance(arguments, dict) or "configuration" not in arguments:
        raise InputError("the checkpoint lacks network_weights or init_args of nnU-Net", where=str(file))
    if not isinstance(arguments["configuration"], str):
        raise InputError("init_args of the checkpoint name no configuration of nnU-Net", where=str(file))
    return contents
