"""The evaluation's numbers against plain loops: one row at a time, full logits, no shared code but the template.

The model is a tiny one that has learned the answers by heart, so that generations, argmaxes and utility are not all 0.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models.chat import Chat
from toolbox.models.token_loss import TokenLoss, collate
from toolbox.shell.records import Row
from toolbox.unlearning.judge import Judge
from toolbox.unlearning.suites import Question
from toolbox.unlearning.summary import summarise

N = 4


def question(name: str, k: int) -> Question:
    asked, answer = f"Who keeps {name} {k}?", f"{name} {k} is kept by {'old ' * (k % 3)}Mr {chr(65 + k)}"
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    paraphrase = None if name == "facts" else f"Mr {chr(65 + k)} keeps {name} {k}"
    wrong = tuple(f"Mr {letter} keeps {name} {'very ' * w}{k}" for w, letter in enumerate("XYZ"[: 2 + k % 2]))
    row = Row(f"{name}{k}", turns, None, "QuestionAnswer", "f", k)
    return Question(row, f"Keeper of {name} {k}?", paraphrase, wrong)


SETS = {name: tuple(question(name, k) for k in range(N)) for name in ("forget", "retain", "authors", "facts")}


@pytest.fixture(scope="module")
def chat():
    return Chat(tiny_tokenizer(), "chat")


@pytest.fixture(scope="module")
def model(chat):
    """Taught all answers for a moment: some are recited, some are not."""
    model = tiny_model(width=64)
    head = TokenLoss(model)
    rows = [chat.encode(one.row.messages) for questions in SETS.values() for one in questions]
    batch = collate(rows, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(28):
        optimizer.zero_grad()
        (head(batch.ids, batch.where, batch.labels)[0].sum() / len(batch.labels)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def reference_log(chat):
    """Of a model that was taught nothing."""
    return Judge(SETS, chat, metrics=("truth_ratio",)).log(TokenLoss(tiny_model(seed=3, width=64)), "untaught")


@pytest.fixture(scope="module")
def log(model, chat):
    return Judge(SETS, chat, max_new_tokens=60, batch_tokens=700, batch_size=3).log(TokenLoss(model))


# -- plain loops ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def pair_loss(model, chat, asked: str, answer: str) -> tuple[float, list[bool]]:
    """Mean -log p of the answer's tokens and the end token, and which of the answer's tokens are the argmax."""
    prompt = chat.prompt([{"role": "user", "content": asked}])
    said = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*prompt, *said, end]
    logits = model(torch.tensor([ids])).logits[0].double()
    total, hits = 0.0, []
    for position in range(len(prompt), len(ids)):
        before = logits[position - 1]
        total -= float(before[ids[position]] - torch.logsumexp(before, 0))
        hits.append(int(before.argmax()) == ids[position])
    return total / (len(said) + 1), hits[:-1]


@torch.no_grad()
def greedy(model, chat, asked: str, new_tokens: int) -> str:
    ids = chat.prompt([{"role": "user", "content": asked}])
    start = len(ids)
    for _ in range(new_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in chat.end_ids:
            break
        ids.append(token)
    return chat.tokenizer.decode(ids[start:])


def rouge_l(answer: str, written: str) -> float:
    """By the textbook recursion, on words in lower case; the stemmer is the package's own."""
    import re

    from nltk.stem.porter import PorterStemmer

    def words(text: str) -> list[str]:
        found = re.findall("[a-z0-9]+", text.lower())
        return [PorterStemmer().stem(word) if len(word) > 3 else word for word in found]

    a, b = words(answer), words(written)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1] / len(a)


def ks_by_counting(a: list[float], b: list[float]) -> tuple[float, float]:
    """D over all points, and p as the share of all ways to deal the pooled values whose D is at least that."""

    def distance(first: list[float], second: list[float]) -> float:
        def share(values: list[float], point: float) -> float:
            return sum(value <= point for value in values) / len(values)

        return max(abs(share(first, point) - share(second, point)) for point in (*first, *second))

    observed = distance(a, b)
    pooled = [*a, *b]
    splits = list(itertools.combinations(range(len(pooled)), len(a)))
    reached = 0
    for chosen in splits:
        rest = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        reached += distance([pooled[i] for i in chosen], rest) >= observed - 1e-12
    return observed, reached / len(splits)


