"""Scores the trainings of `neck_study.py` on whole validation volumes, and compares them by patient."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from neck_fusions import register_fusions
from neck_names import ARMS, CANDIDATES, SEEDS

from mome.atomic import atomic_write
from mome.data.case_folder import CaseFolder
from mome.inference import Segmenter
from mome.metrics import evaluate_folder

RESULTS = Path(__file__).parent / "results"
# Pairs that are compared where both were trained with the same seeds. `swiglu` and `linear` had random queries first.
PAIRS = [
    ("universal", "plain"),
    *(
        (f"{one}{start}", f"linear{start}" if other == "linear" else other)
        for start in ("", "_random")
        for one, other in (
            ("swiglu", "universal"), ("linear", "universal"), ("swiglu", "linear"),
            ("swiglu", "uniform"), ("swiglu", "no_text"), ("swiglu", "segresnet"),
        )
    ),
    ("swiglu", "plain"),
    ("linear", "plain"),
    ("swiglu", "swiglu_random"),
    ("linear", "linear_random"),
    *(
        (arm, other)
        for arm in CANDIDATES if not arm.endswith("_random")
        for other in ("swiglu", "uniform", "no_text", "universal")
    ),
]  # fmt: skip
WHAT = [
    "Fourteen trainings on the 170 training patients of OpenKBP, side by side on one H100, scored once on the 33",
    "validation patients: 2,000 steps of two patches, the same patches in the same order for every arm of a seed",
    "(`python benchmarks/neck_study.py all --minutes 10`, which was continued once). `swiglu` is our mixture, with",
    "four experts per scale and text-guided fusion; `linear` has one linear layer per scale in their place, `uniform`",
    "weighs scales alike, and `no_text` weighs them by a learned query that reads no text. `universal` is the",
    "ancestor, the CLIP-driven model, `plain` a network without mixture, and `segresnet` MONAI's. All have the recipe",
    "of `neck_study.yaml`. The networks share the GPU and the processor with each other, so step times are those of a",
    "crowded machine.",
    "",
    "Our mixture is better than all others but `linear`, from which it does not differ: four experts are no better",
    "than one layer at this size and budget. They did not collapse: on a training patient each gets 20 to 30 % of the",
    "voxels of a scale, and inside of a structure one expert has most of them (scale 0: 81 % of the spinal cord's, 88",
    "% of the mandible's, 99 % of the left parotid gland's). Nor is the fusion uniform: inside of its structure a",
    "prompt gives the finest scale 0.28 to 0.55 and the coarsest 0.02 to 0.05; over the whole body four of five",
    "prompts give the coarsest 0.38 to 0.49 (`mome inspect runs/neck_study/swiglu_0/model --ct",
    "$MOME_TEST_DATA/openkbp/train/images/openkbp_007.nii.gz`, five prompts). Text-guided weights are better than",
    "uniform ones and than those without text, which was the other way round in the first study below.",
    "",
    "The aim that `universal` is better than `plain` is missed, by one structure: its masks of the esophagus are",
    "empty with both seeds. Over the other six it has 0.724, `plain` 0.725 and `swiglu` 0.731. Its text-made heads",
    "have the ReLU of the published ones; at the end, the largest logit of the esophagus is the bias of the last",
    "layer (−3.8 and −3.9), so that no hidden unit raises it. Ours has a slope of 0.1 below zero, with which a head",
    "recovers.",
]
FIRST_WHAT = [
    "An earlier study had time for 350 steps, so that all networks were far from trained. `swiglu_random` and",
    "`linear_random` are our mixtures with the text-guided fusion of that time, which began with random queries;",
    "`uniform` and `no_text` were better than it at this budget.",
    "",
    "The learning rates are not quite alike: the number of steps was chosen after 55 seconds, and an arm that was",
    "then past step 175 kept the full rate until there: `plain` to step 240 and 250, `universal` to 207 and 205,",
    "`linear_random` to 189 and 216. All others had the same rates at every step. All arms were scored with the tiles",
    "of that time, whose last step was shorter (`git checkout d729ff3` before the first scores).",
]
FIRST_ON_CPU = [
    "`swiglu` was trained later, with the fusion as it is now: queries start small (at zero in the training of seed",
    "0), so that all scales weigh alike, and the learning rate of the text projection is divided by √384. The recipe",
    "and the patches are those of the other arms, but it was trained on the CPU in float32. `universal` was trained a",
    "second time in the same way, with one seed, so that the two can be compared. Step times are those of a busy core,",
    "and memory was not measured: `python benchmarks/neck_study.py arm swiglu --seed 0 --set train.steps=350",
    "train.warmup=0.2857 train.mixed_precision=no`, and `scores --cpu` of commit 403a1c4. The interval is of the seed",
    "that both have. `universal` has 0.400 here and 0.497 on the GPU, where it kept its full rate longer (above);",
    "whether that is the reason was not tested. `swiglu` is better than either.",
]
WHY = [
    "Why the text-guided weights lost at first: a text row has 384 numbers of about unit size, so that AdamW could",
    "move a query by 0.46 in every component at one step, which is half of its size. In the models of `swiglu_random`",
    "the largest weight of a voxel is 0.66 on average over two training patches (0.46 in `no_text`, 0.25 if uniform).",
    "Text rows are centred, so that the queries of all prompts sum to nearly zero, and weights that suit all are",
    "hardly learned.",
    "",
    "Other starts were tried on the maps of one frozen encoder (that of `plain`, seed 0), with linear experts",
    "(`benchmarks/fusion_starts.py`, on the CPU, with the patches of the study): the loss of steps 51 to 160, whose",
    "patches only the encoder had seen before, the same patches for all, one column per seed of the weights. Equal",
    "weights at the start (`uniform start`) are not enough, and neither is a learning rate of the text projection that",
    "is divided by √384 (`slow text`). Both together are level with `uniform`: the weights then stay near uniform (the",
    "largest is 0.27 to 0.29 on average after 150 steps), so that text costs nothing and gives little yet. That is the",
    "fusion as it is now. In whole networks it recovers what the random queries lost (arm `swiglu`): its mean is that",
    "of `uniform`; `no_text` is better with seed 0, and not with seed 1.",
]
METRICS = ("dice", "nsd", "hd95")
STUDY = "neck_study"
STUDIES = (STUDY, "neck_study_350_steps", "neck_study_350_steps_cpu")
RESAMPLES = 10_000
_WARM = 50  # first steps of `fusion_starts.py`, which are left out


def write_scores(out: Path) -> None:
    """Scores every training in `out` that ended and has no scores yet, then writes the comparison and the page.

    Args:
        out: The folder of the study.
    """
    register_fusions()
    data = Path(os.environ["MOME_TEST_DATA"]) / "openkbp" / "val"
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in (*ARMS, *CANDIDATES):
        for seed in SEEDS:
            folder = out / f"{arm}_{seed}"
            if (folder / "training.json").is_file():
                runs.setdefault(arm, {})[seed] = {"scores": _scores(folder, data), **_training(folder)}
                print(arm, seed, runs[arm][seed]["training"], flush=True)
    with atomic_write(RESULTS / f"{STUDY}.json", "the results") as part:
        part.write_text(json.dumps(compare(runs), indent=1) + "\n")
    with atomic_write(RESULTS / "neck_study.md", "the page") as part:
        part.write_text(page(*(json.loads((RESULTS / f"{name}.json").read_text()) for name in STUDIES)))


def _scores(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Returns the scores of every case and structure; they are computed once."""
    path = folder / "scores.json"
    if not path.is_file():
        masks = folder / "masks"
        if (folder / "model" / "settings.json").is_file():
            from train_segresnet import predict

            predict(folder / "model", data, masks)
        else:
            segmenter = Segmenter(str(folder / "model"))
            prepared = segmenter.prepare(list(segmenter.model.config.trained_labels))
            for case in CaseFolder(data, "openkbp"):
                segmenter.segment(case.image, prepared).save(masks, case.name)
        found = evaluate_folder(masks, data / "labels", dataset="openkbp", cases=data / "cases.json")
        with atomic_write(path, "the scores") as part:
            part.write_text(json.dumps([vars(score) for score in found]))
    return json.loads(path.read_text())


