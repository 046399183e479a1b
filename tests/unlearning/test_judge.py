"""The judge asks for what the metrics need and nothing else, and its numbers are those of the rows, not of batches."""

from __future__ import annotations

import msgspec
import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models.chat import Chat
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import BadData
from toolbox.shell.records import Row
from toolbox.unlearning.judge import Judge
from toolbox.unlearning.suites import Question
from toolbox.unlearning.summary import summarise


def turns(*contents: str) -> tuple[dict, ...]:
    return tuple({"role": "user" if k % 2 == 0 else "assistant", "content": text} for k, text in enumerate(contents))


def question(k: int, paraphrase: bool = True, wrong: int = 2) -> Question:
    row = Row(
        f"r{k}", turns(f"Who is {k}?", f"{'very ' * (k % 4)}nobody {k}"), None, "QuestionAnswer", "f.jsonl", k + 1
    )
    other = f"nobody else {k}" if paraphrase else None
    return Question(row, f"Name number {k}.", other, tuple(f"somebody {k} {w}" for w in range(wrong)))


def text(words: str) -> Question:
    return Question(Row("t", None, words, "PlainText", "f.jsonl", 7))


@pytest.fixture(scope="module")
def chat():
    return Chat(tiny_tokenizer(), "chat")


@pytest.fixture(scope="module")
def head():
    return TokenLoss(tiny_model())


SETS = {name: tuple(question(k) for k in range(6)) for name in ("forget", "retain", "authors")}


def close(first, second) -> bool:
    """Equal up to the rounding of another batch shape."""
    for name in first.sets:
        for a, b in zip(first.sets[name], second.sets[name], strict=True):
            for field in ("loss", "paraphrase_loss", "perturbed_losses", "es", "es_paraphrased", "em", "rouge_l"):
                one, other = getattr(a, field), getattr(b, field)
                assert one is other is None or one == pytest.approx(other, rel=1e-5), field
            assert (a.index, a.question) == (b.index, b.question)
    return True


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_numbers_do_not_depend_on_the_batches(chat, head, batch_tokens):
    whole = Judge(SETS, chat, max_new_tokens=4).log(head)
    assert close(whole, Judge(SETS, chat, max_new_tokens=4, batch_tokens=batch_tokens, batch_size=2).log(head))


def test_numbers_do_not_depend_on_the_order_of_rows_or_the_other_sets(chat, head):
    whole = Judge(SETS, chat, max_new_tokens=4).log(head)
    turned = Judge({"forget": SETS["forget"][::-1]}, chat, max_new_tokens=4).log(head)
    back = msgspec.structs.replace(turned, sets={"forget": turned.sets["forget"][::-1]})
    assert close(back, msgspec.structs.replace(whole, sets={"forget": whole.sets["forget"]}))


@pytest.mark.parametrize(
    ("metrics", "pairs", "generations"),
    [
        (("es",), 6 * 2, 0),  # the question and its paraphrase
        (("em",), 6, 0),
        (("rouge_l",), 0, 6),
        (("truth_ratio",), 6 * 3, 0),  # the paraphrased answer and two wrong ones
        (("prob", "truth_ratio"), 6 * 4, 0),
    ],
)
def test_only_what_the_metrics_need_is_asked(chat, head, metrics, pairs, generations):
    judge = Judge({"forget": SETS["forget"]}, chat, metrics=metrics, max_new_tokens=2)
    assert (judge.work["pairs"], judge.work["generations"]) == (pairs, generations)
    score = summarise(judge.log(head))
    measured = {
        "es": score.es["forget"], "em": score.em["forget"], "prob": score.prob["forget"],
        "rouge_l": score.rouge_l["forget"], "truth_ratio": score.truth_ratio.forget,
    }  # fmt: skip
    assert {name for name, value in measured.items() if value is not None} == set(metrics)


def test_wrong_answers_are_asked_for_the_probability_of_authors_but_not_of_retain(chat, head):
    judge = Judge({name: SETS[name] for name in ("retain", "authors")}, chat, metrics=("prob",))
    assert judge.work["pairs"] == 6 * 1 + 6 * 3
    score = summarise(judge.log(head))
    assert score.prob["authors"] > score.prob["retain"]  # one of three, against e^-5
    assert score.truth_ratio.authors is None


