"""What the teacher is told: a template of plain slots, read strictly, and the turns that it makes of a pair."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from toolbox.coca.record import FIELDS, Decision, Field, Grammar, neutralise
from toolbox.coca.words import words
from toolbox.shell.errors import BadData, MissingInput

MAX_TEMPLATE = 1 << 20
BUILT_IN = "coca-v1"

Turns = tuple[dict[str, str], ...]


class _Gloss(msgspec.Struct, forbid_unknown_fields=True):
    think: str
    concept: str
    check: str
    erase: str
    response: str


class _Decision(msgspec.Struct, forbid_unknown_fields=True):
    refuse: str
    comply: str


class _Hint(msgspec.Struct, forbid_unknown_fields=True):
    harmful: str = ""
    benign: str = ""


class _Shot(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    answer: str
    label: Literal["harmful", "benign"]
    think: str
    concept: str
    check: str


class _File(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    system: str
    gloss: _Gloss
    ask: str
    decision: _Decision
    refusal: str
    hint: _Hint = msgspec.field(default_factory=_Hint)
    context: str = "{turns}\n"
    again: str = "{rules}\n"
    student: str = ""
    shots: list[_Shot] = msgspec.field(default_factory=list)


def filled(text: str, slots: Mapping[str, str]) -> str:
    """``{name}`` replaced by what ``slots`` has for it, once: what is put in is not looked at again."""
    return re.sub(r"\{([a-z]+)\}", lambda found: slots.get(found[1], found[0]), text)


@dataclass(frozen=True)
class Template:
    """A template with the tags of a run."""

    file: _File
    digest: str
    grammar: Grammar
    few_shot: int = 2

    @property
    def name(self) -> str:
        """``coca-v1@`` and eight digits of the hash of the file."""
        return f"{self.file.id}@{self.digest[:8]}"

    @property
    def refusal(self) -> str:
        return self.file.refusal

    def sentence(self, decision: Decision) -> str:
        """The fourth tag's text."""
        return self.file.decision.refuse if decision == "refuse" else self.file.decision.comply

    @cached_property
    def glosses(self) -> frozenset[str]:
        """The glosses in plain words."""
        return frozenset(" ".join(words(getattr(self.file.gloss, field))) for field in FIELDS)

    @property
    def guidelines(self) -> str:
        """What a model is told that was not trained: the system turn of ``coca-eval --prompt-only``."""
        return filled(self.file.student, {"skeleton": self.skeleton("response")}).strip()

    def skeleton(self, last: Field) -> str:
        """The tags up to ``last`` with a gloss in each."""
        fields = FIELDS[: FIELDS.index(last) + 1]
        return "\n".join(self.grammar.block(field, getattr(self.file.gloss, field)) for field in fields)

    def turns(
        self,
        prompt: str,
        answer: str,
        *,
        context: Sequence[Mapping[str, str]] = (),
        label: str | None = None,
        rules: Sequence[str] = (),
        last: Field = "erase",
        as_json: bool = False,
    ) -> Turns:
        """System turn, examples, and the pair, with tags in it made harmless. ``last`` is the last tag to be written;
        ``as_json`` shows the examples, and asks for the answer, as the JSON object of `json_text`."""
        skeleton = JSON_SKELETON if as_json else self.skeleton(last)
        turns = [{"role": "system", "content": filled(self.file.system, {"skeleton": skeleton}).strip()}]
        for shot in self.file.shots[: self.few_shot]:
            turns.append({"role": "user", "content": self._ask(shot.prompt, shot.answer, (), None, ())})
            turns.append({"role": "assistant", "content": self._shown(shot, last, as_json)})
        turns.append({"role": "user", "content": self._ask(prompt, answer, context, label, rules)})
        return tuple(turns)

    def _ask(
        self, prompt: str, answer: str, context: Sequence[Mapping[str, str]], label: str | None, rules: Sequence[str]
    ) -> str:
        earlier = "\n".join(f"{turn['role']}: {turn['content']}" for turn in context)
        slots = {
            "prompt": neutralise(prompt, self.grammar),
            "answer": neutralise(answer, self.grammar),
            "context": filled(self.file.context, {"turns": neutralise(earlier, self.grammar)}) if earlier else "",
            "hint": getattr(self.file.hint, label) if label else "",
            "again": filled(self.file.again, {"rules": " ".join(rules)}) if rules else "",
        }
        return filled(self.file.ask, slots).strip()

    def _shown(self, shot: _Shot, last: Field, as_json: bool) -> str:
        decision: Decision = "refuse" if shot.label == "harmful" else "comply"
        if as_json:
            return json_text(shot.think, shot.concept, shot.check, decision)
        texts = {
            "think": shot.think, "concept": shot.concept, "check": shot.check, "erase": self.sentence(decision),
            "response": shot.answer,
        }  # fmt: skip
        fields = FIELDS[: FIELDS.index(last) + 1]
        return "\n".join(self.grammar.block(field, texts[field]) for field in fields)


