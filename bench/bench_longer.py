"""LONGER: operations by formula, training against a plain transformer, the cache, memory of long logs, scaling."""

from __future__ import annotations

import functools
import importlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.common import Figure, alternate, in_child, memory_mib, ratios

LENGTH, DIM, QUERIES = 2048, 32, 100


def flops(quick: bool) -> Iterator[Figure]:
    """The paper's example, and how far its table of FLOPs is from the counting here."""
    from toolbox.longer import costs

    plain, merged = costs.plain_layer_flops(LENGTH, DIM), costs.merged_layer_flops(LENGTH, DIM, 4)
    yield Figure("longer-flops: a plain layer", plain / 1e6, "MFLOPs", note="L 2048, d 32; the paper: 587")
    yield Figure("longer-flops: merged by 4", merged / 1e6, "MFLOPs", note="the paper: 336")
    yield Figure("longer-flops: change", 100 * (merged / plain - 1), "%", target="< -42.8", ratio_of="merged / plain")
    first = costs.PAPER_TABLE["no merge, all 2000 queries"]
    base = costs.paper_gflops(*first[:3])
    off = [
        100 * abs(costs.paper_gflops(*row[:3]) / base / (row[3] / first[3]) - 1) for row in costs.PAPER_TABLE.values()
    ]
    yield Figure("longer-flops: table 2, farthest", max(off), "%", target="< 6", note="two factors are fitted")
    yield Figure("longer-flops: table 2, second", sorted(off)[-2], "%", target="< 1.5")


def history(batch: int, length: int, dim: int) -> Any:
    """Random event vectors: speed does not depend on what they are."""
    import torch

    from toolbox.longer.method import History

    return History(torch.randn(batch, length, dim), None, torch.ones(batch, length, dtype=torch.int64))


def pass_of(net: Any, past: Any, candidates: int, *, joint: bool = False) -> Callable[[], None]:
    """Forward and backward of one batch with so many candidates; ``joint``: one by the plain path."""
    import torch

    given = torch.randn(past.events.shape[0], candidates, 2 * past.events.shape[-1])

    def go() -> None:
        net.zero_grad(set_to_none=True)
        out = net.forward_joint(past, given[:, 0]) if joint else net.score(net.prefill(past), given)
        out.square().mean().backward()

    return go


def train(quick: bool) -> Iterator[Figure]:
    """Forward and backward: against the transformer, many candidates a pass, and recomputation."""
    import torch

    from toolbox.longer.method import Longer
    from toolbox.longer.peers.transformer import Transformer

    torch.manual_seed(0)
    repeats, length = (1, 256) if quick else (5, LENGTH)
    past = history(1, length, DIM)
    nets = {f"K={merge}": Longer(DIM, merge=merge, queries=QUERIES) for merge in (4, 8)}
    passes = {name: pass_of(net, past, 1) for name, net in nets.items()}
    passes["transformer"] = pass_of(Transformer(DIM, length), past, 1)
    passes["every row"] = pass_of(Transformer(DIM, length), past, 1, joint=True)
    seconds = alternate(repeats, passes)
    for name, target in (("K=4", "<= .25"), ("K=8", "<= .35")):
        yield Figure.of(
            f"longer-train: {name}", ratios(seconds[name], seconds["transformer"]), "×", target=target,
            ratio_of="CPU of LONGER / of the plain two-layer transformer, both without rows that nobody reads",
            note=f"L {length}, d {DIM}, k {QUERIES}, one candidate, no padding",
        )  # fmt: skip
    for name in ("K=4", "K=8"):
        yield Figure.of(
            f"longer-train: {name} against every row", ratios(seconds[name], seconds["every row"]), "×",
            ratio_of="CPU of LONGER / of that transformer with all rows computed under a dense mask",
        )  # fmt: skip
    together, apart = pass_of(nets["K=8"], past, 32), passes["K=8"]
    seconds = alternate(repeats, {"together": together, "apart": lambda: [apart() for _ in range(32)]})
    yield Figure.of(
        "longer-train: 32 candidates a pass", ratios(seconds["apart"], seconds["together"]), "×", target=">= 8",
        ratio_of="CPU of 32 passes of one candidate / of one pass of 32", note="K 8",
    )  # fmt: skip
    kept = [saved_bytes(how, 256 if quick else 4096) for how in ("none", "blocks")]
    yield Figure(
        "longer-train: kept for backward", kept[1][0] / kept[0][0], "×", target="<= .7",
        ratio_of="bytes saved for backward with --recompute blocks / without", note="L 4096, K 4",
    )  # fmt: skip
    yield Figure("longer-train: loss apart by recomputing", abs(kept[1][1] - kept[0][1]), "", target="<= 0")


def saved_bytes(recompute: str, length: int) -> tuple[int, float]:
    """Bytes that autograd keeps between forward and backward (each storage once, parameters left out), and the loss."""
    import torch

    from toolbox.longer.method import Longer

    torch.manual_seed(0)
    net = Longer(DIM, merge=4, queries=QUERIES, recompute=recompute).train()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net.score(net.prefill(history(1, length, DIM)), torch.ones(1, 8, 2 * DIM)).square().mean()
    return sum(held.values()), float(loss)


