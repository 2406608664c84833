"""`Segmentation.save` replaces no file of another scan, and goes on replacing its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from batch_helpers import segmenter
from small_scans import patient_affine, patient_hu, save_patient

from mome.errors import InputError
from mome.inference import segment_folder
from mome.inference.result import Segmentation
from mome.volumes import Volume, read_label_map, read_label_table, read_volume
from mome.volumes.mask_file import read_scan_digest, write_mask
from mome.volumes.scan_digest import scan_digest

NOT_OURS = "is there already, and is not a mask of this scan"


def other_scan(path: Path) -> Path:
    """A scan on the same grid, of which one voxel differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.load(save_patient(path))
    hu = np.asarray(image.dataobj).copy()
    hu[3, 4, 5] += 1
    nib.save(nib.Nifti1Image(hu, image.affine, image.header), path)
    return path


def result_of(scan: Path | Volume) -> Segmentation:
    return segmenter().segment(scan, ["liver", "spleen"])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("as_array", [False, True])
def test_two_scans_on_one_grid_are_told_apart(tmp_path: Path, multilabel: bool, as_array: bool) -> None:
    """The masks of the second replaced those of the first without a word."""
    one, two = save_patient(tmp_path / "1" / "ct.nii.gz"), other_scan(tmp_path / "2" / "ct.nii.gz")
    first, second = (result_of(read_volume(scan) if as_array else scan) for scan in (one, two))
    paths = first.save(tmp_path / "out", "ct", multilabel=multilabel)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(InputError, match=f"{NOT_OURS}\n  in: .*ct.*\n.*overwrite=True"):
        second.save(tmp_path / "out", "ct", multilabel=multilabel)
    assert [path.read_bytes() for path in paths] == before
    assert first.save(tmp_path / "out", "ct", multilabel=multilabel) == paths
    again = result_of(save_patient(tmp_path / "copy" / "ct.nii.gz"))  # the same scan in another place
    assert again.save(tmp_path / "out", "ct", multilabel=multilabel) == paths
    assert [path.read_bytes() for path in paths] == before
    assert second.save(tmp_path / "out", "ct", multilabel=multilabel, overwrite=True) == paths
    assert read_scan_digest(paths[0]) == second.scan_digest != first.scan_digest


def test_masks_of_a_run_are_known_by_their_header_or_the_report(tmp_path: Path) -> None:
    one, two = save_patient(tmp_path / "1" / "ct.nii.gz"), other_scan(tmp_path / "2" / "ct.nii.gz")
    out = tmp_path / "out"
    segment_folder(segmenter(), [one], out, ["liver", "spleen"])
    first, second = result_of(one), result_of(two)
    with pytest.raises(InputError, match=NOT_OURS):
        second.save(out, "ct")
    assert first.save(out, "ct") == [out / "ct_liver.nii.gz", out / "ct_spleen.nii.gz"]
    for path in out.glob("*.nii.gz"):  # as an earlier version wrote it
        write_mask(path, read_label_map(path).array, first.grid, first.header, read_label_table(path))
        assert read_scan_digest(path) == ""
    with pytest.raises(InputError, match=NOT_OURS):
        second.save(out, "ct")
    first.save(out, "ct")
    # Nothing is known of a mask without digest and report, nor where the report is of another program.
    write_mask(out / "ct_liver.nii.gz", first.masks["liver"], first.grid, first.header)
    write_mask(out / "ct_spleen.nii.gz", first.masks["spleen"], first.grid, first.header)
    (out / "report.json").write_text("[]")
    assert second.save(out, "ct")


def test_the_digest_is_that_of_the_numbers() -> None:
    hu = patient_hu()
    assert scan_digest(hu) == scan_digest(np.asfortranarray(hu)) == scan_digest(hu.astype(np.float32))
    changed = hu.copy()
    changed[-1, -1, -1] += 1
    assert len({scan_digest(array) for array in (hu, changed, hu[::-1], hu.transpose(2, 1, 0))}) == 4
    # Masks hold it, so that it may not change.
    assert scan_digest(np.arange(40 * 3 * 2, dtype=np.float32).reshape(40, 3, 2, order="F")) == "ab3e1b1e5b92cb51"


def test_the_digest_of_a_series_is_that_of_its_slices_in_any_order(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_series import along_z, series, write

    slices = series(along_z(np.arange(8) * 3.0), SeriesInstanceUID="1.2.1")
    one, two = write(tmp_path / "one", slices), write(tmp_path / "two", slices[::-1])
    first, second = (segmenter().segment(folder, ["liver"]).scan_digest for folder in (one, two))
    assert first == second == scan_digest(read_volume(one).array) != ""


def test_the_digest_is_that_of_the_scan_once_it_was_repaired(tmp_path: Path) -> None:
    """What is no number may be stored in several ways; the network sees air."""
    hu = patient_hu().astype(np.float32)
    air, gap = hu.copy(), hu.copy()
    air[0, 0, 0], gap[0, 0, 0] = -1024, np.nan
    assert result_of(Volume(gap, patient_affine())).scan_digest == result_of(Volume(air, patient_affine())).scan_digest


def test_a_report_of_another_program_says_nothing(tmp_path: Path) -> None:
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    first = result_of(scan)
    (path, _) = first.save(out, "ct")
    write_mask(path, first.masks["liver"], first.grid, first.header)  # without a digest
    for masks in (5, {"a": 1}, path.name):
        (out / "report.json").write_text(json.dumps({"studies": [{"name": "ct", "masks": masks}]}))
        assert first.save(out, "ct")


@pytest.mark.parametrize("writer", ["dicom_seg", "rtstruct"])
def test_objects_of_another_series_are_not_replaced(tmp_path: Path, writer: str) -> None:
    """An object of another series on the same grid, even of the same numbers, was replaced without a word."""
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    from dicom_series import along_z, series, write

    def of(name: str, uid: str) -> Segmentation:
        made = series(along_z(np.arange(8) * 3.0), SeriesInstanceUID=uid, FrameOfReferenceUID="1.2.3.9")
        result = segmenter().segment(write(tmp_path / name, made), ["liver"])
        masks = result.masks
        box = np.ones((4, 4, 4), bool)
        masks.replace("liver", (3, 3, 2), box)
        return result

    first, second = of("first", "1.2.1"), of("second", "1.2.2")
    out = tmp_path / "out"
    (path,) = first.save(out, "ct", writer=writer)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"{NOT_OURS}\n  in: .*ct_.*dcm, of .*second"):
        second.save(out, "ct", writer=writer)
    assert path.read_bytes() == before
    assert first.save(out, "ct", writer=writer) == [path]
    assert second.save(out, "ct", writer=writer, overwrite=True) == [path]
    assert "1.2.2" in str(pydicom.dcmread(path))
    path.write_bytes(next((tmp_path / "first").iterdir()).read_bytes())  # a slice refers to no series
    with pytest.raises(InputError, match=NOT_OURS):
        first.save(out, "ct", writer=writer)
    path.write_bytes(before[: len(before) // 20])  # what a killed program left
    assert first.save(out, "ct", writer=writer) == [path]


def test_a_result_without_a_digest_replaces_as_before(tmp_path: Path) -> None:
    """A result that a caller made himself holds none."""
    first = result_of(save_patient(tmp_path / "ct.nii.gz"))
    first.save(tmp_path / "out", "ct")
    assert replace(first, scan_digest="", source=None).save(tmp_path / "out", "ct")
