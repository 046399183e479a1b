"""Conversations as token ids, with a mask of the tokens to learn from.

A row's ids are those of its prompt followed by those of its answer, tokenised apart exactly as generation sees them,
then the token that ends the turn. Labels are found by rendering growing prefixes of the conversation through the Jinja
template; transformers' own assistant mask needs marks in the template that most do not have.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolbox.shell.errors import BadData, MissingInput, UsageProblem

Message = Mapping[str, str]

TEMPLATES = {
    # "Question: ...\nAnswer: ..." with a blank line behind a system turn and a newline between turns.
    "qa": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}\n"
        "{% else %}Question: {{ message['content'] }}\nAnswer:{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
    ),
    "raw": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name. ``llama2`` is the form that TOFU's code uses, without a space before the answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens: ``ids``, which of them are ``labelled`` (learned from, scored), and which of the labelled ones
    ``end`` a turn or a text. The first token is never labelled: nothing predicts it."""

    ids: tuple[int, ...]
    labelled: tuple[bool, ...]
    end: tuple[bool, ...]

    @property
    def n_labelled(self) -> int:
        return sum(self.labelled)


class _Builder:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labelled: list[bool] = []
        self.end: list[bool] = []

    def add(self, ids: Sequence[int], labelled: bool, end: bool = False) -> None:
        self.ids += ids
        self.labelled += [labelled] * len(ids)
        self.end += [end and labelled] * len(ids)

    def done(self, max_length: int | None) -> Encoded:
        if self.labelled:
            self.labelled[0] = self.end[0] = False
        cut = slice(max_length)
        return Encoded(tuple(self.ids[cut]), tuple(self.labelled[cut]), tuple(self.end[cut]))


