"""Augmentations of training patches. Registered by name; nothing here imports torch."""

from mome.registry import AUGMENTATIONS

_HERE = "mome.data.augmentations"
AUGMENTATIONS.register("flip", f"{_HERE}.flip:FlipPatch", summary="mirroring; left and right labels are exchanged")
AUGMENTATIONS.register("rotate", f"{_HERE}.linear:Rotate", summary="rotation about each axis")
AUGMENTATIONS.register("scale", f"{_HERE}.linear:Scale", summary="zoom, equal or different along the axes")
AUGMENTATIONS.register("elastic", f"{_HERE}.elastic:Elastic", summary="smooth random displacement")
AUGMENTATIONS.register("contrast", f"{_HERE}.values:Contrast", summary="contrast and brightness")
AUGMENTATIONS.register("gamma", f"{_HERE}.values:Gamma", summary="a gamma curve or its inverse")
AUGMENTATIONS.register("window", f"{_HERE}.values:Window", summary="another HU window")
AUGMENTATIONS.register("noise", f"{_HERE}.noise:Noise", summary="noise, white or correlated")
AUGMENTATIONS.register("blur", f"{_HERE}.sharpness:Blur", summary="Gaussian blur")
AUGMENTATIONS.register("kernel", f"{_HERE}.sharpness:Kernel", summary="a softer or sharper reconstruction kernel")
AUGMENTATIONS.register("low_resolution", f"{_HERE}.sharpness:LowResolution", summary="thick slices or large voxels")
AUGMENTATIONS.register("metal", f"{_HERE}.metal:Metal", summary="metal with streaks")
AUGMENTATIONS.register("slab", f"{_HERE}.slab:Slab", summary="a short scan, with air above and below")
