"""`/infer` as the extension of OHIF reads its answer: ids of `/info/`, the type of voxels, and their order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_series import SAGITTAL, along_z, dataset, series, write
from server_process import Answer, Server, form

from mome.errors import InputError
from mome.server.nrrd_map import map_ids

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the server needs mome[serve]")

# What the extension's MonaiLabelClient.infer adds to the options of the user.
OHIF = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}


def infer(server: Server, ct: bytes, output: str = "image", **params: Any) -> Answer:
    body, kind = form([("params", json.dumps(params))], [("file", "x", ct)])
    return server.ask("POST", f"/infer/model?image=1.2.3&output={output}", body, {"Content-Type": kind})


def voxels(nrrd: bytes, dtype: type) -> np.ndarray:
    """The voxels as the extension takes them: everything behind the header is of the type that it has asked for."""
    return np.frombuffer(nrrd.split(b"\n\n", 1)[1], dtype)


def test_structures_keep_the_ids_of_info(server: Server, ct: bytes) -> None:
    """OHIF names the voxels of an id by the list of `/info/`, whatever the user has asked for."""
    (model,) = server.ask("GET", "/info/").json["models"].values()
    assert model["labels"] == {"liver": 1}
    asked = {"prompts": "spleen, liver"}
    told = infer(server, ct, "json", **OHIF, **asked).json["label_names"]
    assert told == {"spleen": 2, "liver": 1}
    ohif = voxels(infer(server, ct, **OHIF, **asked).body, np.uint8)
    slicer = voxels(infer(server, ct, result_compress=False, **asked).body, np.uint8)
    assert set(np.unique(slicer)) == {0, 1, 2}
    assert np.array_equal(ohif, np.array([0, 2, 1], np.uint8)[slicer])


def test_classes_are_asked_for_by_their_ids(server: Server, ct: bytes) -> None:
    told = infer(server, ct, "json", **OHIF, label_prompt=[1]).json["label_names"]
    assert told == {"liver": 1}
    for wrong, words in (([], "no structure was chosen"), ([2], "ids of /info/"), (["1"], "ids of"), (True, "ids of")):
        refused = infer(server, ct, **OHIF, label_prompt=wrong)
        assert refused.status == 422 and words in refused.json["what"], refused.body


def test_voxels_have_the_type_that_was_asked_for(server: Server, ct: bytes) -> None:
    answers = {name: infer(server, ct, **{**OHIF, "result_dtype": name}).body for name in ("uint8", "uint16")}
    assert b"type: uint16\n" in answers["uint16"]
    assert np.array_equal(voxels(answers["uint8"], np.uint8), voxels(answers["uint16"], np.uint16))
    for wrong in ({"result_dtype": "float32"}, {"result_extension": ".nii.gz"}, {"result_dtype": ["uint8"]}):
        assert infer(server, ct, **{**OHIF, **wrong}).status == 422


def test_an_older_extension_finds_both_parts(server: Server, ct: bytes) -> None:
    """Before 0.8.5 it splits the answer by hand, and fails without `centroids`."""
    answer = infer(server, ct, "all", **{**OHIF, "result_dtype": "uint16"})
    boundary = answer.headers["content-type"].split("boundary=")[1]
    parts = answer.body.split(f"--{boundary}".encode())
    (params,) = [part for part in parts if b"Content-Type: application/json" in part]
    (image,) = [part for part in parts if b"Content-Type: application/octet-stream" in part]
    assert json.loads(params[params.index(b"{") : params.rindex(b"}") + 1])["centroids"] == {}
    shape = patient_shape()
    content = image.split(b"\r\n\r\n", 1)[1]
    assert voxels(content[: content.rindex(b"\r\n")], np.uint16).size == np.prod(shape)


def patient_shape() -> tuple[int, ...]:
    from small_scans import patient_hu

    return patient_hu().shape


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), SAGITTAL])
def test_voxels_lie_in_the_order_of_the_slices(orientation: tuple[int, ...], tmp_path) -> None:
    """Columns, then rows, then slices along the normal of the slices, as Cornerstone stacks them."""
    from mome.volumes import read_volume

    normal = np.cross(orientation[:3], orientation[3:])
    slices = [dataset(list(map(float, place)), orientation) for place in np.arange(5)[:, None] * 3.0 * normal]
    for one in slices:
        one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = "1.2.3", "1.2", "1.2.4"
    read = read_volume(write(tmp_path / "series", [slices[number] for number in (3, 0, 4, 1, 2)]))
    for number, one in enumerate(slices):
        hu = pydicom.pixels.apply_rescale(one.pixel_array, one)
        assert np.array_equal(read.array[:, :, number].T, hu)


def test_ids_of_structures() -> None:
    assert map_ids(["b", "a"], {}) == {"b": 1, "a": 2}
    assert map_ids(["c", "b", "d"], {"a": 1, "b": 2}) == {"c": 3, "b": 2, "d": 4}


def test_an_id_that_does_not_fit_is_refused(tmp_path) -> None:
    from types import SimpleNamespace

    from mome.server.nrrd_map import write_nrrd_map

    result: Any = SimpleNamespace(prompts=[SimpleNamespace(name="liver")])
    with pytest.raises(InputError, match="the id 256 does not fit into uint8"):
        write_nrrd_map(result, tmp_path / "a.nrrd", dtype="uint8", known_ids={"liver": 256})
    assert not list(tmp_path.iterdir())


def test_a_series_of_the_archive_obeys_the_limit_of_uploads(tmp_path) -> None:
    pytest.importorskip("dicomweb_client", reason="DICOMweb needs mome[dicomweb]")
    from dicomweb_server import archive

    from mome.dicomweb.series import retrieve_series
    from mome.dicomweb.session import connect

    (tmp_path / "in").mkdir()
    with archive(write(tmp_path / "archive", series(along_z(range(0, 36, 3))))) as held:
        client = connect(held.url)
        with pytest.raises(InputError, match="larger than 20000 images or 2e-06 GB"):
            retrieve_series(client, held.study, held.series, tmp_path / "in", most_bytes=2000)
