"""Two frozen segmentation networks as experts of one MoME, and a map of where the fusion trusts each of them.

Both networks segment the spinal cord, the esophagus and the trachea. One has seen the chest alone, the other the neck
and head alone, and each of them fails in the region that it has not seen. A small MoME with both as `extra_experts` is
then trained on whole scans. The networks stay as they are; the fusion learns from the image whom to trust where. It
is never told where the border of the regions lies. All scans are synthetic (`mome.data.phantom`), so nothing is
downloaded.

    python examples/whole_model_expert.py --out trust      # two to three minutes on two free cores

The folder then holds `trust.png`, `results.json`, both networks and the trained model. What is there already is not
trained again. Load the model with the same two networks: `MoME.from_pretrained("trust/model", extra_experts=[…])`.

How to read the picture: for the trachea the trust changes at the border, from the chest network below to the head
network above. For the spinal cord the weights stay near one third each, and the fused mask is still better than either
network's, because the fusion and the head learn to combine them. The head network sees only the upper end of the
esophagus and does not learn it, so the fusion prefers the other one everywhere. Away from a structure the weights mean
little. Whole-scan Dice of the fused model on five unseen phantoms: 0.79 spinal cord, 0.51 esophagus, 0.83 trachea; of
the better network alone: 0.53, 0.51, 0.67 (benchmarks/results/whole_model_expert.json).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from monai.networks.nets import UNet
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mome import MoME, MoMEConfig, MoMEProcessor, WholeModel
from mome.data.phantom import PHANTOM_VERSION, phantom
from mome.losses.bce_dice import masked_bce_dice

LABELS = ["spinal_cord", "esophagus", "trachea"]  # each of them runs through both regions
REGIONS = ["chest", "head"]
SPACING, FIELD, FIELD_MM = (6.0, 6.0, 6.0), (40, 32), (-120.0, -104.0)
SLAB, BORDER_MM = 24, -95.0  # the border is at the shoulders
# colours of Okabe and Ito, which colour-blind readers tell apart; line styles say the same
COLOURS = {"chest network": "#0072B2", "head network": "#E69F00", "own scales": "#000000"}
STYLES = {"chest network": "solid", "head network": "dashed", "own scales": "dotted"}
TRUTH, FUSED = "#F0E442", "#CC79A7"
PROCESSOR = MoMEProcessor(spacing=SPACING, hu_window=[-1000, 600])


class Scan:
    """A phantom on the network grid: the volume (1, D, H, W), targets (P, D, H, W), and the plane of the border."""

    def __init__(self, seed: int) -> None:
        drawn = phantom(seed, spacing=SPACING, z_range=(-280.0, 152.0))
        # 240 × 192 mm around the midline, where the structures are
        starts = [round((mm - drawn.affine[axis, 3]) / SPACING[axis]) for axis, mm in enumerate(FIELD_MM)]
        where = tuple(slice(start, start + side) for start, side in zip(starts, FIELD, strict=True))
        absent = np.zeros(drawn.array.shape, bool)
        self.volume = PROCESSOR.window(torch.from_numpy(drawn.array[where].copy()))[None]
        masks = [drawn.masks.get(name, absent)[where] for name in LABELS]
        self.targets = torch.from_numpy(np.stack(masks)).float()
        self.border = round((BORDER_MM - drawn.affine[2, 3]) / SPACING[2])

    def planes(self, region: str | None) -> tuple[int, int]:
        """The first plane of a region and the one behind its last; of the whole scan for None."""
        end = self.targets.shape[3]
        return {"chest": (0, self.border), "head": (self.border, end)}.get(region or "", (0, end))

    def slab(self, rng: np.random.Generator, region: str | None) -> tuple[Tensor, Tensor]:
        """A batch of one: `SLAB` neighbouring axial planes that all lie in one region, or anywhere for None."""
        low, high = self.planes(region)
        start = int(rng.integers(low, high - SLAB + 1))
        return self.volume[None, ..., start : start + SLAB], self.targets[None, ..., start : start + SLAB]


def fit(
    what: str,
    model: torch.nn.Module,
    run: Callable[[Tensor], Tensor],
    scans: list[Scan],
    region: str | None,
    steps: int,
) -> None:
    """Trains a model on slabs of a region; `run` turns a batch of volumes into logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        volume, targets = scans[rng.integers(len(scans))].slab(rng, region)
        loss = masked_bce_dice(run(volume), targets, None, positive_weight=4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"{what}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def network(scans: list[Scan], region: str, steps: int, folder: Path) -> WholeModel:
    """A small U-Net of MONAI that has seen one region alone, as a frozen expert; the folder keeps it."""
    torch.manual_seed(0)
    net = UNet(3, 1, len(LABELS), channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch")
    recipe = {"region": region, "steps": str(steps), "scans": str(len(scans)), "phantom": str(PHANTOM_VERSION)}
    file = folder / f"{region}.safetensors"
    if file.exists() and (saved := safe_open(file, "pt")).metadata() == recipe:
        net.load_state_dict({key: saved.get_tensor(key) for key in saved.keys()})
    else:
        fit(f"{region} network", net, net, scans, region, steps)
        save_file(net.state_dict(), file, recipe)
    return WholeModel(net, LABELS, spacing=SPACING, hu_window=PROCESSOR.hu_window, activation="sigmoid")


def fused_model(scans: list[Scan], experts: list[WholeModel], steps: int, folder: Path) -> MoME:
    """A small MoME over both experts, trained on whole scans; only what is its own learns. The folder keeps it."""
    recipe = {"steps": steps, "scans": len(scans), "experts": [expert.reference()["sha256"] for expert in experts]}
    record = folder / "fusion.json"
    if record.exists() and json.loads(record.read_text()) == recipe:
        return MoME.from_pretrained(folder / "model", extra_experts=experts).eval()
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
        patch_size=[*FIELD, SLAB],
        extra_experts=experts,
    )
    model = MoME(config)
    model.processor = PROCESSOR
    model.text_bank.set(torch.eye(len(LABELS)))
    fit("fusion", model.train(), lambda volume: model(volume, rows(model)).logits, scans, None, steps)
    model.save_pretrained(folder / "model")
    record.write_text(json.dumps(recipe) + "\n")
    return model.eval()


def rows(model: MoME) -> Tensor:
    return model.prompt_rows(model.text_bank.rows(LABELS), LABELS)


@torch.no_grad()
def in_slabs(run: Callable[[Tensor], Tensor], volume: Tensor) -> Tensor:
    """The mean of what `run` returns for overlapping slabs of the size that was trained on: (…, D, H, W)."""
    total, count = None, torch.zeros(volume.shape[-1])
    for start in range(0, volume.shape[-1] - SLAB + 1, SLAB // 2):
        part = run(volume[None, ..., start : start + SLAB])[0]
        total = part.new_zeros(*part.shape[:-1], volume.shape[-1]) if total is None else total
        total[..., start : start + SLAB] += part
        count[start : start + SLAB] += 1
    return total / count


def dice(mask: Tensor, truth: Tensor) -> float:
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()).clamp(min=1))


