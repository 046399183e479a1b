"""TorchRec's tables, where it is installed: the same numbers as plain ones, in any number of shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.longer.logs import TINY, shared_folder
from tests.server import ROOT, environment
from toolbox.longer.files import load_model, table_files
from toolbox.longer.tables import DenseTables, RowwiseAdagrad
from toolbox.shell.errors import BadData

pytest.importorskip("torchrec", reason="torchrec is not installed: make setup-torchrec", exc_type=ImportError)
pytestmark = pytest.mark.slow

SIZES = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
ROWS, WIDTHS = {"item": 50, "user": 20, "item_bias": 50}, {"item": 8, "user": 8, "item_bias": 1}


def with_packages() -> dict[str, str]:
    """The test environment, and wherever this process finds torchrec."""
    own = environment()
    return {**own, "PYTHONPATH": os.pathsep.join([own["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_twenty_steps_equal_plain_tables_and_the_rate_reaches_the_kernel():
    from toolbox.longer.sharded import ShardedTables

    ours = ShardedTables(ROWS, WIDTHS, kernel="fused", lr=0.05, eps=1e-8, seed=0, device=torch.device("cpu"))
    plain = DenseTables(ROWS, WIDTHS)
    tables = {"table_0": plain.table_0.weight, "table_1": plain.table_1.weight}
    with torch.no_grad():
        for key, weight in tables.items():
            weight.copy_(ours.shards()[key][0])
    optimizer = RowwiseAdagrad(plain.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        rate = 0.05 * (step + 1) / 20
        ids = {
            "a": ("item", torch.randint(0, 50, (4, 6), generator=generator)),
            "b": ("item", torch.randint(0, 50, (5,), generator=generator)),
            "u": ("user", torch.randint(0, 20, (4,), generator=generator)),
        }
        ours.push_rate(rate)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for look_up in (ours.look_up, plain.look_up):
            sum((one * torch.arange(1, 9)).sin().sum() for one in look_up(ids).values()).backward()
        optimizer.step()
    for key, weight in tables.items():
        torch.testing.assert_close(ours.shards()[key][0], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.sums()[key].flatten(), optimizer.state[weight]["sum"], rtol=1e-5, atol=1e-4)


def test_two_processes_give_what_one_gives_and_their_files_are_read_together(tmp_path):
    def go(out: Path, *more):
        done = subprocess.run(
            [sys.executable, ROOT / "bin/longer-train", shared_folder() / "data", *SIZES, "--out", out, "--embedding",
             "torchrec", "--epochs", "50", "--batch-requests", "6", *more],
            env=with_packages(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    one, two = go(tmp_path / "1", "--max-steps", "50"), go(tmp_path / "2", "--max-steps", "50", "-j", "2")
    losses = [[row["loss"] for row in rows if row["event"] == "step"] for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert [len(table_files(tmp_path / name)) for name in "12"] == [1, 2]
    a, b = (dict(load_model(tmp_path / name).named_parameters()) for name in "12")
    assert max(float((a[name] - b[name]).detach().abs().max()) for name in a if name.startswith("tables.")) <= 1e-5
    (tmp_path / "2" / "tables-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadData, match="1 of 2 table files"):
        load_model(tmp_path / "2")
