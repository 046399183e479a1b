"""Records as they come in: JSON lines or one JSON array, validated at the edge, unknown fields kept.

Every complaint names the place: ``FILE:LINE: $.field: what``. Schemas are msgspec Structs; a command says which
shapes it takes and each record is checked against the first shape whose defining fields it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import msgspec

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.streams import MAX_LINE, Streams, damaged_is_bad_data, display_name, iter_lines, open_source

MAX_ARRAY = 1 << 30
"""Largest accepted JSON array in bytes; lines have no such bound."""

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"

MAX_DEPTH = 64
"""Deepest accepted nesting: what goes out must be readable by any other tool."""

Text = Annotated[str, msgspec.Meta(min_length=1)]
Identifier = str | int | None


class Message(msgspec.Struct):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TrainingRow(msgspec.Struct, kw_only=True):
    """What any row of training data may carry beside its text: a label that some trainers balance by; the next three
    serve unlearning."""

    id: Identifier = None
    alternate: Annotated[Text | None, msgspec.Meta(description="what to answer instead, a refusal say")] = None
    key_words: Annotated[
        list[Text] | Text | None, msgspec.Meta(description="words of the answer that matter, or all of them joined")
    ] = None
    weight: Annotated[float, msgspec.Meta(gt=0)] | None = None
    label: Any = None


class QuestionAnswer(TrainingRow, kw_only=True):
    """A question and its answer, as in TOFU."""

    needs: ClassVar[tuple[str, ...]] = ("question", "answer")
    question: Text
    answer: Text


class PromptCompletion(TrainingRow, kw_only=True):
    """A prompt and its completion, as in TRL."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    prompt: Text
    completion: Text


class Conversation(TrainingRow, kw_only=True):
    """Turns with roles."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]


class Instruction(TrainingRow, kw_only=True):
    """An instruction, perhaps with an input, and its output, as in Alpaca."""

    needs: ClassVar[tuple[str, ...]] = ("instruction", "output")
    instruction: Text
    input: str | None = None
    output: Text


class SharedTurn(msgspec.Struct, rename={"speaker": "from"}):
    """One turn of a shared conversation."""

    speaker: Literal["system", "human", "gpt", "user", "assistant", "tool"]
    value: str


class SharedConversation(TrainingRow, kw_only=True):
    """Turns with speakers, as in ShareGPT."""

    needs: ClassVar[tuple[str, ...]] = ("conversations",)
    conversations: Annotated[list[SharedTurn], msgspec.Meta(min_length=1)]


class PlainText(TrainingRow, kw_only=True):
    """A text without roles."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    text: Text


class Prompt(msgspec.Struct):
    """Something to complete, as one string."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    prompt: Text
    id: Identifier = None
    variant: str | None = None


class PromptMessages(msgspec.Struct):
    """Something to complete, as turns; where a ``prompt`` stands beside it, it serves models without chat template."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    prompt: Text | None = None
    id: Identifier = None
    variant: str | None = None


class Path(msgspec.Struct):
    """A completed prompt: the row that came in, and what a model wrote. One line a sample."""

    id: str
    path_id: Annotated[str, msgspec.Meta(description="id/sample, or id/variant/sample")]
    sample: int
    model: str
    completion: str
    finish_reason: Literal["stop", "length", "error"]
    n_prompt_tokens: int
    n_completion_tokens: int
    logprobs: list[float] | None = None


TRAINING_SHAPES: tuple[type[msgspec.Struct], ...] = (Conversation, QuestionAnswer, PromptCompletion, PlainText)
"""What can be learned from or unlearned."""

ANSWER_SHAPES: tuple[type[msgspec.Struct], ...] = (
    Conversation, QuestionAnswer, PromptCompletion, Instruction, SharedConversation,
)  # fmt: skip
"""Rows that hold an answer to learn, in every spelling that safety data comes in."""

PROMPT_SHAPES: tuple[type[msgspec.Struct], ...] = (PromptMessages, Prompt)
"""What can be completed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One validated record: ``data`` is what came in (renamed by ``--map``), ``value`` its typed form.

    ``line`` is None for the elements of an array; ``index`` counts the records of the source from 0, bad ones too.
    """

    data: dict[str, Any]
    value: Any
    id: str
    file: str
    line: int | None
    index: int

    def bad(self, what: str, advice: str | None = None, field: str | None = None) -> BadData:
        """A complaint about this record, to be raised by whoever finds it."""
        if self.line is None:  # an element of an array
            field = f"$[{self.index}]" + (field or "").removeprefix("$")
        return BadData(what, advice, file=self.file, line=self.line, field=field)


@dataclass(frozen=True, slots=True)
class Row:
    """A training row in one form: ``messages`` (role and content) or ``text``; ``shape`` tells which it was."""

    id: str
    messages: tuple[dict[str, str], ...] | None
    text: str | None
    shape: str
    file: str
    line: int | None
    alternate: str | None = None
    key_words: tuple[str, ...] | str | None = None
    weight: float | None = None
    index: int = 0
    label: Any = None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else self.file


