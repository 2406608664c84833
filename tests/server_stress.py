"""Clients that upload slowly, too much, nonsense, half or right, against a server that is killed twice.

    python tests/server_stress.py --clients 50 --seconds 90 > benchmarks/results/server_stress.json

After the storm, every job that a client was told of must have ended once, every mask must be the one of a quiet server,
no file may be left, and the server's memory and descriptors must be back where its process began.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from server_process import TOKEN, Answer, Server, form, save_model
from small_scans import large_body, patient_bytes

LIMIT_MB = 3
MEMORY_MARGIN = 48 * 2**20
DESCRIPTOR_MARGIN = 4
_OPTIONS = ("--max-upload", f"{LIMIT_MB}MB", "--client-timeout", "4s", "--queue", "32", "--connections", "200")
_DOWN = (OSError, http.client.HTTPException)


class Storm:
    """The clients, and what they have seen.

    Args:
        server: The server.
        seed: Of the clients' choices.
    """

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.seed = server, seed
        self.scan = gzip.compress(patient_bytes(), 1)
        # A scan with more tiles, so that kills and cancels meet running jobs.
        self.longer = gzip.compress(patient_bytes(large_body(32)), 1)
        self.accepted: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop, self.is_up = threading.Event(), threading.Event()
        self.kills, self.thread = 0, threading.local()
        self.is_up.set()
        self.expected = self._mask(self._submit(self.scan, "right"))
        self.unauthorized = server.ask("GET", "/metrics", token=None).body
        self.health_ms: list[float] = []

    def client(self, number: int) -> None:
        """Behaves in one way after another until the storm ends."""
        rng = random.Random(f"{self.seed} {number}")
        ways: list[Callable[[random.Random], None]] = [
            *[self.right] * 5, self.cancelled, self.cancelled, self.deleted, self.half, self.huge, self.chunked,
            self.malformed, self.slow_body, self.slow_headers, self.stranger, self.stranger, self.no_scan, self.damaged,
        ]  # fmt: skip
        while not self.stop.is_set():
            self.is_up.wait()
            way = rng.choice(ways)
            self.thread.kills = self.kills
            try:
                way(rng)
                self.seen[way.__name__] += 1
            except _DOWN:
                self.seen["connection lost"] += 1
                if self.is_up.is_set():
                    time.sleep(0.2)

    def probe(self) -> None:
        """Measures how long the server takes to say that it lives."""
        while not self.stop.is_set():
            self.is_up.wait()
            began = time.perf_counter()
            with suppress(*_DOWN):
                if self.server.ask("GET", "/health", token=None).status == 200:
                    self.health_ms.append(1000 * (time.perf_counter() - began))
            time.sleep(0.1)

    def right(self, rng: random.Random) -> None:
        """Uploads a scan, waits, and compares the mask."""
        job = self._submit(self.scan if rng.random() < 0.7 else self.longer, "right")
        if job and self._end(job) == "done" and self.server.ask("GET", f"/jobs/{job}").json["bytes"] == len(self.scan):
            if self._mask(job) != self.expected:
                self.wrong.append(f"{job} has another mask")

    def cancelled(self, rng: random.Random) -> None:
        """Cancels its job after a while."""
        job = self._submit(self.longer, "cancelled")
        if job:
            time.sleep(rng.random())
            self._again(lambda: self.server.ask("POST", f"/jobs/{job}/cancel"))
            self._end(job)

    def deleted(self, rng: random.Random) -> None:
        """Deletes its job, which then does not exist."""
        job = self._submit(self.longer, "deleted")
        if job:
            time.sleep(rng.random())
            self._again(lambda: self.server.ask("DELETE", f"/jobs/{job}"))
            self._expect(self._again(lambda: self.server.ask("GET", f"/jobs/{job}")), 404)

    def half(self, rng: random.Random) -> None:
        """Closes the connection in the middle of an upload."""
        body, kind = form([("prompt", "liver")], [("file", "x", self.longer)])
        with self._socket() as open_socket:
            open_socket.sendall(_head(kind, len(body)) + body[: rng.randrange(len(body))])

    def huge(self, rng: random.Random) -> None:
        """Declares more than is allowed."""
        with self._socket() as open_socket:
            open_socket.sendall(_head("multipart/form-data; boundary=x", 10**12))
            self._expect_raw(open_socket, b" 413 ", b" 503 ")

    def chunked(self, rng: random.Random) -> None:
        """Sends more than is allowed without declaring it."""
        body, kind = form([("prompt", "liver")], [("file", "x", bytes(LIMIT_MB * 1_100_000))])
        chunks = (body[at : at + 65536] for at in range(0, len(body), 65536))
        # 408 where fifty clients in one process leave this one no time to send.
        self._expect(self.server.ask("POST", "/jobs", chunks, {"Content-Type": kind}), 408, 413, 503)

    def malformed(self, rng: random.Random) -> None:
        """Sends a form with wrong bytes in it."""
        body, kind = form([("prompt", "liver")], [("file", "x", rng.randbytes(2000))])
        at = rng.randrange(len(body))
        wrong = body[:at] + rng.randbytes(40) + body[at + rng.randrange(200) :]
        answer = self.server.ask("POST", "/jobs", wrong, {"Content-Type": rng.choice([kind, "text/plain"])})
        self._expect(answer, 400, 415, 422, 503)

    def slow_body(self, rng: random.Random) -> None:
        """Stops in the middle of an upload."""
        with self._socket() as open_socket:
            open_socket.sendall(_head("multipart/form-data; boundary=x", 1000) + b"--x\r\n")
            self._expect_raw(open_socket, b" 408 ", b" 503 ")

    def slow_headers(self, rng: random.Random) -> None:
        """Never completes the headers; the server closes the connection."""
        with self._socket() as open_socket:
            open_socket.sendall(b"GET /health HTTP/1.1\r\nX: ")
            self._expect_raw(open_socket, b"")

    def stranger(self, rng: random.Random) -> None:
        """Has no token, or a wrong one."""
        known = rng.choice(list(self.accepted) or ["x"])
        path = rng.choice([f"/jobs/{known}", f"/jobs/{known}/result", "/jobs/x", "/metrics", "/info/", "/nothing"])
        token = rng.choice([None, "wrong", TOKEN[:-1]])
        answer = self.server.ask(rng.choice(["GET", "DELETE", "POST"]), path, token=token)
        self._expect(answer, 401)
        if answer.body != self.unauthorized:
            self.wrong.append(f"{path} tells a stranger something")
        with suppress(ConnectionResetError, BrokenPipeError):  # an upload is refused before it was sent
            self._expect(self.server.submit([("x", self.longer)], token=token), 401)

    def no_scan(self, rng: random.Random) -> None:
        """Uploads what is no scan."""
        self._expect(self.server.submit([("x", rng.randbytes(5000))]), 422, 503)

    def damaged(self, rng: random.Random) -> None:
        """Uploads a scan whose job fails."""
        job = self._submit(self.scan[: rng.randrange(100, len(self.scan) - 100)], "damaged")
        if job and self._end(job) != "failed":
            self.wrong.append(f"{job} is damaged and did not fail")

    def _submit(self, data: bytes, why: str) -> str | None:
        """Uploads a scan; returns the job, or None where the queue is full."""
        answer = self.server.submit([("x.nii.gz", data)], ["liver", "spleen"], output="multilabel")
        self._expect(answer, 202, 503)
        if answer.status == 503:
            self.seen["refused: the queue is full"] += 1
            time.sleep(0.5)
            return None
        job: str = answer.json["id"]
        self.accepted[job] = why
        return job

    def _end(self, job: str) -> str:
        """Waits for the end of a job, through kills of the server."""
        while True:
            answer = self._again(lambda: self.server.ask("GET", f"/jobs/{job}"))
            if answer.status != 200:
                self.wrong.append(f"{job} is lost: {answer.status}")
                return "lost"
            state: str = answer.json["state"]
            if state in ("done", "failed", "cancelled"):
                return state
            time.sleep(0.3)

    def _mask(self, job: str | None) -> bytes:
        assert job is not None
        assert self._end(job) == "done"
        return gzip.decompress(
            self._again(lambda: self.server.ask("GET", f"/jobs/{job}/result?format=multilabel")).body
        )

    def _again(self, ask: Callable[[], Answer]) -> Answer:
        """Asks until the server is there."""
        while True:
            self.is_up.wait()
            try:
                return ask()
            except _DOWN:
                time.sleep(0.2)

    def _expect(self, answer: Answer, *statuses: int) -> None:
        if answer.status not in statuses:
            self.wrong.append(f"{answer.status} instead of {statuses}: {answer.body[:200]!r}")

    def _expect_raw(self, open_socket: socket.socket, *starts: bytes) -> None:
        found = open_socket.recv(200)
        if found == b"" and self.kills != self.thread.kills:
            raise ConnectionResetError  # the system has closed the connections of the killed server
        if not any(start in found if start else found == b"" for start in starts):
            self.wrong.append(f"{found[:80]!r} instead of {starts}")

    def _socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), 30)


def _head(kind: str, length: int) -> bytes:
    lines = [
        "POST /jobs HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {TOKEN}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def usage(server: Server) -> tuple[int, int]:
    """Returns the resident bytes and the open descriptors of the server's process."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{server.process.pid}/fd"))


