"""HTTP connections with limits: their number, the time for a request's headers, and the time of a stalled answer.

uvicorn has none of these: a client that sends its headers byte by byte, that goes on sending a body after it was
answered, or that never reads its answer, would hold a connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def limited_protocol(most: int, seconds: float) -> type[H11Protocol]:
    """Returns a protocol class for `uvicorn.Config(http=…)`.

    Args:
        most: Connections that are open at a time; a further one is closed at once.
        seconds: The time for the headers of a request, for the rest of a body after the answer, and the time that an
            answer may wait for the client to read.
    """

    class LimitedProtocol(H11Protocol):
        """A connection with limits."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._request_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
                return
            self._watch_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_request()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._request_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            self._request_timer = self._write_timer = None
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _watch_request(self) -> None:
            """Runs a timer while the headers of a request are awaited, or the rest of a body that was answered before
            its end; data that do not complete them do not reset it."""
            unread = self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
            awaited = (unread or self.conn.their_state is h11.IDLE) and not self.transport.is_closing()
            if awaited and self._request_timer is None:
                self._request_timer = self.loop.call_later(seconds, self.transport.abort)
            elif not awaited and self._request_timer is not None:
                self._request_timer.cancel()
                self._request_timer = None

    return LimitedProtocol
