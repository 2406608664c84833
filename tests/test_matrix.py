"""The matrix: every pair of parts is built from its strings, trained for a step, evaluated, saved and loaded.

tests/matrix.py says which pairs there are; benchmarks/results/matrix.md lists them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from tiny_parts import TINY, inputs, make_config, make_model, needs_package, own_names, state, targets, tiny
from whole_models import EXPERT, in_config

from mome import MoME
from mome.errors import InputError
from mome.registry import HEADS, PARTS, TEXT_ENCODERS
from mome.routers.base import Router
from mome.training.text_rows import TextRows

REPOSITORY = Path(__file__).resolve().parent.parent
CASES = matrix.cases()
# All experts of these bodies are equal, or the one in `shared=` is zero: router, gate and scale change nothing.
ALIKE = r"(?<!adaptive\()(experts|routed)=(identity|zero)\(n=4\)|shared=zero"
WEIGHS_THEM = r"\.(router|gate)\.|\.scale_C$"


def _parameters(refused: bool) -> list[Any]:
    return [
        pytest.param(case, id=case.id, marks=[*needs_package(*case.names), *([] if case.quick else [pytest.mark.wide])])
        for case in CASES
        if case.refused == refused
    ]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The tensors are too small for threads."""


@pytest.mark.parametrize("case", _parameters(refused=False))
def test_the_parts_learn_and_are_saved(case: matrix.Case, tmp_path: Path) -> None:
    extra = in_config() if case.whole_model else {}
    model = make_model(**case.config, **extra)
    given = inputs(model, batch=2)
    if case.whole_model:
        given["text_PT"] = model.prompt_rows(given["text_PT"], ["liver", "aorta"])
    check_step(model, given, alike=re.search(ALIKE, f"{case.config['encoder']}, experts={case.config.get('experts')}"))
    check_saved(model, {**given, "volume": given["volume"][:1]}, tmp_path, extra)


def check_step(model: MoME, given: dict[str, torch.Tensor], *, alike: object) -> None:
    """One optimiser step: everything stays finite, and a gradient reaches every parameter that can have one."""
    for norm in model.modules():  # nnU-Net's residual blocks start as their skips, so that no gradient enters them yet
        if isinstance(norm, torch.nn.InstanceNorm3d) and norm.affine and not norm.weight.any():
            torch.nn.init.ones_(norm.weight)
    counts, hooks = count_tokens(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    output = model.train()(**given, targets=targets(model, batch=2))
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert torch.isfinite(output.loss) and torch.isfinite(output.logits).all()
    assert not [name for name, p in trained.items() if p.grad is None]
    assert not [name for name, p in trained.items() if not torch.isfinite(p.grad).all()]
    idle = [mixture for mixture, counts_E in counts.items() if (counts_E == 0).any()]
    untouched = [name for name, p in trained.items() if not p.grad.any()]
    if alike:
        untouched = [name for name in untouched if not re.search(WEIGHS_THEM, name)]
    assert not [name for name in untouched if not any(name.startswith(f"{mixture}.experts.") for mixture in idle)]
    optimiser.step()
    model.after_step()
    assert not [name for name, tensor in state(model).items() if not torch.isfinite(tensor).all()]


def count_tokens(model: MoME) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """For each mixture the number of tokens that its experts got, which a hook counts; and the hooks."""
    counts: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Router) and not isinstance(model.get_submodule(name.rpartition(".")[0]), Router):

            def count(module: Any, args: Any, routing: Any, mixture: str = name.rpartition(".")[0]) -> None:
                counts[mixture] = counts.get(mixture, 0) + routing.counts_E

            hooks.append(module.register_forward_hook(count))
    return counts, hooks