def run(folder: Path, clients: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Runs the storm in three parts, with a SIGKILL of the server after the first two, and returns what happened.

    Args:
        folder: An empty folder.
        clients: Clients at a time.
        seconds: Duration of the storm, without the restarts of the server.
        seed: Of the clients' choices.
    """
    server = Server(save_model(folder / "model"), folder / "server", *_OPTIONS)
    storm = Storm(server, seed)
    threads = [threading.Thread(target=storm.client, args=(n,), daemon=True) for n in range(clients)]
    threads.append(threading.Thread(target=storm.probe, daemon=True))
    for thread in threads:
        thread.start()
    running_at_kills = []
    for _ in range(2):
        time.sleep(seconds / 3)
        storm.is_up.clear()
        storm.kills += 1
        server.kill()
        running_at_kills.append(_states(server).get("running", 0))
        server.start()
        memory_before, descriptors_before = usage(server)
        storm.is_up.set()
    time.sleep(seconds / 6)
    for worker in server.workers():  # one job fails, or none if no job runs at this moment
        os.kill(worker, signal.SIGKILL)
    time.sleep(seconds / 6)
    storm.stop.set()
    for thread in threads:
        thread.join(300)
    ends = Counter(storm._end(job) for job, why in storm.accepted.items() if why != "deleted")
    # Jobs whose clients were not told of them, because the server was killed in between, end too.
    deadline = time.monotonic() + 300
    while {"queued", "running"} & set(_states(server)) and time.monotonic() < deadline:
        time.sleep(0.5)
    untold = [job for job in _ids(server) if job not in storm.accepted]
    states = _states(server)
    log = server.log.read_text()
    ended = Counter(re.findall(r"job (\S+) (?:done|failed|cancelled),", log))
    for job in _ids(server):
        server.ask("DELETE", f"/jobs/{job}")
    time.sleep(6)  # idle connections end after 5 s
    memory_after, descriptors_after = usage(server)
    left = [path for path in server.data.rglob("*") if path.is_file() and not path.name.startswith("jobs.sqlite3")]
    left += [path for name in ("uploads", "jobs", "images") for path in (server.data / name).iterdir()]
    exit_code = server.stop()
    health = sorted(storm.health_ms)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": dict(sorted(storm.seen.items())),
        "jobs_accepted": len(storm.accepted),
        "jobs_ended": dict(ends),
        "jobs_accepted_as_the_server_was_killed": len(untold),
        "jobs_not_ended": sum(states.get(state, 0) for state in ("queued", "running")),
        "jobs_ended_more_than_once": sum(count > 1 for count in ended.values()),
        "jobs_running_at_the_kills": running_at_kills,
        "wrong": storm.wrong[:20],
        "files_left": len(left),
        "descriptors": [descriptors_before, descriptors_after],
        "resident_mb": [round(memory_before / 1e6, 1), round(memory_after / 1e6, 1)],
        "memory_grew_bytes": memory_after - memory_before,
        "health_ms_in_the_process_of_the_clients": {
            "median": round(health[len(health) // 2], 1),
            "p99": round(health[int(0.99 * len(health))], 1),
            "most": round(health[-1], 1),
        },
        "exit_code": exit_code,
        "tracebacks_in_the_log": log.count("Traceback") + log.count(" ERROR "),
    }


def _states(server: Server) -> dict[str, int]:
    return dict(_rows(server, "SELECT state, COUNT(*) FROM jobs GROUP BY state"))


def _ids(server: Server) -> list[str]:
    return [row[0] for row in _rows(server, "SELECT id FROM jobs WHERE deleted = 0")]


def _rows(server: Server, query: str) -> list[Any]:
    with sqlite3.connect(server.data / "jobs.sqlite3") as database:
        rows = database.execute(query).fetchall()
    database.close()
    return rows


def check(found: dict[str, Any]) -> None:
    """Fails where something was lost, leaked or told."""
    assert found["wrong"] == [], found
    assert found["jobs_not_ended"] == 0 and found["jobs_ended_more_than_once"] == 0, found
    assert set(found["jobs_ended"]) <= {"done", "failed", "cancelled"} and found["jobs_ended"]["done"] > 0, found
    assert found["files_left"] == 0, found
    assert found["descriptors"][1] <= found["descriptors"][0] + DESCRIPTOR_MARGIN, found
    assert found["memory_grew_bytes"] <= MEMORY_MARGIN, found
    assert found["exit_code"] == 143 and found["tracebacks_in_the_log"] == 0, found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=90)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), args.clients, args.seconds)
    command = " ".join(["python", "tests/server_stress.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **found}, indent=1))
    check(found)


if __name__ == "__main__":
    main()
