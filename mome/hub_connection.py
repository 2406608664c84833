"""Whether the Hugging Face Hub can be reached, asked once and briefly."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

# How long the Hub may take to answer the first request, in seconds.
TIMEOUT_S = 3.0
# The arguments of `from_pretrained` that say which files of the Hub are meant, and how they are downloaded.
DOWNLOAD_KEYS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def hub_answers() -> bool:
    """Whether the Hub answers one request within `TIMEOUT_S` seconds.

    The Hub's library repeats failed requests for most of a minute, so it is only used where this request succeeds.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[Any] = []

    def ask() -> None:
        # The errors of the Hub's HTTP library have no base class that we could import.
        with contextlib.suppress(Exception):
            answers.append(huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S))

    # A thread, because the timeout of the request does not cover the search for the Hub's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return bool(answers)


def download_options(place: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments for downloads; without a connection, those that use the Hub's local cache only.

    Args:
        place: A folder, a Hub id, or None.
        given: The caller's arguments, such as `revision`.
    """
    if place is None or Path(place).is_dir() or given.get("local_files_only") or hub_answers():
        return given
    return {**given, "local_files_only": True}