def training_row(record: Record) -> Row:
    """The training row in a record of one of ``TRAINING_SHAPES`` or ``ANSWER_SHAPES``."""
    value = record.value
    messages: tuple[dict[str, str], ...] | None = None
    text = None
    match value:
        case QuestionAnswer():
            messages = (_turn("user", value.question), _turn("assistant", value.answer))
        case PromptCompletion():
            messages = (_turn("user", value.prompt), _turn("assistant", value.completion))
        case Conversation():
            messages = tuple(_turn(message.role, message.content) for message in value.messages)
            if not any(message["role"] == "assistant" for message in messages):
                raise record.bad("no assistant turn to learn from", "add one, or use `text`", "$.messages")
        case Instruction():
            asked = f"{value.instruction}\n{value.input}" if value.input else value.instruction
            messages = (_turn("user", asked), _turn("assistant", value.output))
        case SharedConversation():
            messages = tuple(_turn(_ROLES.get(turn.speaker, turn.speaker), turn.value) for turn in value.conversations)
            if not any(message["role"] == "assistant" for message in messages):
                raise record.bad("no assistant turn to learn from", "add one", "$.conversations")
        case PlainText():
            text = value.text
    words = tuple(value.key_words) if isinstance(value.key_words, list) else value.key_words
    shape = type(value).__name__
    return Row(
        record.id, messages, text, shape, record.file, record.line, value.alternate, words, value.weight, record.index,
        value.label,
    )  # fmt: skip


_ROLES = {"human": "user", "gpt": "assistant"}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """``("question=text", "answer=labels")`` as ``{"text": "question", "labels": "answer"}`` (old name to new)."""
    renames: dict[str, str] = {}
    for pair in (part for group in pairs for part in group.split(",") if part):
        new, equals, old = pair.partition("=")
        if not (equals and new and old):
            raise UsageProblem(f"--map {pair}: expected NEW=OLD", "as in --map question=text,answer=labels")
        if old in renames or new in renames.values():
            raise UsageProblem(f"--map {pair}: a field is renamed twice")
        renames[old] = new
    return renames


def _depth(value: Any, limit: int) -> bool:
    if isinstance(value, dict):
        return limit > 0 and all(_depth(item, limit - 1) for item in value.values())
    if isinstance(value, list):
        return limit > 0 and all(_depth(item, limit - 1) for item in value)
    return True


def decode(raw: bytes | msgspec.Raw, file: str, line: int | None, field: str | None = None) -> dict[str, Any]:
    """One JSON object from bytes; BadData with the place otherwise."""

    def bad(what: str, advice: str | None = None) -> BadData:
        return BadData(what, advice, file=file, line=line, field=field)

    try:
        data = msgspec.json.decode(raw)
    except RecursionError:
        raise bad("nested too deeply") from None
    except UnicodeDecodeError:
        raise bad("not UTF-8 text", "convert the file to UTF-8") from None
    except msgspec.MsgspecError as error:
        reason = str(error).split(" - at ")[0]
        raise bad(f"not valid JSON: {reason}", "one JSON object a line, or one array of objects") from None
    if not isinstance(data, dict):
        raise bad(f"expected an object, got {type(data).__name__}", "one JSON object a line, or one array of objects")
    text = bytes(raw)
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and not _depth(data, MAX_DEPTH):  # seldom worth the walk
        raise bad(f"nested more than {MAX_DEPTH} levels deep")
    return data


def _skip_space(handle: BinaryIO) -> tuple[int, bytes]:
    """Step over a byte-order mark and white space; the lines passed and what comes first (empty at the end)."""
    lines, mark = 0, _BOM
    while head := handle.peek(1):  # type: ignore[attr-defined]
        rest = head.removeprefix(mark).lstrip(_SPACE)
        lines += handle.read(len(head) - len(rest)).count(b"\n")
        if rest:
            return lines, rest[:1]
        mark = b""  # a pipe may give no more than white space at first
    return lines, b""


def _elements(handle: BinaryIO, name: str) -> Iterator[tuple[int | None, str | None, bytes | msgspec.Raw]]:
    """``(line, field prefix, raw JSON)`` of each record: a first byte ``[`` means one array, else lines."""
    with damaged_is_bad_data(name):
        passed, first = _skip_space(handle)
    if first != b"[":
        for number, line in iter_lines(handle, name, passed=passed):
            yield number, None, line
        return
    with damaged_is_bad_data(name):
        whole = handle.read(MAX_ARRAY + 1)
    if len(whole) > MAX_ARRAY:
        raise BadData(f"a JSON array of more than {MAX_ARRAY:,} bytes", "use JSON lines: jq -c '.[]'", file=name)
    try:
        raws = msgspec.json.decode(whole, type=list[msgspec.Raw])
    except RecursionError:
        raise BadData("nested too deeply", file=name) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadData(f"not valid JSON: {error}", "one JSON object a line, or one array", file=name) from None
    del whole
    for position, raw in enumerate(raws):
        yield None, f"$[{position}]", raw


