"""The probability of a voxel that a head starts from."""

from __future__ import annotations

from mome.errors import InputError


def check_prior(prior: float) -> None:
    """A head's bias starts at the prior's logit, which 0 and 1 do not have.

    Raises:
        InputError: Not strictly between 0 and 1.
    """
    if not 0 < prior < 1:
        raise InputError(f"prior of the head lies between 0 and 1, got {prior}", hint="prior=0.02 is the default")