class Seen:
    """What both networks, their mean and the fused model say of one scan, and the weights of the fusion."""

    def __init__(self, scan: Scan, experts: list[WholeModel], model: MoME) -> None:
        chest, head = (in_slabs(expert, scan.volume) for expert in experts)
        fused = in_slabs(lambda volume: model(volume, rows(model)).logits, scan.volume)
        weights = in_slabs(lambda volume: model.fusion_weights(model.encode(volume), rows(model)), scan.volume)
        self.scan = scan
        self.logits = {"chest network": chest, "head network": head, "mean of both": (chest + head) / 2, "fused": fused}
        self.weights = {
            "chest network": weights[:, -2],
            "head network": weights[:, -1],
            "own scales": weights[:, :-2].sum(1),
        }

    def dice(self, who: str, label: int, region: str | None) -> float:
        where = slice(*self.scan.planes(region))
        return dice(self.logits[who][label, ..., where] > 0, self.scan.targets[label, ..., where] > 0)

    def trust(self, who: str, label: int, region: str) -> float:
        """The mean weight at the voxels of a structure in a region."""
        where = slice(*self.scan.planes(region))
        return float(self.weights[who][label, ..., where][self.scan.targets[label, ..., where] > 0].mean())


def measured(seen: list[Seen]) -> dict:
    """Dice and weights over all unseen scans, each as mean, lowest and highest."""

    def spread(values: list[float]) -> list[float]:
        return [round(float(number), 3) for number in (np.mean(values), min(values), max(values))]

    return {
        name: {
            f"{what} {region or 'whole scan'}": {who: spread([get(s, who, i, region) for s in seen]) for who in whose}
            for what, get, whose, regions in (
                ("dice,", Seen.dice, seen[0].logits, [None, *REGIONS]),
                ("weight,", Seen.trust, seen[0].weights, REGIONS),
            )
            for region in regions
        }
        for i, name in enumerate(LABELS)
    }


