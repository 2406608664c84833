"""The application: all routes of the server, behind the guard."""

from __future__ import annotations

import sqlite3
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mome.errors import InputError, OutputError
from mome.server import job_routes, monai_label, monai_label_images, page_routes
from mome.server.guard import Guard
from mome.server.http_errors import HttpError, as_http_error, error_body
from mome.server.job_queue import JobQueue
from mome.server.log import LOGGER


def create_app(queue: JobQueue) -> Any:
    """Returns the ASGI application of a queue."""
    # The pages of FastAPI's documentation load scripts from another server; `/openapi.json` is served without them.
    app = FastAPI(title="mome", version=version("mome"), description=_DESCRIPTION, docs_url=None, redoc_url=None)
    # A redirect to a path with a slash would quote the header Host, and http where a proxy speaks https.
    app.router.redirect_slashes = False
    app.state.queue, app.state.image_names = queue, monai_label_images.ImageNames()
    app.include_router(job_routes.router)
    app.include_router(monai_label.router)
    app.include_router(monai_label_images.router)
    app.include_router(page_routes.router)

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Says that the server lives. It needs no token."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Returns counters in Prometheus' text format."""
        text = queue.metrics.text(queue.store.counts(), queue.uploading, is_ready=queue.worker.is_ready)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/capabilities", tags=["server"])
    async def capabilities() -> dict[str, Any]:
        """Returns the models, their labels, the formats of results, and the limits."""
        settings = queue.settings
        return {
            "mome": version("mome"),
            **queue.worker.able,
            "limits": {
                "max_upload_bytes": settings.max_upload,
                "queue": settings.queue,
                "keep_s": settings.keep_s,
                "time_limit_s": settings.time_limit_s,
            },
        }

    app.add_exception_handler(HttpError, _http_error)
    app.add_exception_handler(InputError, _package_error)
    app.add_exception_handler(OutputError, _package_error)
    app.add_exception_handler(sqlite3.Error, _database_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _starlette_error)
    inner: Any = app
    if queue.settings.origins:
        from starlette.middleware.cors import CORSMiddleware

        guarded = Guard(inner, queue.settings, queue.metrics)
        return CORSMiddleware(
            guarded,
            allow_origins=list(queue.settings.origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return Guard(inner, queue.settings, queue.metrics)


_DESCRIPTION = "Text-prompted CT segmentation. Research software, not a medical device."


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HttpError)
    headers = {**error.headers(), **({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _package_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InputError | OutputError)
    return await _http_error(request, as_http_error(error))


async def _database_error(request: Request, error: Exception) -> JSONResponse:
    LOGGER.error("the queue cannot be written: %s", type(error).__name__)
    full = HttpError(507, "the queue cannot be written: the server's disk is full or broken", hint="try again later")
    return await _http_error(request, full)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse(error_body(str(first["msg"]), ".".join(map(str, first["loc"]))), status_code=422)


async def _starlette_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        error_body(str(error.detail), hint="/openapi.json lists the routes"),
        status_code=error.status_code,
        headers=error.headers,
    )
