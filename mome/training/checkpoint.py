"""Training states on disk, without pickle: tensors are safetensors, everything else is JSON.

A state is a folder `step_<number>`. It is complete or absent, never half written:
```
state.json                    step, processes, patches drawn, gradient scaler, SHA-256 of the other files
model.safetensors             weights and buffers
optimizer.safetensors         the moments of the optimiser, by the position of their parameter
average.safetensors           the moving average of the weights, if the run keeps one
random_<process>.safetensors  states of the random generators of one process
```
Nothing in a state is executed, so a run folder that comes from somebody else can be resumed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mome.atomic import output_errors
from mome.checksums import file_sha256
from mome.errors import InputError
from mome.text_file import read_json
from mome.training.adapters import Adapters
from mome.training.random_state import load_random_state, save_random_state
from mome.training.spread import spread_like, whole
from mome.training.tensor_file import check_like, read_tensors, write_tensors
from mome.training.weight_average import Average

_NAME = re.compile(r"step_(\d{8,12})")
# The groups of the optimiser decide the positions in the file. 2: parameters with a learning rate of their own have
# groups of their own. 3: biases that are stacked by expert are in the groups without weight decay.
_FORMAT = 3
_RESTART = "move it away, or --restart to start again"


@dataclass(frozen=True)
class TrainingState:
    """What a training state holds, besides the random generators of every process.

    Attributes:
        accelerator: Knows the processes and the gradient scaler.
        model: The model, as `accelerator.prepare` returned it.
        optimizer: The optimiser, likewise.
        average: The moving average of the weights, or None.
        samples_per_step: Patches of one optimiser step over all processes.
        adapters: The adapters in the model, or None; their weights are among the model's.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    samples_per_step: int = 1
    adapters: Adapters | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Returns, for every file of tensors, the module whose tensors it holds."""
        found: dict[str, nn.Module] = {"model.safetensors": self.accelerator.unwrap_model(self.model)}
        return found if self.average is None else {**found, "average.safetensors": self.average}


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Returns the newest complete training state and its step, or None if there is none.

    Raises:
        InputError: The folder holds a folder `step_…` that is no training state.
    """
    for path in sorted(folder.glob("step_*")):
        if path.is_dir() and path.suffix != ".part" and (not _NAME.fullmatch(path.name) or path.is_symlink()):
            raise InputError(
                "this folder is not a training state, whose names are like step_00000100",
                where=str(path),
                hint=_RESTART,
            )
    complete = _complete_states(folder)
    return (complete[-1], _step(complete[-1])) if complete else None


