"""The arms of `neck_study.py` and their seeds. Imports no torch."""

from __future__ import annotations

SWIGLU = {"experts": "swiglu(n=4, hidden=24)", "router": "topk(k=1)"}
# Arm → preset and the parts that it replaces; None is a network that is no preset.
ARMS: dict[str, tuple[str | None, dict[str, str]]] = {
    "plain": ("plain_ct_tiny", {}),
    "universal": ("universal_ct_tiny", {}),
    "linear": ("mome_ct_tiny", {"experts": "linear"}),
    "swiglu": ("mome_ct_tiny", SWIGLU),
    "uniform": ("mome_ct_tiny", {**SWIGLU, "fusion": "uniform"}),
    "no_text": ("mome_ct_tiny", {**SWIGLU, "fusion": "voxel"}),
    "segresnet": (None, {}),
}
# Other starts of the text-guided fusion; `all` trains them only where `--arms` names them.
CANDIDATES: dict[str, tuple[str | None, dict[str, str]]] = {
    "uniform_start": ("mome_ct_tiny", {**SWIGLU, "fusion": "started(start='uniform')"}),
    "slow_text": ("mome_ct_tiny", {**SWIGLU, "fusion": "started(start='random', slow=true)"}),
    "common_slow": ("mome_ct_tiny", {**SWIGLU, "fusion": "started(start='common', slow=true)"}),
    "uniform_slow": ("mome_ct_tiny", {**SWIGLU, "fusion": "started(start='uniform', slow=true)"}),
}
SEEDS = (0, 1)
