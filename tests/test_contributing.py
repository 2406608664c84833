"""The example of CONTRIBUTING.md is complete: it runs in a model, is trained one step, saved and loaded."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from small_models import small, volume

from mome import MoME
from mome.registry import EXPERTS

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture
def scale_expert(monkeypatch: pytest.MonkeyPatch) -> str:
    """Registers the example as the document says; returns the number of lines of its file."""
    source, registration = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)[:2]
    module = types.ModuleType("mome.experts.scale")
    monkeypatch.setitem(sys.modules, "mome.experts.scale", module)
    exec(compile(source, "CONTRIBUTING.md", "exec", dont_inherit=True), module.__dict__)
    monkeypatch.setattr(EXPERTS, "_entries", dict(EXPERTS._entries))
    exec(registration, {"EXPERTS": EXPERTS})
    return source


def test_the_example_is_complete(scale_expert: str, tmp_path: Path) -> None:
    assert len(scale_expert.splitlines()) < 40
    assert "scale" in EXPERTS.names() and TEXT.index("class ScaleExperts") < 3000
    model = small(experts="scale(n=3)", router="topk(k=2)").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    scales = [expert.body.experts.scale_ED for expert in model.scale_experts]
    before = [scale.detach().clone() for scale in scales]
    model(volume(), torch.randn(2, 12), torch.ones(1, 2, 16, 16, 16)).loss.backward()
    optimiser.step()
    assert len(scales) == 2 and all(not torch.equal(a, b) for a, b in zip(before, scales, strict=True))
    model.eval().save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        text = torch.randn(2, 12)
        assert torch.equal(again(volume(), text).logits, model(volume(), text).logits)
    assert again.config.part_strings()["experts"] == "scale(n=3)"
