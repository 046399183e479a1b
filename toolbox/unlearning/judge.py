"""Asking a model: every number that the metrics are made of, in one scoring run and one of generation.

A row gives several (question, answer) pairs: the answer itself, the answer to the paraphrased question, the paraphrased
answer, each wrong answer. The pairs of all sets are scored together, in batches of like length that are cut before they
are dealt to the processes, so that neither the number of processes nor the order of the rows shows in a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.models.chat import Chat, Encoded
from toolbox.models.extraction import exact_match, extraction_strength
from toolbox.models.facts import context_window
from toolbox.models.generate import Decoding, LocalBackend, Request, plan_batches
from toolbox.models.score import SCORE_TOKENS, TokenScores, score_batches, score_rows
from toolbox.shell.errors import BadData
from toolbox.unlearning.logs import METRICS, Item, Log, Text
from toolbox.unlearning.rouge import rouge_l_recall
from toolbox.unlearning.suites import Question
from toolbox.unlearning.summary import PARAPHRASED

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from toolbox.models.token_loss import TokenLoss

ES_SETS = ("forget", "retain")
"""The sets whose extraction strength alone says how much was forgotten and kept."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Where a question's pairs stand among all pairs; None or empty for those that are not asked for."""

    answer: int | None = None
    paraphrased_question: int | None = None
    paraphrased_answer: int | None = None
    perturbed: tuple[int, ...] = ()


class _Numbers(msgspec.Struct, array_like=True):
    """What is kept of one scored pair: mean loss in nats, ES, EM."""

    loss: float
    es: float
    em: float


class _Answer(msgspec.Struct, array_like=True):
    """What is kept of one generation."""

    place: int
    rouge_l: float
    text: str


