"""Segmenting within a budget of memory: the same masks, plans that hold, and refusals before anything is allocated."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from stand_in_models import Contrast

from mome import memory
from mome.cli.main import main
from mome.errors import InputError, lacks_memory
from mome.inference import Segmenter, scan_memory
from mome.inference import within_memory as within
from mome.inference.memory_plan import MemoryPlan, Work, fitting_plan
from mome.inference.plan import measured_tile, plan_scan
from mome.inference.precision import limit_compiled_products, multiplies_bfloat16
from mome.inference.stream import stream_planes
from mome.memory import as_text, available_bytes, parse_bytes, process_bytes, reset_peak
from mome.processing import MoMEProcessor
from mome.threads import container_cpus
from mome.volumes import Volume

LARGE = Work((512, 512, 600), (200, 200, 300), (64, 64, 64), 100)
NAMES = ["liver", "spleen", "pancreas", "stomach", "aorta"]


def segmenter(**options: object) -> Segmenter:
    model = Contrast(NAMES, [0.3, 0.4, 0.5, 0.6, 0.7], patch=16)
    return Segmenter(model, MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]), **options)


def blobs(shape: tuple[int, int, int] = (40, 44, 36)) -> Volume:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 3)
    return Volume((noise / noise.std() * 60).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1]))


def test_bytes_are_read_and_shown() -> None:
    assert parse_bytes("4GB", "--memory") == 4_000_000_000 and parse_bytes(" 1.5 GiB", "m") == 3 << 29
    assert parse_bytes("2000", "m") == 2000 and as_text(3.24e9) == "3.2 GB" and as_text(52e6) == "52 MB"
    assert [parse_bytes(text, "m") for text in ("1.5 MB", "500k", "7", "1TB", "8B", ".5gb")] == [
        1_500_000, 500_000, 7, 10**12, 8, 500_000_000,
    ]  # fmt: skip
    for wrong in ("", "4 bananas", "-1GB", "0GB", "1e9", "GB", "4 XB", "0", "0.4", "4" + " " * 40 + "x"):
        with pytest.raises(InputError, match="--memory is a number of bytes"):
            parse_bytes(wrong, "--memory")


def test_limits_of_a_container_are_respected(monkeypatch, tmp_path: Path) -> None:
    assert 0 < available_bytes() < 1e14
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert available_bytes() == 2_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 2_400_000
    assert container_cpus() >= 1


def test_a_smaller_budget_gives_a_smaller_plan_and_then_a_refusal() -> None:
    plans = [fitting_plan(LARGE, budget, chunk=32) for budget in (1e11, 3e9, 2.1e9, 1.5e9)]
    totals = [plan.total(LARGE) for plan in plans]
    assert plans[0] == MemoryPlan(100, 32, half_sums=True) and totals == sorted(totals, reverse=True)
    assert plans[3].group < 100
    assert all(total <= budget for total, budget in zip(totals, (1e11, 3e9, 2.1e9, 1.5e9), strict=True))
    assert fitting_plan(LARGE, 1e11, chunk=32, exact=True) == MemoryPlan(100, 32)
    with pytest.raises(InputError, match=r"512 × 512 × 600 voxels needs 1\.\d GB of memory.* 0\.5 GB are left"):
        fitting_plan(LARGE, 5e8, chunk=32, where="ct.nii.gz")


def test_bytes_on_a_gpu_count_there() -> None:
    work = replace(LARGE, on_gpu=True)
    plan = MemoryPlan(100, 32)
    planes_of_the_scan = 64 * 200 * 200 * 4  # those that the tiles of a ring read lie beside it on a GPU
    assert plan.total(work) + plan.total(work, gpu=True) == plan.total(LARGE) + planes_of_the_scan
    assert fitting_plan(work, 1e11, chunk=32, gpu_budget=5e8).group < 100
    with pytest.raises(InputError, match="are left"):
        fitting_plan(work, 1e11, chunk=32, gpu_budget=1e6)


def test_every_plan_gives_the_same_masks() -> None:
    scan, calls = blobs(), []
    plain = segmenter(exact=True).segment(scan, NAMES, probabilities=["spleen"])
    made = segmenter(exact=True)
    prepared = made.prepare(NAMES)
    array, network = made.processor.to_network(scan)
    for plan in (MemoryPlan(5, 2), MemoryPlan(2, 1), MemoryPlan(1, 1), MemoryPlan(3, 3, half_sums=True)):
        calls.clear()
        masks, maps, notes = within.predict_within_memory(
            made.predictor,
            array,
            network,
            scan.grid,
            prepared,
            plan,
            asked=["spleen"],
            progress=lambda *tiles: calls.append(tiles),
        )
        assert notes == [] and list(masks) == NAMES and calls[-1][0] == calls[-1][1] == len(calls)
        for name in NAMES:
            different = int((masks[name] != plain.masks[name]).sum())
            # half precision rounds logits to about one in two thousand
            assert different <= (0 if not plan.half_sums else 0.002 * masks.voxels[name])
            assert masks.voxels[name] == masks[name].sum() > 0
        assert maps is not None and list(maps) == ["spleen"]
        assert np.abs(maps["spleen"].astype(int) - plain.probabilities["spleen"]).max() <= (1 if plan.half_sums else 0)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough")],
)
def test_too_little_memory_after_all_is_said_and_mended(error: Exception, monkeypatch) -> None:
    assert lacks_memory(error) and not lacks_memory(RuntimeError("another"))
    real, groups = within.predict_masks, []

    def fails_for_many(*arguments: object, **options: object):
        prompts = arguments[4]
        groups.append(len(prompts.names))
        if len(prompts.names) > 2:
            raise error
        return real(*arguments, **options)

    plain = segmenter().segment(blobs(), NAMES)
    monkeypatch.setattr(within, "predict_masks", fails_for_many)
    result = segmenter().segment(blobs(), NAMES)
    assert groups[-3:] == [2, 2, 1] and any("memory was not enough at first" in note for note in result.notes)
    for name in NAMES:
        assert (result.masks[name] != plain.masks[name]).sum() <= 0.002 * plain.masks.voxels[name]
    monkeypatch.setattr(within, "predict_masks", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match="not enough for this scan, one prompt at a time"):
        segmenter().segment(blobs(), NAMES)


def test_sums_that_float16_does_not_hold_are_kept_in_float32() -> None:
    made = segmenter()
    made.predictor.model.decode = lambda features, text: Contrast.decode(made.model, features, text) * 1e5
    made.memory = process_bytes() + 10**9
    array, network = made.processor.to_network(blobs())
    plan = MemoryPlan(5, 5, half_sums=True)
    masks, _, notes = within.predict_within_memory(
        made.predictor, array, network, blobs().grid, made.prepare(NAMES), plan
    )
    plain = segmenter(exact=True).segment(blobs(), NAMES)
    assert all(np.array_equal(masks[name], plain.masks[name]) for name in NAMES)
    assert len(notes) == 1 and "with sums in float32" in notes[0]


def test_small_logits_are_kept_at_the_borders_of_tiles() -> None:
    """Times the weight of a border, they were zero in float16, and the masks had holes there."""
    plain = segmenter(exact=True).segment(blobs(), NAMES)
    for factor, allowed in ((1, 0.001), (1e-3, 0.001), (1e-4, 0.002)):
        made = segmenter()
        made.predictor.model.decode = lambda features, text, m=made, f=factor: (
            Contrast.decode(m.model, features, text) * f
        )
        result = made.segment(blobs(), NAMES)
        for name in NAMES:
            assert (result.masks[name] != plain.masks[name]).sum() <= allowed * plain.masks.voxels[name]


def test_sums_in_float32_after_all_stay_within_memory(monkeypatch) -> None:
    """They take twice the bytes of those in float16, for which the first plan was made."""
    made, plans = segmenter(), []
    made.predictor.model.decode = lambda features, text: Contrast.decode(made.model, features, text) * 1e5
    network = made.load(blobs()).network.shape
    work = Work(blobs().shape, network, made.predictor.patch_size, len(NAMES))
    first = MemoryPlan(5, 5, half_sums=True)
    made.network_bytes = 0
    monkeypatch.setattr(scan_memory, "budget", lambda *given: first.total(work))
    real = within._predict
    monkeypatch.setattr(within, "_predict", lambda *given: plans.append(given[5]) or real(*given))
    result = made.segment(blobs(), NAMES)
    assert plans[0] == first and len(plans) == 2 and not plans[1].half_sums
    assert plans[1].group < 5 and plans[1].total(work) <= first.total(work)
    assert sum("with sums in float32" in note for note in result.notes) == 1
    expected = segmenter(exact=True).segment(blobs(), NAMES)
    assert all(np.array_equal(result.masks[name], expected.masks[name]) for name in NAMES)


def test_a_scan_that_cannot_fit_is_refused_before_the_network_runs() -> None:
    made = segmenter(memory="1MB")
    with pytest.raises(InputError, match="of memory, one prompt at a time") as caught:
        made.segment(blobs(), NAMES)
    assert made.model.encoded == 0 and len(str(caught.value).splitlines()) <= 3


@pytest.mark.wide
def test_the_bytes_of_a_plan_are_those_of_a_run() -> None:
    """A scan of 256 × 256 × 200 voxels: the highest memory of a run is 0.4 to 1.1 times the plan's."""
    rng = np.random.default_rng(0)
    coarse = blobs((64, 64, 50)).array.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    scan = Volume(coarse + rng.normal(0, 5, coarse.shape).astype(np.float32), np.diag([0.7, 0.7, 1.0, 1]))
    made = segmenter()
    prompts = made.prepare(NAMES)
    made.segment(blobs(), prompts)  # what is loaded once is loaded
    cost = measured_tile(made, prompts)
    plan = plan_scan(made, scan, prompts, cost, process_bytes() - scan.array.nbytes)
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed counts as taken until it is given back
    before = process_bytes() - scan.array.nbytes
    if not reset_peak():
        pytest.skip("the system does not measure the highest memory of a process")
    made.segment(scan, prompts)
    taken, expected = process_bytes(peak=True) - before, sum(plan.bytes_by_part.values())
    assert 0.4 * expected < taken < 1.1 * expected