JSON_SKELETON = '{"think": "...", "concept": ["..."], "check": ["..."], "decision": "refuse or comply"}'
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "think": {"type": "string"},
        "concept": {"type": "array", "items": {"type": "string"}},
        "check": {"type": "array", "items": {"type": "string"}},
        "decision": {"type": "string", "enum": ["refuse", "comply"]},
    },
    "required": ["think", "concept", "check", "decision"],
    "additionalProperties": False,
}


def json_text(think: str, concept: str, check: str, decision: Decision) -> str:
    """A record's reasoning as the JSON object that ``--decode json`` asks for."""
    listed = [item.strip() for item in concept.split(",")]
    unsafe = [] if check.strip().lower() == "none" else [item.strip() for item in check.split(",")]
    said = {"think": think, "concept": listed, "check": unsafe, "decision": decision}
    return msgspec.json.encode(said).decode()


# -- reading ----------------------------------------------------------------------------------------------------------
def load_template(name: str, grammar: Grammar, few_shot: int) -> Template:
    """``coca-v1``, or a YAML file of the same keys.

    Raises: MissingInput (66), BadData (65) for a file that is none, a shot that breaks the grammar among them.
    """
    path = Path(__file__).with_name(f"{BUILT_IN}.yaml") if name == BUILT_IN else Path(name)
    try:
        with path.open("rb") as handle:
            text = handle.read(MAX_TEMPLATE + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInput(f"--template {name}: no such template", f"{BUILT_IN}, or a YAML file") from None
    shown = path.name
    if len(text) > MAX_TEMPLATE:
        raise BadData(f"larger than {MAX_TEMPLATE:,} bytes", file=shown)
    try:
        file = msgspec.convert(_plain_yaml(text, shown), _File)
    except msgspec.ValidationError as error:
        what, _, field = str(error).partition(" - at `")
        raise BadData(what, "coca-refactor --print-template shows one", file=shown, field=field.rstrip("`")) from None
    template = Template(file, hashlib.sha256(text).hexdigest(), grammar, few_shot)
    for field in ("{prompt}", "{answer}"):
        if field not in file.ask:
            raise BadData(f"`ask` has no slot {field}", "the teacher reads both", file=shown, field="$.ask")
    try:
        template.turns("x", "y", last="response")
    except ValueError as error:
        raise BadData(str(error), "tags are put around the texts by the program", file=shown) from None
    return template


def _plain_yaml(text: bytes, shown: str) -> object:
    """YAML without anchors, aliases and tags: they are refused before anything is built."""
    import yaml

    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise BadData("anchors, aliases and tags are not allowed", file=shown, line=event.start_mark.line + 1)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or error
        raise BadData(f"not valid YAML: {what}", file=shown, line=mark.line + 1 if mark else None) from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise BadData(f"not valid YAML: {error}", file=shown) from None


def template_text() -> str:
    """The built-in template as it stands in its file."""
    return Path(__file__).with_name(f"{BUILT_IN}.yaml").read_text(encoding="utf-8")
