"""Which pairs of parts the tests of tests/test_matrix.py build and run, and which are refused.

The registries are enumerated, so that a new part is in the matrix by its registration. Nothing is left out: `pytest -m
wide` adds to the sample that `pytest` runs the rest of every product. `python tests/matrix.py` prints the list of
benchmarks/results/matrix.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tiny_parts import make_config, own_names, single, tiny

from mome.errors import InputError
from mome.modeling import MoME
from mome.registry import EXPERTS, FUSIONS, PARTS, ROUTERS
from mome.routers.routing import Slots

# Two scales of 4³ and 8³ voxels: small, and every router has groups of several tokens.
SMALL = {"encoder": "unet(channels=[4, 8, 8])", "patch_size": [8, 8, 8]}
# Encoders meet experts that read tokens, which is first and quick, and experts that read the map.
FOR_ENCODERS = ("swiglu", "conv")
# Arguments of experts that hold other experts, and whether they hold a single one.
HOLDERS = {
    "adaptive(experts={})": False,
    "shared(routed={}, shared=linear)": False,
    "shared(routed=linear(n=4), shared={})": True,
    "lora(n=4, rank=2, base={})": True,
}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        block: The name of the product that it belongs to.
        names: The names of the parts that meet.
        config: The values of its config.
        refused: Whether it is refused when it is built.
        quick: Whether `pytest` runs it; `pytest -m wide` runs the others.
        whole_model: Whether a whole model is one more expert of the fusion.
    """

    block: str
    names: tuple[str, ...]
    config: dict[str, Any] = field(hash=False)
    refused: bool = False
    quick: bool = True
    whole_model: bool = False

    @property
    def id(self) -> str:
        """The name of its test."""
        return f"{self.block}: {' × '.join(self.names)}".replace("×", "x")


# What stands above the list of each block: which of its cases `pytest` runs.
RULES = {
    "router × expert": "those whose places in the two sorted lists have a sum that 5 divides",
    "fusion × expert × head": "those whose places in the three sorted lists have a sum that 7 divides",
    "encoder × expert": f"{FOR_ENCODERS[0]} with every encoder",
    "router inside an encoder": "all",
    "expert inside an encoder": "all",
    "expert inside an expert": "those that are refused",
    "router inside depth": "all",
    "fusion × whole model": "all",
}


def cases(*, plugins: bool = True) -> list[Case]:
    """All models of the matrix but those of text encoders.

    Args:
        plugins: Whether the parts of other packages belong to it.
    """
    names = {kind: PARTS[kind].names() if plugins else own_names(kind) for kind in PARTS}
    return [
        *_routers_and_experts(names["router"], names["experts"]),
        *_fusions_experts_heads(names["fusion"], names["experts"], names["head"]),
        *_encoders(names["encoder"]),
        *_inside_encoders(names["router"], names["experts"]),
        *_inside_experts(names["experts"]),
        *_inside_depth(names["router"]),
        *_whole_models(names["fusion"]),
    ]


def _routers_and_experts(routers: list[str], experts: list[str]) -> Iterator[Case]:
    for (i, router), (j, expert) in product(enumerate(routers), enumerate(experts)):
        refused = ROUTERS.part_class(router).returns is Slots and EXPERTS.part_class(expert).reads != "tokens"
        config = {**SMALL, "router": tiny("router", router), "experts": tiny("experts", expert)}
        yield Case("router × expert", (router, expert), config, refused, quick=refused or (i + j) % 5 == 0)


def _fusions_experts_heads(fusions: list[str], experts: list[str], heads: list[str]) -> Iterator[Case]:
    for (i, fusion), (j, expert), (k, head) in product(enumerate(fusions), enumerate(experts), enumerate(heads)):
        parts = {"fusion": tiny("fusion", fusion), "experts": tiny("experts", expert), "head": tiny("head", head)}
        quick = (i + j + k) % 7 == 0
        yield Case("fusion × expert × head", (fusion, expert, head), {**SMALL, **parts}, quick=quick)


def _encoders(encoders: list[str]) -> Iterator[Case]:
    for encoder, expert in product(encoders, FOR_ENCODERS):
        config = {"encoder": tiny("encoder", encoder), "experts": tiny("experts", expert)}
        yield Case("encoder × expert", (encoder, expert), config, quick=expert == FOR_ENCODERS[0])


