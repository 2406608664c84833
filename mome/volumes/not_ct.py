"""Recognises files whose header says that they are no CT. The one place for this rule; every format asks here.

Sources: nifti1.h (intent codes), the documentation of MetaIO (`Modality`), the definition of NRRD (kinds), the
conventions of 3D Slicer and NA-MIC for keys of NRRD, and DICOM PS3.3 C.7.3.1.1.1 (modalities).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mome.errors import InputError

# Words that say nothing about the modality.
_OPEN_MODALITIES = ("", "CT", "OTHER", "UNKNOWN", "OT", "?", "???")
# NIfTI intent codes; 2 to 24 are statistics such as t and p values. 1010 says that values have no unit.
_STATISTICS = range(2, 25)
_INTENTS = {
    1001: "an estimate of a parameter", 1002: "a label map", 1003: "a map of neuroanatomical labels",
    1004: "a field of matrices", 1005: "a field of symmetric matrices", 1006: "a displacement field",
    1007: "a field of vectors", 1008: "a set of points", 1009: "a set of triangles", 1011: "a field of quaternions",
    2001: "a time series", 2002: "node indices of a surface", 2003: "a colour image", 2004: "a colour image",
    2005: "a map of shape values", 2006: "a displacement field of FSL", 2007: "a field of spline coefficients of FSL",
    2008: "a field of spline coefficients of FSL", 2009: "a field of spline coefficients of FSL",
    2016: "a displacement field of FSL",
}  # fmt: skip
_CT_WORDS = ("", "ct", "hu", "hounsfield", "hounsfield unit", "hounsfield units")
# Kinds of a NRRD axis along which lie the components of one voxel.
_COMPONENT_KINDS = ("vector", "covariant-vector", "normal", "point", "3-vector", "2-vector", "4-vector", "3-gradient",
                    "3-normal", "complex", "quaternion")  # fmt: skip


def modality_not_ct(text: str) -> str | None:
    """Returns the modality that a header names, as in "MR", where it is not CT.

    Args:
        text: As in "MR", "CT", "MET_MOD_MR", or empty.
    """
    word = text.strip().upper().removeprefix("MET_MOD_")
    return None if word in _OPEN_MODALITIES else word[:16]


def intent_not_ct(code: int) -> str | None:
    """Returns what a NIfTI intent code says that values are, where that is no CT."""
    return "a map of a statistic" if code in _STATISTICS else _INTENTS.get(code)


def intent_note(code: int, name: str) -> str | None:
    """Returns a note on an intent that may be another one than that of a CT, in code or in name."""
    if code not in (0, 1010):
        return f"the header's intent code is the unknown {code}: are the values HU?"
    if name.strip().lower() not in _CT_WORDS:
        return f"the header's intent_name is {name.strip()[:16]!r}: are the values HU?"
    return None


def nrrd_not_ct(kinds: Iterable[str], keys: Mapping[str, str]) -> str | None:
    """Returns what a NRRD file is, where its header says that it is no CT.

    Args:
        kinds: The kinds of the axes that are none of space and longer than one, in lower case.
        keys: The `key:=value` pairs of the header, their keys in lower case.
    """
    kind = next((kind for kind in kinds if kind in _COMPONENT_KINDS or "matrix" in kind), None)
    if kind is not None:
        return f"an image of several components per voxel (its kind is {kind[:30]})"
    if any(key.startswith("dwmri_") for key in keys):
        return "a diffusion MR (DWMRI)"
    if any(key.startswith("segment0_") for key in keys):
        return "a segmentation of 3D Slicer"
    return modality_not_ct(keys.get("modality", ""))


def refuse_not_ct(reason: str, where: str | None) -> InputError:
    """Returns the error for a file that is no CT."""
    return InputError(f"not a CT but {reason}", where=where, hint="only CT is segmented: give a CT")
