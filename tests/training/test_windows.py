"""Windows are planned globally and shared out so that nothing depends on how."""

from __future__ import annotations

import math

import pytest

from toolbox.training.windows import Plan, Stream, share_out


def plan(count=10, batch=4, epochs=3.0, seed=0, following=()):
    return Plan(Stream("forget", count, batch), following, epochs, seed)


def test_every_epoch_sees_every_row_once_and_drops_none():
    windows = [plan().window(step) for step in range(1, 10)]
    assert plan().steps == 9
    for epoch in range(3):
        part = windows[3 * epoch : 3 * epoch + 3]
        assert sorted(row for window in part for row in window.rows["forget"]) == list(range(10))
        assert [len(window.rows["forget"]) for window in part] == [4, 4, 2]
        assert [window.ends_epoch for window in part] == [False, False, True]
    assert len({windows[0].rows["forget"], windows[3].rows["forget"], windows[6].rows["forget"]}) == 3


def test_a_window_is_a_function_of_seed_and_step_alone():
    forwards = [plan().window(step) for step in range(1, 10)]
    backwards = [plan().window(step) for step in range(9, 0, -1)]
    assert forwards == backwards[::-1]
    assert [plan(seed=1).window(step) for step in range(1, 10)] != forwards


def test_grouped_windows_hold_every_row_once_pad_less_and_depend_on_seed_and_step_alone():
    lengths = [(7 * row) % 97 for row in range(403)]
    grouped = Plan(Stream("forget", 403, 8), (), 2, 0, lengths)
    windows = [grouped.window(step).rows["forget"] for step in range(1, 103)]
    for epoch in (windows[:51], windows[51:]):
        assert sorted(row for window in epoch for row in window) == list(range(403))
        assert [len(window) for window in epoch] == [8] * 50 + [3]

    def padding(windows):
        return sum(max(lengths[row] for row in window) - lengths[row] for window in windows for row in window)

    plain = [plan(403, 8, 2).window(step).rows["forget"] for step in range(1, 103)]
    assert padding(windows) < padding(plain) / 10
    firsts = [lengths[window[0]] for window in windows[:50]]
    assert firsts != sorted(firsts, reverse=True)
    assert windows[:51] != windows[51:]
    again = Plan(Stream("forget", 403, 8), (), 2, 0, lengths)
    assert [again.window(step).rows["forget"] for step in (100, 3)] == [windows[99], windows[2]]


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 3), (1.3, 4), (1 / 3, 1), (1e-9, 1)])
def test_fractional_epochs_round_steps_up(epochs, steps):
    assert plan(epochs=epochs).steps == steps


@pytest.mark.parametrize("batch", [0, 3, 7])
def test_following_rows_cycle_through_all_before_any_returns(batch):
    retain = Stream("retain", 7, batch)
    windows = [plan(following=[retain]).window(step) for step in range(1, 10)]
    drawn = [row for window in windows for row in window.rows["retain"]]
    for window in windows:
        assert len(window.rows["retain"]) == (batch or len(window.rows["forget"]))
    for start in range(0, len(drawn) - 7, 7):
        assert sorted(drawn[start : start + 7]) == list(range(7))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_sharing_out_gives_every_row_once_and_equal_rounds(processes, max_rows):
    lengths = [5, 9, 2, 9, 30, 1, 4]
    shares = share_out(range(7), lengths, processes, max_rows, max_tokens=40)
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(7))
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        for batch in share:
            assert len(batch) <= max_rows
            assert len(batch) <= 1 or max(lengths[row] for row in batch) * len(batch) <= 40


def test_rows_are_spread_when_there_are_fewer_batches_than_processes():
    shares = share_out(range(4), [3] * 4, 4, 100)
    assert [len(share[0]) for share in shares] == [1, 1, 1, 1]
    shares = share_out(range(1), [3], 3, 100)
    assert shares == [[[0]], [[]], [[]]]


def test_batches_hold_rows_of_like_length():
    lengths = [1, 100, 2, 99, 3, 98]
    shares = share_out(range(6), lengths, 1, 3)
    padding = sum(max(lengths[r] for r in b) * len(b) - sum(lengths[r] for r in b) for b in shares[0])
    assert padding <= 6
    assert math.isclose(sum(len(batch) for batch in shares[0]), 6)