def _inside_encoders(routers: list[str], experts: list[str]) -> Iterator[Case]:
    """A layer inside an encoder knows no prompt."""
    unet = "unet(channels=[4, 8, 8], layer=moe(experts={}, router={}))"
    for router in routers:
        config = {**SMALL, "encoder": unet.format("mlp(n=4, hidden=8)", tiny("router", router)), "experts": "linear"}
        yield Case("router inside an encoder", (router, "unet"), config, ROUTERS.part_class(router).reads_prompts)
    for expert in experts:
        config = {**SMALL, "encoder": unet.format(tiny("experts", expert), "topk(k=2)"), "experts": "linear"}
        yield Case("expert inside an encoder", (expert, "unet"), config, EXPERTS.part_class(expert).reads == "prompt")


def _inside_experts(experts: list[str]) -> Iterator[Case]:
    """Experts inside experts read tokens; an always-on part stands outermost, and a single expert has no others."""
    for (holder, alone), expert in product(HOLDERS.items(), experts):
        refused = EXPERTS.part_class(expert).reads != "tokens" or expert == "shared" or (alone and expert == "adaptive")
        inner = single(expert) if alone else tiny("experts", expert)
        config = {**SMALL, "experts": holder.format(inner)}
        yield Case("expert inside an expert", (holder.replace("{}", "…"), expert), config, refused, quick=refused)


def _inside_depth(routers: list[str]) -> Iterator[Case]:
    """The tokens that `depth` chose have no prompt and no place, and are not chosen a second time."""
    for router in routers:
        kind = ROUTERS.part_class(router)
        refused = kind.returns is Slots or kind.reads_prompts or kind.reads_place or kind.needed_alone
        config = {**SMALL, "router": f"depth(router={tiny('router', router)})", "experts": "mlp(n=4, hidden=8)"}
        yield Case("router inside depth", ("depth", router), config, refused)


def _whole_models(fusions: list[str]) -> Iterator[Case]:
    for fusion in fusions:
        config = {**SMALL, "fusion": tiny("fusion", fusion)}
        refused = FUSIONS.part_class(fusion).finest_only
        yield Case("fusion × whole model", (fusion, "whole-model"), config, refused, whole_model=True)


# -- the list ---------------------------------------------------------------------------------------------------------


def listing() -> str:
    """The text of benchmarks/results/matrix.md."""
    everything = cases(plugins=False)
    lines = [
        "# The matrix of parts",
        "",
        "Made by `python tests/matrix.py` from the registries; `tests/test_matrix.py` runs it. Each model is built",
        "from its strings at a tiny size, trained for a step (finite loss, gradients and weights, a gradient for each",
        "parameter), evaluated twice with equal logits, saved, loaded and compared bit for bit. What is refused is",
        "refused when it is built. `pytest` runs a sample, chosen by the rule that stands with each product, and",
        "`pytest -m wide` the rest, so that both together leave out no pair.",
        "",
        "| product | run | refused | of these in `pytest` | rule of the sample |",
        "|---|---|---|---|---|",
    ]
    for block, rule in RULES.items():
        found = [case for case in everything if case.block == block]
        refused = sum(case.refused for case in found)
        quick = sum(case.quick for case in found)
        lines.append(f"| {block} | {len(found) - refused} | {refused} | {quick} | {rule} |")
    total, refused = len(everything), sum(case.refused for case in everything)
    lines += [f"| together | {total - refused} | {refused} | {sum(case.quick for case in everything)} | |", ""]
    lines += [
        "Pairs that are refused are in the sample, too. Every text encoder meets every head, all of them in `pytest`;",
        "those with a tower get a tiny random one. `resenc_unet` and `open_clip` are skipped where their packages are",
        "missing.",
        "",
        "## What meets",
        "",
    ]
    lines += [f"- {kind}: " + ", ".join(f"`{tiny(kind, name)}`" for name in own_names(kind)) for kind in PARTS]
    lines += ["", "## Refused", ""]
    lines += [f"- {case.block}, {' × '.join(case.names)}: {_words(case)}" for case in everything if case.refused]
    lines += ["", "## The sample of the two large products", ""]
    for block in ("router × expert", "fusion × expert × head"):
        sampled = [" × ".join(case.names) for case in everything if case.block == block and case.quick]
        lines += [f"{block}: " + "; ".join(sampled) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def _words(case: Case) -> str:
    """What the refusal says, without the remedy."""
    from whole_models import in_config

    try:
        MoME(make_config(**case.config, **(in_config() if case.whole_model else {})))
    except InputError as error:
        return error.what if error.where is None else f"{error.what} (in {error.where})"
    raise AssertionError(f"{case.id} is not refused")


if __name__ == "__main__":
    print(listing(), end="")
