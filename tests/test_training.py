"""Training: what a step sees, the loss, configuration, and that a killed run goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mome.data.augmentation import Augmentation, AugmentationConfig
from mome.data.cache import cache_case_folder
from mome.data.case_folder import CaseFolder
from mome.data.sampling import PatchDataset, crop
from mome.errors import InputError
from mome.losses.bce_dice import masked_bce_dice
from mome.processing import MoMEProcessor
from mome.training.config import load_run_config
from mome.training.loop import learning_rate

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ["parotid_gland_left", "parotid_gland_right", "mandible"]


def write_cases(folder: Path, count: int = 3) -> Path:
    """A small synthetic data set with OpenKBP's numbers, its left-right axis running to the left."""
    rng = np.random.default_rng(0)
    affine = np.diag([-4.0, 4.0, 3.0, 1.0])
    cases = {}
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        hu = rng.normal(-20, 30, (24, 22, 20)).astype(np.int16)
        labels = np.zeros(hu.shape, np.uint8)
        labels[16:20, 8:12, 6:12] = 4  # left: the axis runs to the left
        labels[4:8, 8:12, 6:12] = 5
        labels[8:14, 14:18, 4:8] = 6
        hu[labels == 6] += 600
        hu[labels == 4] += 150
        nib.save(nib.Nifti1Image(hu, affine), folder / "images" / f"c{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / "labels" / f"c{i}.nii.gz")
        cases[f"c{i}"] = {"annotated": NAMES if i else NAMES[:2]}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.fixture
def cached(tmp_path: Path):
    folder = CaseFolder(write_cases(tmp_path / "data"), "openkbp")
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    return cache_case_folder(tmp_path / "cache", folder, "test", NAMES, processor)


def test_cache_is_on_the_network_grid_and_opens_again(cached, tmp_path: Path) -> None:
    case = cached[1]
    assert case.volume.dtype == np.uint8 and case.volume.shape == (24, 22, 20)
    # RAS: the patient's left is now at small indices
    assert np.argwhere(case.labels == 1)[:, 0].mean() < np.argwhere(case.labels == 2)[:, 0].mean()
    assert cached[0].annotated == ("parotid_gland_left", "parotid_gland_right")
    assert len(case.voxels["mandible"]) == (case.labels == 3).sum() > 0
    stamp = (cached.folder / "index.json").stat().st_mtime_ns
    folder = CaseFolder(tmp_path / "data", "openkbp")
    same = cache_case_folder(
        tmp_path / "cache", folder, "test", NAMES, MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    )
    assert (same.folder / "index.json").stat().st_mtime_ns == stamp
    other = cache_case_folder(
        tmp_path / "cache", folder, "test", NAMES, MoMEProcessor(spacing=[4, 4, 3], hu_window=[-100, 400])
    )
    assert other.folder != same.folder


def test_samples_are_a_function_of_their_number(cached) -> None:
    def dataset(seed: int) -> PatchDataset:
        return PatchDataset(
            [cached],
            [1.0],
            NAMES,
            (16, 16, 16),
            50,
            seed,
            augmentation=Augmentation(AugmentationConfig(affine=0.5), NAMES),
        )

    one, two = dataset(0), dataset(0)
    for number in (3, 0, 3):
        for key, value in one[number].items():
            assert torch.equal(value, two[number][key])
    assert not torch.equal(one[3]["volume"], dataset(1)[3]["volume"])
    assert any(not one[n]["supervised"][2] for n in range(20))  # case c0 has no mandible contour
    present = [bool(one[n]["targets"].flatten(1).any(1).any()) for n in range(20)]
    assert np.mean(present) > 0.6


def test_mirroring_swaps_sides() -> None:
    augment = Augmentation(AugmentationConfig(mirror=1.0, intensity=0.0, noise=0.0), NAMES)
    patch = np.zeros((8, 4, 4), np.float32)
    targets = np.zeros((3, 8, 4, 4), bool)
    targets[0, :2], targets[2, 3:5] = True, True
    supervised = np.array([True, False, True])
    _, flipped, seen = augment(np.random.default_rng(0), patch, targets, supervised)
    assert flipped[1, -2:].all() and not flipped[0].any() and flipped[2, 3:5].all()
    assert seen.tolist() == [False, True, True]
    assert not Augmentation(AugmentationConfig(mirror=1.0), NAMES[:1]).can_mirror


def test_crop_stays_inside_or_pads() -> None:
    array = np.arange(10 * 10 * 3).reshape(10, 10, 3)
    assert np.array_equal(crop(array, (0, 9, 1), (4, 4, 3)), array[:4, 6:, :])
    padded = crop(array + 1, (5, 5, 1), (4, 4, 7))
    assert np.array_equal(padded[:, :, 2:5], (array + 1)[3:7, 3:7]) and not padded[:, :, :2].any()


def test_unsupervised_structures_contribute_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    targets = (torch.rand(2, 3, 4, 4, 4) > 0.5).float()
    supervised = torch.tensor([[True, False, True], [True, False, False]])
    loss = masked_bce_dice(logits, targets, supervised)
    loss.backward()
    assert not logits.grad[:, 1].any() and not logits.grad[1, 2].any() and logits.grad[0, 2].any()
    changed = targets.clone()
    changed[:, 1] = 1 - changed[:, 1]
    assert torch.equal(masked_bce_dice(logits, changed, supervised), loss)
    nothing = masked_bce_dice(logits, targets, torch.zeros(2, 3, dtype=torch.bool))
    assert nothing == 0


def test_loss_against_the_formula() -> None:
    logits, targets = torch.randn(1, 1, 3, 3, 3), (torch.rand(1, 1, 3, 3, 3) > 0.5).float()
    p = logits.sigmoid()
    bce = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    dice = 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)
    torch.testing.assert_close(masked_bce_dice(logits, targets), bce + dice)


