"""Post-processors of masks by name. A new one is one file here and one line below; `base.py` says what it must have.

`POSTPROCESSORS.build("largest_component")` returns one. Listing the names imports neither torch nor scipy.
"""

from mome.registry import Registry

POSTPROCESSORS = Registry(
    "postprocessor", "mome.postprocess", "mome.postprocessors", "mome.postprocess.base:PostProcessor"
)

for _name, _class, _summary in (
    ("largest_component", "LargestComponent", "the largest connected pieces of a mask"),
    ("minimum_size", "MinimumSize", "without pieces that are smaller than a volume or a share of the largest"),
    ("keep_near", "KeepNear", "the largest piece and those near it"),
    ("fill_holes", "FillHoles", "with the holes inside of it"),
    ("inside", "Inside", "the part inside of an organ, for tumours"),
):
    POSTPROCESSORS.register(_name, f"mome.postprocess.{_name}:{_class}", summary=_summary)
