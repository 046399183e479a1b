"""The student's tokenizer: how long a finished row is, and how it spells the tags."""

from __future__ import annotations

from typing import Any

from toolbox.coca.record import FIELDS, Grammar
from toolbox.coca.teacher import Pair


class Student:
    """Counts the tokens of a finished row under the student's chat template."""

    def __init__(self, model: str, *, trust_remote_code: bool = False) -> None:
        from toolbox.models.chat import Chat
        from toolbox.models.load import find_model, load_tokenizer, prepare

        source = find_model(model, trust_remote_code=trust_remote_code)
        prepare(source)
        self._tokenizer: Any = load_tokenizer(source, trust_remote_code=trust_remote_code)
        self._chat = Chat(self._tokenizer)

    def __call__(self, pair: Pair, text: str) -> int:
        """Tokens of the whole conversation, the record as its last answer."""
        turns = [*pair.context, {"role": "user", "content": pair.prompt}, {"role": "assistant", "content": text}]
        return len(self._chat.encode(turns).ids)

    def tags_alike(self, grammar: Grammar) -> dict[str, bool]:
        """For each tag, whether its tokens alone are its tokens inside a record."""
        found = {}
        for field in FIELDS:
            for tag in (grammar.opening(field), grammar.closing(field)):
                alone = self._ids(tag)
                inside = self._ids(f"word {tag} word\n{tag}\n")
                found[tag] = _count(inside, alone) == 2
        return found

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _count(ids: list[int], part: list[int]) -> int:
    return sum(ids[place : place + len(part)] == part for place in range(len(ids) - len(part) + 1))
