"""Which stage a round belongs to: the language model's lists first, the same targets once more, then a score.

Source: LeGIT, Li et al., "Can Large Language Models Help Experimental Design for Causal Discovery?" (arXiv 2503.01139),
section 4. Of its settings the numbers of rounds, of votes and the second question are not published: those here are
reconstructions. A plan grows when a round needs it, so a question is asked only when its turn has come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from toolbox.legit.data import Variable
from toolbox.legit.prompts import Ballot, Sheet, count_votes, fill, read_template, reader
from toolbox.legit.records import Stage
from toolbox.legit.scores import NUMERIC
from toolbox.models.generate import TextRequest
from toolbox.shell.errors import BadData, Unavailable, UsageProblem

Ask = Callable[[Sequence[TextRequest]], Sequence[str]]
"""Texts for requests, in order; what it raises goes through."""

SHORTEST = 20
"""Rounds below which a language model's lists do not pay off in the published curves."""


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Who plans the first rounds. ``strategy`` is X, legit+X, plan+X or llm-only, X one of ``NUMERIC``."""

    strategy: str = "git"
    n_warmup: int = 3
    n_bootstrap: int = 2
    resample: str = "all"
    ask: int = 5
    self_consistency: int = 5
    redraws: int = 2
    show_edges: bool = False
    allow_repeat: bool = False
    anonymise: bool = False
    on_llm_error: str = "auto"
    prompt_warmup: str | None = None
    prompt_bootstrap: str | None = None
    plan: tuple[str, ...] = ()

    @property
    def planner(self) -> str:
        """``legit``, ``plan``, ``llm-only``, or nothing."""
        first, plus, _ = self.strategy.partition("+")
        return first if plus or first == "llm-only" else ""

    @property
    def numeric(self) -> str:
        """The score of the last stage; llm-only falls back on round-robin."""
        return "round-robin" if self.strategy == "llm-only" else self.strategy.partition("+")[2] or self.strategy

    @property
    def asks(self) -> bool:
        """Whether a language model is asked."""
        return self.planner == "llm-only" or (self.planner == "legit" and not self.plan)

    def check(self) -> None:
        """UsageProblem (2) for a strategy that is not known, or a plan without its list."""
        if self.strategy == "llm-only":
            return
        if self.planner not in ("", "legit", "plan") or self.numeric not in NUMERIC:
            known = ", ".join(NUMERIC)
            raise UsageProblem(f"strategy {self.strategy}: not known", f"{known}; legit+X, plan+X, llm-only")
        if self.planner == "plan" and not self.plan:
            raise UsageProblem(f"strategy {self.strategy} needs --plan", "a file with a list of names")


class Entry(msgspec.Struct):
    """What one round of the plan is: a stage and its target, or a numeric round and why."""

    stage: Stage
    name: str | None
    votes: int | None = None
    fallback: str | None = None


class Plan(msgspec.Struct):
    """The rounds planned so far, which stages are done, and how the answers were: kept in the state."""

    entries: list[Entry] = []
    done: list[str] = []
    answers: int = 0
    empty: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Now:
    """What a round knows: targets that can be had, those of the experiments so far in order, believed edges."""

    allowed: Sequence[int]
    tried: Sequence[int]
    edges: Sequence[tuple[int, int]]


class Planner:
    """Grows a plan round by round. ``ask`` is called with requests whose texts it returns."""

    def __init__(self, options: StageOptions, variables: Sequence[Variable], seed: int, plan: Plan) -> None:
        self.options, self.variables, self.seed, self.plan = options, variables, seed, plan
        self._place = {one.name: place for place, one in enumerate(variables)}

    def entry(self, number: int, now: Now, ask: Ask | None) -> Entry | None:
        """The plan's word on round ``number`` (from 1); None where a score decides."""
        if not self.options.planner:
            return None
        self._grow(number, now, ask)
        entries = self.plan.entries
        if self.options.planner == "llm-only" and entries and entries[0].name is not None:
            turns = [entries[(number - 1 + more) % len(entries)] for more in range(len(entries))]
            entry: Entry | None = next((one for one in turns if self._place[one.name or ""] in now.allowed), None)
            return entry or Entry("numeric", None, fallback="unavailable")
        if number > len(entries):
            return None
        entry = entries[number - 1]
        if entry.name is not None and self._place[entry.name] not in now.allowed:
            return Entry("numeric", None, fallback="unavailable")
        return entry

    def next_question(self, number: int) -> str | None:
        """The question that round ``number`` would put: warmup, bootstrap, again, list, or None."""
        options, done = self.options, self.plan.done
        if not options.asks or number <= len(self.plan.entries):
            return None
        if options.planner == "llm-only":
            return None if "list" in done else "list"
        for stage, rounds in (("warmup", options.n_warmup), ("bootstrap", options.n_bootstrap)):
            if stage not in done and rounds:
                return stage
        return "again" if options.resample == "agreed" and "resample" not in done and self._named() else None

    # -- growing ------------------------------------------------------------------------------------------------------
    def _grow(self, number: int, now: Now, ask: Ask | None) -> None:
        options, plan = self.options, self.plan
        while number > len(plan.entries):
            if options.planner == "llm-only":
                if "list" in plan.done:
                    return
                self._add("list", "warmup", len(self.variables), now, ask)
            elif options.plan and "plan" not in plan.done:
                wanted = options.plan[: options.n_warmup + options.n_bootstrap]
                plan.entries += [Entry("plan", name) for name in wanted]
                plan.done.append("plan")
            elif not options.plan and "warmup" not in plan.done:
                self._add("warmup", "warmup", options.n_warmup, now, ask)
            elif not options.plan and "bootstrap" not in plan.done:
                self._add("bootstrap", "bootstrap", options.n_bootstrap, now, ask)
            elif "resample" not in plan.done:
                names = self._repeated(now, ask)
                plan.entries += [Entry("resample", name) for name in names]
                plan.done.append("resample")
            else:
                return

    def _named(self) -> list[str]:
        return [one.name for one in self.plan.entries if one.name is not None]

    def _repeated(self, now: Now, ask: Ask | None) -> list[str]:
        """The targets that are sampled once more."""
        names = self._named()
        if self.options.resample == "none" or not names:
            return []
        if self.options.resample == "all" or self.options.plan:
            return names
        ballot, _ = self._vote("again", now, ask)
        again = {self.variables[one].name for one in ballot.order[: self.options.ask]} if ballot else set()
        return [name for name in names if name in again]

    def _add(self, kind: str, stage: Stage, rounds: int, now: Now, ask: Ask | None) -> None:
        """Ask ``kind`` and plan up to ``rounds`` rounds; the missing ones become numeric."""
        self.plan.done.append(kind)
        if rounds == 0:
            return
        ballot, trouble = self._vote(kind, now, ask)
        excluded = set(self._tried(now)) if kind == "bootstrap" and not self.options.allow_repeat else set()
        votes = dict(zip(ballot.order, ballot.votes, strict=True)) if ballot else {}
        chosen = [one for one in votes if one in now.allowed and one not in excluded][:rounds]
        self.plan.entries += [Entry(stage, self.variables[one].name, votes[one]) for one in chosen]
        if kind == "list" and chosen:
            return
        reason = trouble or ("too-few-names" if votes else "no-valid-name")
        missing = rounds - len(chosen) if kind != "list" else 1
        self.plan.entries += [Entry("numeric", None, fallback=reason) for _ in range(missing)]

    # -- asking -------------------------------------------------------------------------------------------------------
    def request_id(self, kind: str) -> str:
        """What a question is called in logs: stored responses are found by it."""
        return f"legit-{self.seed}-{kind}"

    def prompt(self, kind: str, now: Now) -> str:
        """The text of a question."""
        options = self.options
        path, stem = (
            (options.prompt_bootstrap, "bootstrap") if kind == "bootstrap" else (options.prompt_warmup, "warmup")
        )
        sheet = Sheet.of(self.variables, self.seed, anonymise=options.anonymise)
        ask = len(self.variables) if kind == "list" else min(options.ask, len(self.variables))
        edges = now.edges if options.show_edges and kind == "bootstrap" else None
        return fill(read_template(path, stem), sheet, ask, self._tried(now), edges)

    def _tried(self, now: Now) -> list[int]:
        """The targets of the rounds planned so far, each once: what a question may count on, asked then or later."""
        return list(dict.fromkeys(now.tried[: len(self.plan.entries)]))

    def _vote(self, kind: str, now: Now, ask: Ask | None) -> tuple[Ballot | None, str | None]:
        """The ballot of ``self_consistency`` answers, or why there is none."""
        if ask is None:
            raise UsageProblem(f"strategy {self.options.strategy} needs a language model", "name one with --backend")
        prompt = self.prompt(kind, now)
        read = reader(Sheet.of(self.variables, self.seed, anonymise=self.options.anonymise))
        count = self.options.self_consistency
        readings = {}
        wanted = list(range(count))
        try:
            for attempt in range(self.options.redraws + 1):
                requests = [
                    TextRequest(self.request_id(kind), None, sample + attempt * count, prompt) for sample in wanted
                ]
                for sample, text in zip(wanted, ask(requests), strict=True):
                    readings[sample] = read(text)
                wanted = [sample for sample in wanted if not readings[sample].names]
                if not wanted:
                    break
        except Unavailable:
            if self.options.on_llm_error != "numeric":
                raise
            return None, "endpoint"
        ballot = count_votes([readings[sample] for sample in range(count)])
        self.plan.answers += count
        self.plan.empty += ballot.empty
        self.plan.dropped += ballot.dropped
        if not ballot.order and self.options.on_llm_error == "fail":
            raise BadData(
                "no answer of the language model names a variable", "--on-llm-error numeric goes on without it"
            )
        return ballot, None


