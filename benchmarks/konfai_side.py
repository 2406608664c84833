"""Segments one scan with KonfAI (Boussot et al., Apache-2.0), with the network of a MoME and 0 as the threshold.

KonfAI reads the scan, resamples it to the network's voxels, runs the network patch by patch with Gaussian weights,
resamples the logits back through the inverse of the first step and writes the masks, plane by plane where its memory
budget asks for that. It keeps logits in float16. Its Python API writes its result to a file, so the time of writing an
uncompressed file is part of its time. Written against KonfAI 1.8.7, which is imported here only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from konfai.api import predict
from konfai.data.transform.base import LocalityKind, Transform
from torch import Tensor, nn

from mome.processing import MoMEProcessor
from mome.volumes import Volume

# KonfAI makes the model from a name in its settings; the function of that name returns this one.
_made: list[nn.Module] = []


class OneOutput(nn.Module):
    """A network in the form that KonfAI calls: HU (B, 1, Z, Y, X) in, logits (B, P, Z, Y, X) out.

    Args:
        model: The MoME, whose weights KonfAI loads from a file that it is given.
        logits: Returns logits (B, P, D, H, W) of tiles (B, 1, D, H, W) in [0, 1].
        processor: Windows the HU.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor], processor: MoMEProcessor) -> None:
        super().__init__()
        self.model, self.logits, self.processor = model, logits, processor

    def forward(self, hu_B1ZYX: Tensor) -> Tensor:
        """Windows the HU and exchanges the axes, which SimpleITK gives from the last to the first."""
        tile = self.processor.window(hu_B1ZYX.float()).permute(0, 1, 4, 3, 2).contiguous()
        return self.logits(tile).permute(0, 1, 4, 3, 2)


class Threshold(Transform):
    """Logits to masks, uint8: 1 above 0."""

    locality = LocalityKind.POINTWISE

    def __call__(self, name: str, tensor: Tensor, cache_attribute: Any) -> Tensor:
        return (tensor > 0).to(torch.uint8)


def live_network() -> nn.Module:
    """The network that `prepare` was given."""
    return _made[0]


def prepare(folder: Path, scan: Volume, network: OneOutput) -> Path:
    """Writes the scan and the weights as KonfAI reads them; returns the file of the weights."""
    _made[:] = [network]
    case = folder / "dataset" / "case"
    case.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan.array.T))  # SimpleITK takes (k, j, i) …
    flip = np.diag([-1.0, -1.0, 1.0])  # … and LPS
    image.SetSpacing(scan.spacing)
    image.SetOrigin((flip @ scan.affine[:3, 3]).tolist())
    image.SetDirection((flip @ scan.affine[:3, :3] / np.array(scan.spacing)).ravel().tolist())
    sitk.WriteImage(image, case / "CT.mha")
    weights = folder / "weights.pt"
    state = {f"Model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"Model": {"live_network": state}}, weights)
    return weights


def segment(
    folder: Path,
    weights: Path,
    patch: tuple[int, int, int],
    spacing: list[float],
    *,
    overlap: int,
    memory_budget: str | None = None,
) -> Path:
    """Runs KonfAI and returns the file of the masks, uint8 (Z, Y, X, P) as SimpleITK reads them.

    Args:
        folder: The one given to `prepare`.
        weights: What `prepare` returned.
        patch: Voxels (D, H, W) of a patch of the network.
        spacing: Voxel size (x, y, z) of the network grid in mm.
        overlap: Voxels that neighbouring patches share.
        memory_budget: As KonfAI's settings have it, as in "1GiB"; None for KonfAI's choice.
    """
    resample = {"Resample": {"spacing": spacing, "fill": -1024.0, "interpolation": "linear"}}
    output = {
        "name_class": "OutputDataset",
        "dataset_filename": f"{folder / 'masks'}:mha",
        "group": "MASKS",
        "same_as_group": "CT:CT",
        "patch_combine": "Gaussian",
        "reduction": "Mean",
        "before_reduction_transforms": None,
        "after_reduction_transforms": None,
        "final_transforms": {"konfai_side:Threshold": {}},
    }
    settings = {
        "Predictor": {
            "Model": {
                "classpath": "konfai_side:live_network",
                "live_network": {
                    "in_channels": 1,
                    "dim": 3,
                    "outputs_criterions": None,
                    "ModelPatch": None,
                },
            },
            "Dataset": {
                "groups_src": {
                    "CT": {"groups_dest": {"CT": {"transforms": resample, "patch_transforms": None, "is_input": True}}}
                },
                "augmentations": None,
                "Patch": {
                    "patch_size": list(reversed(patch)),
                    "overlap": overlap,
                    "pad_value": -1024,
                    "extend_slice": 0,
                },
                "dataset_filenames": [f"{folder / 'dataset'}:mha"],
                "batch_size": 1,
                "num_workers": 0,
                "memory_budget": memory_budget,
            },
            "outputs_dataset": {"Model": {"OutputDataset": output}},
            "train_name": "mome",
            "autocast": False,
            "combine": "Mean",
        }
    }
    predict(weights, settings, quiet=True, overwrite=True, predictions_dir=folder / "predictions")
    return folder / "masks" / "case" / "MASKS.mha"


def read_masks(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Reads the file of `segment`: name → bool (i, j, k)."""
    array = sitk.GetArrayFromImage(sitk.ReadImage(path))
    return {name: array[..., index].T > 0 for index, name in enumerate(names)}