class Chat:
    """A tokenizer with the template of a run.

    ``template``: ``auto`` (the tokenizer's chat template if it has one, else ``qa``), ``chat``, a name in
    ``TEMPLATES``, or a Jinja file. ``system`` is put before conversations that have no system turn of their own, so
    that a template which would insert a default one does not.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.name, self.source = _resolve(tokenizer, template)
        self._controls = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True
        )
        self._check_template(template)

    # -- rendering ----------------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The conversation as text; with ``generation`` the assistant's turn has been opened."""
        turns = [dict(message) for message in messages]
        if self.system is not None and not any(turn["role"] == "system" for turn in turns):
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.source, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise BadData(
                f"the template {self.name} refuses this conversation: {error}", "try --template qa", field="$.messages"
            ) from None

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """What generation continues, as text."""
        return self.render(messages, generation=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What generation continues, as ids; earlier answers are tokenised as training sees them.

        Where the template's prefixes do not nest the whole prompt is tokenised at once.
        """
        marked, marks = self._protect(messages)
        builder = _Builder()
        opened = self.render(marked, generation=True)
        try:
            rendered = self._turns(builder, marked, marks, learn=lambda _: False)
            if not opened.startswith(rendered):
                raise _does_not_nest()
        except BadData:
            return self._unmarked(opened, marks)
        builder.add(self._unmarked(opened[len(rendered) :], marks), False)
        return builder.ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        text = self._answer_of([{"role": "user", "content": "x"}], {"role": "assistant", "content": "y"})[1]
        found = self._end(text)[0]
        return tuple(dict.fromkeys(id for id in (found, self.tokenizer.eos_token_id) if id is not None))

    # -- encoding -----------------------------------------------------------------------------------------------------
    def encode(
        self, messages: Sequence[Message], *, loss_on: str = "assistant", max_length: int | None = None
    ) -> Encoded:
        """A conversation with labels on every assistant turn (``assistant``), the ``last`` one, or ``all`` tokens.

        Whatever the template puts behind the last answer's end of turn is dropped. Raises BadData when the template's
        prefixes do not nest, so that labels cannot be told.
        """
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadData("no assistant turn to learn from", "add one", field="$.messages")
        marked, marks = self._protect(messages[: answers[-1] + 1])
        builder = _Builder()
        self._turns(builder, marked, marks, learn=lambda place: loss_on != "last" or place == answers[-1])
        if loss_on == "all":
            builder.labelled = [True] * len(builder.ids)
        return builder.done(max_length)

    def encode_text(self, text: str, *, max_length: int | None = None) -> Encoded:
        """A plain text, all tokens labelled, the end-of-text token behind it."""
        builder = _Builder()
        if self.tokenizer.bos_token_id is not None and _adds_bos(self.tokenizer):
            builder.add([self.tokenizer.bos_token_id], False)
        builder.add(self._ids(text, plain=True), True)
        builder.add([self.tokenizer.eos_token_id], True, end=True)
        return builder.done(max_length)

    def show(self, encoded: Encoded) -> str:
        """The row as text with its labelled runs in ⟦ ⟧."""
        parts, ids, on = [], [], False
        for token, labelled in [*zip(encoded.ids, encoded.labelled, strict=True), (None, False)]:
            if (labelled != on or token is None) and ids:
                text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                parts.append(f"⟦{text}⟧" if on else text)
                ids = []
            if token is not None:
                ids.append(token)
            on = labelled
        return "".join(parts)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _turns(self, builder: _Builder, messages: Sequence[Message], marks: Mapping[str, str], learn: Any) -> str:
        """Add a conversation answer by answer up to the last one's end token; returns the text so far."""
        rendered = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, tail = self._answer_of(messages[:place], message)
            if not prompt.startswith(rendered):
                raise _does_not_nest()
            builder.add(self._unmarked(prompt[len(rendered) :], marks), False)
            end, answer, consumed = self._end(tail)
            if message["content"].strip() not in answer:
                raise _does_not_nest()
            builder.add(self._unmarked(answer, marks), learn(place))
            if end is not None:
                builder.add([end], learn(place), end=True)
            rendered = prompt + tail[:consumed]
        return rendered

    def _answer_of(self, before: Sequence[Message], answer: Message) -> tuple[str, str]:
        """The open prompt before an answer, and what the template makes of the answer behind it."""
        prompt = self.render(before, generation=True)
        whole = self.render([*before, answer], generation=False)
        if not whole.startswith(prompt):
            raise _does_not_nest()
        return prompt, whole[len(prompt) :]

    def _end(self, tail: str) -> tuple[int | None, str, int]:
        """``(id of the end token, the answer's text, characters up to behind the end token)`` of a rendered answer.

        Where the template closes an answer with no control token the tokenizer's end of text does.
        """
        found = min(((tail.find(token), token) for token in self._controls if token in tail), default=None)
        if found is None:
            return self.tokenizer.eos_token_id, tail, len(tail)
        start, token = found
        return self.tokenizer.convert_tokens_to_ids(token), tail[:start], start + len(token)

    def _protect(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Replace contents that spell out a control token by marks, which are tokenised as plain text later."""
        marks: dict[str, str] = {}
        turns = []
        for message in messages:
            content = message["content"]
            if any(token in content for token in self._controls):
                mark = f"\ue000{secrets.token_hex(8)}\ue001"
                marks[mark] = content
                content = mark
            turns.append({"role": message["role"], "content": content})
        return turns, marks

    def _unmarked(self, text: str, marks: Mapping[str, str]) -> list[int]:
        """Ids of rendered text; protected contents as plain text, everything else with its control tokens."""
        for mark, content in marks.items():
            if mark in text:
                before, _, after = text.partition(mark)
                return [*self._unmarked(before, marks), *self._ids(content, plain=True), *self._unmarked(after, marks)]
        return self._ids(text, plain=False)

    def _ids(self, text: str, *, plain: bool) -> list[int]:
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    def _check_template(self, asked: str) -> None:
        """Render once, so that a broken template is an error of the call and not of its first row."""
        try:
            self.render([{"role": "user", "content": "x"}], generation=True)
        except BadData as problem:
            if self.name not in ("chat", *TEMPLATES):
                raise BadData(problem.reason, "mend the template", file=asked) from None


def _resolve(tokenizer: Any, template: str) -> tuple[str, str]:
    if template == "auto":
        template = "chat" if tokenizer.chat_template is not None else "qa"
    if template == "chat":
        source = tokenizer.chat_template
        if source is None:
            raise UsageProblem("--template chat: the model has no chat template", "try --template qa")
        if isinstance(source, dict):  # several named templates
            source = source.get("default") or next(iter(source.values()))
        return "chat", source
    if template in TEMPLATES:
        return template, TEMPLATES[template]
    path = Path(template)
    if not path.is_file():
        raise MissingInput(f"--template {template}: neither a known template nor a file", "auto, chat, qa, llama2, raw")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadData("a template must be UTF-8 text", file=template) from None
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError as error:
        raise BadData(f"not a Jinja template: {error.message}", file=template, line=error.lineno) from None
    return path.name, source


def _adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer's models expect a begin-of-text token before plain text."""
    return tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _does_not_nest() -> BadData:
    return BadData(
        "the chat template's prefixes do not nest, so the answer's tokens cannot be told from the prompt's",
        "use --template qa, or a Jinja file that renders every turn the same wherever it stands",
        field="$.messages",
    )
