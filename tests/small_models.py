"""Small random models that several files of tests use."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mome import MoME, MoMEConfig

_SMALL = {
    "encoder": "unet(channels=[8, 8, 16])",
    "text_encoder": "bank(width=12)",
    "labels": ["liver", "spleen", "aorta"],
    "dim": 8,
    "patch_size": [16, 16, 16],
}


def small(**overrides: object) -> MoME:
    """Of two scales and three labels, with an empty bank."""
    torch.manual_seed(0)
    return MoME(MoMEConfig(**{**_SMALL, **overrides})).eval()


def volume(side: int = 16, batch: int = 1) -> torch.Tensor:
    """What the model sees, (B, 1, D, H, W)."""
    return torch.rand(batch, 1, side, side, side, generator=torch.Generator().manual_seed(0))


def liver_and_spleen() -> MoME:
    """A smaller one with a bank, which calls itself trained on the liver."""
    torch.manual_seed(0)
    config = MoMEConfig(
        encoder="unet(channels=[4, 8])",
        text_encoder="bank(width=6)",
        head="dynamic(hidden=8)",
        labels=["liver", "spleen"],
        trained_labels=["liver"],
        dim=4,
        patch_size=[16, 16, 16],
    )
    model = MoME(config)
    model.text_bank.set(torch.randn(2, 6))
    return model


def remove_checksums(folder: Path) -> None:
    """Makes a saved checkpoint one of a writer that knows no checksums, so that a test may change its files."""
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        if values.pop("checksums", None) is not None:
            path.write_text(json.dumps(values))
