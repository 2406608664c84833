"""Expert parallelism: which experts of a model transformers spreads over processes, and which it cannot.

transformers (5.23 and later) moves the tokens: `ep_dispatch_experts` sends every assignment of a voxel to the process
that holds its expert, and brings the result back to the process of the voxel, which applies the routing weight. FSDP2
shards the other parameters. This module says what is split, checks it before anything is loaded, and moves no tensor.

    MoME.from_pretrained(name, distributed_config=DistributedConfig(ep_size=2, fsdp_size=2))

Every process holds its own cases, and all of them must make the same number of forward passes: a process that makes one
more waits for the others. `fsdp_size` is a multiple of `ep_size`. Losses and gradients are those of one process with
the cases of all processes in one batch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import nn

from mome.errors import InputError
from mome.experts.base import Experts, TokenExperts
from mome.layers.moe import MixtureOfExperts
from mome.loaded_weights import shown
from mome.routers.base import Router

_OLDEST_TRANSFORMERS = "5.23"
# FSDP2 gathers the parameters of a module when its `forward` is called. These modules are called in no other way; the
# parts that are not named here belong to the whole model.
FSDP_PLAN = {"encoder": "free_full_weight", "scale_experts.*.body": "free_full_weight"}


def expert_plan(model: nn.Module) -> dict[str, str]:
    """The plan of a model in the form of transformers' `ep_plan`: name → style, with `*` for the numbers of layers.

    The parameters of every body of several experts are split along dimension 0, and its tokens are dispatched. Bodies
    that cannot be split are left out; `check_experts` refuses them.
    """
    plan: dict[str, str] = {}
    for name, body in _routed_bodies(model):
        if isinstance(body, TokenExperts) and body.stacked:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
            plan |= {f"{pattern}.{key}": "grouped_gemm" for key, _ in body.named_parameters(recurse=False)}
            plan[pattern] = "ep_dispatch_experts"
    return plan


def check_experts(model: nn.Module, ep_size: int) -> None:
    """Checks that the experts of a model can be spread over processes.

    Args:
        model: The model, which may be on the meta device.
        ep_size: The number of processes that share the experts, at least 2.

    Raises:
        InputError: The number of experts is no multiple of `ep_size`, a body of several experts cannot be split, a
            router or body reads the prompts, or the model has no experts to split.
    """
    for name, module in model.named_modules():
        if (isinstance(module, Router) and module.reads_prompts) or (
            isinstance(module, Experts) and module.reads == "prompt"
        ):
            reader = f"{'router' if isinstance(module, Router) else 'expert body'} {type(module).__name__}"
            raise InputError(
                f"ep_size={ep_size}: {reader} reads the prompts, and processes with other prompts would run the "
                "experts another number of times and wait for each other forever",
                where=name,
                hint="use ep_size=1, or experts and a router that read the voxels alone",
            )
    found = False
    for name, body in _routed_bodies(model):
        if next(body.parameters(), None) is None:  # such as identity experts: every process has all of them anyway
            continue
        if not isinstance(body, TokenExperts) or not body.stacked:
            raise InputError(
                f"ep_size={ep_size}: experts {type(body).__name__} cannot be split: "
                + ("they read the whole map" if body.reads == "map" else "not all their parameters are one per expert"),
                where=name,
                hint="use ep_size=1, or experts with stacked weights, as in experts='swiglu(n=8)'",
            )
        if body.num_experts % ep_size:
            raise InputError(
                f"ep_size={ep_size} does not divide the {body.num_experts} experts {type(body).__name__}",
                where=name,
                hint=f"use ep_size={_largest_divisor(body.num_experts, ep_size)}, or a multiple of {ep_size} experts",
            )
        found = True
    if not found:
        raise InputError(
            f"ep_size={ep_size}: the model has no layer of several experts with weights, so there is nothing to split",
            hint="use ep_size=1, or more experts, as in experts='swiglu(n=8)'",
        )


def checked_distributed_config(config: Any, dtype: torch.dtype | str, build: Callable[[], nn.Module]) -> Any:
    """Checks a `DistributedConfig` before anything is loaded.

    Args:
        config: The config, or a dict of its arguments.
        dtype: The type in which the weights are loaded, or "auto".
        build: Makes the model; it is called on the meta device.

    Returns:
        The `DistributedConfig`.

    Raises:
        InputError: transformers is too old, the config splits what is not split here, the run has another number of
            processes, the model has whole-model experts, a parameter has no dimension, the experts' gradients would be
            wrong in the type, or see `check_experts`.
    """
    if Version(transformers.__version__) < Version(_OLDEST_TRANSFORMERS):
        raise InputError(
            f"distributed_config= needs transformers {_OLDEST_TRANSFORMERS} or later, this is "
            f"{transformers.__version__}",
            hint=f"pip install 'transformers>={_OLDEST_TRANSFORMERS}'",
        )
    from transformers.distributed import DistributedConfig

    if isinstance(config, dict):
        try:
            config = DistributedConfig(**config)
        except (TypeError, ValueError) as error:
            raise InputError(f"distributed_config={config!r:.100}: {error}") from error
    for size in ("tp_size", "pp_size"):
        if getattr(config, size) > 1:
            raise InputError(
                f"{size}={getattr(config, size)} splits layers, and MoME splits experts (ep_size) and parameters "
                "(fsdp_size)",
                where="distributed_config",
                hint="DistributedConfig(ep_size=2, fsdp_size=2)",
            )
    _check_processes(config.dp_replicate_size * config.fsdp_size)
    with torch.device("meta"):
        model = build()
    if config.dp_replicate_size * config.fsdp_size > 1:
        if len(getattr(model, "extra_experts", ())):
            raise InputError(
                "a model with whole-model experts is not spread over processes: they load their own weights",
                where="distributed_config",
                hint="leave distributed_config= out, or the whole-model experts",
            )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise InputError(
                    "FSDP2 cannot shard a parameter without a dimension",
                    where=name,
                    hint="another part, as in head=dynamic; in a part of your own, the shape (1,)",
                )
    if config.ep_size > 1:
        _check_type(config.ep_size, dtype)
        check_experts(model, config.ep_size)
    return config


def refuse_new_weights(names: list[str], where: str) -> None:
    """Refuses to make new weights on several processes, which would draw the same numbers for different experts.

    Args:
        names: The tensors that the checkpoint does not hold, or holds in another shape.
        where: The checkpoint, for the message.

    Raises:
        InputError: There are some.
    """
    if names:
        raise InputError(
            f"{len(names)} tensors are new, and a model is spread over processes with loaded weights only: "
            f"{shown(names)}",
            where=where,
            hint="save the model from one process first: MoME.from_pretrained(…, experts=…).save_pretrained(folder)",
        )


def finish_distributed(model: nn.Module) -> None:
    """Lets FSDP2 gather parameters for `encode` and `decode`, too, where these are called instead of `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in ("encode", "decode"):
        register_fsdp_forward_method(model, method)


def wait_for_all(model: nn.Module) -> None:
    """Waits until every process is here, if the model is spread over processes."""
    if _is_distributed(model):
        dist.barrier()


def writes_files(model: nn.Module) -> bool:
    """Whether this process writes the files of a checkpoint; where a model is spread over processes, one of them."""
    return not _is_distributed(model) or dist.get_rank() == 0


def _is_distributed(model: Any) -> bool:
    given = getattr(model.config, "distributed_config", None)
    return given is not None and dist.is_available() and dist.is_initialized()


def _check_type(ep_size: int, dtype: torch.dtype | str) -> None:
    # In other types FSDP2 guards against overflow by a division of its own, in addition to that by the number of
    # processes, where an expert has one copy (torch 2.14). "auto" may be such a type.
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"ep_size={ep_size} with weights in {name}: FSDP2 would divide the experts' gradients twice",
            where="distributed_config",
            hint="dtype=torch.float32 or dtype=torch.bfloat16",
        )


def _check_processes(needed: int) -> None:
    if dist.is_available() and dist.is_initialized():
        running = dist.get_world_size()
    else:
        running = int(os.environ.get("WORLD_SIZE", 1))
    if running != needed:
        raise InputError(
            f"fsdp_size × dp_replicate_size is {needed}, and this run has {running} process{'es' * (running > 1)}",
            where="distributed_config",
            hint=f"torchrun --nproc-per-node {needed} …; ep_size is a divisor of fsdp_size",
        )


def _routed_bodies(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The expert bodies that ids of several experts reach: the outermost one, or the one that it calls for them."""
    for name, mixture in model.named_modules():
        if isinstance(mixture, MixtureOfExperts):
            name, body = f"{name}.experts" if name else "experts", mixture.experts
            while isinstance(body, TokenExperts) and body.routed_part is not None:
                name, body = f"{name}.{body.routed_part}", getattr(body, body.routed_part)
            if body.num_experts > 1:
                yield name, body


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit) if number % d == 0)
