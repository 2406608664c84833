"""Colours that readers with any colour vision tell apart."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito, *Color Universal Design* (2008), without black, which is the background here.
_OKABE_ITO = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"]
OTHERS = "#b0b0b0"


def colors_of(shares: Sequence[float]) -> list[str]:
    """A colour for each of several choices, such as experts.

    Up to seven choices have the colours of the palette in their order. Of more, the seven with the largest shares have
    them, and all others are grey, because no more colours can be told apart.

    Args:
        shares: How often each choice is made.
    """
    if len(shares) <= len(_OKABE_ITO):
        return _OKABE_ITO[: len(shares)]
    order = sorted(range(len(shares)), key=lambda i: -shares[i])
    shown = sorted(order[: len(_OKABE_ITO)])
    return [_OKABE_ITO[shown.index(i)] if i in shown else OTHERS for i in range(len(shares))]
