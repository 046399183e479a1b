"""Rows that are none, rows that lie, and rows in every wrapping: what any reader of records is given in the end."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from typing import Any

from tests.contract.commands import Case, lines
from tests.faults.bench import Bench, complaint

MALFORMED = (
    (b"{oops}\n", "stdin:1: not valid JSON"),
    (b"[1, 2]\n", "expected an object, got int"),
    (b"7\n", "stdin:1: expected an object"),
    (b'{"x": 1}\n', "no known shape"),
    (b'{"x": NaN}\n', "not valid JSON"),
    (b'{"messages": [{"role": "boss", "content": "x"}]}\n', "$.messages[0].role: Invalid enum value 'boss'"),
    (b'{"messages": 3}\n', "$.messages: Expected `array`, got `int`"),
    (b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", "nested too deeply"),
    (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}\n", "nested more than"),
    (b'{"x": "\xff"}\n', "stdin:1: not"),
    (b'{"x": "\\ud800"}\n', "stdin:1: not valid JSON"),
    (b"\xff\xfe{\x00", "UTF-16"),
    (b"\x1f\x8b\x08\x00garbage", "damaged gzip"),
    (b"\x28\xb5\x2f\xfdgarbage", "damaged zstd"),
    (b'{"x": 1', "stdin:1: not valid JSON"),
    (b"[{}", "not valid JSON"),
    (b"\x00" * 64 + b"\n", "stdin:1: not valid JSON"),
    (b'{"x": "' + b"a" * (17 << 20) + b'"}\n', "longer than"),
)  # fmt: skip
"""Bytes on stdin and what is said of them."""

VALUES = (
    None, True, 0, -1, 2**70, 1e308, 0.5, "", " ", "\x00", "\x1b[2J\x07", "\u202e\u2028", "x" * 20_000,
    "../../etc/passwd", "/dev/zero", "<|im_start|>", [], [[]], [None], {}, {"": {}}, ["a", 1, None],
)  # fmt: skip
"""What a field may hold where something else is meant."""


def malformed(bench: Bench, case: Case) -> Iterator[str]:
    """One bad text at a time: 65, its place, nothing on stdout, at once."""
    for text, says in MALFORMED:
        done = bench.run(case, stdin=text)
        told = complaint(case, done.code, done.out, done.err)
        if says.startswith("$.messages") and not case.takes_messages:
            says = "no known shape"
        assert done.code == 65, (says, done.err)
        assert told.startswith(f"{case.name}: stdin:"), told
        assert says in told
        assert done.seconds < 20
        yield says


def named_skipped_and_kept(bench: Bench, case: Case) -> Iterator[str]:
    """A bad line among good ones is named; left out and kept in a file where that is asked for."""
    bad = b'{"x": 1}\n'
    text = lines(case.good[:2]) + bad + b"\n" + lines(case.good[2:])
    failed = bench.run(case, stdin=text, folder=bench.folder("f"))
    assert failed.code == 65
    assert "stdin:3:" in failed.err
    yield "fail"
    rejects = bench.root / "rejects"
    skipped = bench.run(case, "--on-bad", "skip", "--rejects", rejects, stdin=text, folder=bench.folder("s"))
    assert skipped.code == 0, skipped.err
    assert "1 bad rows left out" in skipped.err
    assert rejects.read_bytes() == bad
    if not case.trainer:
        assert skipped.out == bench.run(case, folder=bench.folder("c")).out
    yield "skip"


def wrapped(bench: Bench, case: Case) -> Iterator[str]:
    """An array, compressed, with CRLF and a byte-order mark: the plan is the same."""
    import zstandard

    plain = lines(case.good)
    shapes = {
        "array": json.dumps(case.good).encode(),
        "gzip": gzip.compress(plain),
        "zstd": zstandard.compress(plain),
        "BOM and CRLF": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n\r\n",
    }
    expected = plan(bench, case, plain)
    for name, text in shapes.items():
        assert plan(bench, case, text) == expected, name
        yield name


def plan(bench: Bench, case: Case, text: bytes) -> dict[str, Any]:
    done = bench.run(case, "--dry-run", stdin=text)
    assert done.code == 0, done.err
    return {key: value for key, value in done.rows[0].items() if key != "settings"}


def nothing(bench: Bench, case: Case) -> Iterator[str]:
    """No rows in, no rows out, or a word about it."""
    for name, text in {"nothing": b"", "blank lines": b"\n \r\n\n"}.items():
        done = bench.run(case, stdin=text)
        assert (done.code, done.out) == (case.empty, b""), done.err
        assert case.empty == 0 or "is empty" in done.err
        yield name


def mutations(case: Case) -> list[dict]:
    """The first good row with each of its fields, and one that no command knows, as each of ``VALUES``; ids stay
    apart."""
    found = []
    for field in [*case.good[0], "of no command"]:
        for value in VALUES:
            row = copy.deepcopy(case.good[0])
            if "id" in row:
                row["id"] = f"mutated {len(found)}"
            row[field] = value
            found.append(row)
    return found


def mutated(bench: Bench, case: Case) -> Iterator[str]:
    """Rows whose fields hold anything, left out where they are bad: the run ends well, or names what it cannot take."""
    tried: list[str] = []
    _divide(bench, case, mutations(case), tried)
    yield from tried


def _divide(bench: Bench, case: Case, rows: list[dict], tried: list[str]) -> None:
    """Run the good rows and ``rows``; where a bad one is not left out but ends the run, look at each half alone."""
    folder = bench.folder(f"{len(tried)}-{len(rows)}")
    done = bench.run(case, "--on-bad", "skip", stdin=lines(case.good + rows), folder=folder)
    assert done.code in (0, 65, 66), (done.code, done.err, rows if len(rows) < 3 else len(rows))
    assert "Traceback" not in done.err, done.err
    assert "\x1b" not in done.err
    for line in done.out.splitlines():
        json.loads(line)
    if done.code == 0 or len(rows) == 1:
        tried += [str(row)[:40] for row in rows]
        return
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        _divide(bench, case, half, tried)