def _training(folder: Path) -> dict[str, Any]:
    """Returns steps, parameters, median step time and memory of a training."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    made = json.loads((folder / "training.json").read_text())
    step_s = float(np.median([line["seconds_per_step"] for line in lines[3:] or lines]))
    loss = float(np.mean([line["loss"] for line in lines[-10:]]))
    return {"training": {**made, "step_s": step_s, "loss": loss, "memory_bytes": lines[-1]["memory_bytes"]}}


def by_patient(scores: list[dict[str, Any]], metric: str) -> dict[tuple[str, str], float]:
    """Returns (patient, structure) → score, where both masks are not empty."""
    return {(s["case"], s["structure"]): s[metric] for s in scores if np.isfinite(s[metric])}


def mean_over_structures(values: dict[tuple[str, str], float], patients: list[str]) -> float:
    """Returns the mean over structures of the mean over a sample of patients; a patient may occur several times."""
    structures = sorted({structure for _, structure in values})
    means = []
    for structure in structures:
        found = [values[patient, structure] for patient in patients if (patient, structure) in values]
        if found:
            means.append(np.mean(found))
    return float(np.mean(means))


def averaged(runs: dict[int, dict[str, Any]], metric: str) -> dict[tuple[str, str], float]:
    """Returns the scores by patient and structure, averaged over the seeds that all have a value."""
    each = [by_patient(run["scores"], metric) for run in runs.values()]
    keys = set.intersection(*(set(values) for values in each))
    return {key: float(np.mean([values[key] for values in each])) for key in keys}


def compare(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Returns means of every arm, and paired bootstrap intervals over patients of differences between arms."""
    result: dict[str, Any] = {"arms": {}, "differences": []}
    values = {arm: {metric: averaged(seeds, metric) for metric in METRICS} for arm, seeds in runs.items()}
    for arm, seeds in runs.items():
        patients = sorted({patient for patient, _ in values[arm]["dice"]})
        result["arms"][arm] = {
            "seeds": {
                seed: mean_over_structures(by_patient(run["scores"], "dice"), patients) for seed, run in seeds.items()
            },
            **{metric: mean_over_structures(values[arm][metric], patients) for metric in METRICS},
            "structures": {
                name: float(np.mean([v for (_, s), v in values[arm]["dice"].items() if s == name]))
                for name in sorted({s for _, s in values[arm]["dice"]})
            },
            "trainings": [run["training"] for run in seeds.values()],
        }
    for one, other in compared({arm: set(seeds) for arm, seeds in runs.items()}):
        common = sorted(set(runs[one]) & set(runs[other]))
        pair = ({m: averaged({s: runs[arm][s] for s in common}, m) for m in METRICS} for arm in (one, other))
        result["differences"].append({"one": one, "other": other, "seeds": common, **_difference(*pair)})
    return result


