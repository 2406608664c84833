"""Synthetic CT from label maps of real anatomy."""

from mome.data.synthetic.anatomy import Anatomy, load_anatomy
from mome.data.synthetic.generate import SYNTHETIC_VERSION, SyntheticCT, synthetic_ct

__all__ = ["SYNTHETIC_VERSION", "Anatomy", "SyntheticCT", "load_anatomy", "synthetic_ct"]
