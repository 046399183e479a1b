"""Tables sharded by TorchRec: row-wise over the processes, trained by FBGEMM's fused row-wise Adagrad inside backward.

Only the tables are under DistributedModelParallel; the dense net stays with accelerate. No sharding is our own. Needs
the packages torchrec and fbgemm-gpu (or fbgemm-gpu-cpu), which are imported here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.longer.tables import DenseTables
from toolbox.shell.errors import BadData

_SPREAD = 0.05
_BLOCK = 1 << 14
"""Rows initialised together: the same numbers however many processes share a table."""


class ShardedTables(nn.Module):
    """``DenseTables`` with the same ``look_up``; every process holds some rows of every table.

    Tables of width 1 (the item bias) stay plain and replicated: FBGEMM wants widths that are multiples of 4. All
    look-ups of a step must come in one call, so that gradients of equal ids are summed before they are applied.
    ``lr`` reaches the kernel by ``push_rate``, before the step's backward.
    """

    def __init__(
        self, rows: Mapping[str, int], widths: Mapping[str, int], *, kernel: str, lr: float, eps: float, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        narrow = {name: count for name, count in rows.items() if widths[name] == 1}
        self.plain = DenseTables(narrow, widths)
        self.wide = {name: f"table_{place}" for place, name in enumerate(rows) if name not in narrow}
        self.rows = {key: rows[name] for name, key in self.wide.items()}
        _start_group()
        # Held outside the module tree: neither DDP nor the loop must see parameters that the kernel owns.
        sizes = {key: widths[name] for name, key in self.wide.items()}
        self.__dict__["_sharded"] = _distribute(self.rows, sizes, kernel, lr, eps, device)
        self._initialise(seed)

    def look_up(self, ids: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """``{use: (table, ids)}`` to ``{use: vectors}``; row 0 (padding) is zero and is not trained."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        found = self.plain.look_up({use: pair for use, pair in ids.items() if pair[0] not in self.wide})
        uses: dict[str, list[str]] = {key: [] for key in self.rows}
        for use, (table, _) in ids.items():
            if table in self.wide:
                uses[self.wide[table]].append(use)
        flat = {key: [ids[use][1].flatten() for use in some] for key, some in uses.items()}
        device = next(index.device for _, index in ids.values())
        none = torch.zeros(0, dtype=torch.int64, device=device)
        values = [torch.cat(parts) if parts else none for parts in flat.values()]
        lengths = torch.tensor([len(one) for one in values], dtype=torch.int32, device=device)
        keyed = KeyedJaggedTensor(keys=list(self.rows), values=torch.cat(values), lengths=lengths)
        out = self._sharded(keyed)
        for key, some in uses.items():
            if not some:
                continue
            vectors, at = out[key].values(), 0
            for use in some:
                index = ids[use][1]
                part = vectors[at : at + index.numel()].view(*index.shape, -1)
                found[use] = part * (index != 0)[..., None].to(part.dtype)
                at += index.numel()
        return found

    # -- training -----------------------------------------------------------------------------------------------------
    @property
    def optimizer(self) -> Any:
        """The fused optimiser: its ``param_groups`` hold the rate, its ``step`` hands it to the kernel."""
        return self._sharded.fused_optimizer

    def push_rate(self, lr: float) -> None:
        """Let the next backward use ``lr``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    # -- shards -------------------------------------------------------------------------------------------------------
    def shards(self) -> dict[str, tuple[Tensor, int]]:
        """This process's rows of each table and the number of the first one."""
        found = {}
        for name, value in self._sharded.state_dict().items():
            key = name.removesuffix(".weight").rpartition(".")[2]
            for shard in value.local_shards():
                found[key] = (shard.tensor, int(shard.metadata.shard_offsets[0]))
        return found

    def sums(self) -> dict[str, Tensor]:
        """This process's optimiser state of each table, one number a row."""
        found = {}
        for name, states in self.optimizer.state_dict()["state"].items():
            key = name.removesuffix(".weight").rpartition(".")[2]
            for value in states.values():
                if hasattr(value, "local_shards"):
                    for shard in value.local_shards():
                        found[key] = shard.tensor
        return found

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of this process."""
        tables = {f"shard {key}": tensor.detach() for key, (tensor, _) in self.shards().items()}
        return tables | {f"sums {key}": tensor.detach() for key, tensor in self.sums().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave to this process."""
        with torch.no_grad():
            for kind, here in (("shard", {k: t for k, (t, _) in self.shards().items()}), ("sums", self.sums())):
                for key, tensor in here.items():
                    saved = state.get(f"{kind} {key}")
                    if saved is None or saved.shape != tensor.shape:
                        raise BadData("the saved tables are those of another number of processes", "--overwrite")
                    tensor.copy_(saved)

    def _initialise(self, seed: int) -> None:
        with torch.no_grad():
            for place, key in enumerate(self.rows):
                if key not in self.shards():
                    continue
                tensor, first = self.shards()[key]
                row, end = first, first + len(tensor)
                while row < end:
                    block, within = divmod(row, _BLOCK)
                    generator = torch.Generator().manual_seed((seed * 1009 + place) * 1_000_003 + block)
                    values = _SPREAD * torch.randn(_BLOCK, tensor.shape[1], generator=generator)
                    until = min(end, (block + 1) * _BLOCK)
                    tensor[row - first : until - first].copy_(values[within : within + until - row])
                    row = until
                if first == 0:
                    tensor[0].zero_()


def _start_group() -> None:
    """TorchRec wants a process group even of one."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def _distribute(
    rows: Mapping[str, int], widths: Mapping[str, int], kernel: str, lr: float, eps: float, device: torch.device
) -> Any:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

    tables = [
        EmbeddingConfig(name=key, embedding_dim=widths[key], num_embeddings=count, feature_names=[key])
        for key, count in rows.items()
    ]
    collection = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    sharder = EmbeddingCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": lr, "eps": eps}
    )
    constraints = {key: ParameterConstraints(sharding_types=["row_wise"], compute_kernels=[kernel]) for key in rows}
    world = torch.distributed.get_world_size()
    topology: dict[str, Any] = {"world_size": world, "compute_device": device.type}
    if kernel == "key_value":
        topology["ssd_cap"] = 1 << 40
    planner = EmbeddingShardingPlanner(topology=Topology(**topology), constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], torch.distributed.group.WORLD)
    return DistributedModelParallel(
        module=collection, device=device, plan=plan, sharders=[sharder], init_data_parallel=False
    )


def save_shards(directory: Path, tables: ShardedTables, rank: int, world: int, metadata: Mapping[str, str]) -> None:
    """Write this process's rows as ``tables-<r>-of-<w>.safetensors``, the first row of each in the header."""
    import json

    from toolbox.shell.files import atomic_file
    from toolbox.weights.write import write_file

    parts = tables.shards()
    offsets = {"offsets": json.dumps({key: first for key, (_, first) in sorted(parts.items())})}
    tensors = {f"tables.{key}.weight": tensor.detach().cpu() for key, (tensor, _) in parts.items()}
    with atomic_file(directory / f"tables-{rank:05d}-of-{world:05d}.safetensors") as handle:
        write_file(handle, tensors, {**metadata, **offsets})
