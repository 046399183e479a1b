"""Records are validated where they come in, complaints name the place, and what is not understood passes untouched."""

import io
import json
import random
import threading
import time

import msgspec
import pytest

from toolbox.shell import records
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import (
    MAX_DEPTH,
    PROMPT_SHAPES,
    TRAINING_SHAPES,
    RecordReader,
    decode,
    json_schema,
    parse_map,
    read_records,
    training_row,
    write_rejects,
)
from toolbox.shell.streams import Streams

QA = b'{"question": "q", "answer": "a"}'


def read(data, shapes=TRAINING_SHAPES, name="rows", **more):
    return list(RecordReader(shapes, **more)(io.BufferedReader(io.BytesIO(data)), name))


def complaint(data, shapes=TRAINING_SHAPES, **more):
    with pytest.raises(BadData) as failed:
        read(data, shapes, **more)
    return failed.value.what


def skipping(data, **more):
    """The records and the rejects, as they came and as they are complained about."""
    rejected = []
    reader = RecordReader(
        TRAINING_SHAPES, on_bad="skip", rejects=lambda raw, bad: rejected.append((raw, str(bad))), **more
    )
    return list(reader(io.BufferedReader(io.BytesIO(data)), "rows")), rejected, reader


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": [{"role": "user", "content": ""}]}, "Conversation"),
        ({"question": "q", "answer": "a"}, "QuestionAnswer"),
        ({"prompt": "p", "completion": "c"}, "PromptCompletion"),
        ({"text": "t"}, "PlainText"),
        ({"question": "q", "answer": None, "text": "t"}, "PlainText"),
        ({"messages": None, "prompt": "p", "completion": "c", "text": None}, "PromptCompletion"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}], "text": "t", "tools": []}, "Conversation"),
    ],
)
def test_the_first_shape_whose_fields_are_there_and_not_null_is_meant(row, shape):
    (record,) = read(json.dumps(row).encode())
    assert type(record.value).__name__ == shape
    assert record.data == row


def test_a_prompt_beside_messages_is_no_prompt_completion():
    (record,) = read(b'{"prompt": "p", "messages": [{"role": "user", "content": "x"}]}', PROMPT_SHAPES)
    assert type(record.value).__name__ == "PromptMessages"
    assert record.value.prompt == "p"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"question": "q", "answer": null}', "no known shape: expected messages, or question+answer, "),
        (b'{"question": "q", "answer": null}', "found fields: answer (null), question"),
        (b"{}", "found fields: none"),
        (b'{"question": "q", "answer": ""}', "rows:1: $.answer: Expected `str` of length >= 1"),
        (b'{"question": 3, "answer": "a"}', "rows:1: $.question: Expected `str`, got `int`"),
        (b'{"messages": []}', "rows:1: $.messages: Expected `array` of length >= 1"),
        (b'{"messages": {}}', "rows:1: $.messages: Expected `array`, got `object`"),
        (b'{"messages": [{"role": "user"}]}', "rows:1: $.messages[0]: Object missing required field `content`"),
        (b'{"messages": [{"role": "user", "content": null}]}', "$.messages[0].content: Expected `str`, got `null`"),
        (b'{"messages": [{"role": "boss", "content": ""}]}', "$.messages[0].role: Invalid enum value 'boss'"),
        (b'{"text": "t", "id": true}', "rows:1: $.id: Expected `int | str | null`, got `bool`"),
        (b'{"text": "t", "id": 1.5}', "rows:1: $.id: Expected `int | str | null`, got `float`"),
        (b'{"text": "t", "id": [1]}', "rows:1: $.id: Expected `int | str | null`, got `array`"),
        (b"[]x", "rows: not valid JSON"),
    ],
)
def test_a_complaint_names_the_field(data, says):
    assert says in complaint(data)


def test_a_value_cannot_forge_the_place():
    row = {"messages": [{"role": "x - at `$.forged`", "content": ""}]}
    assert complaint(json.dumps(row).encode()).startswith(
        "rows:1: $.messages[0].role: Invalid enum value 'x - at `$.forged`'"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(b'"x"', "x"), (b'""', ""), (b"7", "7"), (b"-7", "-7"), (b"%d" % 10**30, str(10**30)), (b"null", "3")],
)
def test_an_id_is_a_string_and_else_the_line_number(given, expected):
    (record,) = read(b'\n\n{"text": "t", "id": %s}\n' % given)
    assert (record.id, record.line, record.index) == (expected, 3, 0)
    assert read(b'\n\n{"text": "t"}\n')[0].id == "3"


