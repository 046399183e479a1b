"""CIDEr-D, CHAIR, POPE, VQA and the figures of a model, against other implementations and by hand."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import random
import shutil

import numpy as np
import pytest

from tests.contract.commands import lines
from tests.lit.vlms import chats
from toolbox.lit.chair import Synonyms, built_in, chair, chair_row, mentions, singular, truth
from toolbox.lit.cider import cider_d, simple_tokens
from toolbox.lit.pope import Corpus, pope, question_of
from toolbox.lit.ptb import ptb_tokens
from toolbox.lit.scores import Ratio, gap_interval, interval
from toolbox.lit.vqa import normalise, vqa_accuracy


def slow_cider(candidate: list[str], others: list[list[str]], corpus: list[list[list[str]]]) -> float:
    """CIDEr-D of one candidate, written from the formula with plain loops."""
    total = 0.0
    for n in range(1, 5):

        def grams(tokens, n=n):
            found: dict[tuple[str, ...], int] = {}
            for i in range(len(tokens) - n + 1):
                found[tuple(tokens[i : i + n])] = found.get(tuple(tokens[i : i + n]), 0) + 1
            return found

        def idf(gram, grams=grams):
            df = sum(any(gram in grams(one) for one in each) for each in corpus)
            return math.log(len(corpus)) - math.log(max(1, df))

        mine = {g: c * idf(g) for g, c in grams(candidate).items()}
        for other in others:
            theirs = {g: c * idf(g) for g, c in grams(other).items()}
            dot = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
            norms = math.sqrt(sum(w * w for w in mine.values())) * math.sqrt(sum(w * w for w in theirs.values()))
            gap = max(0, len(candidate) - 1) - max(0, len(other) - 1)
            total += (dot / norms if norms else dot) * math.exp(-gap * gap / 72)
    return 10 * total / 4 / len(others)


def test_cider_equals_the_formula_in_plain_loops():
    draw = random.Random(0)
    words = ["a", "dog", "cat", "runs", "on", "the", "red", "grass"]
    corpus = [[draw.choices(words, k=draw.randint(1, 8)) for _ in range(3)] for _ in range(6)]
    said = [draw.choices([*words, "new"], k=draw.randint(0, 8)) for _ in corpus]
    said[0] = []
    for found, one, each in zip(cider_d(said, corpus), said, corpus, strict=True):
        assert found == pytest.approx(slow_cider(one, each, corpus), abs=1e-12)


def test_cider_equals_pycocoevalcap_on_real_captions(photos):
    peer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="pip install --no-deps pycocoevalcap")
    text = gzip.decompress((photos / "flickr8k_captions_test.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in text.splitlines()]
    tokens = [[simple_tokens(caption) for caption in row["captions"]] for row in rows]
    scorer = peer.CiderScorer(n=4, sigma=6.0)
    for each in tokens:
        scorer += (" ".join(each[0]), [" ".join(one) for one in each[1:]])
    _, theirs = scorer.compute_score()
    ours = cider_d([each[0] for each in tokens], [each[1:] for each in tokens])
    assert len(ours) == 821
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-9


def test_stanford_s_tokens_are_those_of_the_coco_evaluation(photos):
    pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap==1.2")
    if shutil.which("java") is None:
        pytest.skip("there is no java")
    peer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    texts = ["A man's dog can't run - it's \u201cred\u201d!", "", "T-shirt (blue) for $3.50, cannot\nwait...", " "]
    assert ptb_tokens(texts)[:2] == [["a", "man", "'s", "dog", "ca", "n't", "run", "it", "'s", "red"], []]
    rows = gzip.decompress((photos / "flickr8k_captions_test.jsonl.gz").read_bytes()).splitlines()
    texts += [caption for row in rows for caption in json.loads(row)["captions"]]
    theirs = peer.tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    assert [" ".join(tokens) for tokens in ptb_tokens(texts)] == [theirs[number][0] for number in range(len(texts))]


def test_without_the_jar_stanford_s_tokens_are_66(tool, tmp_path):
    if importlib.util.find_spec("pycocoevalcap") is not None:
        pytest.skip("pycocoevalcap is installed")
    (tmp_path / "refs.jsonl").write_bytes(lines([{"id": "a", "image": "x", "captions": ["A dog."]}]))
    words = ["--metric", "cider", "--refs", tmp_path / "refs.jsonl", "--tokenizer", "ptb"]
    done = tool("lit-eval", *words, stdin=lines([{"id": "a", "text": "A dog"}]))
    assert (done.code, done.out) == (66, b"")
    assert "pip install --no-deps pycocoevalcap" in done.err


def test_mentions_follow_the_rules():
    words = built_in()
    for text, found in [
        ("Two dogs chase a man.", ["dog", "person"]),
        ("A baby elephant and an adult sheep", ["elephant", "sheep"]),
        ("A passenger jet over a passenger train", ["airplane", "train"]),
        ("A toilet seat and a bow tie", ["toilet", "tie"]),
        ("A hot dog on a dining table", ["hot dog", "dining table"]),
        ("Buses, children and knives", ["bus", "person", "knife"]),
        ("The traffic light was green", ["traffic light"]),
        ("", []),
    ]:
        assert mentions(text, words) == found, text
    assert len(words.names) == 80
    assert mentions("An orange shirt", built_in(("orange",))) == []
    assert [singular(word) for word in ("dogs", "boxes", "cities", "glass", "bus", "couches")] == [
        "dog", "box", "city", "glass", "bus", "couch",
    ]  # fmt: skip


def test_chair_by_hand():
    words = Synonyms.parse("dog, puppy\ncat\nperson, man\nbus\n", "x")
    true = truth(["dog"], ["A man with his puppy."], words)
    assert true == {"dog", "person"}
    rows = [chair_row(text, true, words) for text in ("A puppy and a cat.", "A man, a dog, a bus and a bus", "")]
    assert chair(rows) == {
        "chair_i": 3 / 6, "chair_s": 2 / 3, "recall": (1 + 2 + 0) / 6, "words": (5 + 9 + 0) / 3,
    }  # fmt: skip


def test_pope_by_hand():
    said = [
        ("Yes, there is.", "yes"), ("No.", "yes"), ("There is not.", "no"), ("I cannot tell", "no"), ("yes", "no"),
        ("Well. No", "yes"),
    ]  # fmt: skip
    found = pope(said)
    assert found == {
        "accuracy": 3 / 6, "precision": 2 / 4, "recall": 2 / 3, "f1": 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3),
        "yes_ratio": 4 / 6, "unparsable": 2,
    }  # fmt: skip
    assert pope(said, strict=True)["accuracy"] == 2 / 6


def test_absent_objects_are_those_of_the_strategy():
    corpus = Corpus()
    for objects in (["dog", "cat"], ["dog", "cat"], ["dog", "bus"], ["person"], ["person"], ["person", "bus"]):
        corpus.add(objects)
    draw = random.Random(0)
    assert corpus.absent(["dog"], "popular", 2, draw) == ["person", "bus"]
    assert corpus.absent(["dog"], "adversarial", 2, draw) == ["cat", "bus"]
    assert set(corpus.absent(["dog"], "random", 9, draw)) == {"cat", "bus", "person"}
    assert question_of("Is there {a} {object} in the image?", "orange") == "Is there an orange in the image?"
    assert question_of("Is there {a} {object} in the image?", "skis") == "Are there skis in the image?"


def test_vqa_by_hand():
    assert normalise("The two, Dogs!") == "2 dogs"
    assert normalise("3.5 o'clock") == "3.5 oclock"
    assert vqa_accuracy("Two dogs.", ["2 dogs"]) == 1.0
    people = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("red", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("green", people) == 0.0


def test_intervals_resample_images_and_pairs_share_the_draw():
    draw = np.random.default_rng(0)
    images = [f"i{n // 4}" for n in range(400)]
    level = np.repeat(draw.random(100), 4)
    one = Ratio(list(level + 1), [1.0] * 400, images)
    two = Ratio(list(level), [1.0] * 400, images)
    low, high = interval(one, draws=500, seed=0)
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 1.96 * level[::4].std() / 10, rel=0.25)
    assert interval(one, draws=500, seed=0, other=two) == pytest.approx([1.0, 1.0])
    assert interval(Ratio([1.0, 2.0], [1.0, 1.0], ["a", "a"]), draws=5, seed=0) == [None, None]


def test_the_interval_of_a_gap_draws_the_images_of_either_side_apart():
    draw = np.random.default_rng(1)
    sides = [draw.random(100) for _ in range(2)]
    one, two = (Ratio(list(np.repeat(side, 2)), [1.0] * 200, [f"i{n // 2}" for n in range(200)]) for side in sides)
    low, high = gap_interval((one, two), draws=2000, seed=0)
    assert low is not None
    assert high is not None
    spread = math.sqrt(sum(side.var() / 100 for side in sides))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert (low + high) / 2 == pytest.approx(sides[0].mean() - sides[1].mean(), abs=spread / 5)
    assert gap_interval((one, Ratio([1.0], [1.0], ["a"])), draws=5, seed=0) == [None, None]
    more = Ratio([value + 0.25 for value in one.over], one.under, one.images)
    assert gap_interval((more, two), draws=50, seed=0, theirs=(one, two)) == pytest.approx([0.25, 0.25])


def test_predictions_must_fit_their_references(tool, tmp_path):
    (tmp_path / "refs.jsonl").write_bytes(lines([{"id": "a", "image": "x", "captions": ["A dog."]},
                                                 {"id": "b", "image": "y", "captions": ["A cat."]}]))  # fmt: skip
    both = [{"id": "a", "text": "A dog"}, {"id": "b", "text": "A dog"}]
    words = ["lit-eval", "--metric", "cider", "--refs", tmp_path / "refs.jsonl"]
    for rows, says in (
        (both[:1], "no prediction for 'b'"), ([*both, both[0]], "is there twice"),
        ([*both, {"id": "c", "text": ""}], "no reference for"), ([{"text": "x"}], "without `id`"),
    ):  # fmt: skip
        done = tool(*words, stdin=lines(rows))
        assert (done.code, done.out) == (65, b""), done.err
        assert says in done.err
    for more in (["--metric", "cider,nll"], ["--metric", "nll"], ["--metric", "blue"]):
        assert tool("lit-eval", *more, stdin=lines(both)).code == 2
    done = tool(*words, "--metric", "chair", "--compare", tmp_path / "refs2.jsonl", stdin=lines(both))
    assert done.code == 66
    (tmp_path / "other.jsonl").write_bytes(lines([{"id": "a", "text": "A cat"}, {"id": "b", "text": "A cat"}]))
    done = tool(*words, "--metric", "chair", "--compare", tmp_path / "other.jsonl", stdin=lines(both))
    assert [(row["metric"], row["value"], row["compare"]["difference"]) for row in done.rows] == [
        ("chair_i", 0.5, 0.0), ("chair_s", 0.5, 0.0),
    ]  # fmt: skip


def test_a_model_s_figures_are_what_its_losses_say(tool, llava, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(chats(4)))
    words = ["lit-eval", tmp_path / "rows.jsonl", "--model", llava, "--rows-out", tmp_path / "each"]
    done = tool(*words, "--metric", "nll,vc,gap", "--train-rows", tmp_path / "rows.jsonl", "--batch-size", "2")
    assert done.code == 0, done.err
    nll, vc, gap = done.rows
    told = tool("lit-tune", tmp_path / "rows.jsonl", "--model", llava, "--out", tmp_path / "out", "--mode", "vit",
                "--max-steps", "1", "--batch-size", "4")  # fmt: skip
    step = next(row for row in told.rows if row["event"] == "step")
    assert vc["null"] == "noise"
    assert nll["value"] == pytest.approx(step["loss_response"], abs=1e-5)
    assert (gap["value"], gap["nll"], gap["n_train"]) == (0.0, pytest.approx(nll["value"]), 4)
    assert gap["ci"][0] < 0 < gap["ci"][1]
    each = [json.loads(line) for line in (tmp_path / "each").read_text().splitlines()]
    train = [row for row in each if row["set"] == "train"]
    each = [row for row in each if row["set"] == "test"]
    assert [(row["id"], row["log_p"]) for row in train] == [(row["id"], row["log_p"]) for row in each]
    assert vc["value"] == pytest.approx(float(np.mean([row["vc"] for row in each])))
    text_only = [row["vc"] for row in each if row["id"] == "c2"]
    assert text_only == [0.0]  # nothing to see, nothing contributed
    assert any(row["vc"] != 0 for row in each)
    other = [{**row, "log_p": row["log_p"] - row["tokens"] / 4 * (row["set"] == "test")} for row in (*each, *train)]
    (tmp_path / "other").write_bytes(lines(other))
    paired = tool("lit-eval", tmp_path / "rows.jsonl", "--model", llava, "--metric", "nll,gap", "--compare",
                  tmp_path / "other", "--train-rows", tmp_path / "rows.jsonl")  # fmt: skip
    assert paired.code == 0, paired.err
    for row in paired.rows:
        assert row["compare"]["difference"] == pytest.approx(-0.25)
        assert row["compare"]["ci"] == pytest.approx([-0.25, -0.25])
    (tmp_path / "other").write_bytes(lines(other[1:]))
    missing = tool("lit-eval", tmp_path / "rows.jsonl", "--model", llava, "--metric", "nll", "--compare",
                   tmp_path / "other")  # fmt: skip
    assert (missing.code, missing.out) == (65, b"")
    assert "no row 'c0' of the test set" in missing.err
