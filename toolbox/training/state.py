"""Saving a run's state so that a killed run continues bit for bit.

A state is a directory ``step-NNNNNN`` made whole under another name and then renamed: safetensors with parameters,
optimiser moments, the objective's own tensors and random states, and a JSON file with everything else. Every rank
writes its local tensors where parameters are sharded; otherwise rank 0 writes for all. (accelerate's ``save_state``
writes pickles and only logs a failure to restore random states, so it is not used.)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_directory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")


class RunState(msgspec.Struct):
    """The JSON half of a state.

    ``fingerprint`` identifies what a resumed run must share: options, data hashes, processes. ``memory`` is the
    loop's own (evaluations at the start, the stop reason).
    """

    format: int
    step: int
    fingerprint: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)


def latest_state(directory: Path) -> Path | None:
    """The newest complete state below ``directory``, or None."""
    named = (path for path in directory.glob("step-*") if _STEP.fullmatch(path.name))
    found = [path for path in named if (path / "state.json").is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_state(path: Path) -> RunState:
    """The JSON half of the state in ``path``; BadData when it is not one of ours."""
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes(), type=RunState)
    except msgspec.MsgspecError as error:
        raise BadData(f"damaged state: {error}", "start anew with --overwrite", file=str(path)) from None
    if state.format != FORMAT:
        raise BadData(f"state format {state.format}, this version reads {FORMAT}", "--overwrite", file=str(path))
    return state


@dataclass
class TrainingTensors:
    """The tensors of a run by name: what is trained, how, and the objective's own."""

    parameters: dict[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]

    def collect(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everything to be saved, as local tensors."""
        import torch

        tensors = {f"parameter/{name}": local_part(tensor.detach()) for name, tensor in self.parameters.items()}
        for name, parameter, number, optimizer in self._slots():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer{number}/{key}/{name}"] = local_part(torch.as_tensor(value))
        tensors |= {f"objective/{key}": local_part(value) for key, value in own.items()}
        tensors["random/torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put saved tensors back in place; returns the objective's own. BadData when something is missing."""
        import torch

        own: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                _copy(_take(tensors, f"parameter/{name}"), local_part(parameter), name)
            for name, parameter, number, optimizer in self._slots():
                prefix = f"optimizer{number}/"
                keys = [key for key in tensors if key.startswith(prefix) and key.split("/", 2)[2] == name]
                for key in keys:
                    optimizer.state[parameter][key.split("/", 2)[1]] = _like(tensors.pop(key), parameter)
        torch.set_rng_state(_take(tensors, "random/torch"))
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("random/cuda"))
        for key in tensors:
            if key.startswith("objective/"):
                own[key.removeprefix("objective/")] = tensors[key]
        return own

    def _slots(self) -> list[tuple[str, nn.Parameter, int, torch.optim.Optimizer]]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [
            (names[id(parameter)], parameter, number, optimizer)
            for number, optimizer in enumerate(self.optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise BadData(f"the saved state lacks {name}", "start anew with --overwrite")
    return tensors.pop(name)


def _copy(source: Tensor, target: Tensor, name: str) -> None:
    if source.shape != target.shape:
        raise BadData(f"the saved {name} has shape {tuple(source.shape)}, not {tuple(target.shape)}", "--overwrite")
    target.copy_(source)


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment or step count on its parameter's device (fused optimisers count there); a shard where that is one.

    A moment gets its parameter's order in memory: fused optimisers walk through both side by side.
    """
    import torch

    here = local_part(parameter.detach())
    value = value.to(here.device)
    if value.shape == here.shape:
        value = torch.empty_like(here, dtype=value.dtype).copy_(value)
    if value.ndim and hasattr(parameter, "to_local"):
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return value


def save_state(directory: Path, state: RunState, tensors: dict[str, Tensor], accelerator: Any, sharded: bool) -> Path:
    """Write a state below ``directory`` and remove the older ones. All ranks call this together."""
    from toolbox.weights.write import write_file

    target = directory / f"step-{state.step:06d}"
    if not sharded:
        if accelerator.is_main_process:
            with atomic_directory(target) as part:
                with (part / "rank-0000.safetensors").open("wb") as handle:
                    write_file(handle, tensors)
                (part / "state.json").write_bytes(msgspec.json.encode(state))
    else:
        staging = directory / f"step-{state.step:06d}.ranks"
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        accelerator.wait_for_everyone()
        with (staging / f"rank-{accelerator.process_index:04d}.safetensors").open("wb") as handle:
            write_file(handle, tensors)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with atomic_directory(target) as part:
                for file in staging.iterdir():
                    file.rename(part / file.name)
                (part / "state.json").write_bytes(msgspec.json.encode(state))
            shutil.rmtree(staging)
    if accelerator.is_main_process:
        for path in directory.glob("step-*"):
            if path != target:
                shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def load_tensors(path: Path, accelerator: Any, sharded: bool) -> dict[str, Tensor]:
    """This rank's tensors of the state in ``path``."""
    from toolbox.weights.read import open_weights

    rank = accelerator.process_index if sharded else 0
    with open_weights(path / f"rank-{rank:04d}.safetensors") as weights:
        return {name: weights.tensor(name) for name in weights.names()}
