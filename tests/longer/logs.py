"""Small logs, datasets and models made in the test."""

from __future__ import annotations

import functools
import os
import random
import tempfile
from pathlib import Path

from toolbox.shell.command import Invocation
from toolbox.shell.progress import Reporter
from toolbox.shell.streams import Streams


def events(users: int = 8, each: int = 12, items: int = 9, seed: int = 0) -> list[dict]:
    """Labelled events in the order of their times; items differ in how often they are liked."""
    draw = random.Random(seed)
    rows = []
    for step in range(each):
        for user in range(users):
            item = draw.randrange(items)
            rows.append({
                "user": f"u{user}", "item": f"i{item}", "ts": 100 * step + user, "cat": f"c{item % 3}",
                "label": int(draw.random() < 0.2 + 0.6 * (item % 2)), "hour": step % 4,
            })  # fmt: skip
    return rows


def invocation(command: str = "test", dry_run: bool = False) -> Invocation:
    """A call whose stdout nobody reads."""
    null = os.open(os.devnull, os.O_RDWR)
    return Invocation(command, Streams(null, null), Reporter(command, quiet=True), {}, dry_run)


def prepared(directory: Path, log: Path, **options) -> Path:
    """A dataset of ``log``, made in this process."""
    from toolbox.longer.prep import Options, run

    settings = {"side": ("cat",), "context": ("hour",), "split": "temporal:.6,.2,.2", "min_count": 1, **options}
    run(Options(file=str(log), out=str(directory), **settings), invocation("longer-prep"))
    return directory


TINY = {"max_len": 16, "dim": 8, "merge": 4, "queries": "2"}
"""Sizes of a model that costs nothing, as longer-train's options."""


def tiny_model(directory: Path, data: Path, seed: int = 0, **options) -> Path:
    """A random model for a dataset, as longer-train would write it."""
    import torch

    from toolbox.longer.dataset import read_manifest
    from toolbox.longer.files import save_model
    from toolbox.longer.options import Options, choose
    from toolbox.longer.parts import make_config
    from toolbox.longer.ranker import Ranker

    chosen = Options(data=str(data), out=str(directory), **{**TINY, **options})
    manifest = read_manifest(data)
    config = make_config(chosen, manifest, choose(chosen, manifest)[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Ranker(config)
        with torch.no_grad():  # far from uniform scores, so that a difference would show
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    directory.mkdir()
    save_model(directory, config, {name: p.detach() for name, p in model.named_parameters()}, {"format": "pt"}, data)
    (directory / "run.json").write_text("{}")
    return directory


@functools.cache
def shared_folder() -> Path:
    """A folder with ``log.jsonl``, ``data`` and ``run``, made once a process."""
    import atexit
    import json
    import shutil

    folder = Path(tempfile.mkdtemp(prefix="longer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events()))
    prepared(folder / "data", folder / "log.jsonl")
    tiny_model(folder / "run", folder / "data")
    return folder