def test_learning_rate_is_warm_up_then_cosine() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


# -- configuration -------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labels: [liver]\ntrain: {samples: 10}\nmodel: {experts: 'mlp(n=2)'}\n")
    run = load_run_config(
        path, ["experts=swiglu(n=8)", "experts.hidden=12", "train.steps=100", "train.learning_rate=1e-3"]
    )
    assert run.model["experts"] == {"name": "swiglu", "n": 8, "hidden": 12}
    assert run.train.steps == 100 and run.train.learning_rate == 1e-3 and run.train.samples == 10

    no = load_run_config(path, ["train.mixed_precision=no", "train.channels_last=true"]).train
    assert no.mixed_precision == "no" and no.channels_last is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=1", "unknown key 'train.stepz', did you mean 'steps'"),
        ("train.steps=many", "train.steps cannot be 'many'"),
        ("train.batch_size=a", "train.batch_size is of type int"),
        ("nonsense", "written key=value"),
        ("labels=liver", "labels is a list"),
        ("sources=[{kindd: x}]", r"unknown key 'sources\[0\].kindd'"),
        ("train.batch_size=0", "train.batch_size is at least 1, got 0"),
        ("train.threads=-1", "train.threads is at least 0"),
        ("train.mixed_precision=bf17", "one of no, bf16, fp16, got 'bf17'"),
        ("train.ema=1.5", "train.ema is from 0 to 1"),
        ("train.learning_rate=0", "train.learning_rate is above 0"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labels: [liver]\n")
    with pytest.raises(InputError, match=words) as caught:
        load_run_config(path, [override])
    assert len(str(caught.value).splitlines()) <= 3


def test_bad_configuration_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such training configuration"):
        load_run_config(tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_run_config(tmp_path / "bad.yaml", [])


def test_the_shipped_recipe_is_valid() -> None:
    run = load_run_config(REPOSITORY / "examples/configs/mome_ct_tiny.yaml", ["experts=swiglu(n=8)"])
    assert run.preset == "mome_ct_tiny" and len(run.labels) == 7


def test_bad_case_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cases.json"):
        CaseFolder(tmp_path, "openkbp")
    folder = write_cases(tmp_path / "d", 1)
    (folder / "cases.json").write_text(json.dumps({"c0": {"annotated": ["liver"]}}))
    with pytest.raises(InputError, match="lists 'liver'"):
        CaseFolder(folder, "openkbp")
    (folder / "cases.json").write_text(json.dumps({"c9": {"annotated": []}}))
    with pytest.raises(InputError, match="has no file"):
        CaseFolder(folder, "openkbp")


# -- the command, killed and resumed ------------------------------------------------------------------------------

RECIPE = """
preset: universal_ct_tiny
labels: [parotid_gland_left, parotid_gland_right, mandible]
cache: {root}/cache
model:
  encoder: unet(channels=[4, 8])
  text_encoder: learned
  head: dynamic(hidden=8)
  experts: swiglu(n=2, hidden=8)
  router: switch
  fusion: text_guided
  dim: 8
  patch_size: [16, 16, 16]
sources: [{{kind: cases, folder: "{root}/data", dataset: openkbp}}]
validation: [{{kind: cases, folder: "{root}/data", dataset: openkbp}}]
train:
  {{steps: 12, validate_every: 6, batch_size: 2, gradient_accumulation: 2, checkpoint_every: 3, threads: 1,
    ema: 0.9, tracker: none}}
"""


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "examples/train.py"), "--config", str(recipe), *overrides]


