"""Chromium driven through its debugging pipe: opens a page, uses its form, and takes pictures."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import _NAMES, _OPTIONS
from matplotlib import image as mpl_image


class DrivenBrowser:
    """One page in Chromium.

    Attributes:
        requests: The URLs that the page has asked for.
        errors: Messages of the console, and exceptions.
    """

    def __init__(self, size: tuple[int, int] = (1200, 800)) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()
        found = next(filter(None, map(shutil.which, _NAMES)), None)
        if found is None:
            pytest.skip("no Chromium here")
        command = [found, *_OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={self._folder.name}"]
        command += [f"--window-size={size[0]},{size[1]}", "about:blank"]

        def descriptors() -> None:  # the browser reads commands from descriptor 3 and answers to 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            command,
            preexec_fn=descriptors,
            pass_fds=(3, 4, to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._write, self._read = ours, os.fdopen(theirs, "rb", buffering=0)
        self._pending = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        pages = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self._ask(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Opens a page."""
        self._ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Runs JavaScript in the page and returns its value, awaited."""
        found = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = 120) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"), self.errors)
            time.sleep(0.1)

    def choose(self, selector: str, *files: Path) -> None:
        """Puts files into a field."""
        root = self._ask("DOM.getDocument")["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._ask("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, path: Path | None = None) -> np.ndarray:
        """Returns what is seen, (height, width, 3) from 0 to 255, and writes it as PNG."""
        data = base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            path.write_bytes(data)
        return np.rint(mpl_image.imread(io.BytesIO(data))[..., :3] * 255).astype(int)

    def close(self) -> None:
        """Ends the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        self._read.close()
        self._folder.cleanup()

    def _ask(self, method: str, **params: Any) -> Any:
        """Sends a command of the DevTools protocol and returns its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self._pending:
            part = self._read.read(1 << 20)
            assert part, "the browser has ended"
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\0")
        return json.loads(line)

    def _note(self, event: Any) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
