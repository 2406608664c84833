"""Two frozen segmentation networks as experts of one MoME, and a map of where the fusion trusts each of them.

One network sees patches of the chest alone, the other patches of the head and neck alone. Both know the spinal cord,
which runs through both regions; only the first knows the left lung, only the second the mandible. A small MoME with
both as `extra_experts` is then trained on whole scans: the networks stay as they are, and the fusion learns from the
image whom to trust for which prompt. All scans are synthetic (`mome.data.phantom`), so nothing is downloaded.

    python examples/whole_model_expert.py --out trust      # some minutes on two cores

The folder then holds `trust.png`, `dice.json` and the trained model. Load it with the same two networks again:
`MoME.from_pretrained("trust/model", extra_experts=[…])`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor

from mome import MoME, MoMEConfig, MoMEProcessor, WholeModel
from mome.data.phantom import phantom
from mome.losses.bce_dice import masked_bce_dice

LABELS = ["spinal_cord", "lung_left", "mandible"]
KNOWN = {"chest": ["spinal_cord", "lung_left"], "head": ["spinal_cord", "mandible"]}
SPACING, PATCH, SHOULDERS_MM = (5.0, 5.0, 5.0), 32, -60.0
PROCESSOR = MoMEProcessor(spacing=SPACING, hu_window=[-1000, 600])


class Scan:
    """A phantom on the network grid: the volume (1, D, H, W), targets (3, D, H, W), and the slice of the shoulders."""

    def __init__(self, seed: int) -> None:
        drawn = phantom(seed, spacing=SPACING, z_range=(-280.0, 150.0))
        sides = [-side % 8 for side in drawn.array.shape]
        pad = [(0, side) for side in sides]
        hu = np.pad(drawn.array, pad, constant_values=-1000.0)
        masks = [np.pad(drawn.masks.get(name, np.zeros(drawn.array.shape, bool)), pad) for name in LABELS]
        self.volume = PROCESSOR.window(torch.from_numpy(hu.copy()))[None]
        self.targets = torch.from_numpy(np.stack(masks)).float()
        self.shoulders = round((SHOULDERS_MM - drawn.affine[2, 3]) / SPACING[2])

    def patch(self, rng: np.random.Generator, region: str | None) -> tuple[Tensor, Tensor]:
        """A patch around a voxel of a random structure, from one region or from the whole scan."""
        sides = self.targets.shape[1:]
        low = {None: 0, "chest": 0, "head": self.shoulders}[region]
        high = {None: sides[2], "chest": self.shoulders, "head": sides[2]}[region]
        there = [voxels for mask in self.targets if len(voxels := mask[..., low:high].nonzero())]
        voxels = there[rng.integers(len(there))]
        centre = voxels[rng.integers(len(voxels))].tolist()
        if rng.random() < 0.3:  # anywhere, so that what holds no structure is seen too
            centre = [int(rng.integers(side)) for side in (*sides[:2], high - low)]
        ends = [(0, sides[0]), (0, sides[1]), (low, high)]
        start = [int(np.clip(c + a - PATCH // 2, a, b - PATCH)) for c, (a, b) in zip(centre, ends, strict=True)]
        where = (slice(None), *(slice(s, s + PATCH) for s in start))
        return self.volume[where], self.targets[where]


def batch(scans: list[Scan], rng: np.random.Generator, region: str | None) -> tuple[Tensor, Tensor]:
    pairs = [scans[rng.integers(len(scans))].patch(rng, region) for _ in range(2)]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def train_network(scans: list[Scan], region: str, steps: int) -> WholeModel:
    """A small U-Net of MONAI that sees one region alone, as a frozen expert."""
    torch.manual_seed(0)
    rng = np.random.default_rng(len(region))
    network = UNet(3, 1, len(KNOWN[region]), channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="instance")
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    chosen = [LABELS.index(name) for name in KNOWN[region]]
    for step in range(1, steps + 1):
        volume, targets = batch(scans, rng, region)
        loss = masked_bce_dice(network(volume), targets[:, chosen], None, positive_weight=20)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(f"{region} network", step, steps, loss)
    return WholeModel(network, KNOWN[region], spacing=SPACING, hu_window=PROCESSOR.hu_window, activation="sigmoid")


def train_fusion(scans: list[Scan], experts: list[WholeModel], steps: int) -> MoME:
    """A small MoME over both experts, trained on whole scans; only what is its own learns."""
    torch.manual_seed(0)
    config = MoMEConfig(
        encoder="unet(channels=[8, 16, 32], depth=1, decoder_depth=1)",
        text_encoder=f"bank(width={len(LABELS)})",
        experts="linear",
        fusion="cross_attention(tokens=4, dim=16)",  # its query reads all maps, so trust can follow the image
        head="dynamic(hidden=16, negative_slope=0.1)",
        labels=LABELS,
        trained_labels=LABELS,
        dim=8,
        patch_size=[PATCH] * 3,
        extra_experts=experts,
    )
    model = MoME(config)
    model.processor = PROCESSOR
    model.text_bank.set(torch.eye(len(LABELS)))
    rows = model.prompt_rows(model.text_bank.rows(LABELS), LABELS)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=6e-3), np.random.default_rng(1)
    model.train()
    for step in range(1, steps + 1):
        volume, targets = batch(scans, rng, None)
        loss = masked_bce_dice(model(volume, rows).logits, targets, None, positive_weight=20)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report("fusion", step, steps, loss)
    return model.eval()


def report(what: str, step: int, steps: int, loss: Tensor) -> None:
    if step % 25 == 0 or step == steps:
        print(f"{what}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def dice(mask: Tensor, truth: Tensor) -> float:
    return round(float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()).clamp(min=1)), 3)


def draw(scan: Scan, logits: Tensor, weights: Tensor, path: Path) -> None:
    """For each prompt: the plane with the truth (green) and the mask (yellow), and the weights of the three voices."""
    voices = {"chest network": weights[:, -2], "head network": weights[:, -1], "own scales": weights[:, :-2].sum(1)}
    figure, axes = plt.subplots(len(LABELS), 4, figsize=(13, 11), layout="constrained")
    for row, name in zip(range(len(LABELS)), LABELS, strict=True):
        truth = scan.targets[row]
        axis = 1 if name == "lung_left" else 0  # a coronal plane of the lung, sagittal ones of the others
        at = int(truth.sum(dim=[a for a in range(3) if a != axis]).argmax())
        cut = {"image": scan.volume[0], "truth": truth, "mask": (logits[row] > 0).float()}
        cut |= {voice: maps[row] for voice, maps in voices.items()}
        planes = {key: values.select(axis, at).T.numpy() for key, values in cut.items()}
        for panel, key in zip(axes[row], ["image", *voices], strict=True):
            panel.imshow(planes["image"], cmap="gray", origin="lower", vmin=0.4, vmax=0.8)
            if key != "image":
                shown = panel.imshow(planes[key], cmap="magma", origin="lower", vmin=0, vmax=1)
            panel.contour(planes["truth"], levels=[0.5], colors=["lime"], linewidths=1.2)
            if key == "image" and planes["mask"].any():
                panel.contour(planes["mask"], levels=[0.5], colors=["yellow"], linewidths=1.2, linestyles="dashed")
            panel.axhline(scan.shoulders, color="cyan", linestyle=":", linewidth=1)
            panel.set_title(f"{name}: {'truth and mask' if key == 'image' else key}", fontsize=10)
            panel.set_axis_off()
        figure.colorbar(shown, ax=axes[row, -1], label="weight in the fusion", shrink=0.8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("trust"))
    parser.add_argument("--steps", type=int, default=500, help="training steps of each network and of the fusion")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    scans, unseen = [Scan(seed) for seed in range(6)], Scan(99)
    experts = [train_network(scans, region, given.steps) for region in KNOWN]
    model = train_fusion(scans, experts, given.steps)
    with torch.no_grad():
        rows = model.prompt_rows(model.text_bank.rows(LABELS), LABELS)
        features = model.encode(unseen.volume[None])
        logits, weights = model.decode(features, rows)[0], model.fusion_weights(features, rows)[0]
        scores = {"fused": {n: dice(logits[i] > 0, unseen.targets[i] > 0) for i, n in enumerate(LABELS)}}
        for region, expert in zip(KNOWN, experts, strict=True):
            alone = expert(unseen.volume[None])[0]
            scores[f"{region} network"] = {
                n: dice(alone[i] > 0, unseen.targets[LABELS.index(n)] > 0) for i, n in enumerate(expert.names)
            }
    (given.out / "dice.json").write_text(json.dumps(scores, indent=1) + "\n")
    draw(unseen, logits, weights, given.out / "trust.png")
    model.save_pretrained(given.out / "model")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
