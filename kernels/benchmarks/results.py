"""Results of a script on one GPU: a JSON file per device, to which a later call adds what is missing."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent


class Results:
    """A JSON file with one entry per measurement; each is written as soon as it is known.

    A failed measurement has a `problem` and is repeated by the next call. One that made the device unusable is `fatal`
    and is not repeated.

    Raises:
        ValueError: The file belongs to other versions or to another state of the code.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = self._read() if path.is_file() else {**header, "steps": {}}
        other = [key for key, value in header.items() if self.data.get(key) != value]
        if other:
            raise ValueError(f"{path} was measured with another {' and '.join(other)}: choose another folder")

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text())
        except ValueError as problem:
            raise ValueError(f"{self.path} is not JSON ({problem}): delete it or choose another folder") from problem
        if not isinstance(data, dict) or not isinstance(data.get("steps"), dict):
            raise ValueError(f"{self.path} was not written by this script: choose another folder")
        return data

    def __contains__(self, name: str) -> bool:
        step = self.data["steps"].get(name)
        return step is not None and ("problem" not in step or bool(step.get("fatal")))

    def killers(self) -> set[str]:
        """Peers that made the device unusable in some step; they are not run again."""
        values = [item for step in self.data["steps"].values() for item in step.items()]
        return {key for key, value in values if isinstance(value, dict) and value.get("fatal")}

    def add(self, name: str, value: dict[str, Any]) -> None:
        """Adds a measurement; the file is replaced atomically."""
        self.data["steps"][name] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        os.replace(temporary, self.path)


def header(device: str, rehearse: bool) -> dict[str, Any]:
    """The device, the versions and the state of the code that the numbers belong to."""
    import importlib.metadata

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device == "cuda":
        versions["driver"] = _driver()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    source = hashlib.sha256()
    for path in sorted((_HERE.parent / "torch-ext").rglob("*.py")) + sorted(
        (_HERE.parent / "torch-ext").rglob("*.json")
    ):
        source.update(path.read_bytes())
    return {"device": name, "versions": versions, "source": source.hexdigest()[:16], "rehearsal": rehearse}


def _driver() -> str | None:
    """The version of the device's driver, or None where nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def minutes(text: str) -> float:
    """Parses an argument of the command line: a finite number of minutes, 0 or more."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError
    return value


def usable(out: Path) -> str | None:
    """The reason why a folder cannot be written to, or None; a missing folder is created."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as problem:
        return f"cannot write to {out}: {problem.strerror}"


def opened(script: str, options: argparse.Namespace, prefix: str = "") -> Results | None:
    """The results of a script in `--out`; without a device or a usable folder it prints the reason and returns None."""
    here = torch.cuda.is_available() or options.rehearse
    why = usable(options.out) if here else "no CUDA device here; nothing was measured"
    if why is None:
        head = header("cpu" if options.rehearse else "cuda", options.rehearse)
        name = head["device"].replace(" ", "_").replace("/", "_")
        try:
            return Results(options.out / f"{prefix}{name}.json", head)
        except ValueError as problem:
            why = str(problem)
    print(f"{script}: {why}", file=sys.stderr)
    return None