def check_saved(model: MoME, given: dict[str, torch.Tensor], folder: Path, extra: dict[str, Any]) -> torch.Tensor:
    """Returns the logits in eval: the same for every state of the random generator, and after saving and loading."""
    model.eval()
    logits = logits_of(model, given, seed=1)
    assert torch.isfinite(logits).all() and torch.equal(logits_of(model, given, seed=2), logits)
    model.save_pretrained(folder)
    again = MoME.from_pretrained(folder, **extra).eval()
    assert again.config.part_strings() == model.config.part_strings()
    loaded = state(again)
    assert not [name for name, tensor in state(model).items() if not torch.equal(tensor, loaded[name])]
    assert torch.equal(logits_of(again, given, seed=3), logits)
    return logits


def logits_of(model: MoME, given: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("case", _parameters(refused=True))
def test_the_parts_are_refused_when_built(case: matrix.Case) -> None:
    """The message names both parts and the remedy in at most three lines."""
    config = make_config(**case.config, **(in_config() if case.whole_model else {}))
    with pytest.raises(InputError) as caught, torch.device("meta"):
        MoME(config)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and caught.value.hint
    for name in case.names:
        assert name.partition("(")[0] in message, message


# -- text encoders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with tiny random towers, by the names of the text encoders that load them."""
    from tiny_text_models import save_open_clip, save_tiny

    folder = tmp_path_factory.mktemp("towers")
    laid = {"hf": save_tiny("bert", folder / "hf"), "clip": save_tiny("clip", folder / "clip")}
    if not needs_package("open_clip"):
        shape = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 49408, "context_length": 32}
        laid["open_clip"] = save_open_clip(folder / "open_clip", shape)
    return laid


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name, marks=needs_package(name)) for name in TEXT_ENCODERS.names()]
)
def test_rows_of_every_text_encoder_train_every_head(
    name: str, head: str, towers: dict[str, str], tmp_path: Path
) -> None:
    """The rows are those that training takes; those of a tower are in the bank that is saved."""
    spec = tiny("text_encoder", name)
    if name in towers:
        spec = f"{spec[:-1]}, model={towers[name]!r})"
    model = make_model(**matrix.SMALL, text_encoder=spec, head=tiny("head", head), text_dim=None)
    rows = TextRows(model, ["liver", "spleen"], synonyms=0.0, seed=0).at(0)
    assert rows.shape == (2, model.config.text_dim) and torch.isfinite(rows).all() and not torch.equal(*rows)
    given = {**inputs(model, batch=2), "text_PT": rows}
    check_step(model, given, alike=False)
    logits = check_saved(model, {**given, "volume": given["volume"][:1]}, tmp_path, {})
    known = MoME.from_pretrained(tmp_path).eval()
    given = {"volume": given["volume"][:1], "text_PT": known.text_bank.rows(["liver", "spleen"])}
    assert torch.equal(logits_of(known, given, seed=0), logits)


# -- the matrix itself ------------------------------------------------------------------------------------------------


def test_every_part_of_mome_has_a_tiny_string() -> None:
    """A part without one would run at its default size; write it into tests/tiny_parts.py."""
    for kind in PARTS:
        assert sorted(TINY[kind]) == own_names(kind)
        for name, spec in TINY[kind].items():
            assert spec.partition("(")[0] == name


def test_every_part_is_in_the_sample() -> None:
    """Those of text encoders have a test of their own, with every head."""
    sampled = {name for case in CASES if case.quick and not case.refused for name in case.names}
    for kind in set(PARTS) - {"text_encoder"}:
        assert not set(PARTS[kind].names()) - sampled
    assert len({case.id for case in CASES}) == len(CASES)


def test_the_list_of_the_matrix_is_current() -> None:
    """`python tests/matrix.py > benchmarks/results/matrix.md` writes it anew."""
    assert (REPOSITORY / "benchmarks" / "results" / "matrix.md").read_text() == matrix.listing()


def test_the_whole_model_is_that_of_the_config() -> None:
    assert make_config(**in_config()).extra_experts == [EXPERT.reference()]
