"""Gives prompts whose text-made head has died the head of another prompt to start from.

    python benchmarks/revive_prompts.py runs/a/model runs/a/revived esophagus=spinal_cord larynx=brainstem

The head of a prompt has two ReLU layers; where both end up at zero everywhere its logit is a constant, and no gradient
brings it back. This changes the controller's weights by the smallest amount (in the least-squares sense, over all labels
and their synonyms) that moves the named prompts' heads to their donors' and leaves every other prompt's head as it is.
Training goes on from there (`init=runs/a/revived`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mome import MoME, MoMEProcessor
from mome.labels import load_table
from mome.registry import TEXT_ENCODERS


@torch.no_grad()
def revive(model: MoME, donors: dict[str, str]) -> None:
    """Changes `model.head.controller` in place."""
    tower, table = TEXT_ENCODERS.build(model.config.text_encoder), load_table()
    texts, owners = [], []
    for name in model.config.trained_labels:
        group = [name.replace("_", " "), *table[name].synonyms]
        texts += group
        owners += [name] * len(group)
    rows = (tower.encode(texts) - model.text_mean) * model.text_scale
    hidden = model.head.text(rows).relu()  # (N, H)
    width = hidden.shape[1]
    text_part = model.head.controller.weight[:, -width:]  # (153, H): the image's half comes first
    first = {name: hidden[owners.index(name)] for name in model.config.trained_labels}
    wanted = torch.stack(
        [
            text_part @ (first[donors[name]] - row) if name in donors else torch.zeros(text_part.shape[0])
            for name, row in zip(owners, hidden, strict=True)
        ]
    )  # (N, 153): change of the head that each text should see
    change = torch.linalg.lstsq(hidden.double(), wanted.double(), driver="gelsd").solution.t()
    model.head.controller.weight[:, -width:] += change.float()
    left = (hidden @ change.float().t() - wanted).abs().max()
    print(f"largest difference from what was asked: {left:.2e}; norm of the change {change.norm():.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", nargs="+", help="dead=donor")
    args = parser.parse_args()
    model = MoME.from_pretrained(args.model)
    revive(model, dict(pair.split("=") for pair in args.pairs))
    model.save_pretrained(args.out)
    MoMEProcessor.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