def serve(quick: bool) -> Iterator[Figure]:
    """Prefill and score against one whole pass a candidate; from how many candidates on the cache is worth it."""
    import torch

    from toolbox.longer.method import Longer

    torch.manual_seed(0)
    length = 256 if quick else LENGTH
    net, past = Longer(DIM, merge=8, queries=QUERIES).eval(), history(1, length, DIM)
    given = torch.randn(1, 256, 2 * DIM)

    def cached(count: int) -> None:
        with torch.inference_mode():
            net.score(net.prefill(past), given[:, :count])

    def joint(count: int) -> None:
        with torch.inference_mode():
            for place in range(count):
                net.forward_joint(past, given[:, place])

    even = None
    for count, target in ((1, ">= .77"), (2, None), (4, None), (16, None), (64, None), (256, ">= 20")):
        repeats = 1 if quick else 9 if count < 64 else 3
        seconds = alternate(
            repeats, {"cached": functools.partial(cached, count), "joint": functools.partial(joint, count)}
        )
        gains = ratios(seconds["joint"], seconds["cached"])
        figure = Figure.of(
            f"longer-serve: {count} candidates", gains, "×", target=target,
            ratio_of="CPU of one plain pass a candidate / of prefill and score together",
            note=f"L {length}, K 8, d {DIM}, k {QUERIES}, N 1",
        )  # fmt: skip
        if even is None and figure.value is not None and figure.value > 1:
            even = count
        yield figure
    yield Figure(
        "longer-serve: break-even", even, "candidates", note="the first of these counts where the cache is faster"
    )


def synthetic_log(path: Path, count: int) -> None:
    """Zipf items of some hundred users with coin-toss labels: for speed and memory, never for an AUC."""
    draw = random.Random(0)
    with path.open("w") as out:
        for place in range(count):
            item = int(100_000 * draw.random() ** 3)
            row = {"user": place % 997, "item": item, "ts": place, "label": int(draw.random() < 0.3)}
            out.write(json.dumps(row) + "\n")


def run_command(name: str, words: list[str]) -> None:
    """A command in this process; RuntimeError where it does not leave with 0."""
    code: object = 0
    try:
        importlib.import_module(f"toolbox.commands.{name}").main(words)
    except SystemExit as leave:
        code = leave.code
    if code:
        raise RuntimeError(f"{name} left with {code}")


def prepare_peak(log: str, out: str) -> float:
    """Peak of resident memory (MiB) of longer-prep, as a process of its own."""
    run_command("longer_prep", [log, "--out", out, "--min-count", "1", "--quiet"])
    return memory_mib("VmHWM")


def train_peak(data: str, out: str) -> list[float]:
    """Peak (MiB) of a run of 30 steps, and of a second one behind it in the same process."""
    peaks = []
    for name in "ab":
        words = [data, "--out", out + name, "--max-len", "256", "--merge", "4", "--max-steps", "30", "--quiet"]
        run_command("longer_train", [*words, "--save-every", "0"])
        peaks.append(memory_mib("VmHWM"))
    return peaks


def memory(quick: bool) -> Iterator[Figure]:
    """Resident memory of prep and train on a long log."""
    count = 20_000 if quick else 5_000_000
    with tempfile.TemporaryDirectory() as folder:
        log, data = Path(folder, "log.jsonl"), Path(folder, "data")
        synthetic_log(log, count)
        peak = in_child(prepare_peak, str(log), str(data))
        note = f"{count:,} events"
        yield Figure("longer-memory: prep", peak, "MiB", target="< 1500", note=note)
        one, two = in_child(train_peak, str(data), str(Path(folder, "run")))
        yield Figure("longer-memory: train", one, "MiB", target="< 1500", note=f"{note}, 30 steps and both evaluations")
        yield Figure("longer-memory: a second run", two / one, "×", target="<= 1.05", ratio_of="its peak / the first's")


def scale(quick: bool) -> Iterator[Figure]:
    """CPU of a training pass against the length of the history, and the power law through it."""
    import torch

    from toolbox.longer.method import Longer
    from toolbox.longer.peers.transformer import Transformer
    from toolbox.longer.scaling import fit_power_law

    torch.manual_seed(0)
    lengths = (64, 128, 192, 256) if quick else (256, 512, 1024, 2048, 4096)
    repeats = 1 if quick else 3
    for name in ("longer", "transformer"):
        cost = []
        for length in lengths:
            net = Longer(DIM, merge=8, queries=QUERIES) if name == "longer" else Transformer(DIM, length)
            seconds = alternate(repeats, {"pass": pass_of(net, history(1, length, DIM), 1)})
            cost.append(sorted(seconds["pass"])[len(seconds["pass"]) // 2])
        law = fit_power_law(lengths, cost)
        interval = "" if law.b_interval is None else f", 95 % [{law.b_interval[0]:.2f}, {law.b_interval[1]:.2f}]"
        yield Figure(
            f"longer-scale: {name}", law.b, "exponent",
            note=f"CPU = a·L^b + c over L = {', '.join(map(str, lengths))}; R² {law.r2:.4f}{interval}",
        )  # fmt: skip


BENCHES = {
    "longer-flops": flops, "longer-train": train, "longer-serve": serve, "longer-memory": memory, "longer-scale": scale,
}  # fmt: skip
