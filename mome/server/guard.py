"""The outermost layer of the server: token, origin, and what every answer has in common."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mome.loopback import is_loopback
from mome.server.http_errors import HttpError
from mome.server.log import LOGGER, place_of
from mome.server.metrics import Metrics
from mome.server.settings import ServerSettings

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Paths that need no token: liveness, the page, and how Slicer learns that a token is needed.
_OPEN = ("/health", "/", "/auth", "/auth/", "/auth/token")
# A client that still sends its body reads the answer only when it has sent it, so a refusal waits a moment for it.
_DRAIN_S = 2.0
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
_NO_STORE = (b"cache-control", b"no-store")


class Guard:
    """Wraps the application.

    It refuses requests without the token before their body is read, and with the same answer for every path, so that
    a stranger learns nothing. Without a token, only requests to this machine's own names are answered, so that a web
    page cannot reach the server under a name of its own (DNS rebinding); and no page of another origin may change
    anything. An error that nobody caught becomes an answer of status 500, and a line of the log without its message.

    Args:
        app: The application.
        settings: The token and the origins.
        metrics: Counters.
    """

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if settings.token is None else settings.token.encode()
        self._origins = set(settings.origins)
        self._host = settings.host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; see ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        exchange = _Exchange(receive, send)
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, exchange.receive, exchange.send)
            else:
                await exchange.refuse(refusal)
        except Exception as error:
            # An error of a stream whose client has gone is no fault.
            if not exchange.is_disconnected:
                LOGGER.error("error in a request: %s", place_of(error))
            if not exchange.has_started:
                await exchange.refuse(HttpError(500, "this is a bug in mome", hint="see the server's log"))
            elif not exchange.is_complete:
                raise ConnectionAbortedError from None

    def _refusal(self, scope: Scope) -> HttpError | None:
        """Returns the answer to a request that is not passed on."""
        headers = {name: value for name, value in scope["headers"]}
        path: str = scope["path"]
        if self._token is None and not _names_this_machine(headers.get(b"host", b""), self._host):
            return HttpError(421, "the server has another name", where="the header Host", hint="http://127.0.0.1:PORT")
        if self._token is not None and path not in _OPEN and not self._has_token(headers.get(b"authorization", b"")):
            self._metrics.unauthorized += 1
            return unauthorized()
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            host = headers.get(b"host", b"").decode("latin-1")
            text = origin.decode("latin-1")
            if text not in self._origins and text not in (f"http://{host}", f"https://{host}"):
                return HttpError(
                    403, "a page of another origin may not do this", where="the header Origin", hint="--allow-origin"
                )
        return None

    def _has_token(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        assert self._token is not None
        return hmac.compare_digest(given.strip(), self._token) and scheme.lower() == b"bearer"


class _Exchange:
    """A request and its answer.

    Attributes:
        has_started: Whether the answer's headers were sent.
        is_complete: Whether the answer was sent.
        is_disconnected: Whether the client has closed the connection.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.has_started = self.is_complete = self.is_disconnected = False
        self._body_ended = self._refused = False

    async def receive(self) -> Message:
        """Passes a part of the body on."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._body_ended = self.is_disconnected = True
        elif not message.get("more_body", False):
            self._body_ended = True
        return message

    async def send(self, message: Message) -> None:
        """Passes a part of the answer on, with the headers that all answers have."""
        if message["type"] == "http.response.start":
            self.has_started = True
            names = {name.lower() for name, _ in message.get("headers", ())}
            extra = [*_HEADERS, *(() if b"cache-control" in names else (_NO_STORE,))]
            if not self._body_ended and message["status"] >= 400:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
            self._refused = message["status"] >= 400
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            if self._refused and not self._body_ended:
                await self._send({**message, "more_body": True})
                await self._drain()
                message = {"type": "http.response.body", "body": b""}
            self.is_complete = True
        await self._send(message)

    async def refuse(self, error: HttpError) -> None:
        """Sends an error."""
        body = json.dumps(error.body(), separators=(",", ":")).encode()  # as the application writes it
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
        ]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def _drain(self) -> None:
        """Drops what the client still sends, for a moment."""
        until = time.monotonic() + _DRAIN_S
        while not self._body_ended and (left := until - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self.receive(), left)
            except TimeoutError:
                return


def unauthorized() -> HttpError:
    """Returns the answer to a wrong token, which is the same everywhere.

    It is a new object each time: one that is raised again keeps the frames of every time before, with the requests.
    """
    return HttpError(
        401, "a valid token is needed", where="the header Authorization", hint="Authorization: Bearer TOKEN"
    )


def _names_this_machine(header: bytes, host: str) -> bool:
    """Says whether the Host header names the loopback interface or the address that the server was given."""
    try:
        name = urlsplit(f"//{header.decode('latin-1')}").hostname
    except ValueError:
        return False
    return bool(name) and (is_loopback(str(name)) or name == host.strip("[]"))
