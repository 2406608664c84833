"""Trains short runs of one recipe that differ only in their experts=, router=, fusion= or head= strings.

    python benchmarks/zoo_runs.py FOLDER --out runs/zoo          # trains and scores every arm
    python benchmarks/zoo_runs.py FOLDER --out runs/zoo --time   # step times, on a machine that does nothing else

FOLDER contains openkbp/; where it is not given, it is that of MOME_TEST_DATA. An arm that has its results is not run
again, and a training that was killed goes on from its checkpoint. All results so far go into one file (`--results`),
from which benchmarks/openkbp_table.py makes a table.

The recipe is examples/configs/mome_ct_tiny.yaml with smaller patches, fewer steps, 40 of the training patients, no
phantoms and no moving average. Four other training patients, in whom all structures are annotated, are scored. The
validation patients are not read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from zoo_arms import ARMS, held_out_batches, recipe, split
from zoo_step_time import time_arms

from mome import MoME
from mome.atomic import atomic_write
from mome.data.case_folder import CaseFolder
from mome.errors import InputError, did_you_mean
from mome.inference import Segmenter
from mome.layers.moe import MixtureOfExperts
from mome.metrics import evaluate_folder, summarise
from mome.model_cost import measure
from mome.routers.routing import Assignments, Routing, TokenChoice
from mome.training.loop import train

KINDS = ("training", "step_time")  # of results of an arm
LAST_STEPS = 20  # over which the training loss is averaged


@torch.inference_mode()
def expert_load(model: MoME, batches: list[dict[str, torch.Tensor]], text_PT: torch.Tensor) -> list[dict[str, Any]]:
    """The load of the experts of each scale, from the coarsest, over some batches.

    A load has `shares` of the assignments, their `entropy` divided by its largest value, and, where voxels go to
    experts one by one, `per_voxel`, the mean number of assignments of a voxel.
    """
    layers = [module for module in model.scale_experts.modules() if isinstance(module, MixtureOfExperts)]
    layers = [layer for layer in layers if layer.router is not None]
    seen: dict[int, list[tuple[int, Routing]]] = {id(layer.router): [] for layer in layers}

    def keep(router: torch.nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        seen[id(router)].append((inputs[0][..., 0].numel(), routing))

    hooks = [layer.router.register_forward_hook(keep) for layer in layers]
    for batch in batches:
        model(volume=batch["volume"], text_PT=text_PT, origin_B3=batch["origin"])
    for hook in hooks:
        hook.remove()
    loads = []
    for entries in seen.values():
        counts_E = torch.stack([routing.counts_E for _, routing in entries]).sum(0).double()
        share_E = counts_E / counts_E.sum().clamp(min=1)
        load = {
            "shares": share_E.tolist(),
            "entropy": float(torch.special.entr(share_E).sum()) / math.log(len(share_E)),
        }
        if isinstance(entries[0][1], TokenChoice | Assignments):
            load["per_voxel"] = float(counts_E.sum()) / sum(voxels for voxels, _ in entries)
        loads.append(load)
    return loads


def run_arm(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, or what is left of it, and scores it on the held-out patients."""
    run, folder = recipe(arm, args), args.out / "held_out"
    trained = train(run)
    lines = [json.loads(line) for line in (args.out / arm / "log.jsonl").read_text().splitlines()]
    last = lines[-LAST_STEPS:]
    segmenter = Segmenter(MoME.from_pretrained(trained), overlap=0.0)
    segmenter.model.processor = segmenter.processor
    prepared = segmenter.prepare(list(run.labels))
    for case in CaseFolder(folder, "openkbp"):
        segmenter.segment(case.image, prepared).save(args.out / arm / "masks", case.name)
    scores = evaluate_folder(
        args.out / arm / "masks", folder / "labels", dataset="openkbp", cases=folder / "cases.json"
    )
    batches = held_out_batches(run, folder, segmenter.model)
    return {
        "loss": statistics.fmean(line["segmentation_loss"] for line in last),
        "aux_loss": statistics.fmean(line["aux_loss"] for line in last),
        "dice": {row["structure"]: row["dice"]["mean"] for row in summarise(scores)},
        "active_parameters": active_parameters(segmenter.model),
        "load": expert_load(segmenter.model, batches, prepared.text_PT),
    }


def active_parameters(model: MoME) -> int | None:
    """The parameters that one voxel uses; None where they depend on the prompts, as with `label_group`."""
    try:
        return measure(model).active_parameters
    except InputError:
        return None


def is_done(arm: str, args: argparse.Namespace) -> bool:
    """Whether an arm has the results that are asked for.

    Raises:
        InputError: The results in its folder are of another command.
    """
    path = results_path(arm, args)
    if path.is_file() and json.loads(path.read_text())["settings"] != settings_of(arm, args):
        raise InputError("the results of this arm were made with other settings", where=str(path), hint="another --out")
    return path.is_file()


def results_path(arm: str, args: argparse.Namespace) -> Path:
    """The file of an arm's results."""
    return args.out / arm / f"{KINDS[1 if args.time else 0]}.json"


def settings_of(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the results of an arm depend on."""
    numbers = {name: getattr(args, name) for name in ("steps", "patch", "precision", "threads")}
    return {**numbers, "arm": ARMS[arm]}


def save(arm: str, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes the results of an arm into its folder."""
    path = results_path(arm, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "the results of an arm") as part:
        part.write_text(json.dumps({"settings": settings_of(arm, args), **results}, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=os.environ.get("MOME_TEST_DATA"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--patch", type=int, default=32, help="side of the patches in voxels")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", action="store_true", help="measure step times; trains nothing")
    parser.add_argument("--rounds", type=int, default=10, help="of --time")
    parser.add_argument("--results", type=Path, help="file of all results (<out>/results.json)")
    args = parser.parse_args()
    for arm in args.arms:
        if arm not in ARMS:
            parser.error(f"no arm '{arm}'{did_you_mean(arm, ARMS)}; arms: {', '.join(ARMS)}")
    if args.data is None:
        parser.error("name the folder that contains openkbp/, or set MOME_TEST_DATA")
    torch.set_num_threads(args.threads)
    split(Path(args.data), args.out)
    missing = [arm for arm in args.arms if not is_done(arm, args)]
    if args.time and missing:
        for arm, times in time_arms(missing, args).items():
            save(arm, args, times)
    for arm in () if args.time else missing:
        print(f"{arm}: {ARMS[arm]}", flush=True)
        save(arm, args, run_arm(arm, args))
    results: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        for kind in KINDS:
            path = args.out / arm / f"{kind}.json"
            if path.is_file():
                results.setdefault(arm, {"parts": ARMS[arm]})[kind] = json.loads(path.read_text())
    with atomic_write(args.results or args.out / "results.json", "the results") as part:
        part.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
