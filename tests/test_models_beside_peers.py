"""What the tests of other libraries demand of a model: offloading, adapters, data types, the Trainer, Auto classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import mome_kernels
import numpy as np
import pytest
import torch
import transformers
from mome_kernels import reference
from small_models import small, volume
from torch import nn

from mome import MoME, create_model
from mome.errors import InputError
from mome.hf_experts import check_experts
from mome.inference import Segmenter
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_logits
from mome.processing import MoMEProcessor
from mome.volumes import Volume
from mome.zoo import list_models, preset_processor

SPARSE = {"experts": "swiglu(n=4, hidden=8)", "router": "topk(k=2)"}


def with_bank(**overrides: Any) -> MoME:
    model = small(**{**SPARSE, **overrides})
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    model.text_bank.set(rows, centre_on=rows)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_bank().save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[2, 2, 2]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def text(model: MoME) -> torch.Tensor:
    return torch.randn(2, model.config.text_dim, generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(volume=volume(), text_PT=torch.ones(2, 12) * torch.tensor([[0.5], [-1.0]]), **given).logits


def streamed(model: MoME) -> torch.Tensor:
    given = torch.rand(1, 1, 20, 18, 24, generator=torch.Generator().manual_seed(3))
    return torch.cat([part for _, part in stream_logits(ModelPredictor(model), given, text(model))], dim=1)


def masks(model: MoME) -> dict[str, np.ndarray]:
    """Masks of a scan of air around soft tissue."""
    array = np.full((20, 22, 18), -1000.0, np.float32)
    array[4:16, 4:18, 4:14] = 40 + 20 * np.random.default_rng(0).standard_normal((12, 14, 10)).astype(np.float32)
    scan = Volume(array, np.diag([2.0, 2, 2, 1]))
    return Segmenter(model, MoMEProcessor(spacing=[2, 2, 2])).segment(scan, ["liver", "spleen"]).masks


# -- offloading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_offloaded_by_accelerate_gives_the_same_results(buffers: bool) -> None:
    model = with_bank()
    want, wanted_masks = streamed(model), masks(model)
    offloaded = accelerate.cpu_offload(model, offload_buffers=buffers)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(streamed(offloaded), want)
    found = masks(offloaded)
    assert all(np.array_equal(found[name], wanted_masks[name]) for name in wanted_masks)


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"encoder": "cpu", "scale_experts": "disk", "fusion": "disk", "head": "disk", "text_bank": "cpu"},
        {"": "disk"},
    ],
    ids=["auto", "map", "disk"],
)
def test_a_device_map_with_too_little_memory_gives_the_same_results(
    folder: Path, device_map: Any, tmp_path: Path
) -> None:
    want = MoME.from_pretrained(folder)
    model = MoME.from_pretrained(
        folder, device_map=device_map, max_memory={"cpu": "50KB"}, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    # weights that are read from the disk are not aligned in memory, which changes the last bits of a product
    torch.testing.assert_close(streamed(model), streamed(want), rtol=1e-5, atol=1e-5)
    found, wanted = masks(model), masks(want)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# -- data types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "bfloat16"])
def test_a_model_loaded_in_another_type_segments(folder: Path, dtype: Any) -> None:
    model = MoME.from_pretrained(folder, dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    far = (streamed(model) - streamed(MoME.from_pretrained(folder))).abs() > 0.1
    assert far.float().mean() < 1e-2  # rounding may send a voxel to another expert
    assert set(masks(model)) == {"liver", "spleen"}
    assert MoME.from_pretrained(folder, torch_dtype=dtype).dtype == model.dtype


def test_wrong_types_are_refused_in_words(folder: Path) -> None:
    for wrong in (torch.int8, "int8", "float", 3, torch.bool):
        for key in ("dtype", "torch_dtype"):
            with pytest.raises(InputError, match="dtype is one of float32"):
                MoME.from_pretrained(folder, **{key: wrong})
    with pytest.raises(InputError, match="differ"):
        MoME.from_pretrained(folder, dtype=torch.float32, torch_dtype=torch.float16)
    assert MoME.from_pretrained(folder, dtype="float16", torch_dtype=torch.float16).dtype == torch.float16
    assert MoME.from_pretrained(folder, dtype="auto").dtype == MoME.from_pretrained(folder).dtype == torch.float32


# -- adapters and quantisation ---------------------------------------------------------------------------------


def adapted(**settings: Any) -> tuple[MoME, Any]:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    model = with_bank()
    return model, peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))


TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "experts": {"target_parameters": ["body.experts.gate_up_proj"]},
    "both": {"target_parameters": ["body.experts.gate_up_proj", "body.experts.down_proj"]},
}


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_train_save_load_and_merge(name: str, tmp_path: Path) -> None:
    plain = logits(with_bank())
    _, wrapped = adapted(**TARGETS[name])
    first = logits(wrapped)
    assert not torch.allclose(first, plain)
    output = wrapped(volume=volume(), text_PT=torch.randn(2, 12), targets=torch.ones(1, 2, 16, 16, 16))
    output.loss.backward()
    trained = {key: p for key, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values()), [
        key for key, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    torch.optim.SGD(trained.values(), lr=1e-4).step()  # larger steps gave logits of 1e21
    second = logits(wrapped)
    assert torch.isfinite(output.loss) and not torch.equal(second, first)
    wrapped.save_pretrained(tmp_path)
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(with_bank(), tmp_path)), second)
    # Random adapters make logits of some hundreds, and sums of them may lie near zero.
    allowed = 1e-5 * max(1.0, float(second.abs().max()))
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), second, rtol=1e-4, atol=allowed)


def test_adapters_reach_the_experts_of_other_models() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(mixtral_config()).double()
    tokens = torch.randint(0, 64, (2, 9))
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    found = {}
    for implementation in ("eager", "mome"):
        model.set_experts_implementation(implementation)
        wrapped.zero_grad()
        loss = wrapped(tokens, labels=tokens).loss
        loss.backward()
        found[implementation] = [loss.detach(), *(p.grad for p in wrapped.parameters() if p.requires_grad)]
    for ours, theirs in zip(found["mome"], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchao_quantises_linear_layers(folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = MoME.from_pretrained(folder, quantization_config=config)
    torch.testing.assert_close(streamed(model), streamed(MoME.from_pretrained(folder)), rtol=0.1, atol=0.1)


# -- loading ---------------------------------------------------------------------------------------------------


def test_overrides_go_with_ignore_mismatched_sizes(folder: Path) -> None:
    model = MoME.from_pretrained(folder, experts="mlp(n=2, hidden=8)", ignore_mismatched_sizes=True)
    assert model.config.experts["name"] == "mlp"


def test_weights_may_come_from_memory(folder: Path) -> None:
    model = MoME.from_pretrained(folder)
    again = MoME.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(again), logits(model)) and again.loaded_processor is None
    state = model.state_dict()
    del state["fusion.scores.bias_S"]
    with pytest.raises(InputError, match="not in the checkpoint: fusion.scores.bias_S"):
        MoME.from_pretrained(None, config=model.config, state_dict=state)
    assert MoME.from_pretrained(None, config=model.config, state_dict=state, allow_missing=True)
    for wrong in ({}, {"config": model.config}, {"state_dict": state}):
        with pytest.raises(InputError, match="without a name"):
            MoME.from_pretrained(None, **wrong)
    with pytest.raises(InputError, match="both a name and state_dict"):
        MoME.from_pretrained(folder, state_dict=model.state_dict())
    with pytest.raises(InputError, match="both config= and dim="):
        MoME.from_pretrained(folder, config=model.config, dim=4)


def test_a_subfolder_of_a_local_folder(folder: Path) -> None:
    model = MoME.from_pretrained(folder.parent, subfolder="model")
    assert torch.equal(logits(model), logits(MoME.from_pretrained(folder)))
    assert model.loaded_processor.spacing == [2.0, 2.0, 2.0]
    assert MoMEProcessor.from_pretrained(folder.parent, subfolder="model").spacing == [2.0, 2.0, 2.0]
    with pytest.raises(InputError, match="no such folder"):
        MoME.from_pretrained(folder.parent, subfolder="other")


def test_dashes_and_underscores_are_the_same_in_names() -> None:
    assert create_model("mome-ct-tiny").config.part_strings() == create_model("mome_ct_tiny").config.part_strings()
    assert preset_processor("mome-ct_tiny").settings() == preset_processor("mome_ct_tiny").settings()
    tagged = list_models("mome_ct*", pretrained=True)
    assert tagged == list_models("mome-ct*", pretrained=True) == ["mome_ct_tiny.openkbp", "mome_ct_tiny.torso"]
    assert (
        list_models("mome-ct-[a-z]*")
        == list_models("mome_ct_*")
        == [
            *("mome_ct_base", "mome_ct_base_sparse", "mome_ct_large", "mome_ct_large_sparse", "mome_ct_resenc_m"),
            *("mome_ct_small", "mome_ct_small_sparse", "mome_ct_timm_convnext", "mome_ct_tiny", "mome_ct_tiny_sparse"),
            "mome_ct_vit3d_small",
        ]
    )
    assert MoME.from_pretrained("mome_ct_tiny").config.trained_labels


# -- Auto classes, Trainer, checkpointing ----------------------------------------------------------------------


def test_auto_processor_finds_the_processor(folder: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor) is MoMEProcessor and processor.spacing == [2.0, 2.0, 2.0]
    with_bank().save_pretrained(folder)  # as a push does, over the files of a processor
    assert transformers.AutoProcessor.from_pretrained(folder).spacing == [2.0, 2.0, 2.0]


@pytest.mark.wide
def test_auto_processor_without_importing_mome_first(folder: Path) -> None:
    code = (
        "from transformers import AutoProcessor; "
        f"found = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True); "
        "print(found.spacing, found.overlap)"
    )
    MoMEProcessor(spacing=[2, 2, 2], overlap=0.25).save_pretrained(folder)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "[2.0, 2.0, 2.0] 0.25", done.stderr


def test_the_trainer_reports_the_loss_of_an_evaluation(tmp_path: Path) -> None:
    model = with_bank()
    item = {"volume": volume(), "text_PT": torch.ones(2, 12), "targets": torch.ones(1, 2, 16, 16, 16)}
    settings = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], per_device_eval_batch_size=1)
    trainer = transformers.Trainer(model, settings, eval_dataset=[item], data_collator=lambda items: items[0])
    with torch.no_grad():
        want = float(model.eval()(**item).loss)
        assert model(**item, return_loss=False).loss is None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want)


def test_reentrant_checkpointing_is_refused_in_words() -> None:
    model = with_bank().train()
    for act in (model.gradient_checkpointing_enable, getattr(model, "activation_checkpointing_enable", None)):
        if act is not None:
            with pytest.raises(InputError, match="no reentrant gradient checkpointing"):
                act({"use_reentrant": True})
    for options in (None, {}, {"use_reentrant": False}, {"preserve_rng_state": False}):
        model.gradient_checkpointing_enable(options)
        model(volume(), torch.ones(2, 12)).logits.sum().backward()
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        (torch.rand(2, 1, 16, 16, 16), {}, "a volume is"),
        (torch.rand(1, 16, 16, 16), {}, "a volume is"),
        (volume(), {"overlap": 1.5}, "overlap is from 0 to 0.9"),
        (volume(), {"overlap": -0.1}, "overlap is from 0 to 0.9"),
        (volume(), {"overlap": float("nan")}, "overlap is from 0 to 0.9"),
    ],
)
def test_stream_logits_refuses_what_it_cannot_stream(given: torch.Tensor, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(stream_logits(ModelPredictor(with_bank()), given, torch.ones(1, 12), **settings))


# -- kernels under other models --------------------------------------------------------------------------------


def mixtral_config(**overrides: Any) -> Any:
    return transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        **overrides,
    )


def test_a_check_says_whether_the_experts_run_on_the_kernels() -> None:
    model = transformers.MixtralForCausalLM(mixtral_config())
    with pytest.raises(InputError, match=r"1 of 1 expert modules run on '\w+', not on 'mome'"):
        check_experts(model)
    model.set_experts_implementation("mome")
    assert check_experts(model) == ["model.layers.0.mlp.experts"]


def ignoring_models() -> dict[str, Any]:
    common = {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    return {
        "JetMoe": {**common, "num_hidden_layers": 1, "kv_channels": 8, "intermediate_size": 16, "num_local_experts": 2},
        "Dbrx": {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 64, "max_seq_len": 32,
                 "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
        "LongcatFlash": {
            **common, "num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 16, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2,
            "zero_expert_num": 1, "expert_ffn_hidden_size": 8, "moe_topk": 1, "head_dim": 8,
        },
        "Llama4Text": {
            **common, "num_hidden_layers": 1, "intermediate_size": 16, "intermediate_size_mlp": 16,
            "num_local_experts": 2, "head_dim": 8,
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", ["JetMoe", "Dbrx", "LongcatFlash", "Llama4Text"])
def test_models_that_ignore_the_setting_are_named(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**ignoring_models()[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("mome")
    with pytest.raises(InputError, match="has no effect on .*: transformers ignores the setting"):
        check_experts(model)


EXPERT_WEIGHTS = {"up": (4, 12, 6), "up_bias": (4, 12), "down": (4, 6, 6), "down_bias": (4, 6)}


def forward_mode(op: str) -> tuple[Any, torch.Tensor]:
    """A function of one tensor that calls an op, and the tensor."""
    torch.manual_seed(0)
    x, ids, gates = torch.randn(5, 6), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    up, up_bias, down, down_bias = (torch.randn(shape) for shape in EXPERT_WEIGHTS.values())
    inverse = torch.randperm(10)
    head = [
        torch.randn(s) for s in ((3, 4), (3, 2), (1, 3, 4, 4), (1, 3, 4), (1, 3, 4, 4), (1, 3, 4), (1, 3, 4), (1, 3))
    ]
    return {
        "moe_mlp": (lambda t: mome_kernels.moe_mlp(t, ids, gates, up, up_bias, down, down_bias, gated=True), x),
        "moe_linear": (lambda t: mome_kernels.moe_linear(x, ids, gates, t), down),
        "grouped_linear": (lambda t: mome_kernels.grouped_linear(t, down, torch.tensor([0, 1, 2, 4, 5])), x),
        "combine": (lambda t: mome_kernels.combine(torch.randn(10, 6), t, inverse), gates),
        "fusion_head": (lambda t: mome_kernels.fusion_head(t, *head), torch.randn(1, 2, 4, 7)),
    }[op]


@pytest.mark.parametrize("op", ["moe_mlp", "moe_linear", "grouped_linear", "combine", "fusion_head"])
def test_forward_mode_raises(op: str) -> None:
    function, x = forward_mode(op)
    with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    x.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(function(x).sum(), x)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "mlp"])
def test_gates_and_their_sum_are_in_float32(layer: str, dtype: torch.dtype) -> None:
    """Every expert returns its token unchanged, so only gates and sum can round; K = 8."""
    torch.manual_seed(0)
    x = torch.randn(200, 16).to(dtype)
    ids = torch.stack([torch.randperm(12)[:8] for _ in range(200)])
    gates = torch.rand(200, 8).softmax(dim=-1) * 1.7
    eye = torch.eye(16, dtype=dtype).expand(12, -1, -1).contiguous()
    if layer == "linear":
        found = mome_kernels.moe_linear(x, ids, gates, eye)
    else:
        found = mome_kernels.moe_mlp(x, ids, gates, eye, None, eye, None, activation="none")
    wanted = (x.double() * gates.double().sum(1, keepdim=True)).to(dtype)
    assert (found != wanted).float().mean() < 0.01  # the sums of float32 may lie across a rounding border
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0)


def test_half_precision_is_as_exact_as_the_grouped_products_of_transformers() -> None:
    torch.manual_seed(0)
    x, ids = torch.randn(64, 32), torch.stack([torch.randperm(16)[:8] for _ in range(64)])
    gates = torch.rand(64, 8).softmax(-1)
    up, down = torch.randn(16, 64, 32) / 32**0.5, torch.randn(16, 32, 64) / 64**0.5
    half = [t.bfloat16() for t in (x, up, down)]
    wanted = reference.moe_mlp(*(t.double() for t in (half[0],)), ids, gates.double(), half[1].double(), None,
                               half[2].double(), None, activation="silu")  # fmt: skip
    found = mome_kernels.moe_mlp(half[0], ids, gates, half[1], None, half[2], None, activation="silu")
    rows = half[0][:, None].expand(-1, 8, -1)
    hidden = torch.nn.functional.silu(torch.einsum("tkd,tkfd->tkf", rows, half[1][ids]))
    theirs = (torch.einsum("tkf,tkdf->tkd", hidden, half[2][ids]) * gates[..., None]).sum(1).bfloat16()
    ours_off, theirs_off = ((t.double() - wanted).norm() / wanted.norm() for t in (found, theirs))
    assert ours_off <= 1.05 * theirs_off, (ours_off, theirs_off)
