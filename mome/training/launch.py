"""The processes of a run: how they are started, and what is said when one of them ends.

`accelerate launch` and `torchrun` tell a process its place by the environment variables RANK and WORLD_SIZE.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from mome.cpu_load import set_threads
from mome.errors import InputError
from mome.training.config import TrainConfig
from mome.training.trackers import tracker_to_use

# Variables by which launchers, the second to fourth of them MPI, say how many processes there are.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_TWO_ON_CPU = "accelerate launch --config_file examples/configs/accelerate/two_cpu_processes.yaml …"
# What gloo says, in a plain RuntimeError, when the connection to another process ends; NCCL has errors of its own.
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "pair closure")


class ProcessLost(InputError):
    """Another process of the run has ended, so that this one cannot go on."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Returns an Accelerator with the run's precision, gradient accumulation and tracker.

    Raises:
        InputError: This machine cannot compute in the run's precision or memory format, the tracker is not installed,
            or a launcher was asked for several processes and started one.
    """
    check_launch(os.environ)
    set_threads(config.threads)
    out = Path(config.out)
    tracker = tracker_to_use(config.tracker)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        accelerator = Accelerator(
            # Without a GPU, Accelerate joins several processes only where it is told to use the CPU.
            cpu=config.cpu or (several and not torch.cuda.is_available()),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
        )
    except ValueError as error:
        first = (str(error).splitlines() or [""])[0][:160]
        raise InputError(
            f"train.mixed_precision={config.mixed_precision} cannot be used here: {first}",
            hint="train.mixed_precision=no",
        ) from error
    if accelerator.device.type == "cpu" and config.channels_last and config.mixed_precision == "bf16":
        # seen with PyTorch 2.11 and 2.14: the gradient of a 3D convolution's weights over two voxels a side is garbage
        raise InputError(
            "train.channels_last with train.mixed_precision=bf16 gives wrong gradients on a CPU (a fault of PyTorch)",
            hint="train.channels_last=false",
        )
    if tracker is not None and not accelerator.log_with:
        raise InputError(
            f"train.tracker={tracker} cannot be used: Accelerate does not find the package {tracker}",
            hint=f"pip install -U {tracker}, or train.tracker=none",
        )
    return accelerator


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuses a launch that was meant for several processes and started one.

    `accelerate launch --cpu --num_processes 2` does so without a message, unless it is told to use mpirun (accelerate
    1.15). It then gives the process a port to meet the others at, and no number of processes.

    Args:
        environment: The environment variables of this process.

    Raises:
        InputError: This is such a launch.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if by_accelerate and not any(name in environment for name in _COUNTS):
        raise InputError(
            "accelerate launch was asked for several processes and has started one: with --cpu it needs mpirun",
            where="the variables MASTER_PORT and ACCELERATE_MIXED_PRECISION, without WORLD_SIZE",
            hint=f"{_TWO_ON_CPU} or torchrun; for one process, --num_processes 1 and no MASTER_PORT",
        )


def describe_processes(accelerator: Accelerator) -> str:
    """Returns a line that says how many processes train, and on what."""
    if accelerator.num_processes == 1:
        return f"1 process on {accelerator.device}"
    return f"{accelerator.num_processes} processes on {accelerator.device.type}, joined by {dist.get_backend()}"


@contextlib.contextmanager
def other_processes_live(accelerator: Accelerator, out: Path) -> Iterator[None]:
    """Turns the error of a lost connection inside the block into a `ProcessLost`.

    Raises:
        ProcessLost: Another process has ended, as when it was killed for the memory that it took.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_lost_connection(error):
            raise
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} stops: another process of this run "
            "has ended",
            where=str(out),
            hint="read what the other process or the system's log (dmesg) says; the same command goes on from the "
            "last checkpoint",
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _LOST)
