"""The report is never written without its lock, so that no entry of another process is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mome.errors import OutputError
from mome.folder_lock import folder_lock
from mome.inference import report as report_module
from mome.inference.report import Report


def test_an_entry_is_refused_while_another_process_keeps_the_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report_module, "_LOCK_WAIT_S", 0.1)
    path = tmp_path / "report.json"
    report = Report(path)
    report.add("a", {"name": "a"})
    before = path.read_bytes()
    with folder_lock(tmp_path) as is_ours:
        assert is_ours
        with pytest.raises(OutputError, match="'b' cannot be added to the report: another process has locked") as error:
            report.add("b", {"name": "b"})
        assert "--resume" in str(error.value) and len(str(error.value).splitlines()) <= 3
        assert path.read_bytes() == before and list(report.entries) == ["a"]
    report.add("b", {"name": "b"})
    assert [entry["name"] for entry in json.loads(path.read_text())["studies"]] == ["a", "b"]