def read_plan(path: str, network: str | None, variables: Sequence[Variable]) -> tuple[str, ...]:
    """The names in a plan: a JSON list, one name a line, or a JSON object with a list for ``network``.

    Raises: MissingInput (66), BadData (65) for names that are no variables.
    """
    import json
    from pathlib import Path

    from toolbox.shell.errors import MissingInput

    if not Path(path).is_file():
        raise MissingInput(f"{path}: no such file", "a plan is a list of names")
    try:
        text = Path(path).read_text(encoding="utf-8")
        told = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.split("\n")
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadData(f"not a plan: {error}", "a JSON list, or one name a line", file=path) from None
    if isinstance(told, dict):
        own = told.get("networks", {}) if isinstance(told.get("networks"), dict) else {}
        found = own.get(network or "")
        told = found.get("order") if isinstance(found, dict) else None
        if told is None:
            known = ", ".join(sorted(own)) or "none"
            raise BadData(f"no list for the network {network}", f"the file has lists for: {known}", file=path)
    if not isinstance(told, list):
        raise BadData("not a plan", "a JSON list, or one name a line", file=path)
    names = [name.strip() for name in told if isinstance(name, str) and name.strip()]
    known_names = {one.name for one in variables}
    for name in names:
        if name not in known_names:
            raise BadData(f"{name} is no variable", "a plan names variables as the data does", file=path)
    if not names or len(set(names)) < len(names):
        raise BadData("a plan needs names, each once", None, file=path)
    return tuple(names)
