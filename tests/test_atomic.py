"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mome import atomic
from mome.atomic import atomic_write, check_output_folder
from mome.errors import InputError, OutputError


def test_an_output_folder_is_looked_at_before_the_work(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a folder"):
        check_output_folder(tmp_path / "dangling")
    with pytest.raises(InputError, match="cannot be made: File name too long"):
        check_output_folder(tmp_path / ("a" * 300))
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match="the output folder is not a folder") as caught:
            check_output_folder(place)
        assert str(tmp_path / "file") in str(caught.value)
        with (
            pytest.raises(OutputError, match="the mask could not be written") as written,
            atomic_write(place / "a.txt", "the mask"),
        ):
            pass
        assert "disk space" not in str(written.value)


def test_a_file_is_moved_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scan.nii.gz"
    with atomic_write(path) as part:
        part.write_text("whole")
        assert part.name.endswith(".nii.gz") and not path.exists()
    assert path.read_text() == "whole" and [entry.name for entry in path.parent.iterdir()] == ["scan.nii.gz"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(OutputError, match="the table could not be written: No space left") as caught:
        with atomic_write(path, "the table") as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 3
    with pytest.raises(InputError), atomic_write(path) as part:
        part.write_text("half")
        raise InputError("not ours to translate")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_write(folder) as part:
            part.mkdir()
            (part / content).write_text(content)
    assert [path.name for path in folder.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(OutputError, match="the model could not be written: I/O error"):
        with atomic_write(tmp_path / "model", "the model"):
            raise SafetensorError("I/O error: No space left on device")


def test_a_folder_that_cannot_be_replaced_stays_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == path and (Path(source) / "weights").read_text() == "new":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="could not be written"), atomic_write(path) as part:
        part.mkdir()
        (part / "weights").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and (path / "weights").read_text() == "old"
    # What cannot be removed is left for the next run, and the new folder is in place.
    monkeypatch.setattr(os, "replace", real)
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, ignore_errors: None)
    with atomic_write(path) as part:
        part.mkdir()
        (part / "weights").write_text("new")
    assert (path / "weights").read_text() == "new"


def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("old")
    path = tmp_path / "here" / "model"
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with atomic_write(path) as part:
        part.mkdir()
        (part / "weights").write_text("new")
    assert (path / "weights").read_text() == "new" and (tmp_path / "elsewhere" / "weights").read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"] and not path.is_symlink()
