"""Lines for people about the paths that came in: nothing is left out or taken for something else without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path as FilePath

from toolbox.landscape.data import MOST_SINGLE, Paths


def warnings(paths: Paths) -> Iterator[str]:
    """What makes a picture say less than it seems to."""
    total = len(paths.paths)
    if without := sum(not path.thoughts for path in paths.paths):
        yield f"{without} of {total} paths have no thoughts: they count as paths, but are not on the map"
    single = sum(len(path.thoughts) == 1 for path in paths.paths)
    cut = sum(len(path.thoughts) == 1 and path.cut for path in paths.paths)
    if cut and single > MOST_SINGLE * total and paths.wording.split == "line":
        yield f"{single} of {total} paths have a single thought: --split sentence cuts them further"
    if paths.strangers:
        yield f"{paths.strangers} rows have a `pred` that is none of the choices: taken for no answer"
    unknown = sum(paths.questions[path.question].gold < 0 for path in paths.paths)
    if unknown:
        yield f"{unknown} of {total} paths have no `answer` to compare with: no right or wrong for them"


def notes(paths: Paths, model: str | None) -> Iterator[str]:
    """What is good to know; ``model`` is the one that scores, None where nothing is scored."""
    sizes = Counter(len(paths.questions[path.question].answers) for path in paths.paths)
    if len(sizes) > 1:
        told = ", ".join(f"{sizes[k]} paths with {k} choices" for k in sorted(sizes))
        yield f"one map for each number of choices: {told}"
    if model is None:
        return
    texts: dict[int, set[object]] = {}
    for path in paths.paths:
        texts.setdefault(path.question, set()).add(path.asking)
    if several := sum(len(found) > 1 for found in texts.values()):
        yield f"{several} questions are asked in several ways: the start drawn is that of the first path of each"
    own = {path.facets["model"] for path in paths.paths} - {None}
    names = {FilePath(name).name for name in own if name is not None}
    if own and names != {FilePath(model).name}:
        told = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        yield f"the paths are of {told}; {FilePath(model).name} scores them as somebody else's"
