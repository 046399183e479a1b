"""The tasks that a model will have learned behind a run that begins from it."""

from __future__ import annotations

import pytest

from toolbox.classify.learned import tasks_with
from toolbox.shell.errors import BadData

OLD = {"id2label": {"0": "9", "10": "c", "2": "b"}}


def test_what_is_new_becomes_a_task_behind_those_of_the_model():
    assert tasks_with(OLD, ["b", "c", "9", "d", "a"], "m") == (("9", "b", "c"), ("d", "a"))
    told = {**OLD, "lwi_tasks": [["9"], ["b", "c"]]}
    assert tasks_with(told, ["a", "b", "c", "9"], "m") == (("9",), ("b", "c"), ("a",))
    assert tasks_with(told, ["b", "c", "9"], "m") == (("9",), ("b", "c"))


def test_a_model_of_other_classes_has_learned_none_of_them():
    assert tasks_with({}, ["x", "y"], "m") == (("x", "y"),)
    assert tasks_with(OLD, ["9", "b"], "m") == (("9", "b"),)
    with pytest.raises(BadData, match="lwi_tasks"):
        tasks_with({**OLD, "lwi_tasks": [["q"]]}, ["9", "b", "c"], "m")
