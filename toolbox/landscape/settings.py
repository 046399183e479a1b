"""landscape-plot's options, and what does not fit together in them; no numerical library."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from toolbox.landscape.wording import TEMPLATE, Wording
from toolbox.shell.errors import AlreadyReported, BadData, CannotCreate, ToolboxError, UsageProblem
from toolbox.shell.lists import comma_list

if TYPE_CHECKING:
    from toolbox.landscape.data import Paths
    from toolbox.landscape.method import LandmarkKind
    from toolbox.landscape.project import Projection

FORMATS = ("png", "svg", "pdf")

_SCORING_ONLY = ("device", "batch_tokens", "trust_remote_code", "num_processes", "accelerate")
"""Options that stored features have no use for."""

_COMPAT_SETS = ("answer_template", "context", "separator", "landmarks")


@dataclass(frozen=True, kw_only=True)
class Options:
    """landscape-plot's options; ``given`` names those that were typed or set by a recipe."""

    out: str
    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    limit: int | None = None
    overwrite: bool = False
    resume: bool = False
    features: str | None = None
    model: str = "smollm2"
    trust_remote_code: bool = False
    dtype: str = "fp32"
    device: str = "auto"
    template: str = "auto"
    system: str | None = None
    answer_template: str = TEMPLATE
    context: str = "auto"
    separator: str = "\\n"
    split: str = "line"
    drop_answer_thought: bool = False
    method: str = "tree"
    batch_tokens: int = 4096
    project: Projection = "tsne"
    perplexity: float = 10.0
    landmarks: str = "simplex"
    bins: int = 5
    density: str = "kde"
    by: str | None = None
    per_question: bool = False
    compat: str | None = None
    draw: str = "png"
    html: str | None = None
    log_text: bool = False
    seed: int = 42
    threads: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def reference(self) -> bool:
        """Whether to do as the released code does."""
        return self.compat == "reference"

    @property
    def wording(self) -> Wording:
        """How rows become texts."""
        if self.reference:
            return Wording.reference(self.split)
        return Wording(
            unescaped(self.answer_template), self.context, unescaped(self.separator), self.split,
            self.drop_answer_thought,
        )  # type: ignore[arg-type] # fmt: skip

    @property
    def landmark_kind(self) -> LandmarkKind:
        return "reference" if self.reference else self.landmarks  # type: ignore[return-value]

    @property
    def facets(self) -> tuple[str, ...]:
        """The fields of ``--by``."""
        return comma_list("by", self.by, ()) if self.by is not None else ()

    @property
    def formats(self) -> tuple[str, ...]:
        """The kinds of files of ``--draw``; none for ``none``."""
        return () if self.draw == "none" else comma_list("draw", self.draw, FORMATS, besides="none")


def unescaped(text: str) -> str:
    r"""``text`` with ``\n``, ``\t`` and ``\\`` as what they stand for: shells hand them on as they are typed."""
    pieces = text.split("\\\\")
    return "\\".join(piece.replace("\\n", "\n").replace("\\t", "\t") for piece in pieces)


@contextlib.contextmanager
def said_once(leader: bool) -> Iterator[None]:
    """Every process meets the same problem; the leader says so."""
    try:
        yield
    except ToolboxError as problem:
        if leader:
            raise
        raise AlreadyReported(problem.exit_code) from None


# --- checking ---------------------------------------------------------------------------------------------------------


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    _ = options.wording, options.facets, options.formats  # each raises for what it cannot take
    if options.reference and (given := sorted(options.given & {*_COMPAT_SETS, "drop_answer_thought"})):
        flag = "--" + given[0].replace("_", "-")
        raise UsageProblem(f"--compat reference settles {flag} itself", "leave one of them out")
    if options.features is not None:
        for name in (name for name in _SCORING_ONLY if name in options.given):
            flag = "-j" if name == "num_processes" else "--" + name.replace("_", "-")
            raise UsageProblem(f"{flag} has no use with --features, which needs no model", "leave one of them out")
        if options.features == "-":
            raise UsageProblem("--features -: stdin has the paths", "name the file")
    if options.project == "opentsne" and importlib.util.find_spec("openTSNE") is None:
        raise UsageProblem("openTSNE is not installed", "pip install openTSNE, or use --project tsne")
    if options.html is not None:
        from toolbox.landscape.html import needs_plotly

        needs_plotly()
    for name, path in (("html", options.html), ("rejects", options.rejects)):
        if path == "-":
            raise UsageProblem(f"--{name} -: stdout has the lines already", "name a file")
        if path is not None and not in_output(path, options) and not FilePath(path).absolute().parent.is_dir():
            raise CannotCreate(f"--{name} {path}: no such directory", "make it first")


def in_output(path: str, options: Options) -> bool:
    """Whether ``path`` is to lie in the output directory itself."""
    return FilePath(path).absolute().parent == FilePath(options.out).absolute()


def check_map(options: Options, paths: Paths) -> None:
    """What will not do for a map, before anything is scored."""
    drawn = paths.drawn
    if not drawn:
        raise BadData(
            f"none of {len(paths.paths)} paths has a thought", "give `thoughts`, or a `completion` that is not empty"
        )
    for name in options.facets:
        if name not in paths.seen_facets:
            first = paths.paths[0].record
            raise UsageProblem(
                f"--by {name}: no row has such a field", f"the first has {', '.join([*first.data, *first.value.meta])}"
            )
    questions = [paths.questions[number] for number in sorted(drawn)]
    for k in sorted({len(one.answers) for one in questions}):
        same = [one for one in questions if len(one.answers) == k]
        unknown = sum(one.gold < 0 for one in same)
        if unknown and len(same) > 1 and not options.per_question:
            raise UsageProblem(
                f"{unknown} of {len(same)} questions have no `answer`, so their choices cannot share a map",
                "give answers, or draw each question on its own with --per-question",
            )
        if options.landmark_kind == "reference":
            from toolbox.landscape.method import landmarks

            landmarks(k, "reference")  # raises where the released code has none
