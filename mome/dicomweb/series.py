"""Retrieves a series by WADO-RS, lists the series of a study by QIDO-RS, and stores objects by STOW-RS."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.dicomweb.session import LISTS, MOST_BYTES, TOKEN_VARIABLE
from mome.errors import InputError, OutputError

if TYPE_CHECKING:
    import pydicom
    from dicomweb_client.web import DICOMwebClient

_MOST_INSTANCES = 20_000
_PARTIAL, _CONFLICT = 206, 409
# In the syntax in which the archive holds them: uncompressed ones would be twice as large.
_ANY_SYNTAX = (("application/dicom", "*"),)


def is_uid(text: str) -> bool:
    """Says whether a text is a UID: digits and dots, 64 at most."""
    return len(text) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", text) is not None


def check_uid(uid: str, option: str) -> str:
    """Returns a UID.

    Raises:
        InputError: It is none: digits and dots, 64 at most.
    """
    if not is_uid(uid):
        raise InputError(f"{uid[:80]!r} is no UID", where=option, hint="digits and dots, 64 at most")
    return uid


def list_series(client: DICOMwebClient, study: str) -> list[dict[str, Any]]:
    """Returns `uid`, `modality`, `images` and `description` of the series of a study, without a patient's data.

    Raises:
        InputError: There is no such study, or the server refuses or cannot be reached.
    """
    with _told(client):
        found = client.search_for_series(study)
        listed = [
            {
                "uid": _value(entry, "0020000E"),
                "modality": _value(entry, "00080060"),
                "images": _value(entry, "00201209"),
                "description": _value(entry, "0008103E"),
            }
            for entry in found
        ]
        if not all(isinstance(entry["uid"], str) for entry in listed):
            raise ValueError("an entry is no series")
    if not listed:
        raise InputError("the DICOMweb server has no such study", where="StudyInstanceUID")
    return listed


def find_study(client: DICOMwebClient, series: str) -> str:
    """Returns the StudyInstanceUID of a series.

    Raises:
        InputError: There is no such series, or the server refuses or cannot be reached.
    """
    with _told(client):
        found = client.search_for_series(search_filters={"SeriesInstanceUID": series})
        studies = {_value(entry, "0020000D") for entry in found if _value(entry, "0020000E") == series}
    if len(studies) != 1 or None in studies:
        raise InputError("the DICOMweb server has no such series", where="SeriesInstanceUID")
    return check_uid(str(studies.pop()), "StudyInstanceUID")


def retrieve_series(
    client: DICOMwebClient,
    study: str,
    series: str,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    *,
    most_bytes: int = MOST_BYTES,
) -> int:
    """Writes the instances of a series to `folder` as `000000.dcm`, `000001.dcm` and so on.

    Args:
        client: See `mome.dicomweb.session.connect`.
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        folder: An empty folder.
        progress: Called with the number of instances so far.
        most_bytes: The largest size of the series.

    Returns:
        The number of instances.

    Raises:
        InputError: The server refuses, cannot be reached, has no such series, or sends another one, a part of it or
            too much.
        OutputError: The disk is full.
    """
    count = size = 0
    session: Any = client._session
    with _told(client):
        datasets = client.iter_series(study, series, media_types=_ANY_SYNTAX)
        if session.last.status_code == _PARTIAL:
            raise InputError(
                "the DICOMweb server sends some images of the series only",
                where=series,
                hint="ask who runs the archive",
            )
        for dataset in datasets:
            if str(dataset.get("SeriesInstanceUID", "")) != series:
                raise InputError("the DICOMweb server sends another series than the one asked for")
            path = folder / f"{count:06d}.dcm"
            try:
                dataset.save_as(path, enforce_file_format=True)
            except OSError as error:
                raise OutputError(f"the series cannot be written: {error.strerror}", where=str(folder)) from error
            count, size = count + 1, size + path.stat().st_size
            if count > _MOST_INSTANCES or size > most_bytes:
                raise InputError(
                    f"the series is larger than {_MOST_INSTANCES} images or {most_bytes / 1e9:g} GB", where=series
                )
            if progress is not None:
                progress(count)
    if count == 0:
        raise InputError("the DICOMweb server has no images of this series", where=series)
    return count


def store_files(client: DICOMwebClient, study: str, files: Sequence[Path]) -> list[str]:
    """Stores DICOM files into a study and returns their SOPInstanceUIDs.

    Raises:
        InputError: The server refuses or cannot be reached.
        OutputError: The server says that it has not stored all of them.
    """
    import pydicom

    datasets = [pydicom.dcmread(file) for file in files]
    uids = [str(dataset.SOPInstanceUID) for dataset in datasets]
    with _told(client):
        answer, status = _stored(client, datasets, study)
        stored = {str(item.get("ReferencedSOPInstanceUID", "")) for item in answer.get("ReferencedSOPSequence") or []}
        failed = [item.get("FailureReason") for item in answer.get("FailedSOPSequence") or []]
    # An answer without a list is a success only by its status; 202 stands for warnings or failures (PS3.18, 10.5.3).
    complete = set(uids) <= stored if stored or failed else status == 200
    if failed or not complete:
        reason = f" (failure reason {failed[0]:#06x})" if failed and isinstance(failed[0], int) else ""
        raise OutputError(
            f"the DICOMweb server has not stored the result{reason}",
            hint="some archives take no label maps: --writer 'dicom_seg(kind=binary)'",
        )
    return uids


def _stored(client: DICOMwebClient, datasets: Sequence[pydicom.Dataset], study: str) -> tuple[pydicom.Dataset, int]:
    """Stores instances and returns what the server says of them, and its status."""
    import pydicom
    import requests

    session: Any = client._session
    try:
        answer = client.store_instances(datasets, study)
    except requests.HTTPError:
        if session.last.status_code != _CONFLICT:
            raise
        # None of the instances was stored (PS3.18, 10.5.3). The body says why, which the client does not read.
        is_json = session.last.content and session.last.headers.get("Content-Type", "").endswith("json")
        answer = pydicom.Dataset.from_json(session.last.json()) if is_json else pydicom.Dataset()
    else:
        if session.last.content and session.last.headers.get("Content-Type") not in LISTS:  # as the page of a login
            raise ValueError("the answer is no list of instances")
    return answer, session.last.status_code


@contextlib.contextmanager
def _told(client: DICOMwebClient) -> Iterator[None]:
    """Turns errors of the client into sentences, without what the server answered.

    Raises:
        InputError: The server refuses, cannot be reached, or answers something else than DICOMweb.
    """
    import requests
    from pydicom.errors import BytesLengthException, InvalidDicomError

    # What pydicom and dicomweb-client raise for answers that they cannot read.
    unreadable = (
        *(AttributeError, EOFError, LookupError, NotImplementedError, OverflowError, RecursionError, SyntaxError),
        *(TypeError, ValueError, struct.error, BytesLengthException, InvalidDicomError),
    )
    where = str(client.base_url)
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        hints = {
            401: f"put a token into the environment variable {TOKEN_VARIABLE}",
            403: "the token has no right to this",
            404: "check the UIDs and the URL",
        }
        raise InputError(
            f"the DICOMweb server answers with status {status}", where=where, hint=hints.get(status)
        ) from None
    except requests.exceptions.SSLError as error:
        raise InputError(
            "the certificate of the DICOMweb server cannot be verified",
            where=where,
            hint="the environment variable REQUESTS_CA_BUNDLE names the certificates of your authority",
        ) from error
    except requests.exceptions.InvalidJSONError:
        raise InputError("the DICOMweb server answers something else than DICOMweb", where=where) from None
    except requests.RequestException as error:
        raise InputError(
            f"the DICOMweb server cannot be reached: {type(error).__name__}", where=where, hint="check the URL"
        ) from error
    except InputError:
        raise
    except unreadable as error:
        raise InputError("the DICOMweb server answers something else than DICOMweb", where=where) from error


def _value(entry: dict[str, Any], tag: str) -> Any:
    """Returns the first value of an attribute of DICOM JSON; None where there is none."""
    values = entry.get(tag, {}).get("Value", []) if isinstance(entry, dict) else []
    return values[0] if values else None
