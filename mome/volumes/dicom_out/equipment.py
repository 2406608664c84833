"""What DICOM objects say of the software that made them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

MANUFACTURER = "mome"
MODEL_NAME = "mome, research software"


def software_version() -> str:
    """Returns the version of the installed package, or "unknown" where it runs without being installed."""
    try:
        return version("mome")
    except PackageNotFoundError:
        return "unknown"


def algorithm_name(model: str) -> str:
    """Returns the name of the algorithm: that of the package and the model, at most 64 characters."""
    return f"mome {model}".strip()[:64]


def algorithm_version(model_version: str) -> str:
    """Returns the version of the package and, where it is known, the fingerprint of the model."""
    return f"{software_version()} {model_version}".strip()[:64]
