"""A model directory: configuration, weights, vocabularies. It loads with safetensors and this package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.longer.ranker import Config, Ranker, as_json
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.files import atomic_file
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_sharded

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"


def read_config(directory: Path) -> Config:
    """The configuration of a model; MissingInput (66) without one, BadData (65) where it is another model's."""
    path = directory / CONFIG
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInput(f"{directory}: is not a model (no {CONFIG})", "make one with longer-train") from None
    try:
        if msgspec.json.decode(raw, type=dict[str, Any]).get("model_type") != "longer":
            raise BadData("is not a model of longer-train", "give what longer-train wrote", file=str(path))
        return msgspec.json.decode(raw, type=Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"damaged configuration: {error}", "train anew", file=str(path)) from None


def save_model(
    directory: Path, config: Config, tensors: Mapping[str, Tensor], metadata: dict[str, str], data: Path
) -> None:
    """Write configuration, weights and the vocabularies of the data set ``data`` below ``directory``."""
    with atomic_file(directory / CONFIG) as handle:
        handle.write(msgspec.json.format(msgspec.json.encode(as_json(config)), indent=2) + b"\n")
    write_sharded(directory, dict(tensors), metadata)
    shutil.copytree(data / "vocab", directory / "vocab", dirs_exist_ok=True)
    shutil.copyfile(data / "items.safetensors", directory / "items.safetensors")
    shutil.copyfile(data / "manifest.json", directory / "data.json")


def load_model(directory: Path) -> Ranker:
    """The model of a directory, in eval mode, on the CPU, in fp32."""
    config = read_config(directory)
    model = Ranker(config)
    load_into(model, directory)
    return model.eval()


def load_into(model: Ranker, directory: Path, *, grow: bool = False) -> None:
    """Fill ``model`` with the weights of a directory.

    ``grow``: positions may be fewer there; they count from the newest event, so the new rows are those of the far end.
    BadData (65) for a missing tensor or another shape.
    """
    import torch

    own = dict(model.named_parameters())
    filled = _load_shards(own, directory)
    with open_weights(directory) as weights, torch.no_grad():
        for name, parameter in own.items():
            if name in filled:
                continue
            if name not in weights:
                raise BadData(f"has no tensor {name!r}", "is it the same architecture?", file=weights.where)
            found = weights.tensor(name)
            far = name == "events.position" or (name.startswith("net.") and name.endswith(".distance"))
            if grow and far and found.shape[1:] == parameter.shape[1:] and len(found) < len(parameter):
                parameter[: len(found)].copy_(found)
                continue
            if found.shape != parameter.shape:
                shapes = f"{tuple(found.shape)}, not {tuple(parameter.shape)}"
                raise BadData(f"tensor {name!r} has shape {shapes}", "give the same sizes", file=weights.where)
            parameter.copy_(found)


def table_files(directory: Path) -> list[Path]:
    """The files of sharded tables, all of them; empty where the tables are plain. BadData (65) where one is missing."""
    found = sorted(directory.glob("tables-*-of-*.safetensors"))
    if found:
        world = found[0].stem.rpartition("-")[2]
        whole = [directory / f"tables-{rank:05d}-of-{world}.safetensors" for rank in range(int(world))]
        if found != whole:
            raise BadData(f"{len(found)} of {int(world)} table files", "copy the whole directory", file=str(directory))
    return found


def _load_shards(own: Mapping[str, Any], directory: Path) -> set[str]:
    """Fill tables from the rows that each process of the run has written; the names of what was filled."""
    import torch

    filled: dict[str, int] = {}
    for path in table_files(directory):
        with open_weights(path) as weights, torch.no_grad():
            offsets = msgspec.json.decode(weights.metadata.get("offsets", "{}"), type=dict[str, int])
            for name in weights.names():
                rows, first = weights.tensor(name), offsets.get(name.split(".")[1], -1)
                table = own.get(name)
                if table is None or first < 0 or first + len(rows) > len(table) or rows.shape[1:] != table.shape[1:]:
                    raise BadData(f"tensor {name!r} fits no table", "is it the right model?", file=str(path))
                table[first : first + len(rows)].copy_(rows)
                filled[name] = filled.get(name, 0) + len(rows)
    for name, rows in filled.items():
        if rows != len(own[name]):
            raise BadData(
                f"{rows} of {len(own[name])} rows of {name!r}", "copy the whole directory", file=str(directory)
            )
    return set(filled)
