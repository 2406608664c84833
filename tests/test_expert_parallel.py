"""Experts spread over processes: what is split and refused, and runs of several processes beside one process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import expert_parallel_run
import pytest
import torch
import transformers
from expert_parallel_run import CASES, batch, run, write_checkpoint
from safetensors.torch import load_file
from small_models import small
from torch import Tensor, nn

from mome import MoME, WholeModel
from mome.errors import InputError
from mome.expert_parallel import check_experts, checked_distributed_config, expert_plan
from mome.experts.base import TokenExperts
from mome.registry import EXPERTS

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
needs_dispatch = pytest.mark.skipif(OLD, reason="transformers before 5.23 has no ep_dispatch_experts for other models")
# Relative to the largest value of a tensor, at least 1; the order of float32 sums differs between the runs.
TOLERANCE = 1e-5


# -- what is split -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "inside", "parameters"),
    [
        ("linear(n=4)", "", {"weight_EDD", "bias_ED"}),
        ("mlp(n=4)", "", {"up_proj", "down_proj", "up_bias", "down_bias"}),
        ("swiglu(n=4)", "", {"gate_up_proj", "down_proj"}),
        ("geglu(n=4)", "", {"gate_up_proj", "down_proj"}),
        ("constant(n=4)", "", {"blend_E2D", "vector_ED"}),
        ("shared(routed=swiglu(n=4))", ".routed", {"gate_up_proj", "down_proj"}),
        ("adaptive(experts=swiglu(n=4))", ".experts", {"gate_up_proj", "down_proj"}),
        ("shared(routed=adaptive(experts=linear(n=4)))", ".routed.experts", {"weight_EDD", "bias_ED"}),
        ("linear(n=1)", "", None),
        ("identity(n=4)", "", None),
        ("lora(n=4)", "", None),
    ],
)
def test_the_plan_names_the_bodies_that_hold_the_experts(
    experts: str, inside: str, parameters: set[str] | None
) -> None:
    model = small(experts=experts)
    body = f"scale_experts.*.body.experts{inside}"
    wanted = {} if parameters is None else {f"{body}.{name}": "grouped_gemm" for name in parameters}
    assert expert_plan(model) == (wanted | {body: "ep_dispatch_experts"} if wanted else {})
    assert model._ep_plan == expert_plan(model)


def test_the_plan_reaches_layers_inside_encoders() -> None:
    layer = "moe(experts=linear(n=2), router=topk(k=1))"
    model = small(encoder=f"unet(channels=[8, 8, 16], layer={layer}, layer_stages=[1, 2])")
    styles = expert_plan(model)
    assert [name for name, style in styles.items() if style == "ep_dispatch_experts"] == [
        next(name for name in styles if name.startswith("encoder.") and name.endswith(".experts"))
    ]
    check_experts(model, 2)


def test_every_split_body_works_with_a_part_of_its_experts() -> None:
    """A body that says it is stacked gives, with half of its weights and ids from 0, the results of these experts."""
    for name in EXPERTS.names():
        expert_class, _ = EXPERTS.resolve(name)
        if not getattr(expert_class, "stacked", False):
            continue
        torch.manual_seed(0)
        whole = EXPERTS.build({"name": name, "n": 4}, dim=6)
        half = EXPERTS.build({"name": name, "n": 2}, dim=6)
        for own, part in zip(whole.parameters(), half.parameters(), strict=True):
            nn.init.normal_(own)
            part.data.copy_(own[2:])
        x, ids = torch.randn(7, 6), torch.randint(2, (7, 2))
        weights = torch.rand(7, 2)
        torch.testing.assert_close(half(x, ids, weights), whole(x, ids + 2, weights), msg=name)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "ep_size", "message"),
    [
        (
            {"experts": "swiglu(n=6)"},
            4,
            r"(?s)ep_size=4 does not divide the 6 experts SwiGLU.*scale_experts\.0\.body",
        ),
        ({"experts": "shared(routed=mlp(n=3))"}, 2, r"(?s)does not divide the 3 experts MLP.*experts\.routed"),
        ({"experts": "conv(n=4)"}, 2, "experts ConvExperts cannot be split: they read the whole map"),
        ({"experts": "lora(n=4)"}, 2, "experts LoRAExperts cannot be split: not all their parameters are one per"),
        ({"experts": "shared(routed=lora(n=4))"}, 2, "experts LoRAExperts cannot be split"),
        ({"experts": "film(n=4)"}, 2, "expert body FiLMExperts reads the prompts"),
        ({"experts": "linear(n=4)", "router": "label_group"}, 2, "router LabelGroupRouter reads the prompts"),
        ({"experts": "linear"}, 2, "no layer of several experts with weights"),
        ({"experts": "identity(n=4)"}, 2, "no layer of several experts with weights"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(parts: dict[str, str], ep_size: int, message: str) -> None:
    with torch.device("meta"):
        model = small(**parts)
    with pytest.raises(InputError, match=message) as caught:
        check_experts(model, ep_size)
    text = str(caught.value)
    assert "use ep_size=" in text and len(text.splitlines()) <= 3


def test_the_remedy_for_a_number_that_does_not_divide_holds() -> None:
    model = small(experts="swiglu(n=6)")
    with pytest.raises(InputError, match="use ep_size=3, or a multiple of 4 experts"):
        check_experts(model, 4)
    check_experts(model, 3)
    check_experts(small(experts="swiglu(n=8)"), 4)


class OwnExperts(TokenExperts):
    """Experts with a parameter that all of them share; nothing says that they can be split."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        n: int = 2

    def __init__(self, config, *, dim):
        super().__init__()
        self.num_experts = config.n
        self.scale_ED = nn.Parameter(torch.ones(config.n, dim))
        self.shift_D = nn.Parameter(torch.zeros(dim))

    def forward(self, x_TD, ids_TK, weights_TK):
        return (x_TD[:, None] * self.scale_ED[ids_TK] * weights_TK[..., None]).sum(1) + self.shift_D