def save_checkpoint(state: TrainingState, folder: Path, step: int, keep: int) -> None:
    """Saves the training state of a step, then removes all but the newest `keep` states.

    The state is written under a temporary name and renamed when it is complete. The main process writes the model and
    the optimiser; every process writes the states of its random generators.

    Raises:
        OutputError: The state cannot be written; the earlier states stay.
    """
    accelerator = state.accelerator
    final = folder / f"step_{step:08d}"
    part = folder / f"step_{step:08d}.part"  # the same name in all processes, which write it together
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    with output_errors(final, "the training state", part):
        part.mkdir(parents=True, exist_ok=True)
        save_random_state(part / _random_file(accelerator.process_index))
        for name, module in state.modules().items():
            _write_whole(accelerator, part / name, _tensors(module))
        _write_whole(accelerator, part / "optimizer.safetensors", *_optimizer_state(state.optimizer))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with output_errors(final, "the training state", part):
            (part / "state.json").write_text(json.dumps(_contents(state, part, step), indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
        for old in _complete_states(folder)[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)
        remove_partial_states(folder)
    accelerator.wait_for_everyone()


def load_checkpoint(state: TrainingState, path: Path) -> list[str]:
    """Loads a training state into the model, the optimiser, the average and the random generators.

    Returns:
        Notes for the user.

    Raises:
        InputError: The state is damaged, of another model, or of a run with another number of processes.
    """
    accelerator = state.accelerator
    contents = read_json(path / "state.json", "the training state", hint=_RESTART)
    _check_contents(contents, state, path)
    for name, module in state.modules().items():
        tensors, current = read_tensors(path / name)[0], _tensors(module)
        check_like(tensors, current, path / name)
        module.load_state_dict({key: spread_like(tensor, current[key]) for key, tensor in tensors.items()})
    _load_optimizer_state(state.optimizer, path / "optimizer.safetensors")
    if accelerator.scaler is not None and isinstance(contents.get("gradient_scaler"), dict):
        accelerator.scaler.load_state_dict(contents["gradient_scaler"])
    note = load_random_state(path / _random_file(accelerator.process_index))
    return [note] if note else []


def remove_partial_states(folder: Path) -> None:
    """Removes states that were not written to their end."""
    for partial in folder.glob("step_*.part"):
        shutil.rmtree(partial, ignore_errors=True)


def _complete_states(folder: Path) -> list[Path]:
    """Returns the folders of complete states, from the oldest to the newest."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _random_file(process: int) -> str:
    return f"random_{process}.safetensors"


def _file_names(state: TrainingState) -> list[str]:
    """Returns the names of the files of a state besides `state.json`."""
    processes = range(state.accelerator.num_processes)
    return [*state.modules(), "optimizer.safetensors", *map(_random_file, processes)]


def _contents(state: TrainingState, folder: Path, step: int) -> dict[str, Any]:
    """Returns the contents of `state.json`."""
    accelerator = state.accelerator
    return {
        "format": _FORMAT,
        "step": step,
        "processes": accelerator.num_processes,
        "samples": step * state.samples_per_step,
        "gradient_scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "sha256": {name: file_sha256(folder / name) for name in _file_names(state)},
    }


def _check_contents(contents: dict[str, Any], state: TrainingState, path: Path) -> None:
    """Checks that a state is whole, and of a run with the same processes and samples per step.

    Raises:
        InputError: It is not.
    """
    step, processes = _step(path), state.accelerator.num_processes
    if contents.get("format") != _FORMAT or contents.get("step") != step:
        raise InputError("this is not a training state of this release", where=str(path), hint=_RESTART)
    if contents.get("processes") != processes or contents.get("samples") != step * state.samples_per_step:
        raise InputError(
            f"the run was started with {contents.get('processes')!r:.20} processes and has drawn "
            f"{contents.get('samples')!r:.20} patches; with {processes} processes it would be {step} steps of "
            f"{state.samples_per_step}",
            where=str(path),
            hint="launch as many processes as before, or --restart to start again",
        )
    sums = contents.get("sha256")
    for name in _file_names(state):
        file = path / name
        if not isinstance(sums, dict) or not file.is_file() or sums.get(name) != file_sha256(file):
            raise InputError(
                f"the training state is damaged: {name} {'has changed' if file.is_file() else 'is missing'}",
                where=str(path),
                hint=f"remove this folder to resume from the state before it; or {_RESTART}",
            )


def _write_whole(
    accelerator: Accelerator, path: Path, tensors: dict[str, Tensor], values: dict[str, Any] | None = None
) -> None:
    """Writes tensors in the main process. Those that are spread are gathered one by one, by all processes."""
    kept = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)  # waits for the other processes
        if accelerator.is_main_process:
            kept[name] = gathered.cpu()
    if accelerator.is_main_process:
        write_tensors(path, kept, values)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the optimiser's state as tensors and JSON values by `<position of the parameter>.<name>`.

    The hyperparameters are left out: the run's settings decide them.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for position, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{position}.{name}"] = value
    return tensors, values


def _load_optimizer_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Loads what `_optimizer_state` returned.

    Raises:
        InputError: The file is damaged, or of another model.
    """
    tensors, values = read_tensors(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        position, _, name = key.partition(".")
        if not position.isdecimal() or int(position) >= len(parameters):
            raise InputError(f"the training state is of another model: '{key:.60}'", where=str(path), hint=_RESTART)
        parameter = parameters[int(position)]
        if isinstance(value, Tensor) and value.ndim:
            if value.shape != parameter.shape:
                raise InputError(
                    f"the training state is of another model: '{key:.60}' is {tuple(value.shape)}, "
                    f"its parameter {tuple(parameter.shape)}",
                    where=str(path),
                    hint=_RESTART,
                )
            # The moments keep the memory format of their parameter, such as channels-last.
            like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            value = like.copy_(spread_like(value, parameter))
        entries.setdefault(int(position), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
