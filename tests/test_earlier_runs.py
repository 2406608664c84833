"""Files that a run wrote stay known in the report after runs of the same study with other prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_helpers import report, segmenter
from small_scans import correct_mask, patient_hu, save_patient
from stand_in_models import Contrast

from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.inference import report as report_module
from mome.inference.earlier_runs import run_that_wrote, runs_of, with_earlier_runs
from mome.inference.output_checks import check_outputs, refuse_corrected_masks
from mome.inference.report import Report
from mome.inference.study import Requests, Study
from mome.inference.study_run import StudyRun
from mome.volumes.mask_file import write_mask

NOT_OURS = "is there already, and no report here says that it is a mask of this scan"


def run(scan: Path, prompts: list[str], **options: Any) -> dict[str, Any]:
    (entry,) = segment_folder(segmenter(), [scan], scan.parent / "out", prompts, **options)
    return entry


def test_a_map_is_made_again_after_single_masks(tmp_path: Path) -> None:
    """The entry of the single masks replaced that of the map, which then was "not a mask of this scan"."""
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"], multilabel=True)
    run(scan, ["liver", "spleen"])
    run(scan, ["spleen"])
    run(scan, ["liver"])
    assert [entry["masks"] for entry in runs_of(report(out)["ct"])] == [
        ["ct_liver.nii.gz"],
        ["ct_spleen.nii.gz"],
        ["ct.nii.gz"],
    ]
    before = (out / "ct.nii.gz").read_bytes()
    with pytest.raises(InputError, match="there already, with other structures: liver\n"):
        run(scan, ["spleen"], multilabel=True)
    assert run(scan, ["liver"], multilabel=True)["status"] == "done"
    assert (out / "ct.nii.gz").read_bytes() == before
    run(scan, ["spleen", "liver"], multilabel=True, overwrite=True)
    run(scan, ["liver", "spleen"])
    assert len(list(runs_of(report(out)["ct"]))) == 2  # nothing is kept of masks that were replaced


def test_earlier_masks_are_checked_as_those_of_the_last_run(tmp_path: Path) -> None:
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"])
    run(scan, ["spleen"])
    whole = (out / "ct_liver.nii.gz").read_bytes()
    (out / "ct_liver.nii.gz").write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="changed after it was written"):
        run(scan, ["liver", "spleen"])
    (out / "ct_liver.nii.gz").write_bytes(whole)
    with pytest.raises(InputError, match="made with another setting"):
        segment_folder(segmenter(overlap=0.25), [scan], out, ["liver"])
    save_patient(scan, patient_hu() + 1)  # another scan of the same name
    with pytest.raises(InputError, match=NOT_OURS):
        run(scan, ["liver"])
    (out / "ct.nii.gz").write_bytes(b"of another program")
    with pytest.raises(InputError, match=NOT_OURS):
        run(scan, ["liver"], multilabel=True)
    assert (out / "ct.nii.gz").read_bytes() == b"of another program"


def test_scans_of_one_name_keep_their_masks_apart(tmp_path: Path) -> None:
    one, two = save_patient(tmp_path / "1" / "ct.nii.gz"), save_patient(tmp_path / "2" / "ct.nii.gz", patient_hu() + 1)
    for scan, prompt in ((one, "liver"), (two, "spleen"), (one, "liver"), (two, "spleen")):
        segment_folder(segmenter(), [scan], tmp_path / "out", [prompt])
    for scan, prompt in ((two, "liver"), (one, "spleen")):
        with pytest.raises(InputError, match=NOT_OURS):
            segment_folder(segmenter(), [scan], tmp_path / "out", [prompt])


def test_pages_of_earlier_runs_are_known(tmp_path: Path) -> None:
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    for files in (["preview"], [], ["preview"]):
        assert run(scan, ["liver"], files=files)["status"] == "done"
    (preview,) = out.glob("*.png")
    two = save_patient(tmp_path / "2" / "ct.nii.gz", patient_hu() + 1)
    with pytest.raises(InputError, match="no report here says that it is of this scan"):
        segment_folder(segmenter(), [two], out, ["spleen"], files=["preview"])
    assert preview.is_file()


def test_masks_stay_known_after_a_run_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"])
    with monkeypatch.context() as patch:

        def fail(*arguments: object, **options: object) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(Segmenter, "segment", fail)
        assert run(scan, ["liver"])["status"] == "failed"
    assert report(out)["ct"]["status"] == "failed"
    assert run(scan, ["liver"])["status"] == "done"


def test_save_asks_the_earlier_runs_too(tmp_path: Path) -> None:
    one, two = save_patient(tmp_path / "1" / "ct.nii.gz"), save_patient(tmp_path / "2" / "ct.nii.gz", patient_hu() + 1)
    out = tmp_path / "out"
    for prompt in ("liver", "spleen"):
        segment_folder(segmenter(), [one], out, [prompt])
    first = segmenter().segment(one, ["liver"])
    write_mask(out / "ct_liver.nii.gz", first.masks["liver"], first.grid, first.header)  # a header without a digest
    with pytest.raises(InputError, match="is there already, and is not a mask of this scan"):
        segmenter().segment(two, ["liver"]).save(out, "ct")
    assert first.save(out, "ct")


@pytest.mark.parametrize("earlier", [5, {"a": 1}, [3], [{"masks": [["x"]], "files": [{}], "ended": []}]])
def test_what_another_program_wrote_as_earlier_runs_says_nothing(tmp_path: Path, earlier: Any) -> None:
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"])
    path = out / "report.json"
    path.write_text(json.dumps({"studies": [{**report(out)["ct"], "earlier": earlier, "ended": [1]}]}))
    (out / "ct_spleen.nii.gz").write_bytes(b"somebody's own")
    with pytest.raises(InputError, match=NOT_OURS):
        run(scan, ["spleen"])
    for resume in (False, True):
        assert run(scan, ["liver"], resume=resume)["status"] == "done"


def test_lists_of_another_length_are_left_out() -> None:
    before = {
        "name": "a",
        "masks": ["a", "b"],
        "mask_sha256": ["1"],
        "mask_bytes": [1, 2],
        "structures": [{"name": "x"}, 3],
    }
    new = with_earlier_runs({"name": "a", "masks": ["b"]}, before)
    assert run_that_wrote(new, "a") == {"masks": ["a"], "mask_bytes": [1], "structures": [{"name": "x"}]}
    assert run_that_wrote(new, "b")["name"] == "a" and run_that_wrote(new, "c") == {}
    assert with_earlier_runs({"name": "a", "masks": ["a", "b"]}, new) == {"name": "a", "masks": ["a", "b"]}


def test_no_run_that_resumes_replaces_a_corrected_mask(tmp_path: Path) -> None:
    """With other prompts the study is not finished, and was made again; the message said that --resume keeps masks."""
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"])
    mask = out / "ct_liver.nii.gz"
    before = correct_mask(mask)
    for _ in range(2):
        with pytest.raises(InputError, match="changed after it was written, and would be replaced\n.*\n.*--overwrite"):
            run(scan, ["liver", "spleen"], resume=True)
        assert mask.read_bytes() == before
        run(scan, ["spleen"], resume=True)
    run(scan, ["liver", "spleen"], overwrite=True)
    assert mask.read_bytes() != before and Report(out / "report.json").entries["ct"]["masks"][0] == mask.name


@pytest.mark.parametrize("resume", [True, False])
def test_a_mask_that_is_corrected_while_the_run_is_under_way_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Masks were compared with the report before the first scan only; somebody's work was lost without a word."""
    scans = [save_patient(tmp_path / f"{name}.nii.gz") for name in "ab"]
    out = tmp_path / "out"
    segment_folder(segmenter(), scans, out, ["liver"])
    mask, real, corrected = out / "b_liver.nii.gz", StudyRun.segment, []

    def segment(self: StudyRun, *arguments: Any) -> None:
        if self.study.name == "b":
            corrected.append(correct_mask(mask))
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StudyRun, "segment", segment)
        first, second = segment_folder(segmenter(), scans, out, ["liver", "spleen"], resume=resume)
    assert first["status"] == "done" and len(first["masks"]) == 2
    assert mask.read_bytes() == corrected[0] and not (out / "b_spleen.nii.gz").exists()
    assert second["status"] == "failed" and "changed while this run was under way" in second["error"]
    assert second["failure"]["phase"] == "write"
    # The report still knows who wrote the mask, so that later runs do not replace it either.
    with pytest.raises(InputError, match="changed after it was written, and would be replaced"):
        segment_folder(segmenter(), scans, out, ["liver", "spleen"], resume=True)
    segment_folder(segmenter(), scans, out, ["liver", "spleen"], overwrite=True)
    assert mask.read_bytes() != corrected[0]


