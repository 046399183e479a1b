"""The few things processes say to one another, and the check that there are as many as were asked for."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from toolbox.shell.errors import Unavailable, UsageProblem
from toolbox.shell.launch import WORKER

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(
    precision: str = "fp32", trackers: Sequence[str] = (), project_dir: str | None = None
) -> Accelerator:
    """Join the process group (or none) and return the accelerator.

    Stops when the launcher delivered something else than was asked for: accelerate runs plain DDP where FSDP is asked
    for on a CPU, and one process for ``--cpu --num_processes 2``, both without a word.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UsageProblem(
            "DeepSpeed is not supported: its engine owns the gradients and the steps",
            "use recipes/accelerate/fsdp2.yaml to shard a model",
        )
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(trackers) or None,
            project_dir=project_dir,
        )
    except (ValueError, ImportError) as error:
        raise UsageProblem(f"accelerate cannot start: {error}", "check --tracker and the launcher") from None
    if len(accelerator.log_with) < len(set(trackers)):
        here = ", ".join(getattr(one, "value", str(one)) for one in accelerator.log_with) or "none"
        raise UsageProblem(f"--tracker {', '.join(trackers)}: its package is missing (here: {here})", "pip install it")
    if accelerator.num_processes > 1:
        # Threads of a process group that outlive Python end its process with an abort.
        atexit.register(_leave)
    wanted = os.environ.get(WORKER) or os.environ.get("WORLD_SIZE")
    if wanted and int(wanted) != accelerator.num_processes:
        here = accelerator.num_processes
        raise Unavailable(f"{wanted} processes were asked for, {here} are here", "check the launcher")
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if wants_fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise Unavailable("FSDP was asked for but is not active (it needs GPUs)", "use ddp.yaml or cpu2.yaml")
    return accelerator


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_bytes(accelerator: Accelerator, payload: bytes | None) -> bytes:
    """Rank 0's ``payload`` on every rank (no pickle)."""
    if accelerator.num_processes == 1:
        assert payload is not None
        return payload
    size = torch.tensor([len(payload or b"")], dtype=torch.int64, device=accelerator.device)
    torch.distributed.broadcast(size, 0)
    if accelerator.is_main_process:
        data = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: int(size)].to(accelerator.device)
    else:
        data = torch.empty(int(size), dtype=torch.uint8, device=accelerator.device)
    torch.distributed.broadcast(data, 0)
    return data.cpu().numpy().tobytes()


def gather_bytes(accelerator: Accelerator, payload: bytes) -> list[bytes]:
    """Every rank's ``payload``, in rank order, on every rank."""
    if accelerator.num_processes == 1:
        return [payload]
    device = accelerator.device
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(sizes, size)
    longest = max(1, *(int(item) for item in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(parts, sizes, strict=True)]


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return list(values)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = torch.tensor(list(values), dtype=dtype, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return total.tolist()
