"""Conversations as token ids, with a mask of the tokens to learn from.

A row's ids are those of its prompt followed by those of its answer, tokenised apart exactly as generation sees them,
then the token that ends the turn. Labels are found by rendering growing prefixes of the conversation through the Jinja
template; transformers' own assistant mask needs marks in the template that most do not have.

Control tokens come from the template alone: where a message spells one out, it is tokenised as ordinary text.
"""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
    ),
    "raw": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name. ``llama2`` is the form that TOFU's code uses, without a space before the answer.

Each begins with the begin-of-text token where the tokenizer itself puts one before plain text, as TOFU's code has it
by leaving that to the tokenizer. Having a ``bos_token`` is not enough: SmolLM2's is <|im_start|>, which opens a turn.
"""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens: ``ids``, which of them are ``labelled`` (learned from, scored), and which of the labelled ones
    ``end`` an answer or a text. The first token is never labelled: nothing predicts it."""

    ids: tuple[int, ...]
    labelled: tuple[bool, ...]
    end: tuple[bool, ...]

    @property
    def n_labelled(self) -> int:
        return sum(self.labelled)

    def cut(self, length: int) -> Encoded:
        """The first ``length`` tokens."""
        return Encoded(self.ids[:length], self.labelled[:length], self.end[:length])


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
    ``TEMPLATES``, or a Jinja file. ``system`` is put before conversations that do not open with a system turn of their
    own, so that a template which would insert a default one does not.

    Raises: UsageProblem (2) for ``chat`` without a chat template, MissingInput (66) for a file that is not there,
    BadData (65) for one that is not a working template.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.name, self.source = _resolve(tokenizer, template)
        self._controls = _Controls(tokenizer, self._probe(template))

    # -- rendering ----------------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The conversation as text; with ``generation`` the assistant's turn has been opened.

        Raises: BadData where the template refuses the conversation or fails.
        """
        # What apply_chat_template calls: unlike that, it takes the empty conversation before an opening answer.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[self._with_system(messages)], chat_template=self.source,
                add_generation_prompt=generation, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BadData(
                f"the template {self.name} refuses this conversation: {reason}", "try --template qa", field="$.messages"
            ) from error
        return rendered[0]

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """What generation continues, as text."""
        return self.render(messages, generation=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What generation continues, as ids; earlier answers are tokenised as training sees them.

        Where the template's prefixes do not nest the whole prompt is tokenised at once.
        """
        marked, hidden = self._controls.hide(self._with_system(messages))
        builder = _Builder()
        opened = self.render(marked, generation=True)
        try:
            rendered = self._turns(builder, marked, hidden, learn=lambda _: False)
            if not opened.startswith(rendered):
                raise _does_not_nest()
        except BadData:
            return self._controls.ids(opened, hidden)
        builder.add(self._controls.ids(opened[len(rendered) :], hidden, first=not builder.ids), False)
        return builder.ids

    def continued(self, messages: Sequence[Message], beginning: str) -> list[int]:
        """What generation continues where the answer's ``beginning`` is given; nothing in that is a control token."""
        ids = self.prompt(messages)
        return ids + self._controls.plain_ids(beginning, first=not ids)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        mark = _mark()
        found = None
        try:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
            found = self._controls.first(self.render(turns, generation=False).partition(mark)[2])
        except BadData:
            pass  # a template that refuses such a conversation tells nothing
        ids = (found and self.tokenizer.convert_tokens_to_ids(found.group()), self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(id for id in ids if id is not None))

    # -- encoding -----------------------------------------------------------------------------------------------------
    def encode(
        self, messages: Sequence[Message], *, loss_on: str = "assistant", max_length: int | None = None
    ) -> Encoded:
        """A conversation with labels on every assistant turn (``assistant``), the ``last`` one, or ``all`` tokens.

        What comes behind the last answer's end of turn is dropped, turns without an answer included. Raises BadData
        when the template's prefixes do not nest, so that labels cannot be told.
        """
        turns = self._with_system(messages)
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise BadData("no assistant turn to learn from", "add one", field="$.messages")
        marked, hidden = self._controls.hide(turns[: answers[-1] + 1])
        builder = _Builder()
        self._turns(builder, marked, hidden, learn=lambda place: loss_on != "last" or place == answers[-1])
        if loss_on == "all":
            builder.labelled = [True] * len(builder.ids)
        return builder.done(max_length)

    def encode_text(self, text: str, *, max_length: int | None = None) -> Encoded:
        """A plain text, all tokens labelled, the end-of-text token behind it."""
        builder = _Builder()
        if _adds_bos(self.tokenizer):
            builder.add([self.tokenizer.bos_token_id], False)
        builder.add(self._controls.plain_ids(text), True)
        if self.tokenizer.eos_token_id is not None:
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
    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        own = bool(messages) and messages[0]["role"] == "system"
        return [*([] if self.system is None or own else [{"role": "system", "content": self.system}]), *messages]

    def _turns(
        self, builder: _Builder, messages: Sequence[Message], hidden: Mapping[str, str], learn: Callable[[int], bool]
    ) -> str:
        """Add a conversation answer by answer up to the last one's end token; returns the text so far."""
        rendered = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, tail = self._answer_of(messages[:place], message)
            if not prompt.startswith(rendered):
                raise _does_not_nest()
            builder.add(self._controls.ids(prompt[len(rendered) :], hidden, first=not builder.ids), False)
            answer, end, consumed = self._split(tail)
            if message["content"].strip() not in answer:
                raise _does_not_nest()
            builder.add(self._controls.ids(answer, hidden, first=not builder.ids), learn(place))
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

    def _split(self, tail: str) -> tuple[str, int | None, int]:
        """``(the answer's text, id of the end token, characters up to behind it)`` of a rendered answer.

        Where the template closes an answer with no control token the tokenizer's end of text does.
        """
        found = self._controls.first(tail)
        if found is None:
            return tail, self.tokenizer.eos_token_id, len(tail)
        return tail[: found.start()], self.tokenizer.convert_tokens_to_ids(found.group()), found.end()

    def _probe(self, asked: str) -> str:
        """Render a question, so that a broken template is an error of the call and not of its first row.

        A template that merely refuses this conversation (by raise_exception) may like the rows better: "" then.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.render([{"role": "user", "content": "x"}], generation=True)
        except BadData as problem:
            error = problem.__cause__
            named = self.name in ("chat", *TEMPLATES)
            if isinstance(error, TemplateSyntaxError):
                what, line = f"not a Jinja template: {error.message}", error.lineno
            elif named or type(error) is TemplateError:
                return ""
            else:
                what, line = problem.reason, _template_line(error)
        if named:
            raise BadData(f"the model's own chat template is broken: {what}, line {line}", "try --template qa")
        raise BadData(what, "mend the template", file=asked, line=line)


class _Controls:
    """The control tokens of a template: found in its text, kept out of what messages say.

    These are the tokenizer's special tokens and those other added tokens that the template opens a turn with (some
    models have not declared theirs special). ``opened`` is a question as the template renders it.
    """

    def __init__(self, tokenizer: Any, opened: str) -> None:
        self._tokenizer = tokenizer
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content}
        undeclared = [text for text, special in added.items() if not special and not text.isspace() and text in opened]
        names = [text for text, special in added.items() if special] + undeclared
        self._any, self._undeclared = _pattern(names), _pattern(undeclared)
        # What could become a control token together with the text before or behind it.
        self._guard = self._find_guard()
        self._heads = tuple({name[:cut] for name in names for cut in range(1, len(name))})
        self._tails = tuple({name[cut:] for name in names for cut in range(1, len(name))})

    def first(self, text: str) -> re.Match[str] | None:
        """The first control token in rendered text."""
        return self._any.search(text)

    def hide(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages with marks for contents that spell out a control token, and the contents by mark.

        Space around a content stays outside its mark: templates trim it.
        """
        hidden: dict[str, str] = {}
        turns = []
        for message in messages:
            content = message["content"]
            core = content.strip()
            if self._any.search(core) or core.endswith(self._heads) or core.startswith(self._tails):
                mark = _mark()
                hidden[mark] = core
                content = content.replace(core, mark, 1)
            turns.append({"role": message["role"], "content": content})
        return turns, hidden

    def ids(self, text: str, hidden: Mapping[str, str], *, first: bool = True) -> list[int]:
        """Ids of rendered text: control tokens of the template as such, those of hidden contents as plain text.

        A text that is not the ``first`` of its row goes on from another one.
        """
        if not any(mark in text for mark in hidden):
            return self._encode(text, plain=False, first=first)
        ids: list[int] = []
        start = 0
        for control in self._any.finditer(text):
            ids += self.plain_ids(_reveal(text[start : control.start()], hidden), first=first and not ids)
            ids.append(self._tokenizer.convert_tokens_to_ids(control.group()))
            start = control.end()
        return ids + self.plain_ids(_reveal(text[start:], hidden), first=first and not ids)

    def plain_ids(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of text in which nothing is a control token."""
        # The tokenizer's own switch knows special tokens only; one that is cut in two is no longer found.
        cuts = [0, *(found.start() + 1 for found in self._undeclared.finditer(text)), len(text)]
        ids: list[int] = []
        for start, stop in pairwise(cuts):
            ids += self._encode(text[start:stop], plain=True, first=first and not ids)
        return ids

    def _encode(self, text: str, *, plain: bool, first: bool) -> list[int]:
        """Tokenizers of the SentencePiece family put a space before every text: one that goes on from another is
        spelled behind a guard, whose ids are dropped again."""
        if not text:
            return []
        if not first and self._guard:
            before, ids = self._call(self._guard, plain), self._call(self._guard + text, plain)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._call(text, plain)

    def _call(self, text: str, plain: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"]

    def _find_guard(self) -> str | None:
        """A text behind which another is spelled without an extra space; None where none is added anyway."""
        start = self._call("x", False)
        if self._tokenizer.decode(start + self._call("y", False)) == "xy":
            return None
        for guard in ("\n", "\t", "~", "."):
            before, ids = self._call(guard, False), self._call(guard + "y", False)
            if ids[: len(before)] == before and self._tokenizer.decode(start + ids[len(before) :]) == "xy":
                return guard
        return None


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Finds any of ``names``, the longest at a place; nothing where there are none."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _mark() -> str:
    """A private text of no meaning to a template. Digits, so that it stays itself in upper and lower case."""
    return f"\ue000{secrets.randbits(64):020d}\ue001"


def _reveal(text: str, hidden: Mapping[str, str]) -> str:
    for mark, content in hidden.items():
        text = text.replace(mark, content)
    return text


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
        return template, ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + TEMPLATES[template]
    path = Path(template)
    if not path.is_file():
        raise MissingInput(f"--template {template}: neither a known template nor a file", "auto, chat, qa, llama2, raw")
    try:
        source = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadData("a template must be UTF-8 text", file=template) from None
    known = path.name in ("auto", "chat", *TEMPLATES)
    return f"./{path.name}" if known else path.name, source


def _adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a begin-of-text token before plain text, because its models expect one."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template_line(error: BaseException | None) -> int | None:
    """The line of the template that raised: jinja2 puts it into the traceback."""
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


def _does_not_nest() -> BadData:
    return BadData(
        "the chat template's prefixes do not nest, so the answer's tokens cannot be told from the prompt's",
        "use --template qa, or a Jinja file that renders every turn the same wherever it stands",
        field="$.messages",
    )
