"""The README's table of parts names every part that mome registers, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mome.registry import ENCODERS, EXPERTS, FUSIONS, HEADS, ROUTERS, TEXT_ENCODERS, Registry

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text()
REGISTRIES = {"encoder": ENCODERS, "text_encoder": TEXT_ENCODERS, "experts": EXPERTS, "router": ROUTERS,
              "fusion": FUSIONS, "head": HEADS}  # fmt: skip


@pytest.mark.parametrize("part", REGISTRIES)
def test_the_table_names_every_part(part: str) -> None:
    registry: Registry = REGISTRIES[part]
    (row,) = re.findall(rf"^\| `{part}` \| (.*) \|$", TEXT, flags=re.M)
    built_in = {name for name in registry.names() if registry.origin(name)[0] == "mome"}
    assert set(re.findall(r"`(\w+)`", row)) == built_in