def test_a_file_that_is_put_there_while_the_run_is_under_way_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first scan such a file is refused; later it was replaced without a word."""
    scan, out, real = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out", StudyRun.segment

    def segment(self: StudyRun, *arguments: Any) -> None:
        real(self, *arguments)
        (out / "ct_liver.nii.gz").write_bytes(b"somebody's own")

    out.mkdir()
    monkeypatch.setattr(StudyRun, "segment", segment)
    entry = run(scan, ["liver"])
    assert entry["status"] == "failed" and "put there while this run was under way" in entry["error"]
    assert (out / "ct_liver.nii.gz").read_bytes() == b"somebody's own"
    assert run(scan, ["liver"], resume=True)["status"] == "done"


def test_a_mask_that_another_run_replaces_meanwhile_is_no_corrected_one(tmp_path: Path) -> None:
    """The report was read before the other run added its entry, so that its mask seemed to be somebody's work."""
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver"])
    study = Study("ct", scan, ("liver",))
    owners = check_outputs([study], [["liver"]], out)
    requests = Requests(segmenter(overlap=0.25, exact=True))
    stale = Report(out / "report.json")
    other = Segmenter(Contrast(thresholds=(0.7, 0.6)), segmenter().processor)
    segment_folder(other, [scan], out, ["liver"], resume=True)
    assert stale.entries["ct"]["mask_sha256"] != report(out)["ct"]["mask_sha256"]
    refuse_corrected_masks(owners, out, stale, requests)
    assert not list(out.glob(".*.writing"))


