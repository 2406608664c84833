"""Trains a model from a YAML configuration, in one process or in several.

    accelerate launch examples/train.py --config examples/configs/mome_ct_tiny.yaml experts="swiglu(n=8)"
    accelerate launch --config_file examples/configs/accelerate/eight_gpus.yaml examples/train.py --config …
    torchrun --nproc-per-node 2 examples/train.py --config …

Overrides are `key=value`: a part of the model (`experts=…`, `experts.n=8`), or any setting (`train.steps=100`).
"""

from __future__ import annotations

import sys

from mome.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
