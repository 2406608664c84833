"""Settings of the sampling of training patches and prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from mome.errors import InputError
from mome.typed import check_range


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How patches and prompts are drawn.

    Args:
        foreground: Share of the patches that are centred near a voxel of an annotated structure. Every structure is
            chosen equally often, so that small and rarely annotated ones are seen. Our choice.
        jitter: Largest distance of such a centre from the voxel, as a share of the patch's side.
        beyond: Probability that a patch may reach beyond the scan, by a random share of up to a quarter of its side.
            Air lies there. Without it, a model knows no patient with more air around than the training scans have.
        cut: Probability that a patch near a structure ends inside it in height and shows up to a quarter of the patch's
            side of it, as a scan of the abdomen ends inside the lungs. Only cases with room for it have such patches.
        structures: Structure → how often it is chosen relative to the others, which have 1, as in `{larynx: 2}`.
        balance: 0 draws sources by their weights alone; 1 multiplies the weights by the numbers of cases, so that every
            case is seen equally often; 0.5 lies between.
        prompts: Prompts of a step, equal for all its patches; 0 asks every label in every step.
        positive: Share of these prompts that a patch shows.
        hard_negative: Share that is annotated and absent, but is the other side or a neighbour of a structure that a
            patch shows. The rest is annotated and absent.
        templates: Probability that a prompt's wording stands in a sentence, as in "a CT scan of the liver".

    Raises:
        InputError: A value is outside its range.
    """

    foreground: float = 0.8
    jitter: float = 0.25
    beyond: float = 0.0
    cut: float = 0.0
    structures: dict[str, float] = field(default_factory=dict)
    balance: float = 0.0
    prompts: int = 0
    positive: float = 0.5
    hard_negative: float = 0.25
    templates: float = 0.0

    def __post_init__(self) -> None:
        check_range("sampling", 0, 1, foreground=self.foreground, beyond=self.beyond, cut=self.cut)
        check_range("sampling", 0, 1, balance=self.balance, templates=self.templates)
        check_range("sampling", 0, 10, jitter=self.jitter)
        check_range("sampling", 0, 2**16, prompts=self.prompts)
        check_range("sampling", 0, 1, positive=self.positive, hard_negative=self.hard_negative)
        if self.positive + self.hard_negative > 1:
            raise InputError(
                "sampling.positive and sampling.hard_negative are shares of the prompts, and their sum is at most 1, "
                f"got {self.positive + self.hard_negative:g}"
            )
        for name, weight in self.structures.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 2**31:
                raise InputError(f"sampling.structures.{name:.60} is a number of at least 0, got {weight!r:.60}")
