"""Errors of the server as HTTP answers: JSON of `what`, `where` and `hint`, as on the command line."""

from __future__ import annotations

from typing import Any

from mome.errors import InputError, OutputError


class HttpError(Exception):
    """An answer that is no success.

    Args:
        status: The HTTP status.
        what: One sentence that says what is wrong.
        where: The field, header or setting it is wrong in.
        hint: What to do about it.
        retry_s: Seconds after which the client may try again.
    """

    def __init__(
        self, status: int, what: str, where: str | None = None, hint: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(what)
        self.status, self.what, self.where, self.hint, self.retry_s = status, what, where, hint, retry_s

    def body(self) -> dict[str, Any]:
        """Returns the JSON object of the answer."""
        return error_body(self.what, self.where, self.hint)

    def headers(self) -> dict[str, str]:
        """Returns the headers of the answer."""
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


def error_body(what: str, where: str | None = None, hint: str | None = None) -> dict[str, Any]:
    """Returns the JSON object of an error."""
    return {"what": what, "where": where, "hint": hint}


def as_http_error(error: InputError | OutputError) -> HttpError:
    """Returns an error of this package as an answer: 422 for what the client can mend, 507 for a full disk."""
    status = 422 if isinstance(error, InputError) else 507
    return HttpError(status, error.what, error.where, error.hint)


def no_such_job() -> HttpError:
    """Returns the answer for a job that does not exist, was deleted, or is no longer kept."""
    return HttpError(404, "there is no such job", hint="finished jobs are deleted after a while; see --keep")
