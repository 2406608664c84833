"""Compares starts of the fusion on the maps of one frozen encoder: a step costs a hundredth of one of the neck study.

    python benchmarks/fusion_starts.py --encoder runs/neck_study/plain_0/model --steps 160 --inits 0 1 2

The patches are those of seed 0 of the neck study, and each is seen once. Linear experts, the fusion and the head are
trained on 8,192 random voxels of every patch; the encoder is that of a network without mixture, and its maps are
resized before the experts instead of after them. The result is the loss of every step, on the same patches for every
fusion.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from neck_arms import recipe
from stored_patches import drawn_batch, unpack
from stored_texts import use_stored_texts
from study_training import open_dataset, rate_at
from torch import Tensor
from torch.nn import functional as F

from mome import MoME
from mome.atomic import atomic_write
from mome.layers.predict import predict
from mome.map_context import MapContext
from mome.registry import LOSSES
from mome.training.config import RunConfig
from mome.training.optimizer import build_optimizer, set_learning_rate
from mome.training.setup import build_model
from mome.training.text_rows import TextRows

VOXELS = 8192
SIDE = 64
FUSIONS = {
    "text-guided": "started(start='random')",
    "uniform": "uniform",
    "without text": "voxel",
    "uniform start": "started(start='uniform')",
    "common start": "started(start='common')",
    "slow text": "started(start='random', slow=true)",
    "uniform start, slow text": "text_guided",
    "common start, slow text": "started(start='common', slow=true)",
}


def frozen_maps(encoder: Path, run: RunConfig, folder: Path, steps: int) -> None:
    """Writes the normalised maps at random voxels, the deepest map and the masks of every batch that is not there."""
    model = MoME.from_pretrained(str(encoder)).float().eval()
    dataset, _ = open_dataset(run, [SIDE] * 3)
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(steps):
        path = folder / f"{step:04d}.pt"
        if path.exists():
            continue
        batch = unpack(drawn_batch(dataset, step * run.train.batch_size, run.train.batch_size), torch.device("cpu"))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pyramid = model.encoder(batch["volume"])
        chosen = torch.randperm(SIDE**3, generator=torch.Generator().manual_seed(step))[:VOXELS]
        places_V3 = torch.stack([chosen % SIDE, chosen // SIDE % SIDE, chosen // SIDE**2], dim=1)
        grid = ((places_V3 + 0.5) / SIDE * 2 - 1).expand(run.train.batch_size, 1, 1, VOXELS, 3)
        maps = [
            F.grid_sample(F.group_norm(x.float(), 16), grid, padding_mode="border", align_corners=False)[:, :, 0, 0]
            for x in pyramid.maps
        ]
        kept = {"maps": [x.half() for x in maps], "bottleneck": pyramid.bottleneck.half()}
        part = path.with_suffix(".part")
        masks = batch["targets"].flatten(2)[:, :, chosen]
        torch.save({**kept, "targets": masks, "supervised": batch["supervised"]}, part)
        part.rename(path)


def train(run: RunConfig, folder: Path, steps: int) -> list[float]:
    """Trains experts, fusion and head, and returns the loss of every step."""
    model = build_model(run)[0].train()
    text = TextRows(model, list(run.labels), run.train.synonyms, 0)
    model.encoder.requires_grad_(False)
    optimizer, loss_function = build_optimizer(model, run.train), LOSSES.build(run.loss)
    losses = []
    for step in range(steps):
        batch = torch.load(folder / f"{step:04d}.pt", weights_only=True)
        set_learning_rate(optimizer, rate_at(step, steps, run.train))
        features: list[Tensor] = []
        for expert, map_BCV in zip(model.scale_experts, batch["maps"], strict=True):
            normed = map_BCV.float() * expert.norm.weight[:, None] + expert.norm.bias[:, None]
            voxels = expert.proj_in(normed.relu().movedim(1, -1))[:, :, None, None]
            features.append(expert.mix(voxels, MapContext())[0].flatten(2))
        rows_PT = model.text_bank(text.at(step))
        logits = predict(model.fusion, model.head, torch.stack(features, dim=1), rows_PT, batch["bottleneck"].float())
        loss = loss_function(logits[..., None, None], batch["targets"][..., None, None], batch["supervised"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Runs the comparison and writes the losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the checkpoint of a network")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--inits", type=int, nargs="*", default=[0], help="seeds of the weights")
    parser.add_argument("--fusions", nargs="*", default=list(FUSIONS), choices=FUSIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/fusion_starts"))
    parser.add_argument("--cached", type=Path, help="folder of the caches of another machine")
    parser.add_argument("--texts", type=Path, help="file of stored_texts.py")
    args = parser.parse_args()
    if args.texts:
        use_stored_texts(args.texts)
    frozen_maps(args.encoder, recipe("linear", 0, args.out, args.cached, []), args.out / "maps", args.steps)
    for seed in args.inits:
        for name in args.fusions:
            run = recipe("linear", seed, args.out, args.cached, [])
            run = dataclasses.replace(run, model={**run.model, "fusion": FUSIONS[name]})
            losses = train(run, args.out / "maps", args.steps)
            late = losses[50:] or losses
            print(f"{name}, init {seed}: loss {sum(late) / len(late):.4f} of the last {len(late)} steps", flush=True)
            with atomic_write(args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}.json", "losses") as part:
                part.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
