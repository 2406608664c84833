"""`jobs.json`: studies with prompts and options of their own, and what is refused in such a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import liver_and_spleen
from small_scans import patient_hu, save_patient
from stand_in_models import Contrast

from mome.cli.main import main
from mome.errors import InputError
from mome.inference import Segmenter, segment_jobs
from mome.inference.jobs import job_prompts, read_jobs
from mome.processing import MoMEProcessor


def segmenter() -> Segmenter:
    return Segmenter(Contrast(thresholds=(0.5, 0.6)), MoMEProcessor(spacing=[8, 9, 10], hu_window=[-200, 800]))


def jobs_file(folder: Path, *jobs: Any) -> Path:
    path = folder / "jobs.json"
    path.write_text(json.dumps({"jobs": list(jobs)}))
    return path


def test_every_job_has_its_own_prompts_and_options(tmp_path: Path) -> None:
    save_patient(tmp_path / "data" / "a.nii.gz")
    save_patient(tmp_path / "far" / "b.nii.gz")
    save_patient(tmp_path / "data" / "4d.nii.gz", np.stack([patient_hu()] * 2, -1))
    path = jobs_file(
        tmp_path / "data",
        {"scan": "a.nii.gz", "prompts": ["liver"]},
        {"scan": str(tmp_path / "far" / "b.nii.gz"), "prompts": ["spleen", "liver"], "name": "patient 2"},
        {"scan": "../far/b.nii.gz", "name": "map", "multilabel": True},  # with the prompts of the run
        {"scan": "4d.nii.gz", "prompts": ["liver"], "frame": 1},
        {"scan": "missing.nii.gz", "prompts": ["liver"]},
    )
    out = tmp_path / "out"
    entries = segment_jobs(segmenter(), path, out, ["spleen"])
    assert [entry["status"] for entry in entries] == ["done"] * 4 + ["failed"]
    assert sorted(file.name for file in out.glob("*.nii.gz")) == [
        "4d_liver.nii.gz",
        "a_liver.nii.gz",
        "map.nii.gz",
        "patient_2_liver.nii.gz",
        "patient_2_spleen.nii.gz",
    ]
    assert entries[3]["settings"]["frame"] == 1 and "no such file" in entries[4]["error"]
    again = segment_jobs(segmenter(), path, out, ["spleen"], resume=True)
    assert [entry.get("skipped", False) for entry in again] == [True] * 4 + [False]
    assert job_prompts(path, ["spleen"]) == ["liver", "spleen"]


REFUSED: dict[str, tuple[Any, str]] = {
    "no prompts": ({"scan": "a.nii"}, "job 1: prompts is a list of texts, got none"),
    "a text": ({"scan": "a.nii", "prompts": "liver"}, "prompts is a list of texts, got 'liver'"),
    "an empty prompt": ({"scan": "a.nii", "prompts": [" "]}, "prompts is a list"),
    "a typo": ({"scan": "a.nii", "promts": ["liver"]}, "job 1 has no key 'promts', did you mean 'prompts'"),
    "an out": ({"scan": "a.nii", "prompts": ["liver"], "out": "/tmp"}, "no key 'out'"),
    "no scan": ({"prompts": ["liver"]}, "job 1 names no scan"),
    "parent": ({"scan": "a.nii", "prompts": ["liver"], "name": "../x"}, "masks go into the folder of --out"),
    "absolute": ({"scan": "a.nii", "prompts": ["liver"], "name": "/etc/x"}, "masks go into"),
    "backslash": ({"scan": "a.nii", "prompts": ["liver"], "name": "..\\x"}, "masks go into"),
    "hidden": ({"scan": "a.nii", "prompts": ["liver"], "name": ".x"}, "masks go into"),
    "an escape": ({"scan": "a.nii", "prompts": ["liver"], "name": "a\x1b[2J"}, "masks go into"),
    "no letters": ({"scan": "a.nii", "prompts": ["liver"], "name": "???"}, "job 1: '[?]{3}' gives no file name"),
    "a frame": ({"scan": "a.nii", "prompts": ["liver"], "frame": -1}, "frame is a whole number from 0, got -1"),
    "true": ({"scan": "a.nii", "prompts": ["liver"], "frame": True}, "frame is a whole number"),
    "a flag": ({"scan": "a.nii", "prompts": ["liver"], "multilabel": "no"}, "multilabel is true or false"),
    "a writer": ({"scan": "a.nii", "prompts": ["liver"], "writer": "nifty"}, "job 1: .*nifti"),
    "a series": ({"scan": "a.nii", "prompts": ["liver"], "series": [1]}, "series is a text"),
    "a list": ([], "job 1 is no object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_jobs_that_are_refused(tmp_path: Path, name: str) -> None:
    job, words = REFUSED[name]
    path = jobs_file(tmp_path, job)
    with pytest.raises(InputError, match=words) as caught:
        read_jobs(path)
    assert len(str(caught.value).splitlines()) <= 3 and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not an object"),
        ("{}", "is not {"),
        ('{"jobs": []}', "is not {"),
        ('{"job": []}', "no key 'job', did you mean 'jobs'"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nests too deeply|not valid JSON"),
        ('{"jobs": [{"scan": "a.nii", "scan": "b.nii", "prompts": ["liver"]}]}', "the key 'scan' twice"),
    ],
)
def test_files_that_hold_no_jobs(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "jobs.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_jobs(path)
    assert len(str(caught.value).splitlines()) <= 3 and caught.value.hint


def test_two_jobs_of_one_name(tmp_path: Path) -> None:
    for second in ({"scan": "x/a.nii"}, {"scan": "b.nii", "name": "a"}, {"scan": "a.nii.gz"}):
        path = jobs_file(tmp_path, {"scan": "a.nii", "prompts": ["liver"]}, {**second, "prompts": ["liver"]})
        with pytest.raises(InputError, match="two scans would both be named 'a'") as caught:
            read_jobs(path)
        assert "name" in str(caught.value.hint) and "job" in str(caught.value.hint)  # no scan has to be renamed
    path = jobs_file(
        tmp_path,
        {"scan": "a.nii", "prompts": ["liver"], "name": "x"},
        {"scan": "a.nii", "prompts": ["spleen"], "name": "y"},
    )
    assert [study.name for study in read_jobs(path)] == ["x", "y"]


def test_two_jobs_whose_maps_would_have_one_name(tmp_path: Path) -> None:
    """Their masks have different names, because they are maps of ids; the second probabilities replaced the first."""
    for name in ("ct", "ct_upper"):
        save_patient(tmp_path / f"{name}.nii.gz")
    jobs = [{"scan": "ct.nii.gz", "prompts": ["upper_aorta"]}, {"scan": "ct_upper.nii.gz", "prompts": ["aorta"]}]
    made = Segmenter(Contrast(("aorta", "upper_aorta"), (0.5, 0.6)), segmenter().processor)
    path, out = jobs_file(tmp_path, *jobs), tmp_path / "out"
    with pytest.raises(InputError, match="both write probabilities/ct_upper_aorta.nii.gz"):
        segment_jobs(made, path, out, multilabel=True, files=["probabilities"])
    assert not out.exists() and len(segment_jobs(made, path, out, multilabel=True)) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    liver_and_spleen().save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[8, 9, 10]).save_pretrained(tmp_path / "model")
    save_patient(tmp_path / "a.nii.gz")
    path = jobs_file(tmp_path, {"scan": "a.nii.gz", "prompts": ["liver"]}, {"scan": "b.nii.gz", "prompts": ["spleen"]})
    arguments = ["segment", "--jobs", str(path), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "model")]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "1 of 2 scans failed" in printed and (tmp_path / "out" / "a_liver.nii.gz").is_file()
    for wrong, words in (
        (["segment", "-o", "x", "-p", "liver"], "no scan was given"),
        ([*arguments, str(tmp_path)], "--jobs names the scans itself"),
        ([*arguments[:2], str(tmp_path / "no.json"), *arguments[3:]], "the jobs file cannot be read"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err
