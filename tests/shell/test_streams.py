"""Data comes in and leaves whole and in order, whatever libraries and callers do to stdin and stdout."""

import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc

import msgspec
import pytest
import zstandard

from tests.server import environment
from toolbox.shell.errors import BadData, InternalError, IoFailure, UsageProblem
from toolbox.shell.streams import MAX_LINE, JsonlWriter, Streams, display_name, iter_lines, open_source, process_rank

BOM = b"\xef\xbb\xbf"


def python(code, *arguments, shell="", ranks=None, **more):
    """Run ``code`` in a Python of its own, with ``shell`` behind the command (``<&-``)."""
    words = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, env={**environment(), **(ranks or {})}, capture_output=True, timeout=60, **more)


@pytest.fixture
def piped():
    """Streams whose stdin gives ``data``; a list of chunks is written with pauses between them."""
    opened = []

    def make(data):
        chunks = data if isinstance(data, list) else [data]
        read_end, write_end = os.pipe()

        def feed():
            with open(write_end, "wb", buffering=0) as handle:
                for place, chunk in enumerate(chunks):
                    time.sleep(0.05 * (place > 0))
                    try:
                        handle.write(chunk)
                    except BrokenPipeError:
                        return

        thread = threading.Thread(target=feed)
        thread.start()
        opened.append((read_end, thread))
        return Streams(stdin_fd=read_end, stdout_fd=-1)

    yield make
    for fd, thread in opened:
        os.close(fd)
        thread.join()


def content(streams, name="-"):
    with open_source(name, streams) as handle:
        return handle.read()


# --- claiming -------------------------------------------------------------------------------------------------------