def test_experts_of_other_packages_are_refused_unless_they_say_that_they_can_be_split() -> None:
    model = small(experts="linear(n=2)")
    for expert in model.scale_experts:
        expert.body.experts = OwnExperts(OwnExperts.Config(), dim=8)
    assert expert_plan(model) == {}
    with pytest.raises(InputError, match="OwnExperts cannot be split"):
        check_experts(model, 2)


@needs_dispatch
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tp_size": 2}, "tp_size=2 splits layers"),
        ({"pp_size": 2}, "pp_size=2 splits layers"),
        ({"ep_size": 2, "fsdp_size": 2}, "is 2, and this run has 1 process\n.*\n.*torchrun --nproc-per-node 2"),
        ({"ep_size": 2}, "ep_size"),
        ({"ep_sise": 2}, "ep_sise"),
    ],
)
def test_a_config_that_the_run_cannot_have_is_refused(config: dict[str, int], message: str, tmp_path: Path) -> None:
    small(experts="linear(n=4)").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        MoME.from_pretrained(tmp_path, distributed_config=config)


@needs_dispatch
def test_experts_are_checked_before_processes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    small(experts="linear(n=3)").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not divide the 3 experts"):
        MoME.from_pretrained(tmp_path, distributed_config={"ep_size": 2, "fsdp_size": 2})
    with pytest.raises(InputError, match="tensors are new, and a model is spread over processes with loaded weights"):
        MoME.from_pretrained(tmp_path, experts="mlp(n=4)", distributed_config={"ep_size": 2, "fsdp_size": 2})
    with pytest.raises(InputError, match="upcycle=True makes new weights"):
        MoME.from_pretrained(tmp_path, upcycle=True, distributed_config={"ep_size": 2, "fsdp_size": 2})
    with pytest.raises(InputError, match="without a dimension"):
        scalar = nn.ParameterDict({"s": nn.Parameter(torch.ones(()))})
        checked_distributed_config({"fsdp_size": 2}, torch.float32, lambda: scalar)


@needs_dispatch
def test_models_with_whole_model_experts_are_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = WholeModel(nn.Conv3d(1, 2, 1), ["background", "liver"], spacing=[2.0, 2.0, 3.0])
    with pytest.raises(InputError, match="whole-model experts is not spread"):
        checked_distributed_config({"fsdp_size": 2}, torch.float32, lambda: small(extra_experts=[other]))


@needs_dispatch
@pytest.mark.parametrize("dtype", [torch.float64, "float16"])
def test_types_whose_gradients_would_be_divided_twice_are_refused(
    dtype: torch.dtype | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    small(experts="linear(n=4)").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"ep_size=2 with weights in float(64|16): .*\n.*\n.*dtype=torch.float32"):
        MoME.from_pretrained(tmp_path, dtype=dtype, distributed_config={"ep_size": 2, "fsdp_size": 2})


def test_an_older_transformers_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(experts="linear(n=4)").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "__version__", "5.22.1")
    with pytest.raises(InputError, match=r"needs transformers 5\.23 or later, this is 5\.22\.1"):
        MoME.from_pretrained(tmp_path, distributed_config={"ep_size": 2, "fsdp_size": 2})
    MoME.from_pretrained(tmp_path)


@needs_dispatch
def test_one_process_is_not_spread(tmp_path: Path) -> None:
    small(experts="linear(n=4)").save_pretrained(tmp_path)
    model = MoME.from_pretrained(tmp_path, distributed_config={"ep_size": 1, "fsdp_size": 1})
    plain = MoME.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def config_of(folder: Path) -> dict:
    """The config without the checksum of the weights, which are compared themselves and may differ by rounding."""
    config = json.loads((folder / "config.json").read_text())
    del config["checksums"]["weights"]
    return config


# -- several processes ---------------------------------------------------------------------------------------------

