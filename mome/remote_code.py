"""The file that lets the Auto classes of transformers find this package in a saved folder or on the Hub."""

from __future__ import annotations

from pathlib import Path

# Written beside every saved model or processor, so that AutoModel(trust_remote_code=True) finds the package or names
# what to install: transformers checks the imports of such a file before it runs it.
STUB_NAME = "modeling_mome.py"
STUB = '"""Needs the package: pip install mome."""\n\nfrom mome.auto import MoME, MoMEConfig, MoMEProcessor\n'
AUTO_MAP = {
    "AutoConfig": "modeling_mome.MoMEConfig",
    "AutoModel": "modeling_mome.MoME",
    "AutoProcessor": "modeling_mome.MoMEProcessor",
}


def write_stub(folder: Path) -> Path:
    """Writes the file into a folder that holds a saved model or processor, and returns its path."""
    path = folder / STUB_NAME
    path.write_text(STUB)
    return path