def compared(seeds: dict[str, set[Any]]) -> list[tuple[str, str]]:
    """Returns the pairs of arms that have a seed in common, from the seeds of every arm that was trained."""
    return [(one, other) for one, other in PAIRS if seeds.get(one, set()) & seeds.get(other, set())]


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Returns the difference in mean Dice and its 95 % interval; both networks are drawn with the same patients."""
    keys = set(one["dice"]) & set(other["dice"])
    change = {key: one["dice"][key] - other["dice"][key] for key in keys}
    patients = sorted({patient for patient, _ in keys})
    structures = sorted({structure for _, structure in keys})
    table_PS = np.array([[change.get((p, s), np.nan) for s in structures] for p in patients])
    rng = np.random.default_rng(0)
    drawn = table_PS[rng.integers(len(patients), size=(RESAMPLES, len(patients)))]
    means = np.nanmean(np.nanmean(drawn, axis=1), axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"dice": float(np.nanmean(np.nanmean(table_PS, axis=0))), "low": float(low), "high": float(high)}


def starts_table(starts: dict[str, dict[str, list[float]]]) -> list[str]:
    """Returns the rows of the comparison of starts.

    Args:
        starts: Fusion → seed of the weights → loss of every step.
    """
    seeds = sorted({seed for losses in starts.values() for seed in losses})
    rows = ["| fusion | " + " | ".join(f"init {seed}" for seed in seeds) + " |", "|---" * (1 + len(seeds)) + "|"]
    for name, losses in starts.items():
        cells = [f"{np.mean(losses[seed][_WARM:]):.3f}" if seed in losses else "" for seed in seeds]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _gigabytes(count: int) -> str:
    """Returns GB, or a dash where the memory was not measured, as on the CPU."""
    return f"{count / 1e9:.1f} GB" if count else "–"


def page(study: dict[str, Any], first: dict[str, Any], first_on_cpu: dict[str, Any]) -> str:
    """Returns the results as a Markdown page."""
    rows = ["# Neck study", "", "Generated by `python benchmarks/neck_study.py scores`.", "", *WHAT, ""]
    rows += [*_tables(study), "", *FIRST_WHAT, "", *_tables(first), "", *FIRST_ON_CPU, "", *_tables(first_on_cpu)]
    rows += ["", *WHY, "", *starts_table(json.loads((RESULTS / "fusion_starts.json").read_text()))]
    return "\n".join(rows) + "\n"


def _tables(result: dict[str, Any]) -> list[str]:
    """Returns the rows of the arms and of their differences."""
    rows = [
        "| arm | Dice | by seed | surface Dice | HD95 mm | steps | step time | memory | parameters |",
        "|---" * 9 + "|",
    ]
    for arm, entry in result["arms"].items():
        made = entry["trainings"]
        rows.append(
            f"| {arm} | {entry['dice']:.3f} | {', '.join(f'{v:.3f}' for v in entry['seeds'].values())} | "
            f"{entry['nsd']:.3f} | {entry['hd95']:.1f} | {', '.join(str(m['step']) for m in made)} | "
            f"{1e3 * np.median([m['step_s'] for m in made]):.0f} ms | "
            f"{_gigabytes(max(m['memory_bytes'] for m in made))} | {made[0]['parameters']:,} |"
        )
    rows += ["", "| difference in Dice | mean | 95 % interval |", "|---|---|---|"]
    for entry in result["differences"]:
        rows.append(
            f"| {entry['one']} − {entry['other']} | {entry['dice']:+.3f} | "
            f"{entry['low']:+.3f} to {entry['high']:+.3f} |"
        )
    return rows
