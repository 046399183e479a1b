"""The journal: what was added is read again, and of a torn or damaged one all that was whole before."""

from __future__ import annotations

import errno
import math
import os
import random

import pytest

from toolbox.landscape.journal import Head, Journal, Scored, read_journal
from toolbox.shell.errors import BadData

HEAD = Head({"--split": "line", "versions": {"torch": "2"}}, {"model": "m"}, ["too/long"])


def scored(seed: int) -> Scored:
    draw = random.Random(seed)
    n, k = draw.randint(0, 4), draw.randint(2, 5)
    numbers = [[-draw.expovariate(0.1) for _ in range(k)] for _ in range(n + 1)]
    return Scored(numbers, [[draw.randint(1, 9)] * k for _ in numbers], [-math.pi * seed] * n, [seed] * n, "tree")


ROUNDS = [{0: scored(0)}, {3: scored(3), 1: scored(1)}, {2: scored(2)}]
EVERYTHING = {number: one for found in ROUNDS for number, one in found.items()}


@pytest.fixture
def whole(tmp_path):
    """A journal of three rounds, and where each of its frames ends."""
    path, ends = tmp_path / "step-scores", []
    with Journal(path, HEAD) as journal:
        for found in ROUNDS:
            journal.add(found)
            ends.append(path.stat().st_size)
    return path, ends


def test_what_was_added_is_read_exactly(whole):
    path, ends = whole
    contents = read_journal(path)
    assert contents.head == HEAD
    assert contents.scored == EVERYTHING
    assert contents.end == ends[-1] == path.stat().st_size


def test_it_is_in_the_systems_hands_when_add_returns(tmp_path):
    path = tmp_path / "step-scores"
    journal = Journal(path, HEAD)
    journal.add(ROUNDS[0])
    assert read_journal(path).scored == ROUNDS[0]
    journal.add(ROUNDS[1])
    assert read_journal(path).scored == {**ROUNDS[0], **ROUNDS[1]}
    journal.close()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with Journal(tmp_path / "step-scores", HEAD):
        pass
    assert list(tmp_path.iterdir()) == []
    assert read_journal(tmp_path / "step-scores") is None


def test_torn_at_any_byte_the_whole_frames_before_count_and_the_rest_is_written_again(whole):
    path, ends = whole
    content = path.read_bytes()
    first = content.index(b'too/long"]}') + len(b'too/long"]}')  # where the head ends
    for size in range(len(content)):
        path.write_bytes(content[:size])
        found = read_journal(path)
        complete = sum(end <= size for end in ends)
        if size < first:
            assert found is None
        else:
            assert found.head == HEAD
            assert found.scored == {n: one for rows in ROUNDS[:complete] for n, one in rows.items()}
        with Journal(path, HEAD, found) as journal:
            for rows in ROUNDS[complete:]:
                journal.add(rows)
        assert path.read_bytes() == content


def test_a_damaged_frame_and_what_is_behind_it_do_not_count(whole):
    path, ends = whole
    content = bytearray(path.read_bytes())
    for place in range(ends[0], ends[1]):
        content[place] ^= 0x10
        path.write_bytes(content)
        assert read_journal(path).scored == ROUNDS[0], place
        content[place] ^= 0x10


def test_a_file_of_somebody_elses_is_refused_and_kept(tmp_path):
    path = tmp_path / "step-scores"
    for other in (b"something else, and longer than ours begins", b"{}"):
        path.write_bytes(other)
        with pytest.raises(BadData, match="no journal of a scoring run"):
            read_journal(path)
        assert path.read_bytes() == other


def test_frames_of_another_version_are_refused(whole):
    import struct
    import zlib

    path, _ = whole
    body = b"\x93\x01\x02\x03"
    path.write_bytes(path.read_bytes() + struct.pack("<II", len(body), zlib.crc32(body)) + body)
    with pytest.raises(BadData, match="no journal"):
        read_journal(path)


def test_a_full_disk_is_said_by_name(tmp_path, monkeypatch):
    path = tmp_path / "step-scores"
    journal = Journal(path, HEAD)
    journal.add(ROUNDS[0])
    kept = path.stat().st_size
    write, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as error:
        journal.add(ROUNDS[1])
    monkeypatch.undo()
    journal.close()
    assert error.value.filename == str(path)
    assert path.stat().st_size == kept + 7
    assert read_journal(path).scored == ROUNDS[0]
