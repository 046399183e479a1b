"""Landscapes: the scorer against lm-evaluation-harness, and what comes after scoring.

The harness (0.4.13, PyPI) lives in an environment of its own that sees our packages, so that both run the same model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.bench_chains import demo_chain, demo_rows
from bench.bench_lot import measured
from bench.bench_models import need_smollm2, smollm2
from bench.common import Figure, alternate, in_child
from bench.guest import guest

HARNESS = "0.4.13"


# -- the harness ------------------------------------------------------------------------------------------------------
def harness_pairs(count: int) -> dict[str, Any]:
    """Log-probabilities of five answers at the third thought of ``count`` paths by the harness and by the tree, and CPU
    seconds of each. Runs in the harness's environment."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from toolbox.models.chains import Chain, score_chains

    model, chat = smollm2()
    harness = HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=1, device="cpu")
    requests, chains = [], []
    for number, row in enumerate(demo_rows()[:: 50 // count][:count]):
        chain = demo_chain(chat.tokenizer, row, 3)
        asked, cut = chain.continuations[-1], chain.cuts[-1]
        chains.append(Chain(chain.ids, (cut,), (asked,)))
        options = [f"{label}) {text}" for label, text in zip(row["labels"], row["choices"], strict=True)]
        context = "\n".join([row["question"], *options, *row["thoughts"][:3]])
        requests += [
            Instance("loglikelihood", {}, (context, f"\nAnswer is: {option}"), place, (f"pair{number}", None, 1))
            for place, option in enumerate(options)
        ]
    found: dict[str, list[float]] = {}

    def theirs() -> None:
        found["harness"] = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    def ours() -> None:
        found["tree"] = [value for scores in score_chains(model, chains) for value in scores.logprob[0].tolist()]

    seconds = alternate(1, {"harness": theirs, "tree": ours}, warm=False)
    return {**found, "seconds": {name: one[0] for name, one in seconds.items()}}


def harness(quick: bool) -> Iterator[Figure]:
    """Fifty pairs of real contexts and answers under the embedded model in fp32."""
    need_smollm2()
    demo_rows()
    python = guest("lm-eval", HARNESS, "requests>=2")
    found = in_child(harness_pairs, 2 if quick else 10, python=python)
    gaps = [abs(one - other) for one, other in zip(found["harness"], found["tree"], strict=True)]
    yield Figure("lm-eval: largest difference", max(gaps), "nats", target="<= 1e-3",
                 note=f"{len(gaps)} pairs, ln p of HFLM.loglikelihood against the tree's")  # fmt: skip
    seconds = found["seconds"]
    yield Figure("lm-eval: speed", seconds["harness"] / seconds["tree"], "×",
                 ratio_of="CPU of HFLM.loglikelihood, one pair a pass / of the tree",
                 note="answers asked once a path; the tree gains with every further state")  # fmt: skip


# -- behind scoring ---------------------------------------------------------------------------------------------------
def stored(folder: Path, questions: int = 5, paths: int = 10, thoughts: int = 13, k: int = 5) -> None:
    """``paths.jsonl`` and ``features.safetensors``: as many states as the demo's, with distances that drift."""
    import json

    import numpy as np

    from toolbox.landscape.features import PathScores, QuestionScores, Scoring, assemble, write_features

    scoring = Scoring("none", "", "", "fp32", "Answer is: {label}) {text}", "auto", "\n", "line", "tree", {}, {})
    draw, tokens = np.random.default_rng(0), np.full((thoughts, k), 8)
    asked, scored, rows = [], [], []
    for question in range(questions):
        asked.append(QuestionScores(f"q{question}", question % k, -draw.gamma(9, 1, k), tokens[0]))
        for number in range(paths):
            pred = question % k if number % 2 else (question + number) % k
            drift = np.cumsum(draw.normal(0, 0.5, (thoughts, k)), axis=0)
            drift[:, pred] += np.linspace(0, 6, thoughts)
            name, spent = f"q{question}/{number}", np.full(thoughts, 20)
            scored.append(PathScores(name, question, pred, {}, drift - 20, tokens, -2.0 * spent, spent))
            rows.append({
                "id": f"q{question}", "path_id": name, "choices": [f"thing {place}" for place in range(k)],
                "answer": "ABCDE"[question % k], "pred": "ABCDE"[pred], "question": "Which?",
                "thoughts": [f"Thought {place}." for place in range(thoughts)],
            })  # fmt: skip
    write_features(folder / "features.safetensors", assemble(asked, scored, scoring))
    (folder / "paths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def behind(quick: bool) -> Iterator[Figure]:
    """``landscape-plot --features`` (map, lines, figures) and ``landscape-verify``, as true processes."""
    os.environ["TOOLBOX_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored(folder, paths=4 if quick else 10)
        rows, features = folder / "paths.jsonl", str(folder / "features.safetensors")
        words = ["bin/landscape-plot", "--features", features, "--out", str(folder / "out"), "--overwrite"]
        states = f"{5 * (4 if quick else 10) * 13} states"
        for project in ("tsne", "pca"):
            runs = [measured([*words, "--project", project], rows) for _ in range(1 if quick else 3)]
            yield Figure.of(f"landscape: drawn by {project}", [seconds for seconds, _ in runs], "CPU-s",
                            target="<= 30", note=f"{states}, from stored features to two figures")  # fmt: skip
        more = ["--shuffles", "1"] if quick else []
        runs = [measured(["bin/landscape-verify", "--features", features, *more], rows)]
        yield Figure.of("landscape: verified", [seconds for seconds, _ in runs], "CPU-s", target="<= 60",
                        note="50 paths, five folds, 20 shuffles, forests")  # fmt: skip


BENCHES = {"lm-eval": harness, "landscape": behind}
