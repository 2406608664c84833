"""Compressed pixels are decoded in another process, which may crash, hang or print without harm."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_series import AXIAL, along_z, dataset, largest_hu_error, slice_hu, write
from pydicom.uid import UID

from mome.errors import InputError
from mome.volumes import read_volume
from mome.volumes.dicom import DicomOptions, decoder

JPEG_LS = "1.2.840.10008.1.2.4.80"
POSITIONS = along_z(np.arange(5) * 3.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A series of five slices, compressed as JPEG-LS; the file of slice k is `00<5 − k>.dcm`."""
    pytest.importorskip("jpeg_ls")
    made = [dataset(p, hu=slice_hu(p, AXIAL, 16, 16)) for p in POSITIONS]
    for image in made:
        image.compress(UID(JPEG_LS), generate_instance_uid=False)
    return write(tmp_path / "series", made)


# A decoder that ends or hangs at one file; it writes to stdout and stderr, as C++ libraries do.
PROGRAM = """
import os, sys, time
sys.path.insert(0, {folder!r})
import decoder_process
real = decoder_process._answer

def answer(request, answers):
    os.write(1, b"noise"), os.write(2, b"Doe")
    if request["file"].endswith("003.dcm"):
        {harm}
    real(request, answers)

decoder_process._answer = answer
decoder_process.main(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "harm",
    [
        "os.abort()",
        "os._exit(0)",
        "raise MemoryError",
        "bytearray(1 << 40)",
        pytest.param("time.sleep(100)", marks=pytest.mark.wide),
    ],
)
def test_a_decoder_that_dies_damages_one_slice(tmp_path: Path, folder: Path, monkeypatch, capfd, harm: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(Path(decoder.__file__).parent), harm=harm))
    monkeypatch.setattr(decoder, "_PROGRAM", program)
    monkeypatch.setattr(decoder, "_LONGEST", 5.0 if "sleep" in harm else 60.0)
    volume = read_volume(folder, dicom=DicomOptions(allow_damaged=True))
    assert volume.shape[2] == 5 and largest_hu_error(volume.array, volume.affine) < 1.1
    assert any("1 slice left out: 003.dcm" in note for note in volume.notes)
    with pytest.raises(InputError, match="1 slice cannot be read: 003.dcm"):
        read_volume(folder)
    assert "".join(capfd.readouterr()) == ""


def test_nothing_is_imported_from_the_folder_of_the_scan(folder: Path, monkeypatch) -> None:
    for name in ("json", "pydicom", "numpy", "logging", "sitecustomize"):
        (folder / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').write_text('')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    assert read_volume(".").shape[2] == 5
    assert not (folder / "ran").exists()