def test_without_a_paraphrase_the_answer_itself_stands_for_it_and_is_asked_once(chat, head):
    questions = tuple(question(k, paraphrase=False) for k in range(3))
    judge = Judge({"facts": questions}, chat, metrics=("prob", "truth_ratio"))
    assert judge.work["pairs"] == 3 * 3
    items = judge.log(head).sets["facts"]
    assert all(item.paraphrase_loss == item.loss for item in items)


def test_without_wrong_answers_there_is_no_truth_ratio(chat, head):
    judge = Judge({"forget": tuple(question(k, wrong=0) for k in range(3))}, chat)
    score = summarise(judge.log(head))
    assert score.truth_ratio.forget is None
    assert score.es["forget"] is not None


def test_es_alone_is_that_of_the_log(chat):
    head = TokenLoss(_knows_one_byte())
    judge = Judge(SETS, chat, metrics=("es",))
    full = summarise(judge.log(head)).es
    assert judge.es(head) == pytest.approx({"forget": full["forget"], "retain": full["retain"]})
    assert 0 < full["forget"] < 1


def _knows_one_byte():
    """A model whose hidden states are 0 and whose bias always predicts `0`: right about one answer's last token."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[tiny_tokenizer()("0")["input_ids"][0]] = 1.0
    return model


def test_plain_texts_are_scored_whole_and_nothing_is_generated(chat, head):
    judge = Judge({"forget": (text("Zorblax was here."), question(1))}, chat, max_new_tokens=2)
    assert judge.work["generations"] == 1
    plain, asked = judge.log(head).sets["forget"]
    assert plain.loss is not None
    assert plain.es is not None
    assert (plain.rouge_l, plain.text, plain.paraphrase_loss, plain.perturbed_losses) == (None,) * 4
    assert asked.text.prompt == "Who is 1?"


def test_of_a_conversation_the_last_answer_is_judged(chat, head):
    whole = Question(Row("c", turns("Hi", "Hello.", "Who?", "Nobody.", "And?"), None, "Conversation", "f", 1), "Whom?")
    assert [turn["content"] for turn in whole.asked] == ["Hi", "Hello.", "Who?"]
    assert whole.answer == "Nobody."
    alone = Judge({"forget": (whole,)}, chat, max_new_tokens=2)
    assert [pair.n_labelled for pair in alone._pairs] == [len("Nobody.") + 1] * 2
    assert alone.log(head).sets["forget"][0].es_paraphrased is not None


def test_the_log_says_how_it_asked(head):
    judge = Judge({"forget": SETS["forget"][:2]}, Chat(tiny_tokenizer(), "qa", "Be brief."), max_new_tokens=3)
    log = judge.log(head, "the model")
    assert (log.model, log.template, log.system, log.max_new_tokens) == ("the model", "qa", "Be brief.", 3)
    assert Judge({"forget": SETS["forget"][:2]}, judge.chat, metrics=("es",)).log(head).max_new_tokens is None


@pytest.mark.parametrize("metrics", [("em",), ("rouge_l",)])
def test_a_row_that_does_not_fit_the_window_is_named(chat, head, metrics):
    long = Question(Row("l", turns("Who? " * 200, "Nobody."), None, "QuestionAnswer", "f.jsonl", 3))
    with pytest.raises(BadData, match=r"f\.jsonl:3: .*too many for the model's window of 512") as caught:
        Judge({"forget": (question(1), long)}, chat, metrics=metrics).log(head)
    assert "Who" not in str(caught.value)


def test_a_row_without_an_answer_token_is_named(chat):
    with pytest.raises(BadData, match=r"f\.jsonl:7: the answer has no token"):
        Judge({"forget": (text("x"),)}, chat)  # its only token has nothing before it to predict it


def test_a_broken_model_is_an_error_and_not_a_number(chat):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadData, match=r"f\.jsonl:1: the model's losses are not numbers"):
        Judge({"forget": (question(0),)}, chat, metrics=("prob",)).log(TokenLoss(broken))


def test_a_model_in_training_goes_on_training(chat):
    head = TokenLoss(tiny_model())
    head.train()
    Judge({"forget": SETS["forget"][:2]}, chat, max_new_tokens=2).log(head)
    assert head.training
    assert head.model.training
