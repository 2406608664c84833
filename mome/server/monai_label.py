"""The routes of MONAI Label (0.8.5) that its client in 3D Slicer and its extension of OHIF call.

Written from the requests that these clients make (Project-MONAI/MONAILabel, plugins/slicer/MONAILabel/MONAILabelLib/
client.py and plugins/ohifv3/extensions/monai-label). All models are of type `segmentation`. Training, active
learning, scribbles and stored labels do not exist here; the clients hide what `/info/` does not list.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from importlib.metadata import version
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from mome.errors import InputError
from mome.labels.all_labels import asks_all
from mome.server.guard import unauthorized
from mome.server.http_errors import HttpError
from mome.server.job_routes import accept, check_prompts, queue_of
from mome.server.monai_label_answers import OUTPUTS, answer
from mome.server.monai_label_images import LONGEST_NAME, stored_image
from mome.server.nrrd_map import ID_TYPES
from mome.server.upload import Fields, Upload, receive_upload

router = APIRouter(tags=["MONAI Label"])

_LONGEST_PASSWORD_FORM = 8 * 1024
_EXTENSION = ".nrrd"


@router.get("/info", include_in_schema=False)
@router.get("/info/")
async def info(request: Request) -> dict[str, Any]:
    """Describes the models as MONAI Label does. Slicer offers `prompts` of the config as an option of a model."""
    able = queue_of(request).worker.able
    models = {
        name: {
            "type": "segmentation",
            "labels": _ids(each),
            "dimension": 3,
            "description": "Text-prompted CT segmentation; prompts are separated by commas",
            "config": {"prompts": ""},
        }
        for name, each in able["models"].items()
    }
    return {
        "name": "mome",
        "description": "Text-prompted CT segmentation. Research software, not a medical device.",
        "version": version("mome"),
        "labels": list(_ids(able)),
        "models": models,
        "trainers": {},
        "strategies": {},
        "scoring": {},
        "train_stats": {},
        "datastore": {"total": 0, "completed": 0},
    }


@router.get("/auth", include_in_schema=False)
@router.get("/auth/")
async def auth(request: Request) -> dict[str, bool]:
    """Says whether a token is needed. It needs none itself."""
    return {"enabled": queue_of(request).settings.token is not None}


@router.post("/auth/token")
async def auth_token(request: Request) -> dict[str, str]:
    """Takes the token as the password of a login, with any user name, because Slicer asks for these two."""
    queue = queue_of(request)
    try:
        given = await _password(request, queue.settings.client_timeout_s)
    except TimeoutError:  # a stranger must not hold a connection for ever
        given = None
    token = queue.settings.token
    if token is None or given is None or not hmac.compare_digest(given.encode(), token.encode()):
        queue.metrics.unauthorized += 1
        raise unauthorized()
    return {"access_token": token, "token_type": "Bearer"}


async def _password(request: Request, seconds: float) -> str | None:
    """Returns the password of a form; None where the form is too long.

    Raises:
        TimeoutError: The form did not come in time.
    """
    body = b""
    async with asyncio.timeout(seconds):
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_PASSWORD_FORM:
                return None
    return parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]


@router.get("/auth/token/valid")
async def auth_token_valid() -> dict[str, bool]:
    """Answers requests with the right token only."""
    return {"valid": True}


@router.post("/infer/{model}", response_model=None)
async def infer(
    request: Request,
    model: str,
    image: Annotated[str, Query(max_length=LONGEST_NAME)] = "",
    session_id: str = "",
    output: str = "all",
) -> JSONResponse | FileResponse | StreamingResponse:
    """Segments an image and answers when that is done.

    The image is the field `file`, or a session, or the name of an image that was uploaded, or the UID of a series of
    the archive that the server's option `--dicomweb` names. `params` is JSON. `prompts` in it is a list of structures
    or a text with commas, `label_prompt` a list of ids of `/info/`; without them all structures that the model was
    trained on are segmented. `output` is `image` (an NRRD map of ids), `json` (`label_names` and what else is known),
    `all` (both, as multipart/form-data), or `dicom_seg`.

    The ids are 1, 2, … in the order of the prompts, as Slicer expects them. With `label_prompt`, or `restore_label_idx`
    false as OHIF sends it, structures of `/info/` keep their ids there, because OHIF names segments by them.
    `result_dtype` is `uint8` or `uint16`; OHIF reads the voxels as the type that it has asked for.
    """
    queue = queue_of(request)
    models = queue.worker.able["models"]
    if model not in models:
        hint = ", ".join([*(f"/infer/{name}" for name in models), "or a server with that model (-m)"])
        raise HttpError(404, f"this server has no model {model[:60]!r}", where="the path", hint=hint)
    if output not in OUTPUTS:
        raise HttpError(422, f"there is no output {output[:40]!r}", where="output", hint=", ".join(OUTPUTS))
    async with queue.place():
        upload = await receive_upload(
            request, queue.folders, queue.settings, file_fields=("file",), other_fields=None, needs_file=False
        )
        try:
            params = _params(upload.fields)
            nrrd = _map_options(params, models[model])
            prompts = _prompts(params, models[model])
            if not upload.source:
                stored = await stored_image(request, image, session_id)
                fields = upload.fields
                queue.folders.remove(upload.folder)
                upload = Upload(stored.id, stored.folder, stored.source, stored.bytes, fields)
        except BaseException:
            queue.folders.remove(upload.folder)
            raise
        kind = "dicom_seg" if output == "dicom_seg" else "nrrd"
        asked = {"output": [kind], "model": [model]}
        job = await accept(queue, upload, lambda fields: prompts, asked, nrrd=nrrd)
    return await answer(request, queue, job, output, kind)


def _params(fields: Fields) -> dict[str, Any]:
    """Returns the parameters of a request.

    Raises:
        InputError: They are no JSON object.
    """
    try:
        params = json.loads(fields.get("params", ["{}"])[-1] or "{}")
    except (ValueError, RecursionError):
        params = None
    if not isinstance(params, dict):
        raise InputError("params is no JSON object", where="the field params", hint='{"prompts": ["liver"]}')
    return params


def _map_options(params: dict[str, Any], able: dict[str, Any]) -> dict[str, Any]:
    """Returns how the map of ids is written; see `write_nrrd_map`.

    Raises:
        InputError: The client asks for another type of file or of voxels.
    """
    dtype, extension = params.get("result_dtype"), params.get("result_extension", _EXTENSION)
    if dtype is not None and dtype not in ID_TYPES:
        raise InputError(f"there is no result_dtype {dtype!r:.40}", where="params", hint=" or ".join(ID_TYPES))
    if extension != _EXTENSION:
        raise InputError(f"there is no result_extension {extension!r:.40}", where="params", hint=_EXTENSION)
    keeps_ids = params.get("restore_label_idx") is False or "label_prompt" in params
    return {
        "gzip": params.get("result_compress", True) is not False,
        "dtype": dtype,
        "ids": _ids(able) if keeps_ids else {},
    }


def _prompts(params: dict[str, Any], able: dict[str, Any]) -> list[str]:
    """Returns the prompts of a request, or what the model was trained on.

    Raises:
        InputError: They are of another type, or ids that `/info/` does not list.
    """
    given = params.get("prompts") or []
    if isinstance(given, str):
        given = [text.strip() for text in given.split(",") if text.strip()]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise InputError("prompts are a list of texts, or one text with commas", where="params")
    if any(asks_all(text) for text in given):  # ids are numbers of names
        given = [name for text in given for name in (_ids(able) if asks_all(text) else [text])]
    if not given and "label_prompt" in params:
        given = _prompts_of_ids(params["label_prompt"], able)
    return check_prompts(given or list(_ids(able)))


def _prompts_of_ids(given: Any, able: dict[str, Any]) -> list[str]:
    """Returns the labels of ids of `/info/`.

    Raises:
        InputError: They are no such ids, or none.
    """
    names = {number: name for name, number in _ids(able).items()}
    if not isinstance(given, list) or not all(type(number) is int and number in names for number in given):
        raise InputError("label_prompt is a list of ids of /info/", where="params", hint=f"1 to {len(names)}")
    if not given:  # the client would name the structures of the map wrongly
        raise InputError("no structure was chosen", where="label_prompt")
    return list(dict.fromkeys(names[number] for number in given))


def _ids(able: dict[str, Any]) -> dict[str, int]:
    """Returns the structures that `/info/` lists of a model, with their ids."""
    return {name: number for number, name in enumerate(able["trained_labels"] or able["labels"], 1)}