WITH_TWO = list(CASES)
WITH_FOUR = ["topk", "one-expert-each", "replicas", "encoder"]
WITH_TWO.remove("replicas")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every case."""
    folder = tmp_path_factory.mktemp("experts")
    for name, case in CASES.items():
        write_checkpoint(case, name, folder / name)
    return folder


def spread(folder: Path, processes: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What the cases give with several processes."""
    program = [sys.executable, "-W", "ignore", expert_parallel_run.__file__]
    running = [
        subprocess.Popen([*program, str(rank), str(processes), str(folder), *names]) for rank in range(processes)
    ]
    assert [process.wait(timeout=400) for process in running] == [0] * processes
    found: dict[str, dict[str, Tensor]] = torch.load(folder / f"{processes}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def with_two(checkpoints: Path) -> dict[str, dict[str, Tensor]]:
    return spread(checkpoints, 2, WITH_TWO)


@pytest.fixture(scope="module")
def with_four(checkpoints: Path) -> dict[str, dict[str, Tensor]]:
    return spread(checkpoints, 4, WITH_FOUR)


def compare(name: str, processes: int, several: dict[str, Tensor], folder: Path) -> None:
    """Compares a run of several processes with one process that has the scans of all of them in one batch."""
    case, end = CASES[name], f"{name}-{processes}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = MoME.from_pretrained(folder / name)
    model.save_pretrained(folder / f"{end}-loaded")
    one = run(case, model, batch(case, range(processes)), folder / f"{end}-alone")
    torch.set_num_threads(threads)
    assert {"0.loss", "logits"} < one.keys() and sum(key.startswith("0.grad.") for key in one) > 20
    for key, value in one.items():
        if key.endswith(".sent"):  # the tokens that each process sent to each expert
            assert torch.equal(several[key].sum(0), value.sum(0)), key
        else:
            assert_close(several[key], value, key)
    for before, after, close in (
        (folder / f"{end}-loaded", folder / f"{end}-unchanged", torch.equal),
        (folder / f"{end}-alone", folder / f"{end}-trained", is_close),
    ):
        assert sorted(path.name for path in before.iterdir()) == sorted(path.name for path in after.iterdir())
        assert config_of(before) == config_of(after)
        first, second = (load_file(part / "model.safetensors") for part in (before, after))
        assert first.keys() == second.keys() and all(close(first[key], second[key]) for key in first)
    MoME.from_pretrained(folder / f"{end}-trained")


def is_close(got: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors differ by rounding."""
    difference = (got.double() - wanted.double()).abs().max().item()
    return difference <= TOLERANCE * max(1.0, wanted.double().abs().max().item())


def assert_close(got: Tensor, wanted: Tensor, what: str) -> None:
    difference = (got.double() - wanted.double()).abs().max().item()
    assert is_close(got, wanted), f"{what} differs by {difference}, the largest value is {wanted.abs().max().item()}"


@needs_dispatch
@pytest.mark.wide
@pytest.mark.parametrize("name", WITH_TWO)
def test_two_processes_train_and_save_as_one(
    name: str, with_two: dict[str, dict[str, Tensor]], checkpoints: Path
) -> None:
    compare(name, 2, with_two[name], checkpoints)


@needs_dispatch
@pytest.mark.wide
@pytest.mark.parametrize("name", WITH_FOUR)
def test_four_processes_train_and_save_as_one(
    name: str, with_four: dict[str, dict[str, Tensor]], checkpoints: Path
) -> None:
    compare(name, 4, with_four[name], checkpoints)


@needs_dispatch
@pytest.mark.wide
def test_each_process_holds_its_share_of_the_experts(
    with_two: dict[str, dict[str, Tensor]], with_four: dict[str, dict[str, Tensor]]
) -> None:
    up = "rows.scale_experts.0.body.experts"
    assert with_two["topk"][f"{up}.gate_up_proj"] == 2
    assert with_four["topk"][f"{up}.gate_up_proj"] == with_four["one-expert-each"][f"{up}.weight_EDD"] == 1
    assert with_four["replicas"][f"{up}.up_proj"] == 1  # two of four experts, of which FSDP2 shards the rows
    assert with_two["shared"][f"{up}.routed.gate_up_proj"] == 2 == with_two["adaptive"][f"{up}.experts.up_proj"]
    inside = [rows for key, rows in with_two["encoder"].items() if key.startswith("rows.encoder") and "gate_up" in key]
    assert inside and all(rows == 2 for rows in inside)


@needs_dispatch
@pytest.mark.wide
def test_processes_without_a_token_were_among_them(with_two: dict[str, dict[str, Tensor]]) -> None:
    sent_WE = with_two["empty-receiver"]["0.sent"]
    assert sent_WE[:, 2:].sum() == 0 and (sent_WE[:, 0] > 0).all()  # the second process holds experts 2 and 3
    sent_WE = with_two["empty-sender"]["0.sent"]
    assert sent_WE[1].sum() == 0 and sent_WE[0].sum() > 0
