"""What strangers and broken clients try: odd tokens and headers, endless bodies, mutated forms, hostile prompts."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path

import pytest
from server_process import TOKEN, Server, form

from mome.errors import InputError
from mome.server.http_errors import HttpError

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the server needs mome[serve]")


def raw(server: Server, request: bytes) -> bytes:
    """Sends bytes and returns all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as opened:
        opened.sendall(request)
        answer = b""
        while part := opened.recv(65536):
            answer += part
        return answer


def test_odd_tokens_get_the_same_answer(server: Server) -> None:
    odd = [
        *(b"", b"Bearer", b"Bearer ", b"bearer x", TOKEN.encode(), b"Bearer " + TOKEN.upper().encode()),
        *(b"Basic " + TOKEN.encode(), b"Bearer\t" + TOKEN.encode(), b"Bearer " + TOKEN.encode() + b" x"),
        *(b"Bearer " + bytes([0xFF, 0xFE]) + TOKEN.encode(), b"Bearer " + b"x" * 20_000),
        b'Bearer "' + TOKEN.encode() + b'"',
    ]  # fmt: skip
    end = b"Host: 127.0.0.1\r\nConnection: close\r\n"
    answers = [
        raw(server, b"GET /metrics HTTP/1.1\r\n" + end + b"Authorization: " + text + b"\r\n\r\n") for text in odd
    ]
    asked = ["OPTIONS /jobs", "PATCH /jobs", "GET /metrics", "GET //", "GET /health/", "GET /page/x", "GET /HEALTH"]
    asked += ["GET /%2e%2e/metrics", f"GET /metrics?token={TOKEN}", "GET /auth/token/valid"]
    answers += [raw(server, f"{what} HTTP/1.1\r\n".encode() + end + b"\r\n") for what in asked]
    assert all(answer.startswith(b"HTTP/1.1 401 ") for answer in answers), answers
    bodies = {answer.split(b"\r\n\r\n", 1)[1] for answer in answers}
    heads = {b"\n".join(line for line in answer.split(b"\r\n\r\n")[0].split(b"\r\n") if b"date:" not in line.lower())
             for answer in answers}  # fmt: skip
    assert len(bodies) == 1 and len(heads) == 1, heads


def test_a_path_without_its_slash_is_not_redirected(server: Server) -> None:
    """A redirect would quote the header Host."""
    for path in ("/info", "/info/", "/auth", "/auth/"):
        assert server.ask("GET", path, headers={"Host": "evil.example"}).status == 200
    for path in ("/metrics/", "/capabilities/", "/jobs/"):
        answer = server.ask("GET", path, headers={"Host": "evil.example"})
        assert answer.status in (404, 405) and "location" not in answer.headers


def test_a_body_that_nobody_reads_does_not_hold_its_connection(server: Server) -> None:
    """The answer comes before the body has ended; the rest of the body must not keep the connection open for ever."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as opened:
        opened.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n\r\n")
        assert b" 200 " in opened.recv(4096)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 30:
                opened.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 20


def test_lengths_that_lie_and_headers_that_inject(server: Server) -> None:
    lines = f"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    lines += "Content-Type: multipart/form-data; boundary=x\r\n"
    for length in ("-1", "1e3", "9" * 5000, "10\r\nContent-Length: 20", "\u0661"):
        answer = raw(server, f"{lines}Content-Length: {length}\r\n\r\n--x--\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400 "), answer
    for path in ("/jobs/%0d%0aX-Evil:%201", "/infer/model%0d%0aX-Evil:1?output=%0d%0aX-Evil:1"):
        answer = server.ask("GET", path)
        assert "x-evil" not in answer.headers and answer.status in (404, 405, 422)
    assert server.ask("GET", "/health").status == 200


def test_mutated_forms_are_refused_in_words(tmp_path: Path) -> None:
    """No form, however broken, is a bug: the parser's errors and ours are the only ones."""
    from python_multipart.exceptions import ParseError

    from mome.server.upload import _Form, _parser

    rng = random.Random(0)
    files = [("file", f"../../{'n' * 9}\0.dcm", b"DICM" * 9), ("file", "b", b"")]
    body, kind = form([("prompt", "liver"), ("output", "nifti")], files)
    boundary = kind.split("boundary=")[1].encode()
    odd = [b"\r\n", b"\0", b"--" + boundary, b"filename*=utf-9''%ff%fe", b'name="', b";;;", b"\xff" * 9, b"name*0=x;"]
    ends = {"whole": 0, "refused": 0}
    for number in range(400):
        folder = tmp_path / str(number)
        folder.mkdir()
        mutated = body
        for _ in range(rng.randrange(1, 4)):
            at, cut = rng.randrange(len(mutated)), rng.choice([0, 0, rng.randrange(30)])
            mutated = mutated[:at] + rng.choice(odd) + mutated[at + cut :]
        made = _Form(folder, ("file",), ("prompt", "output"))
        try:
            parser = _parser(boundary, made)
            for at in range(0, len(mutated), 7):
                parser.write(mutated[at : at + 7])
                if made.error is not None:
                    raise made.error
            made.flush()
            ends["whole"] += 1
        except (ParseError, InputError, HttpError):
            ends["refused"] += 1
        finally:
            made.close()
        assert all(path.name.startswith("upload_") for path in folder.iterdir())
    assert min(ends.values()) > 20, ends
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(400)}


def test_prompts_name_no_path(server: Server, ct: bytes) -> None:
    hostile = [
        "../../../../tmp/evil",
        "/etc/passwd",
        "a\0b",
        "x" * 500,
        "C:\\evil",
        ".",
        "🫁 evil\r\nX: 1",
        "liver/../evil",
    ]
    for prompt in hostile:  # this model has no text tower, so that none of them is a free text
        refused = server.submit([("ct", ct)], [prompt])
        assert refused.status == 422 and "bug in mome" not in refused.json["what"], refused.body
        assert "mome list" not in str(refused.json["hint"]) and "x-evil" not in refused.headers
    assert "evil" not in server.log.read_text() and not list((server.data / "uploads").iterdir())


def test_the_worker_has_no_token(server: Server) -> None:
    environments = [Path(f"/proc/{worker}/environ").read_bytes() for worker in server.workers()]
    assert environments and all(b"MOME_TOKEN" not in text and b"PATH=" in text for text in environments)