class Judge:
    """Sets of questions under one template, ready to be put to any number of models with that tokenizer.

    ``metrics`` (names of ``logs.METRICS``) bounds the work: only what they are made of is asked. ``batch_tokens``
    bounds the padded tokens scored at once, ``batch_size`` the prompts completed together. With an ``accelerator`` the
    work is shared by its processes, each of which holds the whole model, and every process gets the whole result.
    ``on_rows`` is told how many pairs or prompts were just finished by this process.

    Raises: BadData (65) with file and line for a row that the template refuses or that has no answer token.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Question]],
        chat: Chat,
        *,
        metrics: Iterable[str] = tuple(METRICS),
        max_new_tokens: int = 200,
        device: torch.device | str = "cpu",
        batch_tokens: int = SCORE_TOKENS,
        batch_size: int = 16,
        accelerator: Accelerator | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self.sets = {name: tuple(questions) for name, questions in sets.items()}
        self.chat, self.metrics, self.device = chat, tuple(metrics), device
        self.max_new_tokens = max_new_tokens
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._accelerator, self.on_rows = accelerator, on_rows
        pad = chat.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else pad
        self._pairs: list[Encoded] = []
        self._owner: list[Question] = []
        self._plan = {
            name: [self._pairs_of(question, name) for question in questions] for name, questions in self.sets.items()
        }
        self._prompts = self._requests() if "rouge_l" in self.metrics else []

    @property
    def work(self) -> dict[str, int]:
        """What ``log`` costs: pairs and tokens to score, prompts to complete."""
        tokens = sum(len(pair.ids) for pair in self._pairs)
        return {"pairs": len(self._pairs), "tokens": tokens, "generations": len(self._prompts)}

    def log(self, model: TokenLoss, name: str = "model") -> Log:
        """All wanted numbers of ``model``, on every process. ``name`` is what the log calls it."""
        scores = self._score(model, range(len(self._pairs)))
        answers = self._generate(model)
        prompts = iter(range(len(self._prompts)))
        sets = {}
        for set_name, questions in self.sets.items():
            items = []
            for question, pairs in zip(questions, self._plan[set_name], strict=True):
                asked = bool(self._prompts) and bool(question.asked)
                items.append(self._item(question, pairs, scores, answers[next(prompts)] if asked else None))
            sets[set_name] = tuple(items)
        bound = self.max_new_tokens if self._prompts else None
        return Log(
            model=name, sets=sets, template=self.chat.name, system=self.chat.system, max_new_tokens=bound
        )  # fmt: skip

    def es(self, model: TokenLoss) -> dict[str, float]:
        """Mean extraction strength of the forget and the retain set (those that are here), and nothing else."""
        places = {
            name: [pairs.answer for pairs in self._plan[name] if pairs.answer is not None]
            for name in ES_SETS
            if name in self._plan
        }
        scores = self._score(model, [place for found in places.values() for place in found])
        return {
            name: math.fsum(scores[place].es for place in found) / len(found) for name, found in places.items() if found
        }

    def answers(self, name: str, model: TokenLoss) -> list[Encoded]:
        """The (question, answer) pairs of the set ``name``, where a metric asks for them, fit for ``model``."""
        places = [pairs.answer for pairs in self._plan[name] if pairs.answer is not None]
        self._check_window(model, places)
        return [self._pairs[place] for place in places]

    # -- preparing ----------------------------------------------------------------------------------------------------
    def _pairs_of(self, question: Question, name: str) -> _Pairs:
        """Encode what the metrics need of a question. Without a paraphrase the answer itself stands for it."""
        metrics = set(self.metrics)
        wrong, other = question.perturbed_answers, question.paraphrased_answer
        ratio = "truth_ratio" in metrics and bool(wrong)
        chosen = "prob" in metrics and name in ("authors", "facts")
        answer = paraphrased_question = paraphrased_answer = None
        if metrics & {"es", "em", "prob"} or (ratio and other is None):
            answer = self._add(question)
        if "es" in metrics and name in PARAPHRASED and question.paraphrased_question is not None:
            paraphrased_question = self._add(question, asked=question.paraphrased_question)
        if ratio:
            paraphrased_answer = answer if other is None else self._add(question, answer=other)
        perturbed = tuple(self._add(question, answer=one) for one in wrong if ratio or chosen)
        return _Pairs(answer, paraphrased_question, paraphrased_answer, perturbed)

    def _add(self, question: Question, *, asked: str | None = None, answer: str | None = None) -> int:
        """Encode a pair of this question; returns its place."""
        row = question.row
        try:
            if question.answer is None:
                encoded = self.chat.encode_text(row.text or "")
            else:
                turns = question.asked
                if asked is not None:
                    last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
                    turns[last]["content"] = asked
                turns.append({"role": "assistant", "content": question.answer if answer is None else answer})
                encoded = self.chat.encode(turns, loss_on="last")
            if not any(on and not end for on, end in zip(encoded.labelled, encoded.end, strict=True)):
                raise BadData("the answer has no token to score", "leave the row out")
        except BadData as problem:
            raise BadData(
                problem.reason, problem.advice, file=row.file, line=row.line, field=problem.field
            ) from None  # fmt: skip
        self._pairs.append(encoded)
        self._owner.append(question)
        return len(self._pairs) - 1

    def _requests(self) -> list[Request]:
        return [
            Request(question.row.id, tuple(self.chat.prompt(question.asked)))
            for questions in self.sets.values()
            for question in questions
            if question.asked
        ]

    # -- scoring ------------------------------------------------------------------------------------------------------
    def _score(self, model: TokenLoss, places: Sequence[int]) -> dict[int, _Numbers]:
        """The numbers of the pairs at ``places``."""
        self._check_window(model, places)
        places = list(places)
        batches = score_batches([len(self._pairs[place].ids) for place in places], self._batch_tokens)
        # Whole batches laid end to end are cut into the same batches again by score_rows.
        mine = [places[row] for batch in self._mine(batches) for row in batch]
        rows = [self._pairs[place] for place in mine]
        found = score_rows(
            model, rows, device=self.device, pad_id=self.pad_id, max_tokens=self._batch_tokens, on_batch=self.on_rows
        )
        numbers = {place: self._numbers(place, scores) for place, scores in zip(mine, found, strict=True)}
        return {
            place: one for part in self._gather(numbers, dict[int, _Numbers]) for place, one in part.items()
        }  # fmt: skip

    def _numbers(self, place: int, scores: TokenScores) -> _Numbers:
        loss = float(scores.nll.astype("float64").mean())
        if not math.isfinite(loss):
            row = self._owner[place].row
            advice = "its weights may be damaged, or too large for --dtype"
            raise BadData("the model's losses are not numbers", advice, file=row.file, line=row.line)
        return _Numbers(loss, extraction_strength(scores), exact_match(scores))

    def _check_window(self, model: TokenLoss, places: Sequence[int]) -> None:
        """Beyond the window that it was made for a model says nothing that means anything."""
        window = context_window(model.model.config)
        for place in places:
            if window is not None and len(self._pairs[place].ids) > window:
                row = self._owner[place].row
                what = f"the row has {len(self._pairs[place].ids)} tokens, too many for the model's window of {window}"
                raise BadData(what, "shorten it, or leave it out", file=row.file, line=row.line)

    # -- generating ---------------------------------------------------------------------------------------------------
    def _generate(self, model: TokenLoss) -> list[_Answer]:
        """Greedy completions of all prompts and their ROUGE-L recall, in the order of the prompts."""
        if not self._prompts:
            return []
        backend = LocalBackend(
            model.model, self.chat.tokenizer, end_ids=self.chat.end_ids, batch_size=self._batch_size
        )  # fmt: skip
        decoding = Decoding(max_new_tokens=self.max_new_tokens)
        asked = [question for questions in self.sets.values() for question in questions if question.asked]
        for request, question in zip(self._prompts, asked, strict=True):
            try:
                backend.room(request, decoding)
            except BadData as problem:
                row = question.row
                raise BadData(problem.reason, problem.advice, file=row.file, line=row.line) from None
        lengths = [len(request.prompt_ids) + self.max_new_tokens for request in self._prompts]
        mine: list[_Answer] = []
        for batch in self._mine(plan_batches(lengths, self._batch_size)):
            for place, one in zip(
                batch, backend.complete([self._prompts[place] for place in batch], decoding), strict=True
            ):
                recall = rouge_l_recall(asked[place].answer or "", one.text)
                mine.append(_Answer(place, recall, one.text))
            if self.on_rows is not None:
                self.on_rows(len(batch))
        answers = [answer for part in self._gather(mine, list[_Answer]) for answer in part]
        return sorted(answers, key=lambda answer: answer.place)

    # -- putting together ---------------------------------------------------------------------------------------------
    def _item(self, question: Question, pairs: _Pairs, scores: Mapping[int, _Numbers], answer: _Answer | None) -> Item:
        """The numbers of one question, those that were asked for."""

        def of(place: int | None, metric: str, number: str) -> float | None:
            return getattr(scores[place], number) if place is not None and metric in self.metrics else None

        text = None
        if answer is not None:
            asked = "\n".join(turn["content"] for turn in question.asked)
            text = Text(prompt=asked, answer=question.answer or "", generation=answer.text)
        return Item(
            index=question.row.id,
            question=question.hash,
            loss=of(pairs.answer, "prob", "loss"),
            paraphrase_loss=of(pairs.paraphrased_answer, "truth_ratio", "loss"),
            perturbed_losses=tuple(scores[place].loss for place in pairs.perturbed) or None,
            es=of(pairs.answer, "es", "es"),
            es_paraphrased=of(pairs.paraphrased_question, "es", "es"),
            em=of(pairs.answer, "em", "em"),
            rouge_l=answer.rouge_l if answer is not None else None,
            text=text,
        )

    # -- processes ----------------------------------------------------------------------------------------------------
    def _mine(self, batches: list[list[int]]) -> list[list[int]]:
        if self._accelerator is None:
            return batches
        return batches[self._accelerator.process_index :: self._accelerator.num_processes]

    def _gather(self, mine: Any, kind: Any) -> list[Any]:
        """Every process's part."""
        if self._accelerator is None or self._accelerator.num_processes == 1:
            return [mine]
        from toolbox.training.processes import gather_bytes

        parts = gather_bytes(self._accelerator, msgspec.msgpack.encode(mine))
        return [msgspec.msgpack.decode(part, type=kind) for part in parts]