# --- lines ----------------------------------------------------------------------------------------------------------


def test_line_numbers_count_blank_lines_bad_lines_and_marks():
    data = b"\xef\xbb\xbf\n" + QA + b"\r\n\r\n \n{oops}\n" + QA + b"\n\n" + QA
    found, rejected, reader = skipping(data)
    assert [(record.line, record.id, record.index) for record in found] == [(2, "2", 0), (6, "6", 2), (8, "8", 3)]
    assert [raw for raw, _ in rejected] == [b"{oops}"]
    assert rejected[0][1].startswith("rows:5: not valid JSON")
    assert (reader.read, reader.skipped) == (3, 1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not valid JSON"),
        (QA + b" x", "not valid JSON: JSON is malformed: trailing characters"),
        (QA + QA, "not valid JSON"),
        (QA + b"\r" + QA, "not valid JSON"),
        (b"{'text': 't'}", "not valid JSON"),
        (b'{"text": "\x00"}', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 text"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"text": "t", "x": NaN}', "not valid JSON"),
        (b'{"text": "t", "x": Infinity}', "not valid JSON"),
        (b'{"text": "t", "x": 1e400}', "not valid JSON: Number out of range"),
        (b'{"text": "t", "x": ' + b"9" * 5000 + b"}", "not valid JSON: Integer value out of range"),
        (b'{"text": "t", "x": 01}', "not valid JSON"),
        (b"null", "expected an object, got NoneType"),
        (b'"text"', "expected an object, got str"),
        (b'{"x": ' + b'{"x":' * 100_000 + b"}" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "t", "x": ' + b"[" * 64 + b"]" * 64 + b"}", f"nested more than {MAX_DEPTH} levels"),
        ('{"text": "t"}'.encode("utf-16-le"), "not valid JSON"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
def test_a_line_that_is_no_record_is_bad_data_with_its_number(line, says):
    with pytest.raises(BadData, match=r"\A") as failed:
        read(QA + b"\n" + line + b"\n")
    assert says in failed.value.what
    assert (failed.value.file, failed.value.line) == ("rows", 2)
    found, rejected, _ = skipping(QA + b"\n" + line + b"\n" + QA)
    assert [record.line for record in found] == [1, 3]
    assert [raw for raw, _ in rejected] == [line]


def test_the_deepest_accepted_nesting():
    assert decode(b"[" * 0 + b'{"x": ' + b"[" * 63 + b"]" * 63 + b"}", "rows", 1)
    assert decode(b'{"x": ' + b'{"x": ' * 63 + b"1" + b"}" * 63 + b"}", "rows", 1)


def test_of_equal_keys_the_last_one_counts_as_in_python_and_jq():
    (record,) = read(b'{"text": "one", "text": "two"}')
    assert record.data == {"text": "two"}
    assert record.value.text == "two"


def test_values_of_fields_that_are_not_ours_pass_through():
    source = random.Random(0)

    def value(depth):
        kinds = ["int", "float", "text", "null", "bool", *(["list", "dict"] if depth else [])]
        match source.choice(kinds):
            case "int":
                return source.getrandbits(source.choice([3, 60, 64, 65, 200, 4000])) * source.choice([1, -1])
            case "float":
                return source.choice(
                    [source.uniform(-1, 1), source.uniform(-1, 1) * 10 ** source.randint(-320, 300), -0.0]
                )
            case "text":
                return "".join(source.choices('aé漢🙂\u2028\x00\x1b"\\/\n\t\u202e', k=source.randrange(6)))
            case "null":
                return None
            case "bool":
                return source.random() < 0.5
            case "list":
                return [value(depth - 1) for _ in range(source.randrange(3))]
            case _:
                return {str(source.getrandbits(8)): value(depth - 1) for _ in range(source.randrange(3))}

    rows = [{"text": "t", "extra": value(4)} for _ in range(300)]
    found = read("\n".join(json.dumps(row, ensure_ascii=source.random() < 0.5) for row in rows).encode())
    assert [repr(record.data) for record in found] == [repr(row) for row in rows]
    again = [json.loads(msgspec.json.encode(record.data)) for record in found]
    assert [repr(row) for row in again] == [repr(row) for row in rows]


# --- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [b"", b"\xef\xbb\xbf", b" \n\t\r\n", b"\xef\xbb\xbf\n", b" " * 9000],
    ids=["", "mark", "blank", "both", "far"],
)
def test_one_array_is_its_elements(start):
    found = read(start + b"[" + QA + b",\n\n " + QA + b"]\n")
    assert [(record.line, record.index, record.id) for record in found] == [(None, 0, "1"), (None, 1, "2")]
    assert read(start + b"[]") == []


def test_complaints_about_elements_name_element_and_field():
    good = QA.decode()
    bad = '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 7}]}'
    assert complaint(f"[{good}, {bad}]".encode()) == "rows: $[1].messages[1].content: Expected `str`, got `int`"
    assert complaint(f"[{good}, 3]".encode()) == "rows: $[1]: expected an object, got int"
    assert complaint(f'[{good}, {{"x": 1}}]'.encode()).startswith("rows: $[1]: no known shape")
    (_, record) = read(f"[{good}, {good}]".encode())
    assert record.bad("taken").what == "rows: $[1]: taken"
    assert record.bad("taken", field="$.id").what == "rows: $[1].id: taken"
    (record,) = read(QA)
    assert record.bad("taken", field="$.id").what == "rows:1: $.id: taken"


@pytest.mark.parametrize(
    "data",
    [
        b"[" + QA,
        b"[" + QA + b"] x",
        b"[" + QA + b"]\n[" + QA + b"]",
        b"[" + QA + b",]",
        b"[" + QA + b" " + QA + b"]",
        b"[" + b"[" * 200_000 + b"]" * 200_000 + b"]",
        b"[" * 200_000,
    ],
    ids=["open", "garbage", "two", "comma", "no comma", "deep", "deep and open"],
)
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_an_array_that_cannot_be_taken_apart_is_an_error_in_any_case(data, on_bad):
    says = complaint(data, on_bad=on_bad)
    assert says.startswith("rows: n")  # not valid, or nested too deeply


def test_bad_elements_are_left_out_and_the_others_keep_their_place():
    big = b'{"text": "' + b"x" * 50 + b'"}'
    data = b"[" + b", ".join([QA, b"3", b'{"text": "\xff"}', big, b'{"x":\n{"y": 1}}', QA]) + b"]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_LINE", 40)
        found, rejected, reader = skipping(data)
    assert [(record.index, record.id) for record in found] == [(0, "1"), (5, "6")]
    assert [raw for raw, _ in rejected] == [b"3", b'{"text": "\xff"}', big, b'{"x":\n{"y": 1}}']
    assert [says.split(": ")[1] for _, says in rejected] == ["$[1]", "$[2]", "$[3]", "$[4]"]
    assert (reader.read, reader.skipped) == (2, 4)


def test_a_record_found_bad_later_does_not_shift_the_others():
    reader = RecordReader(TRAINING_SHAPES, on_bad="skip")
    ids = []
    for record in reader(io.BufferedReader(io.BytesIO(b"[" + b",".join([QA] * 4) + b"]")), "rows"):
        ids.append((record.index, record.id))
        if record.index == 1:
            reader.bad(record.bad("empty"), QA)
    assert ids == [(0, "1"), (1, "2"), (2, "3"), (3, "4")]
    assert reader.skipped == 1


def test_an_array_beyond_the_bound_is_refused(monkeypatch):
    data = b"[" + QA + b"]"
    monkeypatch.setattr(records, "MAX_ARRAY", len(data))
    assert len(read(data)) == 1
    monkeypatch.setattr(records, "MAX_ARRAY", len(data) - 1)
    assert "a JSON array of more than" in complaint(data)


@pytest.mark.parametrize(
    "chunks", [[b"\n", b"\n [", QA + b"]"], [b"\xef", b"\xbb\xbf", b"[" + QA + b"]"]], ids=["blank", "mark"]
)
def test_a_slow_writer_s_array_is_still_an_array(chunks):
    import os

    read_end, write_end = os.pipe()

    def feed():
        with open(write_end, "wb", buffering=0) as handle:
            for chunk in chunks:
                handle.write(chunk)
                time.sleep(0.05)

    thread = threading.Thread(target=feed)
    thread.start()
    found = list(read_records("-", Streams(read_end, -1), RecordReader(TRAINING_SHAPES)))
    thread.join()
    os.close(read_end)
    assert [(record.file, record.index) for record in found] == [("stdin", 0)]


# --- renaming -------------------------------------------------------------------------------------------------------


def test_the_map_is_old_to_new():
    assert parse_map(["question=text,answer=labels", "id=key"]) == {"text": "question", "labels": "answer", "key": "id"}
    assert parse_map([]) == parse_map([""]) == {}
    assert parse_map(["a=b=c"]) == {"b=c": "a"}


@pytest.mark.parametrize("pair", ["question", "=", "=x", "x=", "a=b,c", "a=x,b=x", "a=x,a=y"])
def test_a_map_that_says_nothing_or_two_things_is_a_usage_error(pair):
    with pytest.raises(UsageProblem, match="--map"):
        parse_map([pair])


@pytest.mark.parametrize(
    ("pairs", "row", "expected"),
    [
        ("text=body", {"body": "b", "x": 1}, {"text": "b", "x": 1}),
        ("text=body", {"x": 1, "body": "b", "y": 2}, {"x": 1, "text": "b", "y": 2}),
        ("text=title,title=text", {"text": "a", "title": "b"}, {"title": "a", "text": "b"}),
        ("text=title,title=text", {"title": "b"}, {"text": "b"}),
        ("text=title,old=text", {"text": "a", "title": "b"}, {"old": "a", "text": "b"}),
        ("text=text", {"text": "a"}, {"text": "a"}),
        ("a=b", {"text": "a"}, {"text": "a"}),
    ],
)
def test_fields_are_renamed_all_at_once(pairs, row, expected):
    (record,) = read(json.dumps(row).encode(), renames=parse_map([pairs]))
    assert record.data == expected
    assert list(record.data) == list(expected)


@pytest.mark.parametrize(
    "row", ['{"text": "a", "body": "b"}', '{"body": "b", "text": "a"}', '{"body": "b", "text": null}']
)
def test_a_renamed_field_overwrites_nothing(row):
    assert complaint(row.encode(), renames={"body": "text"}) == "rows:1: --map would overwrite `text`"


# --- rows, rejects, schemas -----------------------------------------------------------------------------------------


def test_rows_have_one_form():
    def row(**fields):
        return training_row(read(json.dumps(fields).encode())[0])

    assert row(question="q", answer="a").messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )
    assert row(prompt="q", completion="a").messages == row(question="q", answer="a").messages
    talk = [{"role": "system", "content": ""}, {"role": "assistant", "content": "a"}]
    assert row(messages=talk).messages == tuple(talk)
    assert (row(text="t").text, row(text="t").messages, row(text="t").shape) == ("t", None, "PlainText")
    assert row(text="t").place == "rows:1"
    with pytest.raises(BadData, match=r"rows:1: \$\.messages: no assistant turn") as failed:
        row(messages=talk[:1])
    assert failed.value.advice


def test_rejects_are_one_a_line_and_can_be_read_again(tmp_path):
    _, rejected, _ = skipping(b'[{"x":\n [1,\r\n 2]}, 3, {"y": "a\\nb"}]')
    path = tmp_path / "rejects.jsonl"
    write_rejects(str(path), [raw for raw, _ in rejected])
    *lines, end = path.read_bytes().split(b"\n")
    assert end == b""
    assert [json.loads(line) for line in lines] == [{"x": [1, 2]}, 3, {"y": "a\nb"}]
    write_rejects(str(path), [])
    assert path.read_bytes() == b""


def test_the_schema_accepts_what_the_reader_accepts():
    schema = json_schema(TRAINING_SHAPES)
    assert [reference["$ref"].rpartition("/")[2] for reference in schema["anyOf"]] == [
        s.__name__ for s in TRAINING_SHAPES
    ]
    for shape in TRAINING_SHAPES:
        definition = schema["$defs"][shape.__name__]
        assert set(definition["required"]) == set(shape.needs)
        assert definition["additionalProperties"] is True
    assert schema["$defs"]["Message"]["properties"]["role"]["enum"] == ["assistant", "system", "tool", "user"]
    assert json.dumps(schema)


def test_answers_come_in_the_spellings_of_alpaca_and_sharegpt():
    from toolbox.shell.records import ANSWER_SHAPES, RecordReader, training_row

    rows = [
        {"instruction": "Add", "input": "1 and 2", "output": "3", "label": "safe", "text": "as a whole"},
        {"instruction": "Add 1 and 2", "input": "", "output": "3"},
        {"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}]},
        {"conversations": [{"from": "human", "value": "Add"}]},
    ]
    handle = io.BufferedReader(io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    *good, bad = RecordReader(ANSWER_SHAPES)(handle, "f")
    one, two, three = map(training_row, good)
    assert [turn["content"] for turn in one.messages] == ["Add\n1 and 2", "3"]
    assert (one.label, two.label) == ("safe", None)
    assert [turn["content"] for turn in two.messages] == ["Add 1 and 2", "3"]
    assert [turn["role"] for turn in three.messages] == ["user", "assistant"]
    with pytest.raises(BadData, match="no assistant turn"):
        training_row(bad)
