"""Folder runs never lose a scan, a mask or an entry of the report, and a resumed run gives the same results."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import correct_mask
from stand_in_models import Threshold

from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment_folder
from mome.inference.scans import find_scans
from mome.processing import MoMEProcessor
from mome.volumes import Grid, write_mask
from mome.volumes.mask_names import file_part


def segmenter(level: float = 0.5, **options: object) -> Segmenter:
    return Segmenter(Threshold(level), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]), **options)


def ct(path: Path, depth: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.random.default_rng(0).normal(0, 60, (8, 8, depth)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), path)
    return path


class Untouched:
    """A segmenter that understands prompts and fails the test where a scan is segmented."""

    def __init__(self, real: Segmenter) -> None:
        self.model, self.processor = real.model, real.processor
        self.predictor = real.predictor
        self.overlap, self.precision, self.understand = real.overlap, real.precision, real.understand
        self.exact = real.exact

    def segment(self, *arguments: object, **options: object) -> None:
        raise AssertionError("inference ran")


# -- scans and masks are never overwritten -------------------------------------------------------------------


def test_a_map_never_replaces_its_scan(tmp_path: Path) -> None:
    scan = ct(tmp_path / "d" / "ct.nii.gz")
    before = scan.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "d")
    for given, out in (([scan], tmp_path / "d"), ([scan], link), ([tmp_path / "d"], tmp_path / "d" / ".." / "d")):
        with pytest.raises(InputError, match="a mask would overwrite its scan"):
            segment_folder(Untouched(segmenter()), given, out, ["liver"], multilabel=True)
    with pytest.raises(InputError, match="a mask would overwrite its scan"):
        segmenter().segment(scan, ["liver"]).save(tmp_path / "d", "ct", multilabel=True)
    assert scan.read_bytes() == before and [p.name for p in scan.parent.iterdir()] == ["ct.nii.gz"]


def test_a_mask_never_replaces_another_scan(tmp_path: Path) -> None:
    ct(tmp_path / "ct.nii.gz"), ct(tmp_path / "ct_liver.nii.gz")
    with pytest.raises(InputError, match="a mask would overwrite its scan"):
        segment_folder(Untouched(segmenter()), [tmp_path], tmp_path, ["liver"])


def test_masks_beside_the_scans_are_not_taken_for_scans(tmp_path: Path, caplog) -> None:
    ct(tmp_path / "ct.nii.gz")
    for is_said in (False, True):
        entries = segment_folder(segmenter(), [tmp_path], tmp_path, ["liver"])
        assert [entry["name"] for entry in entries] == ["ct"]
        said = f"1 mask or folder of masks is left out as no scan, unless given by its path: {tmp_path}/ct_liver"
        assert (said in caplog.text) == is_said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "ct_liver.nii.gz", "report.json"]
    masks = tmp_path / "masks"
    table = [{"id": 1, "name": "liver"}]
    write_mask(masks / "a_liver.nii.gz", np.ones((2, 2, 2)), Grid((2, 2, 2), np.eye(4)), labels=table)
    with pytest.raises(InputError, match="masks only"):
        find_scans([masks])


def test_every_format_that_is_read_is_found(tmp_path: Path) -> None:
    names = ["a.nii.gz", "b.NII", "c.nrrd", "d.nhdr", "e.mha", "f.mhd"]
    for name in [*names, "d.raw.gz", "f.raw", "notes.txt"]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_scans([tmp_path])] == names
    assert find_scans([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # a file is taken as it is given


# -- different masks have different file names ----------------------------------------------------------------


def test_names_that_become_one_file_name_are_refused_before_anything_runs(tmp_path: Path) -> None:
    ct(tmp_path / "x" / "a b.nii.gz"), ct(tmp_path / "x" / "a_b.nii.gz")
    with pytest.raises(InputError, match="two scans would both be named 'a_b'"):
        find_scans([tmp_path / "x"])
    scan, out = ct(tmp_path / "a.nii.gz"), tmp_path / "out"
    untouched = Untouched(segmenter())
    with pytest.raises(InputError, match="give the same file name"):
        segment_folder(untouched, [scan], out, ["odd lesion", "odd/lesion"])
    with pytest.raises(InputError, match="gives no file name"):
        segment_folder(untouched, [scan], out, ["liver", "???"])
    # The scan "a" with the prompt "big odd lesion" and the scan "a_big" with "odd lesion" give the same name.
    with pytest.raises(InputError, match="both write a_big_odd_lesion.nii.gz"):
        segment_folder(untouched, [scan, ct(tmp_path / "a_big.nii.gz")], out, ["odd lesion", "big odd lesion"])
    assert not out.exists()
    with pytest.raises(InputError, match="give the same file name"):
        segmenter().segment(scan, ["odd lesion", "odd/lesion"])
    assert file_part("a b") == file_part("a_b") == "a_b"


# -- resuming ------------------------------------------------------------------------------------------------


def test_resume_asks_for_the_same_model_settings_and_scan(tmp_path: Path) -> None:
    scan, out = ct(tmp_path / "a.nii.gz"), tmp_path / "out"

    def skipped(made: Segmenter, **options: object) -> bool:
        (entry,) = segment_folder(made, [scan], out, ["liver"], resume=True, **options)
        assert entry["status"] == "done"
        return entry.get("skipped", False)

    assert not skipped(segmenter()) and skipped(segmenter())
    assert not skipped(segmenter(0.6)) and skipped(segmenter(0.6))  # other weights
    assert not skipped(segmenter(0.6, overlap=0.25))
    assert not skipped(segmenter(0.6, overlap=0.25, precision="bf16"))
    other = segmenter(0.6, overlap=0.25, precision="bf16")
    other.processor = MoMEProcessor(spacing=[2, 2, 2], hu_window=[-200, 100])
    assert not skipped(other) and skipped(other)
    other.model.config.trained_labels = ["spleen"]
    assert not skipped(other) and skipped(other)
    assert not skipped(other, frame=0) and skipped(other, frame=0)
    os.utime(scan, ns=(1, 1))
    assert not skipped(other, frame=0)
    ct(scan, depth=12)
    os.utime(scan, ns=(1, 1))
    assert not skipped(other, frame=0) and skipped(other, frame=0)


def test_a_finished_run_is_resumed_without_the_tower(tmp_path: Path, monkeypatch) -> None:
    scans, out, made = [ct(tmp_path / f"{name}.nii.gz") for name in "ab"], tmp_path / "out", segmenter()
    segment_folder(made, scans[:1], out, ["liver"])

    def no_tower(*arguments: object) -> None:
        raise InputError("no tower")

    monkeypatch.setattr("mome.inference.segmenter.embed_prompts", no_tower)
    (entry,) = segment_folder(made, scans[:1], out, ["liver"], resume=True)
    assert entry["skipped"]
    with pytest.raises(InputError, match="no tower"):  # the error ends the run, it is not recorded per scan
        segment_folder(made, scans, out, ["liver"], resume=True)


def test_the_report_forgets_nothing(tmp_path: Path) -> None:
    a, b, out = ct(tmp_path / "a.nii.gz"), ct(tmp_path / "b.nii.gz"), tmp_path / "out"

    def names() -> list[str]:
        return [entry["name"] for entry in json.loads((out / "report.json").read_text())["studies"]]

    segment_folder(segmenter(), [a], out, ["liver"])
    assert [e["name"] for e in segment_folder(segmenter(), [b], out, ["liver"])] == ["b"]
    assert names() == ["a", "b"]

    def killed(entry: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_folder(segmenter(), [a, b], out, ["liver"], resume=True, on_done=killed)
    assert names() == ["a", "b"]
    assert all(e["skipped"] for e in segment_folder(segmenter(), [a, b], out, ["liver"], resume=True))
    (out / "report.json").write_text("another program's")
    with pytest.raises(InputError, match="cannot be read"):
        segment_folder(Untouched(segmenter()), [a], out, ["liver"])
    assert (out / "report.json").read_text() == "another program's"


# -- broken studies ------------------------------------------------------------------------------------------


def test_any_error_of_one_study_is_recorded_and_passed_over(tmp_path: Path, monkeypatch) -> None:
    scans, out = [ct(tmp_path / f"{name}.nii.gz") for name in "abc"], tmp_path / "out"
    made, real = segmenter(), Segmenter.segment

    def stumble(self: Segmenter, scan: Path, *rest: object, **options: object):
        if scan.name == "b.nii.gz":
            raise RuntimeError("something odd\nand more")
        return real(self, scan, *rest, **options)

    monkeypatch.setattr(Segmenter, "segment", stumble)
    entries = segment_folder(made, scans, out, ["liver"])
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert entries[1]["error"] == "RuntimeError: something odd" and entries[1]["failure"]["bug"]
    with pytest.raises(RuntimeError, match="something odd"):
        segment_folder(made, scans, out, ["liver"], debug=True)
    too_little = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    for error in (MemoryError(), too_little, OSError(errno.EIO, "Input/output error", str(scans[0]))):

        def lack(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(Segmenter, "segment", lack)
        (entry,) = segment_folder(made, scans[:1], tmp_path / "lack", ["liver"])
        assert not entry["failure"]["bug"] and "--debug" not in entry["error"] + entry["failure"]["remedy"]
        assert ("memory" in entry["error"]) == (not isinstance(error, OSError))
    for error in (OutputError("full"), KeyboardInterrupt()):

        def stop(*arguments: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(Segmenter, "segment", stop)
        with pytest.raises(type(error)):
            segment_folder(made, scans, out, ["liver"])


def test_a_report_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    scan = ct(tmp_path / "a.nii.gz")
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OutputError, match="the report could not be written: No space left"):
        segment_folder(segmenter(), [scan], tmp_path / "out", ["liver"])


def test_a_mask_that_somebody_corrected_is_kept(tmp_path: Path) -> None:
    scan, out = ct(tmp_path / "a.nii.gz"), tmp_path / "o"
    segment_folder(segmenter(), [scan], out, ["liver"])
    mask = out / "a_liver.nii.gz"
    before = correct_mask(mask)
    with pytest.raises(InputError, match="the mask was changed after it was written"):
        segment_folder(segmenter(), [scan], out, ["liver"])
    for _ in range(2):
        (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], resume=True)
        assert entry["skipped"] and mask.read_bytes() == before
        assert sum("changed after they were written, and kept" in note for note in entry["notes"]) == 1
    (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], overwrite=True)
    assert mask.read_bytes() != before and not any("changed" in note for note in entry["notes"])
    segment_folder(segmenter(), [scan], out, ["liver"])  # an untouched mask is replaced by the same mask


def test_a_damaged_mask_is_made_again(tmp_path: Path) -> None:
    scan, out = ct(tmp_path / "a.nii.gz"), tmp_path / "o"
    segment_folder(segmenter(), [scan], out, ["liver"])
    mask = out / "a_liver.nii.gz"
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], resume=True)
    assert not entry.get("skipped") and len(mask.read_bytes()) == len(whole)
    (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], resume=True)
    assert entry["skipped"]


@pytest.mark.parametrize("stem", ["../x", "/x", "", ".", "a/b"])
def test_a_stem_never_leaves_the_folder(tmp_path: Path, stem: str) -> None:
    result = segmenter().segment(ct(tmp_path / "a.nii.gz"), ["liver"])
    with pytest.raises(InputError, match="a stem is the name of a file"):
        result.save(tmp_path / "o", stem)
