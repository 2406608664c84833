"""The routes of MONAI Label, asked as its client in 3D Slicer and its extension of OHIF ask."""

from __future__ import annotations

import gzip
import json
import time
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlencode

import numpy as np
import pytest
from server_process import PATIENT, TOKEN, Answer, Server, form
from small_scans import large_body, patient_affine, patient_bytes

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the server needs mome[serve]")

LIMIT = "----------lImIt_of_THE_fIle_eW_$"  # the boundary of Slicer's client


def as_slicer(server: Server, method: str, selector: str, params: dict[str, Any], **files: tuple[str, bytes]) -> Answer:
    """A multipart request with the bytes, names and headers of `MONAILabelUtils.http_multipart`."""
    lines: list[bytes] = []
    params = {**params, "client_id": "user-xyz"}
    lines += [f"--{LIMIT}".encode(), b'Content-Disposition: form-data; name="params"', b"", json.dumps(params).encode()]
    for key, (name, content) in files.items():
        head = f'Content-Disposition: form-data; name="{key}"; filename="{name}"'
        lines += [f"--{LIMIT}".encode(), head.encode(), b"Content-Type: application/octet-stream", b"", content]
    body = b"".join(line + b"\r\n" for line in [*lines, f"--{LIMIT}--".encode(), b""])
    kind = f"multipart/form-data; boundary={LIMIT}"
    return server.ask(method, selector, body, {"content-type": kind, "content-length": str(len(body))})


def parts_of(answer: Answer) -> tuple[dict[str, Any], str, bytes]:
    """Returns `params`, and the name and the content of the image, of a multipart answer.

    Slicer's client reads the answer from the connection itself, so that it must not come in chunks.
    """
    assert "transfer-encoding" not in answer.headers and int(answer.headers["content-length"]) == len(answer.body)
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + answer.body).get_payload()
    found: dict[str, Message] = {str(p.get_param("name", header="content-disposition")): p for p in parts}
    params, image = found["params"].get_payload(decode=True), found["image"].get_payload(decode=True)
    return json.loads(params), str(found["image"].get_filename()), image


def test_slicer_logs_in(server: Server) -> None:
    assert server.ask("GET", "/auth/", token=None).json["enabled"] is True
    login = {"username": "anybody", "password": TOKEN, "grant_type": "password"}
    kind = {"content-type": "application/x-www-form-urlencoded"}
    given = server.ask("POST", "/auth/token", urlencode(login), kind, token=None).json
    header = {"Authorization": f"{given['token_type']} {given['access_token']}"}
    assert server.ask("GET", "/auth/token/valid", headers=header, token=None).status == 200
    login["password"] = "wrong"
    refused = server.ask("POST", "/auth/token", urlencode(login), kind, token=None)
    assert refused.status == 401 and refused.body == server.ask("GET", "/info/", token=None).body


def test_slicer_reads_the_models(server: Server) -> None:
    info = server.ask("GET", "/info/").json
    assert "config" not in info  # Slicer takes a server with this key for an old one
    (model,) = info["models"].values()
    assert model["type"] == "segmentation" and model["labels"] == {"liver": 1}
    assert info["labels"] == ["liver"] and info["trainers"] == info["strategies"] == info["train_stats"] == {}
    assert server.ask("GET", "/train/?check_if_running=true").status == 404  # not 200: no training runs


def check_map(data: bytes, names: dict[str, int], expected: Any, folder: Path) -> None:
    """A map of ids 1, 2, … in the order of the prompts, on the scan's grid."""
    import SimpleITK as sitk

    (folder / "label.nrrd").write_bytes(data)
    image = sitk.ReadImage(str(folder / "label.nrrd"))
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    assert np.allclose(image.GetOrigin(), patient_affine()[:3, 3] * (-1, -1, 1))
    assert np.allclose(image.GetSpacing(), expected.grid.spacing)
    masks = {name: expected.masks[name].astype(bool) for name in names}
    union = np.any(list(masks.values()), axis=0)
    assert ((array > 0) == union).all() and array.max() == max(names.values())
    for name, number in names.items():
        others = np.any([mask for other, mask in masks.items() if other != name], axis=0)
        assert (array[masks[name] & ~others] == number).all()


@pytest.fixture(scope="module")
def expected(server: Server, ct: bytes, tmp_path_factory: pytest.TempPathFactory):
    import torch

    from mome import Segmenter

    torch.set_num_threads(1)  # tensors are small

    path = tmp_path_factory.mktemp("expected") / "ct.nii.gz"
    path.write_bytes(ct)
    return Segmenter(server.folder.parent / "model").segment(path, ["spleen", "liver"])