def losses(run: Path) -> dict[int, float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_cases(tmp_path / "data")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(recipe, f"train.out={whole}"), check=True, capture_output=True)
    victim = subprocess.Popen(
        command(recipe, f"train.out={broken}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        if (broken / "log.jsonl").is_file() and len((broken / "log.jsonl").read_text().splitlines()) >= 5:
            os.kill(victim.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL and not (broken / "model").exists()
    subprocess.run(command(recipe, f"train.out={broken}"), check=True, capture_output=True)
    assert losses(broken) == losses(whole) and sorted(losses(whole)) == list(range(1, 13))
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert len(list((broken / "checkpoints").iterdir())) <= 2


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    from mome.training.checkpoint import check_same_run, note_run

    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    check_same_run(tmp_path / "r", load_run_config(recipe, []))
    note_run(tmp_path / "r", load_run_config(recipe, []))
    check_same_run(tmp_path / "r", load_run_config(recipe, ["train.threads=2", "train.out=elsewhere"]))
    for override, key in (("train.seed=3", "train.seed"), ("experts=linear", "model.experts"), ("loss=x", "loss")):
        with pytest.raises(InputError, match=f"another '{key}'") as caught:
            check_same_run(tmp_path / "r", load_run_config(recipe, [override]))
        assert len(str(caught.value).splitlines()) <= 3


def test_accelerate_launch_with_overrides(tmp_path: Path) -> None:
    """The command of the README, its experts swapped and its steps set from the command line."""
    write_cases(tmp_path / "data")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [
            *launch,
            *command(recipe, "experts=swiglu(n=8)", "train.steps=2", f"train.out={tmp_path / 'r'}")[1:],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "r" / "model" / "config.json").read_text())
    assert config["experts"]["n"] == 8 and sorted(losses(tmp_path / "r")) == [1, 2]


@pytest.fixture
def ready(tmp_path: Path) -> tuple:
    """A run on the small data set with its model, its bank filled, and its processor."""
    from mome.training.setup import TextRows, build_model

    write_cases(tmp_path / "data")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    run = load_run_config(recipe, [])
    model, processor = build_model(run)
    TextRows(model, list(run.labels), 0.0, 0)
    return model, run, processor


def find_bright(model, volume, text, **options):
    """In place of `stream_logits`: an oracle for the mandible, which is the brightest."""
    yield 0, torch.stack([torch.full(volume.shape[2:], -1.0)] * 2 + [volume[0, 0] - 0.7])


def test_validation_scores_whole_volumes(ready: tuple, monkeypatch) -> None:
    from mome.training import validation

    assert torch.equal(ready[0].text_bank.rows_LT, torch.eye(3))
    monkeypatch.setattr(validation, "stream_logits", find_bright)
    scores = validation.validate(*ready)
    assert scores["dice/mandible"] > 0.8 and scores["dice/parotid_gland_left"] == 0
    assert scores["dice/mean"] == pytest.approx(scores["dice/mandible"] / 3)


def test_synonyms_are_a_function_of_the_step(tmp_path: Path, monkeypatch) -> None:
    from mome.registry import TEXT_ENCODERS
    from mome.training.setup import TextRows
    from mome.zoo import create_model

    class Tower:
        needs_tower = True

        def width(self, num_labels: int) -> int:
            return 384

        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.stack([torch.full((384,), float(sum(map(ord, text)))) + torch.arange(384) for text in texts])

    monkeypatch.setattr(TEXT_ENCODERS, "build", lambda spec: Tower())
    model = create_model("mome_ct_tiny", labels=["mandible", "larynx", "liver"], trained_labels=["mandible", "larynx"])
    rows = TextRows(model, ["mandible", "larynx"], 0.7, seed=1)
    assert torch.equal(rows.at(5), rows.at(5)) and any(not torch.equal(rows.at(i), rows.at(5)) for i in range(20))
    assert torch.equal(model.text_bank.rows_LT[0], Tower().encode(["mandible"])[0])
    assert torch.equal(model.text_bank.rows_LT[2], Tower().encode(["liver"])[0]) and model.text_bank.scale != 1


@pytest.mark.parametrize("override", ["loss=bce_dicee", "sources=[{kind: cases, folder: /none, dataset: openkbp}]"])
def test_a_run_that_cannot_start_leaves_nothing_behind(tmp_path: Path, override: str) -> None:
    from mome.training.loop import train

    write_cases(tmp_path / "data")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    with pytest.raises(InputError):
        train(load_run_config(recipe, [override, f"train.out={tmp_path / 'r'}"]))
    assert not list(tmp_path.glob("r/*.json*"))


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path, monkeypatch) -> None:
    from accelerate import Accelerator

    from mome.errors import OutputError
    from mome.training.checkpoint import latest_checkpoint, save_checkpoint

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, 1, keep=1)

    def full(path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(OutputError, match="the training state could not be written: No space left") as caught:
        save_checkpoint(accelerator, tmp_path, 2, keep=1)
    assert len(str(caught.value).splitlines()) == 3 and model is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_00000001", 1)


def test_processes_share_the_validation_cases(ready: tuple, monkeypatch) -> None:
    from types import SimpleNamespace

    from mome.training import validation

    seen = []

    def counted(model, volume, text, **options):
        seen.append(volume)
        yield from find_bright(model, volume, text)

    monkeypatch.setattr(validation, "stream_logits", counted)
    alone = validation.validate(*ready)
    assert len(seen) == 3
    parts: list[dict] = []
    monkeypatch.setattr(validation, "gather_object", lambda mine: (parts.extend(mine), list(parts))[1])
    for rank in range(2):
        shared = validation.validate(*ready, SimpleNamespace(process_index=rank, num_processes=2))
    assert len(seen) == 6 and shared == pytest.approx(alone)


def test_a_changed_file_is_cached_anew(cached, tmp_path: Path) -> None:
    image = tmp_path / "data" / "images" / "c0.nii.gz"
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 10**9))
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    again = cache_case_folder(tmp_path / "cache", CaseFolder(tmp_path / "data", "openkbp"), "test", NAMES, processor)
    assert again.folder != cached.folder


def test_overrides_stand_on_both_sides_of_an_option(tmp_path: Path) -> None:
    from mome.cli.parser import Parser
    from mome.cli.train import add_arguments

    parser = Parser(prog="train.py")
    add_arguments(parser)
    args = parser.parse_intermixed_args(["a=1", "--config", "c.yaml", "b=2"])
    assert args.overrides == ["a=1", "b=2"]


def test_a_mistyped_override_ends_with_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    done = subprocess.run(command(recipe, "train.stepz=1"), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) <= 3 and "did you mean" in done.stderr
