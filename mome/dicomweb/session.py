"""HTTP to one DICOMweb server and no other: no redirect elsewhere, no http over a network, time and size limits."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from mome.errors import InputError
from mome.loopback import is_loopback

if TYPE_CHECKING:
    import requests
    from dicomweb_client.web import DICOMwebClient

TOKEN_VARIABLE = "MOME_DICOMWEB_TOKEN"
_TIMEOUTS_S = (10.0, 60.0)  # to connect, and between two pieces of an answer
MOST_BYTES = 8 * 10**9
_MOST_BYTES_AT_ONCE = 64 * 2**20  # of an answer that is read as a whole, such as a list of series
_LONGEST_EPILOGUE = 4096
LISTS = ("application/dicom+json", "application/json", "application/dicom+xml", "application/xml")


def connect(url: str, *, insecure: bool = False) -> DICOMwebClient:
    """Returns a client of a DICOMweb server. Nothing is sent yet.

    The bearer token of the environment variable `MOME_DICOMWEB_TOKEN` is sent with each request, to this server only.
    Proxies and `.netrc` of the environment are not used; `REQUESTS_CA_BUNDLE` names the certificates of an authority.

    Args:
        url: The root of the service, as in `https://pacs.example/dicom-web`.
        insecure: Allow http to another machine.

    Raises:
        InputError: A package is not installed, the URL is none, holds a password, or is http to another machine.
    """
    if importlib.util.find_spec("dicomweb_client") is None or importlib.util.find_spec("pydicom") is None:
        raise InputError("dicomweb-client is not installed", hint='pip install "mome[dicom,dicomweb]"')
    check_url(url, insecure=insecure)
    from dicomweb_client.web import DICOMwebClient

    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token and not (token.isascii() and token.isprintable()):
        raise InputError("the token holds characters that no header can hold", where=TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    client = DICOMwebClient(url.rstrip("/"), session=_session(url), headers=headers, timeout=_TIMEOUTS_S)
    client.set_http_retry_params(retry=False)
    return client


def check_url(url: str, *, insecure: bool = False) -> None:
    """Checks the URL of a service.

    Raises:
        InputError: It is no URL of http or https, it holds a user's name or a password, or it is http to another
            machine and `insecure` is not set.
    """
    parts = _parts(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError("this is no URL of a DICOMweb server", where="the URL", hint="https://pacs.example/dicom-web")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "the URL holds a user's name or a password, which would be seen in lists of processes",
            where="the URL",
            hint=f"put a token into the environment variable {TOKEN_VARIABLE}",
        )
    if parts.scheme == "http" and not insecure and not is_loopback(parts.hostname):
        raise InputError(
            f"http to {parts.hostname} can be read by anybody on the network",
            where="the URL",
            hint="https://…, or --insecure if the network is private",
        )


def _session(url: str) -> requests.Session:
    """Returns a session that speaks to the server of `url` only."""
    import requests

    root = _origin(url)

    class OneServer(requests.Session):
        """Follows a redirect on the same server only, bounds every answer, and notices one that ends early.

        Attributes:
            last: The last answer.
        """

        last: requests.Response | None = None

        def get_redirect_target(self, resp: requests.Response) -> str | None:
            target = super().get_redirect_target(resp)
            if target is not None and _origin(urljoin(resp.url, target)) != root:
                raise InputError(
                    "the DICOMweb server redirects to another server, which is refused",
                    hint="give the URL of the server that holds the images",
                )
            return target

        def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
            if _origin(request.url or "") != root:
                raise InputError("a request would go to another server than the one of the URL")
            is_whole = not kwargs.get("stream")
            response = super().send(request, **{**kwargs, "stream": True})  # else it is read here, without a limit
            kind, _, parameters = response.headers.get("Content-Type", "").partition(";")
            if kind.strip().lower() in LISTS:  # dicomweb-client knows these without a charset only
                response.headers["Content-Type"] = kind.strip().lower()
            most = _MOST_BYTES_AT_ONCE if is_whole else MOST_BYTES
            response.iter_content = _bounded(response.iter_content, most, _end_of_parts(kind, parameters))  # type: ignore[method-assign]
            if is_whole:
                _ = response.content
            self.last = response
            return response

    session = OneServer()
    session.trust_env = False
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    session.max_redirects = 3
    return session


def _bounded(iter_content: Any, most: int, end: bytes) -> Any:
    """Returns the method `iter_content` of an answer, with checks of its size and its end.

    Args:
        iter_content: The method.
        most: The most bytes that it gives.
        end: What stands at the end of the answer; empty where nothing is known of that.
    """

    def bounded(*args: Any, **kwargs: Any) -> Iterator[bytes]:
        received, tail = 0, b""
        for part in iter_content(*args, **kwargs):
            received += len(part)
            if received > most:
                raise InputError(f"the DICOMweb server sends more than {most / 1e9:.2g} GB")
            tail = (tail + part)[-len(end) - _LONGEST_EPILOGUE :]
            yield part
        # A server or a proxy that breaks off need not say so: the last boundary is the only sign of the end.
        if end not in tail:
            raise InputError("the DICOMweb server's answer ends early", hint="try again")

    return bounded


def _end_of_parts(kind: str, parameters: str) -> bytes:
    """Returns the last boundary of an answer of several parts (RFC 2046, 5.1.1); empty for another answer."""
    if kind.strip().lower() != "multipart/related":
        return b""
    found = re.search(r'(?:^|;)\s*boundary=("?)([^";]+)\1', parameters, re.IGNORECASE)
    return b"" if found is None else b"--" + found[2].strip().encode("latin-1") + b"--"


def _origin(url: str) -> tuple[str, str, int] | None:
    """Returns scheme, host and port of a URL."""
    parts = _parts(url)
    if parts is None or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _parts(url: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises an error for a port that is none
        return parts
    except ValueError:
        return None
