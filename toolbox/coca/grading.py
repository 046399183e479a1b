"""Who judges: rules, or a language model behind an endpoint. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from toolbox.coca.answers import Subject
from toolbox.coca.judge import Graded, Rubric, StringJudge
from toolbox.models.generate import Decoding, TextRequest
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem

if TYPE_CHECKING:
    from toolbox.coca.evaluate import Options

GRADE_TOKENS = 64
TRIES = 2


class Grader(Protocol):
    """Takes rows with their final texts, None where an answer is unfinished; one grade each, in order."""

    def __call__(self, work: Sequence[tuple[Subject, str | None]]) -> list[Graded | None]: ...


class StringGrader:
    """A string judge."""

    def __init__(self, judge: StringJudge) -> None:
        self._judge = judge

    def __call__(self, work: Sequence[tuple[Subject, str | None]]) -> list[Graded | None]:
        return [None if text is None else Graded(self._judge(text)) for _, text in work]


class LlmGrader:
    """A rubric read by a model behind an endpoint. What cannot be read is asked once more, and then stays unjudged."""

    def __init__(self, rubric: Rubric, options: Options, call: Invocation) -> None:
        self._rubric, self._options, self._call = rubric, options, call

    def __enter__(self) -> LlmGrader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (endpoint := getattr(self, "_endpoint", None)) is not None:
            endpoint.__exit__()

    def __call__(self, work: Sequence[tuple[Subject, str | None]]) -> list[Graded | None]:
        grades: list[Graded | None] = [None] * len(work)
        open_places = [place for place, (_, text) in enumerate(work) if text is not None]
        for attempt in range(TRIES):
            if not open_places:
                break
            requests = []
            for place in open_places:
                subject, text = work[place]
                if subject.prompt is None:
                    raise subject.record.bad("no prompt, which --judge llm has to read", "add it", "$.prompt")
                content = self._rubric.ask(subject.prompt_text, text or "")
                requests.append(TextRequest(subject.record.id, "judge", attempt, content))
            replies = self._open().complete(requests, Decoding(GRADE_TOKENS))
            for place, reply in zip(open_places, replies, strict=True):
                grades[place] = self._rubric.read(reply.text)
            open_places = [place for place in open_places if grades[place] is None]
        return grades

    def _open(self) -> Any:
        if not hasattr(self, "_endpoint"):
            from toolbox.models.endpoint import Endpoint

            options = self._options
            if options.base_url is None:
                raise UsageProblem("--judge llm needs an address", "as in --base-url http://localhost:8000/v1")
            service = options.service(self._rubric.model, self._call.reporter.warn)
            self._endpoint = Endpoint(service, self._call.reporter.note).__enter__()
        return self._endpoint
