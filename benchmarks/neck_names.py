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
# Other starts of the text-guided fusion; `all` trains them only where `--arms` names them. `text_guided` began with a
# random query per prompt and had one learning rate when the first study was made.
_STARTS = {
    "random": "started(start='random')",
    "random_slow": "started(start='random', slow=true)",
    "uniform_fast": "started(start='uniform')",
    "common_slow": "started(start='common', slow=true)",
}
CANDIDATES: dict[str, tuple[str | None, dict[str, str]]] = {
    "linear_random": ("mome_ct_tiny", {"experts": "linear", "fusion": _STARTS["random"]}),
    **{f"swiglu_{name}": ("mome_ct_tiny", {**SWIGLU, "fusion": fusion}) for name, fusion in _STARTS.items()},
}
SEEDS = (0, 1)