def test_what_libraries_print_lands_on_stderr_and_what_they_read_is_empty():
    done = python(
        """if True:
        import os, subprocess, sys
        from toolbox.shell.streams import JsonlWriter, claim, open_source
        streams = claim()
        print("printed")
        sys.stdout.flush()
        os.write(1, b"written to fd 1\\n")
        subprocess.run(["sh", "-c", "echo from a child; cat"], check=True)
        try:
            input("really? [y/N] ")
        except EOFError:
            os.write(1, b"end of file\\n")
        with open_source("-", streams) as handle:
            text = handle.read().decode()
        writer = JsonlWriter(streams)
        writer.write({"read": text})
        writer.close()
        """,
        input=b"a\nb\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b'{"read":"a\\nb\\n"}\n'
    for text in (b"printed", b"written to fd 1", b"from a child", b"really?", b"end of file"):
        assert text in done.stderr
    assert b"a\nb" not in done.stderr


@pytest.mark.parametrize("closed", [set(c) for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str)
def test_closed_streams_are_dev_null_and_their_numbers_are_given_to_nobody(closed, tmp_path):
    done = python(
        """if True:
        import json, os, sys
        from toolbox.shell.streams import JsonlWriter, claim, open_source
        from toolbox.shell.progress import Reporter
        streams = claim()
        found = {"private": min(streams.stdin_fd, streams.stdout_fd)}
        with open(sys.argv[1], "wb") as handle:
            found["next"] = handle.fileno()
        print("printed")
        sys.stdout.flush()
        reporter = Reporter("lm-tune")
        with reporter.progress("row", 1) as bar:
            bar.advance()
        reporter.note("noted")
        reporter.show("shown")
        with open_source("-", streams) as handle:
            found["read"] = handle.read().decode()
        writer = JsonlWriter(streams)
        writer.write("row")
        writer.close()
        found["devices"] = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
        with open(sys.argv[1], "w") as handle:
            json.dump(found, handle)
        """,
        tmp_path / "found",
        shell=" ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed),
        input=b"" if 0 in closed else b"data",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["private"] > 2
    assert found["next"] > 2
    assert found["read"] == ("" if 0 in closed else "data")
    assert found["devices"][0] == "/dev/null"
    assert found["devices"][1] == found["devices"][2]
    assert (found["devices"][2] == "/dev/null") == (2 in closed)
    assert done.stdout == (b"" if 1 in closed else b'"row"\n')
    for text in (b"printed", b"noted", b"shown"):
        assert (text in done.stderr) == (2 not in closed)


def test_a_non_blocking_stdin_is_read_to_its_end():
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    code = """if True:
        import sys
        from toolbox.shell.streams import claim, iter_lines, open_source
        streams = claim()
        print("ready", flush=True)
        with open_source("-", streams) as handle:
            print(len(list(iter_lines(handle, "stdin"))))
        """
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=read_end,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(read_end)
    assert child.stderr.readline() == b"ready\n"
    with open(write_end, "wb", buffering=0) as feed:
        for _ in range(3):
            time.sleep(0.05)
            feed.write(b"row\n")
    assert child.stderr.read() == b"3\n"
    child.stderr.close()
    assert child.wait() == 0


RANK_CODE = """if True:
    import sys
    from toolbox.shell.streams import JsonlWriter, claim, open_source
    streams = claim()
    with open_source("-", streams) as handle:
        print(handle.read().decode(), file=sys.stderr)
    writer = JsonlWriter(streams)
    writer.write(1)
    writer.close()
    """


def test_only_rank_0_has_the_streams():
    leader = python(RANK_CODE, input=b"data", ranks={"RANK": "0", "LOCAL_RANK": "0"})
    assert (leader.stdout, leader.stderr) == (b"1\n", b"data\n")
    other = python(RANK_CODE, input=b"data", ranks={"RANK": "1", "LOCAL_RANK": "1"})
    assert (other.returncode, other.stdout, other.stderr) == (0, b"", b"\n")


def test_a_rank_without_a_launcher_silences_nobody():
    lone = python(RANK_CODE, input=b"data", ranks={"RANK": "1"})
    assert (lone.stdout, lone.stderr) == (b"1\n", b"data\n")


def test_a_rank_that_is_no_number_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageProblem, match="RANK=first"):
        process_rank()


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_stdin_is_read_by_any_of_its_names(piped, name):
    assert content(piped(b"rows\n"), name) == b"rows\n"


def test_two_inputs_cannot_share_stdin(piped):
    streams = piped(b"rows\n")
    open_source("-", streams, "the forget set").close()
    with pytest.raises(UsageProblem, match=r"the forget set and the retain set cannot both be read from stdin"):
        open_source("/dev/stdin", streams, "the retain set")


def test_a_terminal_is_no_input():
    leader, terminal = os.openpty()
    with pytest.raises(UsageProblem, match="the input is read from stdin, which is a terminal"):
        open_source("-", Streams(stdin_fd=terminal, stdout_fd=-1))
    os.close(leader)
    os.close(terminal)


def test_what_cannot_be_opened_or_read_is_named(tmp_path):
    streams = Streams(stdin_fd=os.open(tmp_path, os.O_RDONLY), stdout_fd=-1)
    with pytest.raises(IsADirectoryError) as failed:
        open_source("-", streams)
    assert failed.value.filename == "stdin"
    os.close(streams.stdin_fd)
    with pytest.raises(IsADirectoryError):
        open_source(str(tmp_path), streams)
    with pytest.raises(FileNotFoundError):
        open_source(str(tmp_path / "none"), streams)


def test_messages_call_the_input_by_its_name():
    assert display_name("-") == "stdin"
    assert display_name("rows.jsonl") == "rows.jsonl"


PLAIN = b'{"text": "one"}\n{"text": "two"}\n'
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
PACKED = {
    "plain": (PLAIN, PLAIN),
    "gzip": (gzip.compress(PLAIN), PLAIN),
    "gzip members": (gzip.compress(PLAIN) + gzip.compress(b"") + gzip.compress(PLAIN), PLAIN * 2),
    "gzip padded": (gzip.compress(PLAIN) + bytes(700), PLAIN),
    "zstd": (zstandard.compress(PLAIN), PLAIN),
    "zstd frames": (zstandard.compress(PLAIN) + zstandard.compress(b"") + zstandard.compress(PLAIN), PLAIN * 2),
    "zstd with a skippable frame": (zstandard.compress(PLAIN) + SKIPPABLE + zstandard.compress(PLAIN), PLAIN * 2),
    "zstd of unknown size": (zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN), PLAIN),
    "nothing": (b"", b""),
    "less than a magic number": (b"7\n", b"7\n"),
    "the start of a magic number": (b"\x1f", b"\x1f"),
    "half a magic number": (b"\x28\xb5\x2f", b"\x28\xb5\x2f"),
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
def test_compressed_input_is_recognised_by_its_first_bytes(piped, tmp_path, packed):
    data, expected = packed
    (tmp_path / "rows").write_bytes(data)
    assert content(piped(data)) == expected
    assert content(piped(b""), str(tmp_path / "rows")) == expected
    assert content(piped([data[:1], data[1:3], data[3:]])) == expected  # a writer may be slow


def test_large_zstd_data_comes_through_whole(tmp_path):
    source = random.Random(0)
    data = b"".join(b"%d\n" % source.getrandbits(source.choice([8, 200])) for _ in range(100_000))
    path = tmp_path / "rows.zst"
    path.write_bytes(zstandard.compress(data[:1_000_000]) + zstandard.compress(data[1_000_000:]))
    assert content(Streams(-1, -1), str(path)) == data


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_cut_off_compressed_data_is_an_error_wherever_the_cut_is(tmp_path, pack):
    data = pack(PLAIN * 50)
    path = tmp_path / "rows"
    for whole in (b"", data):  # in the only member, in the second
        for cut in range(2 if pack is gzip.compress and not whole else 4, len(data)):
            path.write_bytes(whole + data[:cut])
            with open_source(str(path), Streams(-1, -1)) as handle, pytest.raises(BadData, match="damaged") as failed:
                list(iter_lines(handle, "rows"))
            assert failed.value.file == "rows"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_flipped_bytes_are_never_other_rows(tmp_path, pack):
    rows = PLAIN * 30
    data = bytearray(
        zstandard.ZstdCompressor(write_checksum=True).compress(rows) if pack is not gzip.compress else pack(rows)
    )
    path = tmp_path / "rows"
    for place in range(10, len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            with open_source(str(path), Streams(-1, -1)) as handle:
                found = list(iter_lines(handle, "rows"))
        except BadData:
            continue
        assert [line for _, line in found] == rows.splitlines()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_bomb_is_a_long_line_and_fills_no_memory(tmp_path, pack):
    path = tmp_path / "bomb"
    path.write_bytes(pack(bytes(4 << 20)) * 128)  # half a GiB
    tracemalloc.start()
    with open_source(str(path), Streams(-1, -1)) as handle, pytest.raises(BadData, match="line longer than"):
        list(iter_lines(handle, "bomb"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * MAX_LINE


# --- lines ----------------------------------------------------------------------------------------------------------


def lines_of(data, **more):
    return list(iter_lines(io.BufferedReader(io.BytesIO(data)), "rows", **more))


def slow_lines(data, max_line):
    """The same by splitting the whole: lines until the first that is too long, and that one's number."""
    found = []
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        line = line.rstrip(b"\r")
        if len(line) > max_line:
            return found, number
        if line.strip():
            found.append((number, line))
    return found, None


def test_lines_and_their_numbers_are_those_of_the_whole_text():
    source = random.Random(1)
    for _ in range(3000):
        lines = [
            source.choice([b"", b" ", b"\t "]) if source.random() < 0.3 else b"x" * source.choice([1, 3, 7, 8, 9, 20])
            for _ in range(source.randrange(5))
        ]
        data = b"".join(line + source.choice([b"\n", b"\r\n"]) for line in lines)
        if source.random() < 0.5:
            data = data.removesuffix(b"\n").removesuffix(b"\r")
        if source.random() < 0.5:
            data = BOM + data
        expected, too_long = slow_lines(data, 8)
        if too_long is None:
            assert lines_of(data, max_line=8) == expected, data
        else:
            with pytest.raises(BadData, match="line longer than 8 bytes") as failed:
                lines_of(data, max_line=8)
            assert failed.value.line == too_long, data


@pytest.mark.parametrize("start", [b"", BOM], ids=["plain", "marked"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=repr)
def test_the_longest_line_is_accepted_and_one_byte_more_is_not(start, end):
    assert lines_of(start + b"x" * MAX_LINE + end) == [(1, b"x" * MAX_LINE)]
    with pytest.raises(BadData, match="longer than 16,777,216 bytes"):
        lines_of(start + b"x" * (MAX_LINE + 1) + end)


def test_blank_lines_count():
    assert lines_of(b"\n \t\r\na\n\n\nb") == [(3, b"a"), (6, b"b")]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16_is_named_where_it_says_what_it_is(codec):
    mark = {"utf-16-be": b"\xfe\xff", "utf-16-le": b"\xff\xfe"}.get(codec, b"")
    with pytest.raises(BadData, match="UTF-16") as failed:
        lines_of(mark + '{"text": "x"}\n'.encode(codec))
    assert "iconv" in failed.value.advice


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sink(tmp_path):
    """A writer into a file, and what the file holds."""

    def make(**more):
        fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        writer = JsonlWriter(Streams(stdin_fd=-1, stdout_fd=fd), **more)
        os.close(fd)
        return writer, lambda: (tmp_path / "out").read_bytes()

    return make


def test_rows_leave_in_input_order_however_they_are_handed_in(sink):
    rows = {0: ["a"], 1: [], 2: ["b", "c"], 3: ["d"], 4: []}
    for order in itertools.permutations(rows):
        writer, written = sink()
        for index in order:
            writer.put(index, rows[index])
        writer.close()
        assert written() == b'"a"\n"b"\n"c"\n"d"\n'


def test_a_row_that_waits_is_what_it_was_when_handed_in(sink):
    writer, written = sink()
    row = {"n": 1}
    writer.put(1, [row])
    row["n"] = 2
    writer.put(0, [])
    writer.close()
    assert written() == b'{"n":1}\n'


def test_a_row_that_never_came_or_came_twice_is_our_fault_and_not_a_silent_loss(sink):
    writer, written = sink()
    writer.put(0, ["a"])
    writer.put(2, ["c"])
    for index in (0, 2):
        with pytest.raises(InternalError, match=f"input {index} came twice"):
            writer.put(index, ["x"])
    with pytest.raises(InternalError, match="input 1 never came"):
        writer.close()
    assert written() == b'"a"\n'


def test_numbers_leave_as_the_values_they_came_as(sink):
    numbers = (
        b"[0,-1,9007199254740993,18446744073709551616,-340282366920938463463374607431768211456,0.1,1e22,-0.0,5e-324]"
    )
    row = msgspec.json.decode(numbers)
    writer, written = sink()
    writer.write(row)
    writer.write([float("nan"), float("inf")])
    writer.close()
    first, second = written().splitlines()
    assert repr(json.loads(first)) == repr(json.loads(numbers)) == repr(row)
    assert second == b"[null,null]"  # JSON has no such numbers


@pytest.mark.parametrize("trainer", [False, True])
def test_a_full_disk_is_an_error_once_when_writing_or_at_the_latest_when_closing(trainer):
    streams = Streams(stdin_fd=-1, stdout_fd=os.open("/dev/full", os.O_WRONLY))
    small = JsonlWriter(streams, trainer=trainer)
    with pytest.raises(IoFailure, match="stdout: No space left on device"):  # noqa: PT012
        small.write("row")
        assert not trainer  # an event is handed over at once
        small.close()
    small.write("more")
    small.close()
    large = JsonlWriter(streams, trainer=trainer)
    with pytest.raises(IoFailure, match="stdout: No space left on device"):
        large.write("x" * 1_000_000)
    large.close()
    os.close(streams.stdout_fd)


@pytest.fixture
def closed_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield Streams(stdin_fd=-1, stdout_fd=write_end)
    os.close(write_end)


def test_a_closed_pipe_ends_a_filter(closed_pipe):
    writer = JsonlWriter(closed_pipe)
    writer.write("row")
    with pytest.raises(BrokenPipeError):
        writer.flush()
    writer.close()
    at_close = JsonlWriter(closed_pipe)
    at_close.put(0, ["row"])
    with pytest.raises(BrokenPipeError):
        at_close.close()


def test_a_closed_pipe_is_a_trainer_s_warning_and_only_one(closed_pipe, capsys):
    writer = JsonlWriter(closed_pipe, trainer=True)
    for _ in range(3):
        writer.write({"event": "step"})
    writer.put(0, ["row"])
    writer.flush()
    writer.close()
    assert capsys.readouterr().err == "stdout was closed by its reader; the run goes on without it\n"


def test_a_trainer_whose_stdout_and_stderr_are_one_closed_pipe_finishes(tmp_path):
    code = """if True:
        import sys
        from toolbox.shell.progress import Reporter
        from toolbox.shell.streams import JsonlWriter, claim
        streams = claim()
        sys.stdin.read()
        writer, reporter = JsonlWriter(streams, trainer=True), Reporter("lm-tune")
        for step in range(3):
            writer.write({"event": "step"})
            reporter.note("a note")
            reporter.show("a table")
            print("a library", flush=True)
        writer.close()
        open(sys.argv[1], "w").close()
        """
    for first in ("note", "write"):  # who finds out first must not matter
        text = code if first == "write" else code.replace("for step", 'reporter.show("first")\n        for step')
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = subprocess.run(
            [sys.executable, "-c", text, tmp_path / first], stdin=subprocess.DEVNULL, stdout=write_end,
            stderr=write_end, env=environment(), timeout=60,
        )  # fmt: skip
        os.close(write_end)
        assert done.returncode == 0
        assert (tmp_path / first).exists()