def test_the_command_says_what_a_scan_will_take(tmp_path: Path, capsys, monkeypatch) -> None:
    scan = blobs((24, 24, 24))
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(scan.array.astype(np.int16), scan.affine), path)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"broken")
    monkeypatch.setattr("mome.inference.Segmenter", lambda *a, **options: segmenter(memory=options["memory"]))
    out = tmp_path / "out"
    arguments = ["segment", str(path), "-p", "liver", "-p", "spleen", "-o", str(out), "--plan", "-m", "any"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "24×24×24 voxels of 2×2×2 mm" in printed and "8 tiles at most" in printed and "before the scan" in printed
    assert main([*arguments[:2], str(broken), *arguments[2:], "--json"]) == 2
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans[0]["tiles"] == 8 and plans[0]["bytes"]["scan"] == 4 * 24**3 and "broken" in plans[1]["error"]
    (tmp_path / "scans" / "inside").mkdir(parents=True)
    path.rename(tmp_path / "scans" / "inside" / "ct.nii.gz")
    path = tmp_path / "scans"
    assert main([arguments[0], str(path), *arguments[2:], "--recursive", "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["plans"]
    assert alone["name"] == "inside_ct" and "next scan" not in alone["bytes"]
    shutil.copy(path / "inside" / "ct.nii.gz", path / "inside" / "two.nii.gz")
    folder = [arguments[0], str(path / "inside"), *arguments[2:], "--json"]
    assert main(folder) == 0  # while the first is segmented, the second is read, which takes a quarter more for checks
    for plan in json.loads(capsys.readouterr().out)["plans"]:
        assert plan["bytes"]["next scan"] == plan["bytes"]["scan"] * 5 // 4 + 4 * math.prod(plan["part"])
    assert main([*folder, "--memory", "8GB"]) == 0  # with a limit, no scan is read ahead
    assert all("next scan" not in plan["bytes"] for plan in json.loads(capsys.readouterr().out)["plans"])
    (path / "inside" / "two.nii.gz").unlink()
    assert main([arguments[0], str(path / "inside"), *arguments[2:], "--memory", "1MB"]) == 2
    assert "of memory, one prompt at a time" in capsys.readouterr().out
    coarse = np.diag([24.0, 24, 24, 1])
    nib.save(nib.Nifti1Image(scan.array[8:16, 8:16, 8:16].astype(np.int16), coarse), tmp_path / "coarse.nii.gz")
    command = [arguments[0], str(tmp_path / "coarse.nii.gz"), *arguments[2:]]
    assert main([*command, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["tiles"] > 500 and any("masks may be wrong" in note for note in plan["notes"])
    assert main(command) == 0
    assert "note: voxels are 24 × 24 × 24 mm large" in capsys.readouterr().out
    assert not out.exists()


def test_a_plan_of_jobs_and_of_mirrored_tiles(tmp_path: Path, capsys, monkeypatch) -> None:
    scan = blobs((24, 24, 24))
    for name in ("one", "two"):
        nib.save(nib.Nifti1Image(scan.array.astype(np.int16), scan.affine), tmp_path / f"{name}.nii.gz")
    with zipfile.ZipFile(tmp_path / "three.zip", "w") as archive:
        archive.write(tmp_path / "one.nii.gz", "one.nii.gz")
    jobs = [
        {"scan": "one.nii.gz", "prompts": ["liver"]},
        {"scan": "two.nii.gz", "name": "patient", "prompts": ["spleen", "aorta"]},
        {"scan": "three.zip"},
        {"scan": "missing.nii.gz"},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    tiles: list[int] = []

    def made(*given: object, **options: Any) -> Segmenter:
        found = segmenter(mirror=options["mirror"])
        encode = found.model.encode
        found.model.encode = lambda *tile: (tiles.append(1), encode(*tile))[1]
        return found

    monkeypatch.setattr("mome.inference.Segmenter", made)
    arguments = ["segment", "--jobs", str(tmp_path / "jobs.json"), "-p", "liver", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--plan", "--json", "-m", "any"]) == 2
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan.get("name", plan.get("scan")) for plan in plans] == ["one", "patient", "three", "missing"]
    assert [plan.get("prompts_at_once") for plan in plans] == [1, 2, 1, None] and "missing" in plans[3]["error"]
    once, _ = len(tiles), tiles.clear()
    assert main([*arguments, "--plan", "--json", "-m", "any", "--mirror", "ap,si"]) == 2
    assert len(tiles) == 4 * once > 0
    assert not (tmp_path / "out").exists()


def test_memory_for_the_scan_that_is_read_ahead_is_left_where_possible() -> None:
    whole = MemoryPlan(100, 32, half_sums=True)
    needed = whole.total(LARGE)
    assert fitting_plan(LARGE, needed, chunk=32) == whole
    assert fitting_plan(LARGE, needed + 1e9, chunk=32, reserved=1e9) == whole
    smaller = fitting_plan(LARGE, needed, chunk=32, reserved=1e8)
    assert smaller != whole and smaller.total(LARGE) <= needed - 1e8
    smallest = fitting_plan(LARGE, needed, chunk=32, reserved=needed)
    assert smallest == MemoryPlan(1, 1, half_sums=True)


def test_features_of_a_tile_are_dropped_before_the_next_is_encoded() -> None:
    class Features:
        pass

    class Watched:
        patch_size, device = (16, 16, 16), torch.device("cpu")

        def __init__(self) -> None:
            self.alive: weakref.WeakSet = weakref.WeakSet()

        def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> Features:
            assert not len(self.alive)
            features = Features()
            self.alive.add(features)
            return features

        def decode(self, features: Features, text: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, len(text), 16, 16, 16)

    planes = stream_planes(Watched(), torch.zeros(1, 1, 40, 20, 16), torch.eye(3), prompt_chunk=2)
    assert sum(finished.stop - finished.first for finished in planes) == 40


def test_few_compiled_products_are_kept(monkeypatch) -> None:
    """oneDNN reads the limit when it computes first; a process of its own would show that memory stays."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    Segmenter(Contrast(), MoMEProcessor())
    assert [os.environ[name] for name in names] == ["64", "64"]
    monkeypatch.setenv(names[0], "300")
    limit_compiled_products()
    assert os.environ[names[0]] == "300"


@pytest.mark.wide
@pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor emulates bfloat16, which takes minutes")
def test_memory_does_not_grow_with_the_tiles_in_bfloat16() -> None:
    """A process of its own, since oneDNN reads its limits once. Without the limit, eight tiles took 120 MB more."""
    script = """
import torch
from mome.inference import Segmenter
from mome.memory import process_bytes
segmenter = Segmenter("mome-ct-tiny", precision="bf16")
with torch.inference_mode():
    for number in range(10):
        tile = (torch.rand(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(number)) * (0.3 + 0.1 * number))
        segmenter.predictor.encode(tile.clamp(0, 1), (number, 0, 0))
        if number == 1:
            before = process_bytes()
print((process_bytes() - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 60


def test_maps_of_disagreement_are_counted() -> None:
    plan = MemoryPlan(8, 8)
    more = plan.total(replace(LARGE, disagreement=True)) - plan.total(LARGE)
    assert more == 3 * 4 * math.prod(LARGE.network) + math.prod(LARGE.scan)
