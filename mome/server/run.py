"""Runs the server until a signal ends it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import FrameType

from mome.errors import InputError
from mome.loopback import is_loopback
from mome.server.folders import Folders, data_folder
from mome.server.job_queue import JobQueue
from mome.server.log import LOGGER, set_up_log
from mome.server.metrics import Metrics
from mome.server.settings import ServerSettings
from mome.server.store import Store

_GRACE_S = 20.0


def serve(settings: ServerSettings, *, grace_s: float = _GRACE_S) -> None:
    """Serves until SIGTERM or Ctrl-C.

    At the end, the running job may finish within `grace_s` seconds, else it returns to the queue; what waits stays in
    the queue of a `data` folder.

    Raises:
        InputError: A package is not installed, the port is in use, the folder cannot be used, or the model cannot be
            loaded.
    """
    check_packages()
    os.umask(0o077)
    set_up_log()
    with _listen(settings.host, settings.port) as listening, data_folder(settings.data) as root:
        asyncio.run(_serve(settings, root, listening, grace_s))


def check_packages() -> None:
    """Checks that the packages of the server are installed.

    Raises:
        InputError: One is not.
    """
    import importlib.util

    for module, package in (
        ("fastapi", "fastapi"),
        ("uvicorn", "uvicorn"),
        ("python_multipart", "python-multipart"),
    ):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{package} is not installed", hint='pip install "mome[serve]"')


def _listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket.

    Raises:
        InputError: The address is not of this machine, or the port is in use or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"there is no address {host!r:.80}: {error.strerror}", hint="--host 127.0.0.1") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"the server cannot listen at {host} port {port}: {error.strerror}",
            hint="another --port, or 0 for a free one",
        ) from error
    return bound


async def _serve(settings: ServerSettings, root: Path, listening: socket.socket, grace_s: float) -> None:
    """Starts the queue, then answers requests."""
    import uvicorn

    from mome.server.app import create_app
    from mome.server.connections import limited_protocol

    folders = Folders(root, settings.free_bytes)
    store = Store(folders.database)
    try:
        queue = JobQueue(settings, folders, store, Metrics())

        class Server(uvicorn.Server):
            """Logs the address once it takes connections, and ends the streams of events at a signal."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                _say_where(settings.host, listening.getsockname()[1])

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                super().handle_exit(sig, frame)
                loop.call_soon_threadsafe(queue.stop_streams)

        loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            create_app(queue),
            http=limited_protocol(settings.connections, settings.client_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
        server = Server(config)
        await _start(queue)
        try:
            await server.serve(sockets=[listening])
        finally:
            await queue.stop(grace_s)
            LOGGER.info("stopped")
    finally:
        store.close()


def _say_where(host: str, port: int) -> None:
    """Logs the address, after which a client may connect at once."""
    LOGGER.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
    if not is_loopback(host):
        LOGGER.warning(
            "without TLS, anybody on the network can read scans and the token: put a proxy with TLS before it"
        )


async def _start(queue: JobQueue) -> None:
    """Starts the queue; a signal that comes while the model is loaded ends the worker."""
    try:
        await queue.start()
    except BaseException:
        await queue.worker.stop()
        raise
