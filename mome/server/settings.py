"""Settings of the server, and the units in which users write them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mome.errors import InputError
from mome.loopback import is_loopback
from mome.presets import bundled_models

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SHORTEST_TOKEN = 16
_LONGEST_TOKEN = 1024


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        models: Folders, bundled names or Hub ids of the models; all that are bundled if not given.
        host: The address to listen at.
        port: The TCP port; 0 for a free one.
        token: What clients send as `Authorization: Bearer TOKEN`; None for no token.
        keep_s: Seconds that a finished job and an uploaded image are kept.
        max_upload: The largest upload in bytes.
        queue: Jobs that wait or are being uploaded at a time.
        data: The folder of the queue and its files; None for a private temporary folder that ends with the server.
        device: A torch device of the worker; None for the CPU.
        precision: `auto`, `fp32`, `bf16` or `fp16`; see `mome.inference.Segmenter`.
        threads: CPU threads of the worker; 0 for torch's choice, within the quota of a container.
        time_limit_s: Seconds that a job may run.
        client_timeout_s: Seconds that a client may pause while it sends or receives.
        connections: Connections that are open at a time.
        free_bytes: Bytes of the disk that uploads leave free.
        origins: Web pages of other servers, as in `https://viewer.example`, that may call this one (CORS).
        dicomweb: The URL of a DICOMweb server from which `/infer` takes images by their SeriesInstanceUID.
        insecure: Allow http to a DICOMweb server elsewhere.
    """

    models: tuple[str, ...] = field(default_factory=lambda: tuple(bundled_models()))
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    keep_s: float = 3600.0
    max_upload: int = 2 * 10**9
    queue: int = 32
    data: Path | None = None
    device: str | None = None
    precision: str = "auto"
    threads: int = 0
    time_limit_s: float = 3600.0
    client_timeout_s: float = 30.0
    connections: int = 256
    free_bytes: int = 500 * 10**6
    origins: tuple[str, ...] = ()
    dicomweb: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: A value is out of range, or the address can be reached from outside and there is no token.
        """
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port is from 0 to 65535, got {self.port}")
        for name, value, least in (
            ("--queue", self.queue, 1),
            ("--max-upload", self.max_upload, 1),
            ("--keep", self.keep_s, 1),
            ("--time-limit", self.time_limit_s, 1),
            ("--client-timeout", self.client_timeout_s, 0.1),
            ("--connections", self.connections, 4),
        ):
            if value < least:
                raise InputError(f"{name} is at least {least:g}, got {value:g}")
        if self.token is None and not is_loopback(self.host):
            raise InputError(
                f"the address {self.host} can be reached from other machines, and no token protects it",
                hint="--token-file FILE, the environment variable MOME_TOKEN, or --host 127.0.0.1",
            )
        # Browsers write an origin in small letters and without the port that belongs to its scheme.
        plain = tuple(re.sub(r"^(http://.+):80$|^(https://.+):443$", r"\1\2", o.lower()) for o in self.origins)
        object.__setattr__(self, "origins", plain)
        for origin in self.origins:
            if not re.fullmatch(r"https?://[\w.\-\[\]:]+", origin):
                raise InputError(
                    f"{origin!r:.80} is no origin of a web page", hint="--allow-origin https://viewer.example"
                )


def read_token(file: Path | None) -> str | None:
    """Returns the token of a file, else that of the environment variable MOME_TOKEN, else None.

    Raises:
        InputError: The file cannot be read, or the token is shorter than 16 characters, longer than 1024, or holds
            other characters than visible ASCII.
    """
    if file is not None:
        where = str(file)
        try:
            with open(file, "rb") as opened:
                content = opened.read(_LONGEST_TOKEN + 2)
        except OSError as error:
            raise InputError(f"the token cannot be read: {error.strerror}", where=where) from error
        text = content.decode("ascii", "replace").strip()
    elif "MOME_TOKEN" in os.environ:
        where, text = "the environment variable MOME_TOKEN", os.environ["MOME_TOKEN"].strip()
    else:
        return None
    if not _SHORTEST_TOKEN <= len(text) <= _LONGEST_TOKEN or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise InputError(
            f"a token has {_SHORTEST_TOKEN} to {_LONGEST_TOKEN} letters, digits and signs of ASCII, without spaces",
            where=where,
            hint="openssl rand -hex 32 > token",
        )
    return text


def parse_duration(text: str) -> float:
    """Returns the seconds that a text such as "1h", "30m" or "90" stands for.

    Raises:
        InputError: It is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|)", text.strip())
    if found is None:
        raise InputError(f"{text!r:.40} is no duration", hint="as in 1h, 30m or 90s")
    return float(found[1]) * _SECONDS[found[2]]