@pytest.fixture(scope="module")
def slow(model, chat):
    """``{set: [numbers of a question]}`` by the loops above."""
    found = {}
    for name, questions in SETS.items():
        found[name] = []
        for one in questions:
            asked, answer = (turn["content"] for turn in one.row.messages)
            loss, hits = pair_loss(model, chat, asked, answer)
            _, paraphrased_hits = pair_loss(model, chat, one.paraphrased_question, answer)
            other = one.paraphrased_answer or answer
            found[name].append(
                {
                    "loss": loss,
                    "hits": hits,
                    "paraphrased_hits": paraphrased_hits,
                    "paraphrase": pair_loss(model, chat, asked, other)[0],
                    "wrong": [pair_loss(model, chat, asked, wrong)[0] for wrong in one.perturbed_answers],
                    "rouge_l": rouge_l(answer, greedy(model, chat, asked, 60)),
                }
            )
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def suffix(hits: list[bool]) -> float:
    return next((k for k, hit in enumerate(reversed(hits)) if not hit), len(hits)) / len(hits)


# -- parity -----------------------------------------------------------------------------------------------------------
def test_the_numbers_of_every_item(log, slow):
    for name, items in log.sets.items():
        for item, plain in zip(items, slow[name], strict=True):
            assert item.loss == pytest.approx(plain["loss"], rel=1e-5, abs=1e-6)
            assert item.paraphrase_loss == pytest.approx(plain["paraphrase"], rel=1e-5, abs=1e-6)
            assert item.perturbed_losses == pytest.approx(plain["wrong"], rel=1e-5, abs=1e-6)
            assert item.es == suffix(plain["hits"])
            paraphrased = suffix(plain["paraphrased_hits"]) if name in ("forget", "retain") else None
            assert item.es_paraphrased == paraphrased
            assert item.em == mean(plain["hits"])
            assert item.rouge_l == plain["rouge_l"]
    hits = [item.es for items in log.sets.values() for item in items]
    assert 0.1 < mean(hits) < 0.9  # or the comparison above says little


def test_probability_truth_ratios_and_utility(log, slow):
    score = summarise(log)

    def ratio(plain: dict, variant: str) -> float:
        wrong = [math.exp(-loss) for loss in plain["wrong"]]
        together = mean(wrong) if variant == "arithmetic" else math.prod(wrong) ** (1 / len(wrong))
        return together / math.exp(-plain["paraphrase"])

    parts = {"arithmetic": [], "geometric": []}
    for name, rows in slow.items():
        if name in ("forget", "retain"):
            probability = mean(math.exp(-row["loss"]) for row in rows)
        else:
            probability = mean(
                math.exp(-row["loss"]) / (math.exp(-row["loss"]) + sum(math.exp(-loss) for loss in row["wrong"]))
                for row in rows
            )
        assert score.prob[name] == pytest.approx(probability, rel=1e-5)
        assert score.rouge_l[name] == pytest.approx(mean(row["rouge_l"] for row in rows))
        for variant, held in (("arithmetic", score.truth_ratio), ("geometric", None)):
            ratios = [ratio(row, variant) for row in rows]
            expected = mean(min(r, 1 / r) if name == "forget" else max(0, 1 - r) for r in ratios)
            found = getattr(held, name) if held else score.truth_ratio.geometric[name]
            assert found == pytest.approx(expected, rel=1e-5)
            if name != "forget":
                parts[variant] += [probability, mean(row["rouge_l"] for row in rows), expected]
    for variant, found in (("arithmetic", score.model_utility), ("geometric", score.model_utility_geometric)):
        assert all(part > 0 for part in parts[variant])
        assert found == pytest.approx(9 / sum(1 / part for part in parts[variant]), rel=1e-5)


def test_forget_quality_by_counting(log, reference_log, slow):
    ours = [math.exp(row["paraphrase"] - mean(row["wrong"])) for row in slow["forget"]]
    theirs = [math.exp(item.paraphrase_loss - mean(item.perturbed_losses)) for item in reference_log.sets["forget"]]
    d, p = ks_by_counting(ours, theirs)
    score = summarise(log, reference_log)
    assert score.ks.d == pytest.approx(d)
    assert score.forget_quality == pytest.approx(p)
    assert d > 0
