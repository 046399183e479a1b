"""A worker of test_engines: trains the tiny model by every objective under one engine and writes what came out.

Run alone, or as two processes: ``engines.py ENGINE OUT`` with ENGINE ``alone``, ``ddp`` or ``fsdp2``. accelerate does
not switch FSDP on for CPUs, so the model is sharded here, by what accelerate would call on GPUs.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.parity.test_objectives import ROWS, needed
from tests.tiny import tiny_model
from toolbox.models.token_loss import TokenLoss
from toolbox.training.loop import Loop, LoopSettings
from toolbox.training.processes import start_processes
from toolbox.training.windows import Plan, Stream
from toolbox.unlearning.losses import make_forget_loss
from toolbox.unlearning.objectives import Retention
from toolbox.unlearning.rectified import GruObjective, Rectifier
from toolbox.unlearning.registry import OBJECTIVES, resolve

STEPS = 4
ADAPTED = ("ga", "npo", "satimp", "klmin", "undial")
CASES = {
    **{name: {"name": name} for name in OBJECTIVES},
    **{f"{name} lora": {"name": name, "lora": True} for name in ADAPTED},
    "npo kl": {"name": "npo", "add_kl": 0.5, "add_retain": 0.5},
    "ga adamw": {"name": "ga", "geometry": "optimizer", "adamw": True},
    "ga layer": {"name": "ga", "scope": "layer"},
    "npo resumed": {"name": "npo", "resumed": True},
}


def build(engine: str, accelerator, folder: Path | None, *, name: str, lora=False, adamw=False, resumed=False, **more):
    """A loop of ``STEPS`` steps over windows of unequal rows."""
    model = tiny_model(1).double()
    reference = None
    if lora:
        from toolbox.models.adapters import add_lora

        model = add_lora(model, r=2, seed=5)
        generator = torch.Generator().manual_seed(6)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # 0 at the start, where half of the gradients vanish
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            elif "lora_A" in key:
                parameter.data = parameter.data.double()
    elif OBJECTIVES[name].reference or OBJECTIVES[name].retain_loss or more.get("add_kl"):
        reference = copy.deepcopy(model).requires_grad_(False)
    head = TokenLoss(model, 3, reference)
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for module in list(head.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(head, mesh=mesh)
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if adamw else torch.optim.SGD(trained, lr=0.1)
    if engine == "ddp":
        head, optimizer = accelerator.prepare(head, optimizer)
    constants = resolve(name, {"layer": 1} if name == "rmu" else {})
    own = Retention(OBJECTIVES[name].retain_loss or "nll", constants.alpha, layer=1) if constants.alpha > 0 else None
    objective = GruObjective(
        needed(name), 0, make_forget_loss(name, constants, 3), Rectifier(**more), retain=Retention(), own=own,
        gamma=constants.gamma, seed=3,
    )  # fmt: skip
    count = len(ROWS["forget"])
    plan = Plan(Stream("forget", count, 3), [Stream("retain", count, 0)], STEPS / 2, seed=0)
    settings = LoopSettings(lr=1e-3 if adamw else 0.1 / (1 + 99 * (name == "rmu")), micro_batch=2, save_every=0)
    return Loop(accelerator, head, objective, [optimizer], plan, settings, state_dir=folder)


def trained_tensors(loop: Loop) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in loop.ground.parameters.items():
        value = parameter.detach()
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().contiguous()
    return found


def run(engine: str, accelerator, out: Path, case: dict) -> dict[str, torch.Tensor]:
    loop = build(engine, accelerator, None, **case)
    if not case.get("resumed"):
        events = list(loop.run())
        assert len(events) == STEPS
        return {**trained_tensors(loop), "cos": torch.tensor([event["cos"] for event in events])}
    folder = out / f"states-{engine}"
    folder.mkdir(exist_ok=True)
    first = build(engine, accelerator, folder, **case)
    events = first.run()
    for _ in range(2):
        next(events)
    first.save()
    events.close()
    second = build(engine, accelerator, folder, **case)
    second.resume(folder / "step-000002")
    assert [event["step"] for event in second.run()] == [3, 4]
    return trained_tensors(second)


def main(engine: str, out: Path) -> None:
    accelerator = start_processes()
    assert accelerator.num_processes == (1 if engine == "alone" else 2)
    for name, case in CASES.items():
        torch.manual_seed(0)
        found = run(engine, accelerator, out, case)
        if accelerator.is_main_process:
            save_file(found, out / f"{engine} {name}.safetensors")
    accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads at times abort a process that ends by itself


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