def draw(seen: list[Seen], path: Path) -> None:
    """One row for each structure: sagittal planes of the first scan, and the weights along all scans."""
    scan, first = seen[0].scan, seen[0]
    trust = LinearSegmentedColormap.from_list("trust", [COLOURS["head network"], "white", COLOURS["chest network"]])
    figure, axes = plt.subplots(
        len(LABELS), 5, figsize=(12.5, 15), layout="constrained", width_ratios=[1, 1, 1, 1, 1.6]
    )
    height_mm = (np.arange(scan.volume.shape[-1]) - scan.border) * SPACING[2]
    extent = (0, FIELD[1] * SPACING[1], height_mm[0], height_mm[-1])
    for row, name in enumerate(LABELS):
        at = int(scan.targets[row].sum(dim=(1, 2)).argmax())
        truth = scan.targets[row, at].T.numpy()
        for panel, who in zip(axes[row], ["fused", "chest network", "head network"], strict=False):
            mask = (first.logits[who][row, at] > 0).float().T.numpy()
            panel.imshow(scan.volume[0, at].T.numpy(), cmap="gray", origin="lower", vmin=0.4, vmax=0.8, extent=extent)
            panel.contour(truth, levels=[0.5], colors=TRUTH, linewidths=1.5, extent=extent)
            if mask.any():
                colour = COLOURS.get(who, FUSED)
                panel.contour(mask, levels=[0.5], colors=[colour], linewidths=1.5, linestyles="dashed", extent=extent)
            panel.set_title(f"{name}\n{who}{'' if who == 'fused' else ' alone'}", fontsize=11)
        chest, head = (first.weights[who][row, at].T.numpy() for who in ("chest network", "head network"))
        shown = axes[row, 3].imshow(chest / (chest + head), cmap=trust, origin="lower", vmin=0, vmax=1, extent=extent)
        axes[row, 3].contour(truth, levels=[0.5], colors="black", linewidths=1.2, extent=extent)
        axes[row, 3].set_title(f"{name}\ntrust in chest or head", fontsize=11)
        profile = axes[row, 4]
        for who in first.weights:
            heights, values = [], []
            for one in seen:
                weights, inside = one.weights[who][row], one.scan.targets[row]
                there = inside.sum(dim=(0, 1)).nonzero().flatten()
                values.append(((weights * inside).sum(dim=(0, 1)) / inside.sum(dim=(0, 1)))[there].numpy())
                heights.append((there.numpy() - one.scan.border) * SPACING[2])
                profile.plot(values[-1], heights[-1], color=COLOURS[who], alpha=0.35, linewidth=1)
            planes = np.unique(np.concatenate(heights))
            middle = [np.concatenate(values)[np.concatenate(heights) == plane].mean() for plane in planes]
            profile.plot(middle, planes, color=COLOURS[who], linestyle=STYLES[who], linewidth=2.5)
        profile.set(xlim=(0, 1), ylim=extent[2:], xlabel="weight at the structure's voxels")
        profile.set_title(f"{name}\nmean weights along {len(seen)} scans", fontsize=11)
        for panel in axes[row]:
            panel.axhline(0, color="black" if panel in axes[row, 3:] else "white", linestyle=":", linewidth=1.2)
        for panel in axes[row, 1:4]:
            panel.set_yticks([])
        axes[row, 0].set_ylabel("mm above the border of the regions")
        figure.colorbar(shown, ax=axes[row, 3], orientation="horizontal", shrink=0.9, label="chest / (chest + head)")
    entries = [Line2D([], [], color=TRUTH, label="truth (black on the trust map)")]
    entries.append(Line2D([], [], color=FUSED, linestyle="dashed", label="mask of the fused model"))
    entries += [Line2D([], [], color=COLOURS[who], linestyle=STYLES[who], label=who) for who in COLOURS]
    entries.append(Line2D([], [], color="grey", linestyle=":", label="border of the regions, unknown to the fusion"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=11, facecolor="lightgrey")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("trust"))
    parser.add_argument("--steps", type=int, default=400, help="training steps of each network and of the fusion")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    scans = [Scan(seed) for seed in range(8)]
    experts = [network(scans, region, given.steps, given.out) for region in REGIONS]
    model = fused_model(scans, experts, given.steps, given.out)
    seen = [Seen(Scan(seed), experts, model) for seed in range(100, 105)]
    results = measured(seen)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(seen, given.out / "trust.png")
    print("mean, lowest and highest of five unseen phantoms")
    for name, tables in results.items():
        for what, values in tables.items():
            print(f"{name:12} {what:18}", *(f"{who} {m:.2f} [{a:.2f}, {b:.2f}]" for who, (m, a, b) in values.items()))


if __name__ == "__main__":
    main()
