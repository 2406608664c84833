"""The code in docs/python.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_scans import patient_image

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "python.md"


def test_the_code_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    import nibabel

    nibabel.save(patient_image(), "ct.nii.gz")
    exec(compile("\n".join(blocks), str(DOCUMENT), "exec"), {})
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
