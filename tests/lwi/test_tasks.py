"""Classes into tasks: by order or field; what a model has learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolbox.classify.learned import learned_tasks
from toolbox.classify.manifest import Sample
from toolbox.lwi.tasks import check_new, class_order, split_by_field, split_classes
from toolbox.shell.errors import BadData, MissingInput, UsageProblem

LABELS = tuple("abcdefg")


def samples(pairs):
    return [Sample(str(i), "x.png", label, {"when": when}, f"m:{i}", None) for i, (label, when) in enumerate(pairs)]


def test_runs_of_the_order_are_as_equal_as_they_can_be():
    assert split_classes(LABELS, 3, "m").tasks == (("a", "b", "c"), ("d", "e"), ("f", "g"))
    for count in range(1, 8):
        tasks = split_classes(LABELS, count, "m").tasks
        assert tuple(label for task in tasks for label in task) == LABELS
        assert max(map(len, tasks)) - min(map(len, tasks)) <= 1
    with pytest.raises(BadData, match="7 classes cannot make 8 tasks"):
        split_classes(LABELS, 8, "m")
    with pytest.raises(UsageProblem, match="--task 3"):
        split_classes(LABELS, 3, "m").of(3, "m")
    with pytest.raises(BadData, match="one class only"):
        split_classes(LABELS, 7, "m").of(0, "m")


def test_a_field_tells_tasks_and_numbers_are_in_order_of_value():
    rows = samples([("a", 10), ("b", 9), ("c", "10"), ("d", 9), ("a", 10)])
    assert split_by_field(rows, "when", "m").tasks == (("b", "d"), ("a", "c"))
    with pytest.raises(BadData, match="m:2: class 'a' is in task 2 and in task 1"):
        split_by_field(samples([("a", 1), ("b", 1), ("a", 2)]), "when", "m")
    for lacking in (None, True, 1.5):
        with pytest.raises(BadData, match="no task in its field 'when'"):
            split_by_field(samples([("a", lacking)]), "when", "m")


def test_the_order_of_classes_is_sorted_drawn_or_listed(tmp_path: Path):
    assert class_order(LABELS, "sorted", 3) == LABELS
    drawn = class_order(LABELS, "seed", 3)
    assert drawn == class_order(LABELS, "seed", 3) != class_order(LABELS, "seed", 4)
    assert sorted(drawn) == list(LABELS)
    listed = tmp_path / "order"
    listed.write_text("\ufeffg\n\nz\n" + "\n".join(LABELS[:-1]))
    assert class_order(LABELS, str(listed), 0) == ("g", *LABELS[:-1])
    listed.write_text("a\nb\na\n")
    with pytest.raises(BadData, match="'a' stands there twice"):
        class_order(LABELS, str(listed), 0)
    listed.write_text("a\n")
    with pytest.raises(BadData, match="'b' is not in it"):
        class_order(LABELS, str(listed), 0)
    with pytest.raises(MissingInput):
        class_order(LABELS, str(tmp_path / "none"), 0)


def test_a_model_tells_what_it_has_learned():
    assert learned_tasks({}, ["x", "y"], "m") == (("x", "y"),)
    assert learned_tasks({"lwi_tasks": [["x"], ["y", "z"]]}, ["x", "y", "z"], "m") == (("x",), ("y", "z"))
    for stored in ("x", [["x"], []], [["x"]], [["x", "y"], ["y"]], [["x", "q"]]):
        with pytest.raises(BadData, match="lwi_tasks"):
            learned_tasks({"lwi_tasks": stored}, ["x", "y"], "m")
    check_new(["q"], [["x"], ["y"]], "m")
    with pytest.raises(BadData, match=r"has learned 'y', 'x' already, as its task 1"):
        check_new(["y", "q", "x"], [["x"], ["y"]], "m")