def test_a_run_that_resumes_reads_no_mask_of_a_finished_study_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mask was read once for each mask of its study, before the first scan."""
    scan, read = save_patient(tmp_path / "ct.nii.gz"), []
    run(scan, ["liver", "spleen"])
    real = report_module.file_sha256
    monkeypatch.setattr(report_module, "file_sha256", lambda path: read.append(path.name) or real(path))
    run(scan, ["liver", "spleen"], resume=True)
    assert read == ["ct_liver.nii.gz", "ct_spleen.nii.gz"]
    read.clear()
    run(scan, ["liver", "spleen"])
    assert read == ["ct_liver.nii.gz", "ct_spleen.nii.gz"] * 2  # before the first scan, and before they are replaced


def test_a_run_that_was_killed_while_it_replaced_masks_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask was new and the entry was not, so that the mask seemed to be corrected by somebody."""
    scan, out = save_patient(tmp_path / "ct.nii.gz"), tmp_path / "out"
    run(scan, ["liver", "spleen"])
    other = Segmenter(Contrast(thresholds=(0.7, 0.6)), segmenter().processor)
    real = StudyRun.write

    def killed(self: StudyRun) -> None:
        real(self)
        raise KeyboardInterrupt  # not an error of the study: no entry is added

    with monkeypatch.context() as patch:
        patch.setattr(StudyRun, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            segment_folder(other, [scan], out, ["liver"], resume=True)
    new = (out / "ct_liver.nii.gz").read_bytes()
    assert [(entry.get("status"), entry["masks"]) for entry in runs_of(report(out)["ct"])] == [
        ("failed", ["ct_liver.nii.gz"]),
        (None, ["ct_spleen.nii.gz"]),
    ]
    assert json.loads((out / "problems.json").read_text())["problems"][0]["phase"] == "write"
    (entry,) = segment_folder(other, [scan], out, ["liver"], resume=True)
    assert entry["status"] == "done" and "skipped" not in entry and (out / "ct_liver.nii.gz").read_bytes() == new
    assert not (out / "problems.json").exists()
    # The first model's masks are not taken for finished either.
    (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], resume=True)
    assert "skipped" not in entry and (out / "ct_liver.nii.gz").read_bytes() != new