def test_slicer_segments_an_image_that_it_uploads(server: Server, ct: bytes, expected: Any, tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    name = quote_plus(f"{PATIENT} 1966")
    file = ("/tmp/slicer/x.nii.gz", ct)
    assert as_slicer(server, "PUT", f"/datastore/?image={name}", {}, file=file).json == {"image": f"{PATIENT} 1966"}
    answer = as_slicer(server, "POST", f"/infer/model?image={name}", {"prompts": "spleen, liver"})
    assert answer.status == 200, answer.body
    params, filename, image = parts_of(answer)
    assert filename.endswith(".nrrd") and params["label_names"] == {"spleen": 1, "liver": 2}
    check_map(image, params["label_names"], expected, tmp_path)
    assert params["warnings"] == list(expected.warnings)  # those of the command
    assert any("not trained on 'spleen'" in warning for warning in params["warnings"])
    again = as_slicer(server, "PUT", f"/datastore/?image={name}", {}, file=file)
    assert again.status == 200 and len(list((server.data / "images").iterdir())) == 1  # the first one was replaced
    assert "Eisenbart" not in server.log.read_text()
    assert "Eisenbart" not in " ".join(map(str, server.data.rglob("*")))
    assert as_slicer(server, "POST", "/infer/model?image=unknown", {}).status == 404
    other = as_slicer(server, "POST", "/infer/mome-ct-torso-tiny?image=unknown", {})
    assert other.status == 404 and other.json["hint"].startswith("/infer/model,")
    assert other.json["what"] == "this server has no model 'mome-ct-torso-tiny'"
    assert as_slicer(server, "POST", "/infer/model?image=", {}).json["what"] == "no image was given"


def test_slicer_uses_a_session(server: Server, ct: bytes) -> None:
    body, kind = form([("client_id", "user-xyz")], [("files", "scan.nii.gz", ct)])
    created = server.ask("PUT", "/session/", body, {"Content-Type": kind}).json
    session = created["session_id"]
    assert str(server.folder) not in json.dumps(created)
    assert server.ask("GET", f"/session/{session}").json["expiry"] == 3600
    answer = as_slicer(server, "POST", f"/infer/model?image=x&session_id={session}", {})
    assert parts_of(answer)[0]["label_names"] == {"liver": 1}  # without prompts, what the model was trained on
    assert server.ask("DELETE", f"/session/{session}").status == 200
    assert server.ask("GET", f"/session/{session}").status == 404
    assert as_slicer(server, "POST", f"/infer/model?image=x&session_id={session}", {}).status == 404
    assert server.ask("GET", "/session/..%2f..").status == 404


def test_ohif_asks_for_raw_nrrd(server: Server, ct: bytes, expected: Any, tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    options = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "prompts": ["liver"]}
    answer = as_slicer(server, "POST", "/infer/model?image=1.2.3&output=image", options, file=("x", ct))
    assert answer.status == 200 and b"encoding: raw\n" in answer.body
    check_map(answer.body, {"liver": 1}, expected, tmp_path)
    answer = as_slicer(server, "POST", "/infer/model?image=1.2.3&output=json", options, file=("x", ct))
    assert set(answer.json) == {"label_names", "latencies", "volumes_ml", "warnings"}
    refused = as_slicer(server, "POST", "/infer/model?output=image", {"prompts": ["left thingy"]}, file=("x", ct))
    assert refused.status == 422 and "which is not understood" in refused.json["what"]
    assert as_slicer(server, "POST", "/infer/model?output=wsi", {}, file=("x", ct)).status == 422
    assert as_slicer(server, "POST", "/infer/model", {"prompts": 3}, file=("x", ct)).status == 422


def test_nothing_is_kept_of_an_inference(server: Server, ct: bytes) -> None:
    before = {path for path in (server.data / "jobs").iterdir()}
    assert as_slicer(server, "POST", "/infer/model?image=x", {}, file=("x", ct)).status == 200
    deadline = time.monotonic() + 10  # files go when the answer has been sent, which the client knows a moment before
    while not {path for path in (server.data / "jobs").iterdir()} <= before:
        assert time.monotonic() < deadline
    assert not list((server.data / "uploads").iterdir())


def test_a_client_that_goes_away_cancels_its_inference(server: Server) -> None:
    large = gzip.compress(patient_bytes(large_body()), 1)
    body, kind = form([("params", "{}")], [("file", "x", large)])
    connection = server.connection()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
    cancelled = server.ask("GET", "/metrics").body.split(b'jobs_ended_total{state="cancelled"} ')[1].split()[0]
    connection.request("POST", "/infer/model?image=x", body, headers)
    while b'mome_jobs{state="running"} 1' not in server.ask("GET", "/metrics").body:
        time.sleep(0.05)
    connection.close()
    expected = f'jobs_ended_total{{state="cancelled"}} {int(cancelled) + 1}'.encode()
    while expected not in server.ask("GET", "/metrics").body:
        time.sleep(0.05)
