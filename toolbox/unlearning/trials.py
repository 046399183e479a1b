"""What of the forgetting survives, tried on one loaded model: equal retention, rounding, relearning, membership."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.models.load import ModelSource, find_model
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import BadData
from toolbox.stats import bootstrap_mean
from toolbox.training.language import lr_by_size
from toolbox.unlearning.attacks import quantize_, relearn, split_relearn
from toolbox.unlearning.calibrate import Mixture, merged, tensors_of, uwc
from toolbox.unlearning.logs import Log
from toolbox.unlearning.summary import DRAWS, Score

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.unlearning.evaluate import Options
    from toolbox.unlearning.judge import Judge
    from toolbox.unlearning.suites import Question

RELEARN_BATCH = 16
"""Rows of one step of relearning, at most."""


class Trials:
    """The trials that the options ask for. Each changes the model in place, so ``load`` gives a fresh one.

    Args:
        load: a new copy of the model, on its device, in the type that is named or else in that of the options.
        judges: makes a ``Judge`` for other sets, asked as the model at hand is.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        load: Callable[[str | None], TokenLoss],
        judges: Callable[[Mapping[str, Sequence[Question]], Sequence[str]], Judge],
    ) -> None:
        self.options, self.accelerator, self.load, self.judges = options, accelerator, load, judges

    def run(
        self, head: TokenLoss, judge: Judge, others: Sequence[Question], summarise: Callable[[Log], Score]
    ) -> dict[str, dict[str, Any] | None]:
        """All of them: what goes under ``membership``, ``uwc``, ``quantized`` and ``relearn`` of the model's line.

        ``head`` is not used any more behind this; ``others`` are rows that no model was trained on.
        """
        options = self.options
        found: dict[str, dict[str, Any] | None] = dict.fromkeys(("membership", "uwc", "quantized", "relearn"))
        if others:
            found["membership"] = self.membership(head, judge, others)
        if options.uwc is not None:
            source = find_model(options.uwc, trust_remote_code=options.trust_remote_code)
            found["uwc"] = self.equal_retention(head, judge, source)
        if options.quantize is not None:
            found["quantized"] = self.quantized(self.load(None), judge, summarise)
        if options.relearn:
            found["relearn"] = self.relearned(self.load("fp32"), judge)  # small steps are lost on narrower weights
        return found

    def membership(self, head: TokenLoss, judge: Judge, others: Sequence[Question]) -> dict[str, Any]:
        """AUC of each score between the forget rows and the ``others``."""
        from toolbox.models.score import score_rows
        from toolbox.unlearning.membership import labelled_text, membership, membership_scores, vocabulary_moments

        def scores(judge: Judge, name: str) -> list[dict[str, float]]:
            rows, device, tokenizer = judge.answers(name, head), self.accelerator.device, judge.chat.tokenizer
            nll = score_rows(head, rows, device=device, pad_id=judge.pad_id)
            moments = vocabulary_moments(head, rows, device=device, pad_id=judge.pad_id)
            return [
                membership_scores(one, labelled_text(tokenizer, row), moment)
                for one, row, moment in zip(nll, rows, moments, strict=True)
            ]

        strangers = self.judges({"others": others}, ("es",))
        return membership(scores(judge, "forget"), scores(strangers, "others"), seed=self.options.seed)

    def equal_retention(self, head: TokenLoss, judge: Judge, original: ModelSource) -> dict[str, Any]:
        """ES of the forget rows where the mixture with the original keeps enough of the retain rows."""
        plain = TokenLoss(merged(head.model), head.chunk)
        seen: dict[float, tuple[float, float]] = {}
        with tensors_of(original, trust_remote_code=self.options.trust_remote_code) as tensors:
            mixture = Mixture(plain.model, tensors)

            def es(a: float) -> tuple[float, float]:
                if a not in seen:
                    mixture.set(a)
                    means = judge.es(plain)
                    seen[a] = means["forget"], means["retain"]
                return seen[a]

            found = uwc(es, es(1.0)[1], self.options.keep)
        return {"original": original.name, "es_forget_original": es(1.0)[0], **found.as_record()}

    def quantized(self, head: TokenLoss, judge: Judge, summarise: Callable[[Log], Score]) -> dict[str, Any]:
        """All numbers of the model after rounding its linear layers."""
        assert self.options.quantize is not None
        model = merged(head.model)
        try:
            rounded = quantize_(model, int(self.options.quantize.removeprefix("rtn")))
        except ValueError as error:
            raise BadData(f"--quantize: {error}") from None
        score = msgspec.to_builtins(summarise(judge.log(TokenLoss(model, head.chunk))))
        kept = ("es", "em", "prob", "rouge_l", "truth_ratio", "model_utility", "forget_quality", "intervals")
        return {
            "kind": self.options.quantize,
            "group": rounded.group,
            "parameters": rounded.parameters,
            "of": rounded.total,
            **{name: score[name] for name in kept},
        }

    def relearned(self, head: TokenLoss, judge: Judge) -> dict[str, Any]:
        """ES and probability of the forget rows that were not learned again, before and after learning some."""
        options = self.options
        learned, left = split_relearn(judge.sets["forget"], options.relearn, options.seed)
        teacher, jury = self.judges({"forget": learned}, ("es",)), self.judges({"forget": left}, ("es", "prob"))
        plain = TokenLoss(merged(head.model), head.chunk)
        lr = lr_by_size(sum(p.numel() for p in plain.parameters()), small=5e-5)
        before = jury.log(plain)
        losses = relearn(
            plain, teacher.answers("forget", plain), pad_id=teacher.pad_id, steps=options.relearn_steps, lr=lr,
            batch_size=min(RELEARN_BATCH, len(learned)), seed=options.seed, accelerator=self.accelerator,
        )  # fmt: skip
        after = jury.log(plain)
        return {
            "rows": len(learned),
            "steps": options.relearn_steps,
            "lr": lr,
            "loss": {"first": losses[0], "last": losses[-1]},
            "n": len(left),
            "before": _means(before, options.seed),
            "after": _means(after, options.seed),
        }


def _means(log: Log, seed: int) -> dict[str, Any]:
    from toolbox.unlearning.tofu import probability

    items = log.sets["forget"]
    found: dict[str, Any] = {}
    for name, values in (
        ("es", [one.es for one in items]),
        ("prob", [probability(one.loss) for one in items if one.loss is not None]),
    ):
        interval = bootstrap_mean([value for value in values if value is not None], draws=DRAWS, seed=seed)
        record = interval.as_record()
        found[name] = interval.estimate
        found[f"{name}_interval"] = [record["low"], record["high"]]
    return found
