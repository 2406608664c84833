"""What holds the memory of a training step of `mome_ct_tiny`: two patches of 64³ voxels, seven prompts, float32.

    python benchmarks/training_memory.py --out benchmarks/results/training_memory.md

It counts the process after its imports, the tensors that autograd keeps for the backward pass, by the module that makes
them, and the peak of whole steps. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from peak_memory import peak_mib, reset_peak, resident_mib

LABELS = ("spinal_cord", "brainstem", "esophagus", "parotid_gland_left", "parotid_gland_right", "mandible", "larynx")
MIB = 2**20
STEPS = 3


def measure() -> tuple[dict[str, float], Counter[str]]:
    """MiB of the process at several points, and bytes that autograd keeps, by module."""
    found = {"Python": resident_mib()}
    import torch

    found["torch"] = resident_mib()
    import mome.training.loop  # noqa: F401
    from mome.kept_memory import keep_freed_memory
    from mome.training.config import RunConfig, TrainConfig
    from mome.training.optimizer import build_optimizer
    from mome.training.setup import build_model
    from mome.training.text_rows import text_rows

    found["all imports of a training"] = resident_mib()
    run = RunConfig(labels=LABELS, bank="trained", model={"text_encoder": "learned"}, loss="bce_dice")
    model, _ = build_model(run)
    text_PT = text_rows(model, run).at(0)
    model.train().to(memory_format=torch.channels_last_3d)
    optimizer = build_optimizer(model, TrainConfig())
    volume = torch.rand(2, 1, 64, 64, 64)
    targets = (torch.rand(2, len(LABELS), 64, 64, 64) > 0.9).to(torch.uint8)

    inside = ["fusion and decoding"]  # what no module of the first two levels makes
    for name, module in model.named_modules():
        if name and name.count(".") <= 1:
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            module.register_forward_hook(lambda *_: inside.pop() and None)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: Counter[str] = Counter()
    seen: set[int] = set()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen | parameters:
            seen.add(storage.data_ptr())
            kept[inside[-1]] += storage.nbytes()
        return tensor

    found["with the model"] = reset_peak()
    keep_freed_memory()  # as `mome train` does
    for step in range(STEPS):
        with torch.autograd.graph.saved_tensors_hooks(count if step == 0 else lambda x: x, lambda x: x):
            output = model(volume, text_PT)
            loss = model.segmentation_loss(output.logits, targets, None) + output.aux_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del output, loss
    found[f"peak of {STEPS} steps"] = peak_mib()
    return found, kept


def table(found: dict[str, float], kept: Counter[str]) -> str:
    """The results as Markdown."""
    total = sum(kept.values()) / MIB
    lines = [
        "# Memory of a training step",
        "",
        "`python benchmarks/training_memory.py`: `mome_ct_tiny`, two patches of 64³ voxels, seven prompts, float32.",
        "",
        "| point | resident memory (MiB) |",
        "|---|---|",
        *(f"| {name} | {value:.0f} |" for name, value in found.items()),
        "",
        f"Autograd keeps {total:.0f} MiB for the backward pass; the rest is gradients of maps that exist for a",
        "moment. `train.gradient_checkpointing=true` computes the maps of encoder and experts again instead.",
        "",
        "| made by | kept (MiB) | share |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {size / MIB:.0f} | {size / MIB / total:.0%} |" for name, size in kept.most_common(8)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables to this .md")
    args = parser.parse_args()
    text = table(*measure())
    if args.out is not None:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
