"""What the contract suite needs to know of a command: good input, bad input, and a short run. One entry a command.

A new command joins the suite by its entry here; a test asserts that none is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lit.vlms import chats, shared_llava, shared_tower
from tests.longer.logs import TINY, events, shared_folder
from tests.lwi.pictures import picture_rows

PEOPLE = [
    {
        "id": f"p{i}",
        "question": f"What does Person {i} like?",
        "answer": f"Person {i} likes {'very ' * (i % 3)}thing {i}.",
    }
    for i in range(6)
]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Case:
    """One command: ``good`` rows for its stdin and the arguments of a short run on the tiny model.

    ``arguments(tiny, folder)`` may write further inputs below ``folder``; a trainer's output goes to ``folder/out``.
    ``sums_up``: its lines are about the rows as a whole, where a filter's are the rows. ``fed``: its rows come through
    stdin. ``fills``: it is no trainer and yet fills the directory ``folder/out``. ``artefact``: what it makes is not
    its lines, so a closed pipe does not stop it. ``model``: it loads one (and has ``--model``, ``-j`` and so on).
    ``replaces``: fields of a row that it writes anew. ``seeded``: its seed shows in the output of the
    ``stochastic`` run. ``takes_messages``: rows may be conversations. ``empty``: its exit status when no row comes in.
    Of a trainer ``artefacts`` are files of its output, the weights first; ``full_disk`` is a file size they exceed.
    """

    name: str
    good: list[dict]
    arguments: Callable[[Path, Path], list[str]]
    trainer: bool
    stochastic: tuple[str, ...] = ()
    sums_up: bool = False
    fills: bool = False
    model: bool = True
    seeded: bool = True
    takes_messages: bool = True
    artefact: bool = False
    empty: int = 0
    replaces: tuple[str, ...] = ()
    artefacts: tuple[str, ...] = ("model.safetensors", "config.json", "tokenizer.json")
    full_disk: int = 60_000
    fed: bool = True

    @property
    def again(self) -> list[str]:
        """What a second run into the same folder needs."""
        return ["--overwrite"] if self.trainer or self.fills else []


def _tune(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--out", str(folder / "out"), "--epochs", "2", "--batch-size", "3", "--lr", "1e-2"]


def _unlearn(tiny: Path, folder: Path) -> list[str]:
    retain = folder / "retain.jsonl"
    retain.write_bytes(lines([{"question": f"Who is {i}?", "answer": f"Nobody number {i}."} for i in range(4)]))
    return [
        "--model", str(tiny), "--forget", "-", "--retain", str(retain), "--out", str(folder / "out"),
        "--epochs", "2", "--batch-size", "3", "--lr", "1e-2",
    ]  # fmt: skip


def _generate(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--max-new-tokens", "5"]


def _intervene(tiny: Path, folder: Path) -> list[str]:
    return [
        "--model", str(tiny), "--out", str(folder / "out"), "--epochs", "2", "--batch-size", "3", "--lr", "1e-2",
        "--method", "loreft", "--rank", "32", "--layers", "0-1",
    ]  # fmt: skip


LABELLED = [
    {
        "id": f"s{i}",
        "prompt": f"{'Harm' if i % 2 else 'Help'} {'now ' * (i % 4)}{i}",
        "label": ["safe", "unsafe"][i % 2],
    }
    for i in range(40)
]


def _probe(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--split-seeds", "2"]


ITEMS = [
    {
        "id": f"i{i}",
        "question": f"Which thing is number {i}?",
        "choices": [f"thing {i}", f"thing {i + 1}", f"thing {i + 2}"],
        "answer": "ABC"[i % 3],
        "extra": {"big": 2**70, "x": [i, None]},
    }
    for i in range(7)
]
ANSWERED = [
    {
        **item,
        "id": f"{item['id']}/{k}",
        "variant": variant,
        "path_id": f"{item['id']}/{k}/{variant}/0",
        "group": f"g{i}",
        "completion": "Answer: " + ("B" if (i + k) % every else "C"),
        "finish_reason": "stop",
        "n_completion_tokens": 10 + i,
    }
    for i, item in enumerate(ITEMS)
    for k in range(4)
    for variant, every in (("cot", 3), ("lot2", 4))
]


QUESTIONS = [
    {
        **row,
        "paraphrased_question": f"Which thing pleases Person {i}?",
        "paraphrased_answer": f"Thing {i} pleases Person {i}.",
        "perturbed_answer": [f"Thing {i + k} pleases Person {i}." for k in (1, 2)],
    }
    for i, row in enumerate(PEOPLE)
]


def _evaluate(tiny: Path, folder: Path) -> list[str]:
    retain = folder / "retain.jsonl"
    retain.write_bytes(lines(QUESTIONS[:3]))
    return ["--model", str(tiny), "--forget", "-", "--retain", str(retain), "--max-new-tokens", "3"]


SOLVED = [
    {**item, "path_id": f"{item['id']}/{k}", "completion": f"Thought {i}.\nThought {k}.\nAnswer: {'ABC'[(i + k) % 3]}"}
    for i, item in enumerate(ITEMS)
    for k in range(3)
]


def _plot(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--out", str(folder / "out"), "--project", "pca", "--draw", "none"]


def _verify(tiny: Path, folder: Path) -> list[str]:
    """Features of ``SOLVED`` with random scores: a verifier needs no model, and neither does its case."""
    import numpy as np

    from toolbox.landscape.features import PathScores, QuestionScores, Scoring, assemble, write_features

    scoring = Scoring("tiny", "", "", "fp32", "Answer is: {label}) {text}", "auto", "\n", "line", "tree", {}, {})
    draw, tokens = np.random.default_rng(0), np.ones((3, 3), dtype=int)
    questions = [QuestionScores(item["id"], i % 3, -draw.gamma(3, 1, 3), tokens[0]) for i, item in enumerate(ITEMS)]
    paths = [
        PathScores(row["path_id"], n // 3, (n // 3 + n) % 3, {}, -draw.gamma(3, 1, (3, 3)), tokens, -np.ones(3),
                   tokens[0])
        for n, row in enumerate(SOLVED)
    ]  # fmt: skip
    write_features(folder / "features.safetensors", assemble(questions, paths, scoring))
    return ["--features", str(folder / "features.safetensors"), "--verifier", "logreg", "--shuffles", "1"]


SAFE_PAIRS = [
    {
        "id": f"s{i}",
        "prompt": f"Tell me about thing {i}.",
        "completion": "I'm sorry, but I can't help with that." if i % 2 else f"Thing {i} is a thing.",
        "label": "harmful" if i % 2 else "benign",
        "extra": {"big": 2**70, "x": [i, None]},
    }
    for i in range(6)
]
SHORT_TEMPLATE = """
id: short
system: "{skeleton}"
gloss: {think: why, concept: what, check: unsafe, erase: decide, response: answer}
ask: "{prompt} {answer}"
decision: {refuse: I refuse., comply: I comply.}
refusal: No.
"""


def _refactor(tiny: Path, folder: Path) -> list[str]:
    template = folder / "short.yaml"
    template.write_text(SHORT_TEMPLATE)
    return ["--model", str(tiny), "--template", str(template), "--verify", "off"]


ASIA = ("asia", "bronc", "dysp", "either", "lung", "smoke", "tub", "xray")
MEASURED = [
    {"values": {name: "yes" if (i >> k) & 1 or i == k else "no" for k, name in enumerate(ASIA)}, "targets": targets}
    for i, targets in enumerate([[]] * 14 + [["smoke"]] * 4 + [["tub"]] * 4)
]
SHORT = ["--obs-iters", "2", "--model-iters", "1", "--graph-iters", "2", "--hidden", "4"]


def _target(tiny: Path, folder: Path) -> list[str]:
    return ["--network", "asia", "--stateless", *SHORT, "--imagined-graphs", "2", "--imagined-rows", "4"]


def _fit(tiny: Path, folder: Path) -> list[str]:
    return ["--network", "asia", "--epochs", "1", "--model-iters", "2", "--graph-iters", "2", "--all-pairs"]


def _loop(tiny: Path, folder: Path) -> list[str]:
    return [
        "--network",
        "asia",
        "--observations",
        "-",
        "--strategies",
        "random",
        "--seeds",
        "2",
        "--rounds",
        "2",
        *SHORT,
    ]


def _fuse(tiny: Path, folder: Path) -> list[str]:
    for name in ("old", "new"):
        if not (folder / name).exists():
            shutil.copytree(tiny, folder / name)
    return ["-", "--root", str(folder), "--out", str(folder / "out"), "--overwrite", "--groups", "ff"]


PICTURED = [
    {
        "id": f"d{i}",
        "image": f"digits:{i}",
        "label": "head" if i < 12 else "tail",
        "extra": {"big": 2**70, "x": [i, None]},
    }
    for i in range(18)
]


def _dull_train(tiny: Path, folder: Path) -> list[str]:
    return ["--out", str(folder / "out"), "--image-size", "8", "--epochs", "2", "--batch-size", "9", "--holdout", "0"]


def _dull_eval(tiny: Path, folder: Path) -> list[str]:
    """An untrained network beside the tiny model: the case is about rows, not accuracy."""
    path = tiny.with_name("dull-model")
    if not path.exists():
        from toolbox.classify.backbones import backbone_config, new_backbone

        new_backbone(backbone_config("cifar-resnet8", ["head", "tail"], widths=[2, 3, 4]), 0).save_pretrained(path)
    return ["--model", str(path), "--image-size", "8"]


PICTURES = picture_rows(12)


def _learn(tiny: Path, folder: Path) -> list[str]:
    return ["--tasks", "2", "--task", "1", "--model", "cifar-resnet8", "--image-size", "8", "--epochs", "1",
            "--batch-size", "4", "--out", str(folder / "out")]  # fmt: skip


def _judge(tiny: Path, folder: Path) -> list[str]:
    from tests.lwi.states import write_states

    if not (folder / "m1").exists():
        write_states(folder, "m0", "m1")
    return ["-", str(folder / "m0"), str(folder / "m1"), "--bootstrap", "50"]


LOG = events()
REQUESTS = [
    {"id": f"r{i}", "user": f"u{i % 4}", "ts": 700 + i, "labels": [1, 0, 1][: 1 + i % 3], "hour": 2,
     "candidates": ["i1", {"item": "i2", "cat": "c0"}, "new"][: 1 + i % 3], "extra": {"big": 2**70, "x": [i, None]}}
    for i in range(7)
]  # fmt: skip
SCORED = [
    {"user": f"u{i % 5}", "labels": [1, 0, i % 2], "scores": [0.9 - i / 20, 0.2 + i / 20, 0.5], "hist_len": 30 * i}
    for i in range(10)
]


def _longer_train(tiny: Path, folder: Path) -> list[str]:
    sizes = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    data = str(shared_folder() / "data")
    return [data, "--out", str(folder / "out"), *sizes, "--dim", "16", "--batch-requests", "16", "--eval-every", "2"]


def _longer_score(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(shared_folder() / "run"), "--data", str(shared_folder() / "data")]


CHATS = chats(6)
CAPTIONED = [
    {"id": f"k{i}", "image": f"{i}.jpg", "captions": [f"{('A dog', 'Two cats', 'A man')[i % 3]} near a bus."]}
    for i in range(9)
]


def _lit_tune(tiny: Path, folder: Path) -> list[str]:
    return [
        "--model", str(shared_llava()), "--out", str(folder / "out"), "--epochs", "2", "--batch-size", "3",
        "--lr", "1e-2",
    ]  # fmt: skip


def _lit_build(tiny: Path, folder: Path) -> list[str]:
    return [
        "--vision", str(shared_tower()), "--lm", "scratch", "--vocab-from", "-", "--lm-dim", "16", "--lm-heads", "2",
        "--out", str(folder / "out"), "--overwrite",
    ]  # fmt: skip


def _lit_eval(tiny: Path, folder: Path) -> list[str]:
    (folder / "refs.jsonl").write_bytes(lines(CAPTIONED))
    return ["--metric", "cider,chair", "--refs", str(folder / "refs.jsonl"), "--bootstrap", "50"]


def _lit_generate(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(shared_llava()), "--max-new-tokens", "5"]


def _lit_inspect(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(shared_llava())]


CASES = {
    case.name: case
    for case in (
        Case("coca-refactor", SAFE_PAIRS, _refactor, trainer=False, stochastic=("--temperature", "1"),
             replaces=("completion",)),
        Case("coca-eval", [{name: row[name] for name in ("id", "prompt", "label")} for row in SAFE_PAIRS],
             lambda tiny, folder: ["--model", str(tiny), "--max-new-tokens", "5", "--bootstrap", "50"], trainer=False,
             sums_up=True, seeded=False),
        Case("lm-tune", PEOPLE, _tune, trainer=True, empty=65),
        Case("satimp-unlearn", PEOPLE, _unlearn, trainer=True, empty=65),
        Case("gru-unlearn", PEOPLE, _unlearn, trainer=True, empty=65),
        Case("coca-train", PEOPLE, _intervene, trainer=True, empty=65, artefacts=("intervention.safetensors",),
             full_disk=10_000),
        Case("coca-probe", LABELLED, _probe, trainer=False, sums_up=True, empty=65),
        Case(
            "lm-generate",
            [{"id": f"q{i}", "prompt": "Say " + "more " * (5 * i % 7) + str(i), "extra": {"big": 2**70, "x": [i, None]}}
             for i in range(7)],
            _generate,
            trainer=False,
            stochastic=("--temperature", "1"),
        ),
        Case("unlearn-eval", QUESTIONS, _evaluate, trainer=False, sums_up=True, empty=65),
        Case("lot-data", ITEMS, lambda tiny, folder: ["mcq", "--name", ""], trainer=False, model=False, seeded=False,
             takes_messages=False),
        Case("lot-prompt", ITEMS, lambda tiny, folder: [], trainer=False, stochastic=("--shuffle-choices",),
             model=False, takes_messages=False),
        Case("lot-eval", ANSWERED, lambda tiny, folder: ["--baseline", "cot", "--bootstrap", "50"], trainer=False,
             sums_up=True, model=False, takes_messages=False),
        Case("landscape-plot", SOLVED, _plot, trainer=False, sums_up=True, fills=True, takes_messages=False, empty=65),
        Case("landscape-verify", SOLVED, _verify, trainer=False,
             stochastic=("--verifier", "rf", "--shuffles", "0", "--folds", "2"), model=False, takes_messages=False,
             empty=65),
        Case("legit-target", MEASURED, _target, trainer=False, sums_up=True, model=False, takes_messages=False,
             empty=65),
        Case("legit-fit", MEASURED, _fit, trainer=False, sums_up=True, model=False, takes_messages=False, empty=65),
        Case("legit-loop", MEASURED[:14], _loop, trainer=False, sums_up=True, model=False, takes_messages=False,
             empty=65),
        Case("legit-sim", [{"target": name, "n": 3} for name in ("smoke", "tub", "asia", "lung", "smoke")],
             lambda tiny, folder: ["--network", "asia", "--from", "-"], trainer=False, sums_up=True, model=False,
             takes_messages=False),
        Case("legit-score", [{"record": "graph", "nodes": list(ASIA)}, {"source": "smoke", "target": "lung"},
                             {"source": "lung", "target": "either"}, {"source": "either", "target": "xray"}],
             lambda tiny, folder: ["--truth", "asia"], trainer=False, sums_up=True, model=False, seeded=False,
             takes_messages=False, empty=65),
        Case("lwi-fuse", [{"model": "old"}, {"model": "new", "k": 0.25}], _fuse, trainer=False,
             stochastic=("--shuffle-seed", "1"), sums_up=True, model=False, takes_messages=False, artefact=True,
             empty=65),
        Case("dull-noise", PICTURED, lambda tiny, folder: ["--min-clean", "1"], trainer=False, model=False,
             takes_messages=False, empty=65, replaces=("label",)),
        Case("dull-eval", PICTURED, _dull_eval, trainer=False, sums_up=True, model=False, seeded=False,
             takes_messages=False, empty=65),
        Case("dull-train", PICTURED, _dull_train, trainer=True, model=False, takes_messages=False, empty=65,
             artefacts=("model.safetensors", "config.json", "preprocessor_config.json")),
        Case("lwi-eval", PICTURES, _judge, trainer=False, sums_up=True, model=False, takes_messages=False, empty=65),
        Case("lwi-train", PICTURES, _learn, trainer=True, model=False, takes_messages=False, empty=65,
             artefacts=("model.safetensors", "config.json", "preprocessor_config.json")),
        Case("longer-prep", LOG, lambda tiny, folder: ["--out", str(folder / "out"), "--side", "cat"], trainer=False,
             sums_up=True, model=False, seeded=False, takes_messages=False, empty=65, fills=True),
        Case("longer-train", [], _longer_train, trainer=True, model=False, takes_messages=False, fed=False,
             artefacts=("model.safetensors", "config.json")),
        Case("longer-score", REQUESTS, _longer_score, trainer=False, model=False, seeded=False, takes_messages=False),
        Case("lit-tune", CHATS, _lit_tune, trainer=True, empty=65),
        Case("lit-build", CHATS, _lit_build, trainer=False, sums_up=True, model=False, seeded=False, artefact=True,
             empty=65),
        Case("lit-eval", [{"id": f"k{i}", "text": f"A dog and {i} buses"} for i in range(9)], _lit_eval, trainer=False,
             sums_up=True, model=False, takes_messages=False, empty=65),
        Case("lit-generate", CHATS, _lit_generate, trainer=False, stochastic=("--temperature", "1")),
        Case("lit-pope", CAPTIONED, lambda tiny, folder: ["--per-image", "1"], trainer=False, sums_up=True, model=False,
             takes_messages=False),
        Case("lit-templates", CHATS, lambda tiny, folder: [], trainer=False, sums_up=True, model=False, seeded=False),
        Case("lit-inspect", CHATS, _lit_inspect, trainer=False, model=False, seeded=False),
        Case("longer-eval", SCORED, lambda tiny, folder: [], trainer=False, stochastic=("--bootstrap", "20"),
             sums_up=True, model=False, takes_messages=False, empty=65),
    )
}  # fmt: skip

METHODS = {"coca", "dull", "landscape", "legit", "lit", "longer", "lot", "lwi"}
"""Methods of several commands have a page of their own in docs/, beside those of the commands."""

ABOUT_ALL = {"performance", "pipelines", "reliability", "scale"}
"""Pages in docs/ that speak of all methods."""
