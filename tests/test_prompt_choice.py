"""Which patches and prompts a step has: a function of seed and step, whatever the processes, workers and restarts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in_models import LetterTower

from mome.data.augmentation import AugmentationConfig, BatchAugmentation
from mome.data.cache import CaseCache
from mome.data.cache_build import LoadedCase, build_cache
from mome.data.prompt_choice import PatchContents, choose_prompts, confusable
from mome.data.sampling import PatchDataset
from mome.data.sampling_config import SamplingConfig
from mome.errors import InputError
from mome.labels.vocabulary import prompt_templates
from mome.processing import MoMEProcessor
from mome.training.batches import batches_from, samples_per_step
from mome.training.config import TrainConfig
from mome.training.text_rows import TextRows
from mome.volumes import Grid

LABELS = ["kidney_left", "kidney_right", "liver", "spleen", "aorta", "heart", "urinary_bladder", "trachea"]
# Structures stand along the body, 12 voxels each, on their side; the last two are annotated in one case only.
PLACES = {name: (4 if name.endswith("left") else 18, 4, 4 + 12 * (number // 2)) for number, name in enumerate(LABELS)}


def case(annotated: list[str]) -> LoadedCase:
    shape = (28, 12, 52)
    rng = np.random.default_rng(len(annotated))
    masks = {}
    for name in annotated:
        mask = np.zeros(shape, bool)
        i, j, k = PLACES[name]
        if name != "spleen":  # annotated and without a voxel
            mask[i : i + 4, j : j + 4, k : k + 4] = True
        masks[name] = mask
    return LoadedCase(rng.normal(0, 50, shape).astype(np.float32), Grid(shape, np.diag([2.0, 2, 2, 1])), masks)


@pytest.fixture
def cache(tmp_path: Path) -> CaseCache:
    cases = [("a", lambda: case(LABELS[:6])), ("b", lambda: case(LABELS)), ("c", lambda: case(LABELS[2:3]))]
    processor = MoMEProcessor(spacing=[2, 2, 2], hu_window=[-200, 200])
    return build_cache(tmp_path, "test", LABELS, processor, cases, "")


def dataset(cache: CaseCache, samples: int = 4, on: str = "auto", **settings: object) -> PatchDataset:
    sampling = SamplingConfig(**{"prompts": 4, **settings})  # type: ignore[arg-type]
    config = AugmentationConfig(affine=0.5, margin=0.2, on=on)  # type: ignore[arg-type]
    augmentation = BatchAugmentation(config, LABELS, seed=1)
    return PatchDataset([cache], [1.0], LABELS, (12, 12, 12), 1000, 1, sampling, augmentation, samples)


def run(cache: CaseCache, processes: int, batch: int, accumulation: int, start: int, workers: int = 0) -> dict:
    """Sample number → its tensors, of the steps from `start` to 5, in a run of so many processes."""
    config = TrainConfig(batch_size=batch, gradient_accumulation=accumulation, workers=workers)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for rank in range(processes):
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
        patches = dataset(cache, samples_per_step(config, accelerator))  # type: ignore[arg-type]
        numbers: list[int] = []
        real = patches.finish

        def finish(stored, *rest, real=real, numbers=numbers):
            numbers += stored["number"].tolist() if "number" in stored else []
            return real(stored, *rest)

        if not workers:
            patches.finish = finish  # type: ignore[method-assign]
        made = list(batches_from(start, 5, patches, config, accelerator))  # type: ignore[arg-type]
        first = start * accumulation
        if workers:
            size, count = batch, accumulation * (5 - start)
            numbers = [(b * processes + rank) * size + i for b in range(first, first + count) for i in range(size)]
        assert len(numbers) == batch * accumulation * (5 - start)
        rows = [{key: value[i] for key, value in one.items()} for one in made for i in range(batch)]
        for number, row in zip(numbers, rows, strict=True):
            assert number not in seen  # nothing is drawn twice
            seen[number] = row
    return seen


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n][key], other[n][key]) for n in one for key in one[n])


def test_processes_accumulation_and_restarts_change_no_sample(cache: CaseCache) -> None:
    alone = run(cache, 1, 4, 1, 0)
    assert sorted(alone) == list(range(20))
    assert same(alone, run(cache, 2, 2, 1, 0)) and same(alone, run(cache, 4, 1, 1, 0))
    assert same(alone, run(cache, 2, 1, 2, 0))
    resumed = run(cache, 1, 4, 1, 3)
    assert sorted(resumed) == list(range(12, 20)) and same({n: alone[n] for n in resumed}, resumed)
    single = dataset(cache)[7]
    assert all(torch.equal(single[key], alone[7][key]) for key in single)


def test_the_place_of_augmentation_changes_no_sample(cache: CaseCache) -> None:
    config, made = TrainConfig(batch_size=3), []
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    for on in ("loader", "device"):
        patches = dataset(cache, 3, on)
        assert patches.augmentation is not None and patches.augmentation.runs_on(accelerator.device) == (on == "device")
        assert patches.augmentation.margin(patches.patch) == (2, 2, 2)
        made.append(list(batches_from(0, 3, patches, config, accelerator)))  # type: ignore[arg-type]
    for one, other in zip(*made, strict=True):
        assert one["volume"].shape == (3, 1, 12, 12, 12) and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert BatchAugmentation(AugmentationConfig(), LABELS).runs_on(torch.device("cuda"))


def test_workers_change_no_sample(cache: CaseCache) -> None:
    assert same(run(cache, 1, 4, 1, 0), run(cache, 1, 4, 1, 0, workers=2))


def test_all_samples_of_a_step_share_its_prompts_and_their_targets_fit(cache: CaseCache) -> None:
    patches, every = dataset(cache), dataset(cache, prompts=0)
    assert every.prompts_at(3) == list(range(8))
    for number in range(24):
        prompts = patches.prompts_at(number // 4)
        assert len(set(prompts)) == 4 and prompts == sorted(prompts)
        some, whole = patches[number], every[number]
        assert torch.equal(some["targets"], whole["targets"][prompts])
        assert torch.equal(some["supervised"], whole["supervised"][prompts])
        assert torch.equal(some["volume"], whole["volume"])
    assert patches.prompts_at(2) == dataset(cache).prompts_at(2)
    assert len({tuple(patches.prompts_at(step)) for step in range(20)}) > 5


def test_prompts_are_present_absent_or_confusable(cache: CaseCache) -> None:
    """Over many steps the shares of the kinds are those of the settings, as far as there are such structures."""
    present = 0
    for step in range(60):
        patches = dataset(cache, foreground=1.0, jitter=0.0, prompts=4, positive=0.25, hard_negative=0.5)
        contents = [patches._contents(number) for number in range(4 * step, 4 * step + 4)]
        shown = frozenset().union(*(one.present for one in contents))
        asked = {LABELS[i] for i in patches.prompts_at(step)}
        present += len(asked & {one.focus for one in contents})
        annotated = shown.union(*(one.absent for one in contents))
        assert asked & shown and (asked <= annotated or len(annotated) < 4)
    assert present >= 60  # a quarter of four, and at times another focus among the negatives


def test_what_a_patch_shows_is_known_without_its_voxels(cache: CaseCache) -> None:
    patches = dataset(cache, foreground=0.5)
    patches.augmentation = None
    checked = 0
    for number in range(40):
        contents, sample = patches._contents(number), dataset(cache, prompts=0, foreground=0.5)
        sample.augmentation = None
        targets = sample[number]["targets"].flatten(1).any(1)
        truth = {name for name, found in zip(LABELS, targets.tolist(), strict=True) if found}
        assert truth <= contents.present and not truth & contents.absent
        checked += len(contents.absent)
    assert checked > 20


def test_mirrored_patches_have_mirrored_contents(cache: CaseCache) -> None:
    patches = dataset(cache, foreground=1.0)
    patches.augmentation = BatchAugmentation(AugmentationConfig(mirror=1.0), LABELS)
    plain = dataset(cache, foreground=1.0)
    plain.augmentation = None
    focuses = [(plain._contents(n).focus, patches._contents(n).focus) for n in range(40)]
    assert ("kidney_left", "kidney_right") in focuses and ("liver", "liver") in focuses
    assert ("kidney_left", "kidney_left") not in focuses


def test_hard_negatives_are_the_other_side_or_neighbours() -> None:
    absent = ["kidney_right", "urinary_bladder", "liver", "trachea", "aorta"]
    assert set(confusable(["kidney_left"], absent)) == {"kidney_right", "urinary_bladder"}
    assert confusable(["urinary_bladder"], ["spleen", "trachea"]) == ["spleen"]  # the group beside, by the table
    assert confusable(["urinary_bladder"], ["trachea"]) == []
    patch = PatchContents(frozenset(["kidney_left"]), frozenset(absent), "kidney_left")
    names = ["kidney_left", *absent, "spleen"]
    for step in range(20):
        asked = {names[i] for i in choose_prompts([patch], names, 2, 0.5, 0.5, 0, step)}
        assert "kidney_left" in asked and len(asked & {"kidney_right", "urinary_bladder"}) == 1
    assert choose_prompts([patch], names, 9, 0.5, 0.5, 0, 0) == list(range(7))
    nothing = PatchContents(frozenset(), frozenset())
    assert len(choose_prompts([nothing], names, 3, 0.5, 0.25, 0, 0)) == 3


def test_structures_and_sources_are_weighed(cache: CaseCache) -> None:
    def focuses(**settings: object) -> Counter[str | None]:
        patches = dataset(cache, foreground=1.0, **settings)
        return Counter(patches.place(number).focus for number in range(400))

    even = focuses()
    assert set(even) == set(LABELS) - {"spleen"} and min(even.values()) > 30  # no patch is drawn for an absent spleen
    heavy = focuses(structures={"heart": 6, "liver": 0})
    assert heavy["heart"] > 150 and heavy["liver"] == 0
    with pytest.raises(
        InputError, match="sampling.structures names 'hart', which is not trained, did you mean 'heart'"
    ):
        focuses(structures={"hart": 2})
    with pytest.raises(InputError, match="gives every trained structure the weight 0"):
        focuses(structures=dict.fromkeys(LABELS, 0))
    for wrong in ({"positive": 0.8, "hard_negative": 0.5}, {"structures": {"heart": -1}}, {"balance": 2.0}):
        with pytest.raises(InputError):
            SamplingConfig(**wrong)  # type: ignore[arg-type]

    class Larger(CaseCache):
        def __init__(self) -> None:
            super().__init__(cache.folder, LABELS)
            self.index = self.index * 3

    for balance, wanted in ((0.0, 0.5), (1.0, 0.75)):
        sampling = SamplingConfig(balance=balance)
        both = PatchDataset([cache, Larger()], [1.0, 1.0], LABELS, (12, 12, 12), 9, 0, sampling)
        share = np.mean([both.place(number).source for number in range(600)])
        assert abs(share - wanted) < 0.06


def test_the_cases_of_a_step_have_names(cache: CaseCache) -> None:
    names = [dataset(cache).cases_at(step) for step in range(6)]
    assert all(1 <= len(some) <= 3 and set(some) <= {"a", "b", "c"} for some in names)


def test_wordings_stand_in_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    from mome.registry import TEXT_ENCODERS
    from mome.zoo import create_model

    assert all(template.count("{}") == 1 for template in prompt_templates()) and len(prompt_templates()) > 4

    monkeypatch.setattr(TEXT_ENCODERS, "build", lambda spec: LetterTower())
    names = ["mandible", "larynx", "liver"]
    model = create_model("mome_ct_tiny", labels=names, trained_labels=names)
    rows = TextRows(model, names, 0.0, seed=1, templates=0.5)
    bare = LetterTower().encode(["mandible"])[0]
    sentences = LetterTower().encode([template.format("mandible") for template in prompt_templates()])
    seen = [rows.at(step)[0] for step in range(60)]
    plain = sum(bool(torch.equal(row, bare)) for row in seen)
    framed = sum(bool((sentences == row).all(1).any()) for row in seen)
    assert 15 < plain < 45 and plain + framed == 60
    assert torch.equal(rows.at(4, [2, 0]), rows.at(4)[[2, 0]])