class RecordReader:
    """Reads records of the given shapes; counts what it skipped.

    ``on_bad="skip"`` leaves bad records out and hands each one, as it came and with the complaint, to ``rejects``
    where that is given; ``"fail"`` raises at the first. ``renames`` maps old field names to new ones.
    """

    def __init__(
        self,
        shapes: Sequence[type[msgspec.Struct]],
        *,
        renames: dict[str, str] | None = None,
        on_bad: str = "fail",
        rejects: Callable[[bytes, BadData], None] | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.renames = renames or {}
        self.on_bad = on_bad
        self.rejects = rejects
        self.skipped = 0
        self.read = 0

    def __call__(self, handle: BinaryIO, name: str) -> Iterator[Record]:
        """Yield the records of one open source; ``name`` is what messages call it."""
        name = display_name(name)
        for index, (line, prefix, raw) in enumerate(_elements(handle, name)):
            try:
                record = self._record(raw, name, line, prefix, index)
            except BadData as problem:
                self.bad(problem, bytes(raw))
                continue
            self.read += 1
            yield record

    def bad(self, problem: BadData, raw: bytes) -> None:
        """Deal with a bad record by ``on_bad``: raise, or count it and write it to the rejects."""
        if self.on_bad == "fail":
            raise problem from None
        self.skipped += 1
        if self.rejects is not None:
            self.rejects(raw, problem)

    def _record(self, raw: bytes | msgspec.Raw, name: str, line: int | None, prefix: str | None, index: int) -> Record:
        if len(raw) > MAX_LINE:
            raise BadData(f"a record of more than {MAX_LINE:,} bytes", file=name, line=line, field=prefix)
        data = self._renamed(decode(raw, name, line, prefix), name, line, prefix)
        shape = self._shape(data, name, line, prefix)
        try:
            value = msgspec.convert(data, shape)
        except msgspec.ValidationError as error:
            what, at, place = str(error).rpartition(" - at `")  # the last one: a quoted value may hold another
            field = (prefix or "$") + place.rstrip("`").removeprefix("$") if at else prefix
            raise BadData(what if at else place, None, file=name, line=line, field=field) from None
        identifier = getattr(value, "id", None)
        return Record(data, value, str(line or index + 1) if identifier is None else str(identifier), name, line, index)

    def _renamed(self, data: dict[str, Any], name: str, line: int | None, prefix: str | None) -> dict[str, Any]:
        if self.renames.keys().isdisjoint(data):
            return data
        renamed: dict[str, Any] = {}  # all at once, so that two fields may swap their names
        for old, value in data.items():
            new = self.renames.get(old, old)
            if new in renamed:
                raise BadData(f"--map would overwrite `{new}`", file=name, line=line, field=prefix)
            renamed[new] = value
        return renamed

    def _shape(self, data: dict[str, Any], name: str, line: int | None, prefix: str | None) -> type[msgspec.Struct]:
        for shape in self.shapes:
            if all(data.get(need) is not None or (need in data and need in blank(shape)) for need in needs(shape)):
                return shape
        wanted = ", or ".join("+".join(needs(shape)) for shape in self.shapes)
        found = ", ".join(f"{key} (null)" if data[key] is None else key for key in sorted(data)[:12]) or "none"
        raise BadData(
            f"no known shape: expected {wanted}; found fields: {found}",
            "rename fields with --map new=old",
            file=name,
            line=line,
            field=prefix,
        )


def needs(shape: type[msgspec.Struct]) -> tuple[str, ...]:
    """The fields that tell records of this shape."""
    return shape.needs  # type: ignore[attr-defined]


def blank(shape: type[msgspec.Struct]) -> tuple[str, ...]:
    """Those of them that may be null: elsewhere a field that is null counts as absent."""
    return getattr(shape, "may_be_null", ())


def read_records(name: str, streams: Streams, reader: RecordReader, role: str = "the input") -> Iterator[Record]:
    """Open ``name`` (or stdin for ``-``) and yield its records."""
    with open_source(name, streams, role) as handle:
        yield from reader(handle, name)


def write_rejects(path: str, rejected: Sequence[bytes]) -> None:
    """Write skipped records as they came, one a line (the line breaks inside an element of an array become spaces)."""
    from toolbox.shell.files import atomic_file

    with atomic_file(path) as handle:
        handle.writelines(raw.replace(b"\n", b" ") + b"\n" for raw in rejected)


def json_schema(shapes: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    """The JSON Schema of records that have any one of ``shapes``."""
    (schemas, components) = msgspec.json.schema_components(tuple(shapes), ref_template="#/$defs/{name}")
    for definition in components.values():  # unknown fields pass through
        definition.setdefault("additionalProperties", True)
    return {"anyOf": list(schemas), "$defs": components}
