"""A run whose model is spread over its processes: FSDP2 shards parameters, and experts may live in one process each.

transformers spreads a model while it loads one (`mome.expert_parallel`). The main process therefore saves the first
weights into the run's folder, and every process loads its part of them. What is written to disk are whole tensors, so
that training states and models are those of any other run.

Functions that gather tensors wait for all processes, so that every process must call them.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mome.atomic import output_errors
from mome.errors import InputError
from mome.expert_parallel import checked_distributed_config
from mome.temporary_names import temporary_path
from mome.training.config import RunConfig
from mome.training.moving_average import growing_average

if TYPE_CHECKING:
    from mome.modeling import MoME


def check_spread(run: RunConfig, model: MoME, accelerator: Accelerator) -> None:
    """Checks, before data are read, that a run's model can be spread over its processes.

    Args:
        run: The run; nothing is checked where `run.distributed` spreads nothing.
        model: The run's model, whole.
        accelerator: Knows the processes.

    Raises:
        InputError: It cannot; see `checked_distributed_config`, too.
    """
    if not run.distributed.spreads:
        return
    config = run.train
    for setting, is_set, remedy in (
        ("lora.rank", run.lora.rank > 0, "lora.rank=0"),
        ("train.channels_last", config.channels_last, "train.channels_last=false"),
        ("train.mixed_precision=fp16", config.mixed_precision == "fp16", "train.mixed_precision=bf16"),
        (
            "train.cpu",
            accelerator.device.type == "cpu" and torch.cuda.is_available(),
            "CUDA_VISIBLE_DEVICES= hides GPUs",
        ),
    ):
        if is_set:
            raise InputError(
                f"{setting} does not go with a model that is spread over processes",
                where=f"distributed.fsdp_size={run.distributed.fsdp_size}",
                hint=f"{remedy}, or leave the section distributed out",
            )
    checked_distributed_config(
        run.distributed.arguments(), torch.float32, lambda: type(model)(copy.deepcopy(model.config))
    )


def spread_models(model: MoME, run: RunConfig, accelerator: Accelerator, count: int) -> list[MoME]:
    """Returns models with the weights of one, each spread over all processes.

    Args:
        model: The same whole model in every process.
        run: How it is spread, and the folder through which the weights go.
        accelerator: Knows the processes.
        count: The number of models.

    Raises:
        OutputError: The weights cannot be written.
    """
    _quiet_torch()
    out = Path(run.train.out)
    named = [str(temporary_path(out / "start")) if accelerator.is_main_process else ""]
    broadcast_object_list(named)
    folder = Path(named[0])
    if accelerator.is_main_process:
        with output_errors(out, "the first weights", folder):
            model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    found = [
        cast("MoME", type(model).from_pretrained(folder, distributed_config=run.distributed.arguments()))
        for _ in range(count)
    ]
    for one in found:
        one.processor, one.card_sections = model.processor, model.card_sections
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    parameters = list(found[0].parameters())
    held, total = sum(own_part(value).numel() for value in parameters), sum(value.numel() for value in parameters)
    accelerator.print(f"the first process holds {held:,} of {total:,} parameters")
    return found


def _quiet_torch() -> None:
    """Turns off two messages of torch that no setting of a run changes.

    One warns of operations in place on what a sharded module returns, and neither the model nor the loop has any. The
    other says that a sum over two groups of processes takes two steps.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def is_spread(model: nn.Module) -> bool:
    """Says whether a model is spread over processes."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with the parts of all processes; a plain tensor is returned as it is."""
    return cast(Tensor, tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a whole tensor, the same in every process, spread like another one.

    Args:
        tensor: The whole tensor.
        other: A tensor of the same shape; a plain one leaves `tensor` as it is.
    """
    if not isinstance(other, DTensor):
        return tensor
    # Experts that FSDP2 also shards are interleaved among the processes, which only `redistribute` makes.
    plain = [Shard(place.dim) if place.is_shard() else place for place in other.placements]  # type: ignore[attr-defined]
    on_device = tensor.to(other.to_local().device)
    return distribute_tensor(on_device, other.device_mesh, plain, src_data_rank=None).redistribute(
        placements=other.placements
    )


def own_part(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def free_whole_parameters(model: nn.Module) -> None:
    """Leaves every process with its part of the parameters, after a forward pass without a backward pass.

    FSDP2 keeps some parameters whole until the backward pass. The next forward pass would take them as they were.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class SpreadAverage(nn.Module):
    """What `torch.optim.swa_utils.AveragedModel` does, for a model that cannot be copied because it is spread.

    Args:
        module: A second spread model, which becomes the average.
        decay: Of the exponential moving average.
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("n_averaged", torch.tensor(0))
        self._average = growing_average(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Adds the weights of a model, spread like the average; buffers are copied."""
        averages = [own_part(parameter) for parameter in self.module.parameters()]
        news = [own_part(parameter) for parameter in model.parameters()]
        if self.n_averaged == 0:
            for average, new in zip(averages, news, strict=True):
                average.copy_(new)
        else:
            self._average(averages, news, self.n_averaged)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1
