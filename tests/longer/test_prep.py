"""longer-prep: no history leaks, splits and vocabularies know nothing of test, bad input is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.longer.logs import events, prepared
from toolbox.longer.columns import read_columns
from toolbox.longer.dataset import read_manifest, read_vocabulary, verify
from toolbox.longer.requests import draw_negatives, group_requests, history_end, sort_events
from toolbox.longer.splits import SPLITS
from toolbox.shell.errors import BadData

LOG = events(users=6, each=20)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prep")
    return prepared(folder / "data", write(folder / "log.jsonl", LOG))


def all_samples(data: Path):
    """(split, user, item, ts, label, history) of every sample, by name; -1 where the item is unknown."""
    columns, users = read_columns(data / "events.safetensors"), read_vocabulary(data, "user")
    items = ["", None, *read_vocabulary(data, "item")]
    for split in SPLITS:
        samples = read_columns(data / f"samples.{split}.safetensors")
        for row in range(len(samples["user"])):
            user, end = int(samples["user"][row]), int(samples["hist_end"][row])
            part = slice(int(columns["user_ptr"][user]), end)
            past = [(items[i], int(t)) for i, t in zip(columns["item"][part], columns["ts"][part], strict=True)]
            yield (
                split,
                users[user],
                items[samples["item"][row]],
                int(samples["ts"][row]),
                int(samples["label"][row]),
                past,
            )


def test_histories_are_the_events_strictly_before_and_requests_lie_in_one_split(data):
    seen = 0
    boundaries = read_manifest(data).boundaries
    for split, user, item, ts, label, past in all_samples(data):
        expected = [(row["item"], row["ts"]) for row in LOG if row["user"] == user and row["ts"] < ts]
        assert past == expected
        assert {"user": user, "item": item, "ts": ts, "label": label} in [
            {key: row[key] for key in ("user", "item", "ts", "label")} for row in LOG
        ]
        assert split == SPLITS[(ts >= boundaries[0]) + (ts >= boundaries[1])]
        seen += 1
    assert seen == len(LOG)


def test_a_column_or_a_manifest_that_is_not_as_made_is_bad_data(data, tmp_path):
    with pytest.raises(BadData, match=r"events\.safetensors: has no column 'other'"):
        read_columns(data / "events.safetensors")["other"]
    for text in ('{"format": ' + "[" * 5000, '"\\ud800"', ""):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(BadData, match="damaged manifest"):
            read_manifest(tmp_path)


def test_verify_finds_a_leak_and_a_changed_file(data, tmp_path, tool):
    import shutil

    from toolbox.longer.columns import write_columns
    from toolbox.shell.files import sha256_file

    assert verify(data) == []
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    path = copy / "samples.test.safetensors"
    columns = {name: np.array(one) for name, one in read_columns(path).items()}
    columns["hist_end"][3] += 1
    write_columns(path, columns)
    assert verify(copy) == ["samples.test.safetensors: its content is not what the manifest says"]
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["samples.test.safetensors"] = sha256_file(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert verify(copy) == ["samples.test: a history with an event at or after the request"]
    failed = tool("longer-prep", "--verify", copy)
    assert (failed.code, failed.rows[0]["ok"]) == (1, False)
    assert tool("longer-prep", "--verify", data).rows == [{"event": "verify", "ok": True, "problems": []}]
    assert tool("longer-prep", "--verify", tmp_path).code == 66


def test_vocabularies_come_from_training_only(tmp_path):
    rows = [dict(row) for row in LOG]
    late = max(row["ts"] for row in rows)
    for row in rows:
        if row["ts"] > late - 300:
            row["item"] = "new" if row["user"] == "u1" else row["item"]
    data = prepared(tmp_path / "d", write(tmp_path / "log", rows), min_count=2)
    names = read_vocabulary(data, "item")
    assert "new" not in names
    counts = {
        name: sum(r["item"] == name and r["ts"] < read_manifest(data).boundaries[0] for r in rows) for name in names
    }
    assert min(counts.values()) >= 2
    assert read_manifest(data).out_of_vocabulary["train"] == {"positives": 0.0, "negatives": 0.0}
    unknown = read_manifest(data).out_of_vocabulary["test"]
    assert max(unknown.values()) > 0


def test_user_and_column_splits_are_disjoint_by_user(tmp_path):
    log = [{**row, "user": f"u{n % 40}", "fold": n % 40 % 5} for n, row in enumerate(events(users=40, each=8))]
    path = write(tmp_path / "log", log)
    for how, name in (("user:3", "a"), ("column:fold=4", "b")):
        data = prepared(tmp_path / name, path, split=how)
        users: dict[str, set] = {split: set() for split in SPLITS}
        for split, user, *_ in all_samples(data):
            users[split].add(user)
        assert users["train"].isdisjoint(users["test"])
        assert users["train"].isdisjoint(users["valid"])
        assert read_manifest(data).user_disjoint
    assert users["test"] == {row["user"] for row in log if row["fold"] == 4}


def test_a_window_of_samples_is_one_request_with_the_first_ones_history(tmp_path):
    data = prepared(tmp_path / "d", write(tmp_path / "log", LOG), split="temporal:.5,.2,.3", request_window=5)
    found = {}
    for split in SPLITS:
        samples = read_columns(data / f"samples.{split}.safetensors")
        for request in np.unique(samples["request"]):
            mine = samples["request"] == request
            found[split, int(request)] = int(mine.sum())
            assert len(np.unique(samples["hist_end"][mine])) == len(np.unique(samples["ts"][mine])) == 1
    assert set(found.values()) == {5}  # 20 events a user


def test_negatives_existed_then_and_are_never_positives_of_the_request():
    generator = np.random.default_rng(0)
    user, item, ts = (
        generator.integers(0, 5, 300),
        generator.integers(0, 20, 300),
        np.sort(generator.integers(0, 90, 300)),
    )
    held = sort_events(user, item, ts, 5)
    requests = group_requests(held, np.arange(300), user, ts, np.full(300, -1), None)
    chosen_item, request = item[requests.rows], requests.of_sample()
    for how in ("popularity", "uniform"):
        drawn = draw_negatives(item, ts, requests, chosen_item, 3, how, 0)
        assert len(drawn.sample) > 800
        for sample, event in zip(drawn.sample, drawn.event, strict=True):
            asked = request[sample]
            assert ts[event] < requests.ts[asked]
            assert item[event] not in set(chosen_item[request == asked])
        again = draw_negatives(item, ts, requests, chosen_item, 3, how, 0)
        assert np.array_equal(drawn.event, again.event)
    # uniform: every item seen by the end is about as likely; popularity: as often as it occurred
    late = np.flatnonzero(requests.ts[request] > 80)
    uniform = draw_negatives(item, ts, requests, chosen_item, 50, "uniform", 1)
    counts = np.bincount(item[uniform.event[np.isin(uniform.sample, late)]], minlength=20)
    assert counts.min() > 0.5 * counts.mean()


def test_history_end_equals_a_plain_count():
    generator = np.random.default_rng(3)
    user, ts = generator.integers(0, 4, 50), generator.integers(-5, 9, 50)
    held = sort_events(user, user, ts, 6)
    for who in range(6):
        for when in range(-7, 11):
            end = int(history_end(held, np.asarray([who]), np.asarray([when]))[0])
            assert end - held.user_ptr[who] == int(((user == who) & (ts < when)).sum())


def test_unsorted_and_repeated_events_are_sorted_kept_and_counted(tmp_path, tool):
    rows = [*LOG, LOG[3]]
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    done = tool("longer-prep", write(tmp_path / "log", shuffled), "--out", tmp_path / "d")
    assert done.code == 0, done.err
    assert done.rows[0]["events"] == len(rows)
    assert "1 repeat another's" in done.err
    assert verify(tmp_path / "d") == []


def test_csv_tsv_inter_and_json_lines_make_the_same_columns(tmp_path):
    plain = [{key: row[key] for key in ("user", "item", "ts", "label", "cat", "hour")} for row in LOG]
    files = {"log.jsonl": "".join(json.dumps(row) + "\n" for row in plain)}
    for name, mark in (("log.csv", ","), ("log.tsv", "\t")):
        files[name] = "\n".join([mark.join(plain[0]), *(mark.join(map(str, row.values())) for row in plain)]) + "\n"
    head = "user_id:token\titem_id:token\ttimestamp:float\tlabel:float\tcat:token_seq\thour:token"
    body = ["\t".join([*map(str, list(row.values())[:4]), f"{row['cat']} more", str(row["hour"])]) for row in plain]
    files["log.inter"] = "\n".join([head, *body]) + "\n"
    found = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        data = prepared(tmp_path / f"d-{name}", tmp_path / name)
        found.append({file.name: file.read_bytes() for file in data.glob("*.safetensors")})
    assert found[0] == found[1] == found[2] == found[3]


def test_samples_and_item_features_may_come_from_files_of_their_own(tmp_path):
    history = [{key: row[key] for key in ("user", "item", "ts")} for row in LOG]
    items = write(tmp_path / "items", [{"item": f"i{n}", "cat": [f"c{n % 3}", "x"]} for n in range(9)])
    asked = write(
        tmp_path / "asked", [{key: row[key] for key in ("user", "item", "ts", "label", "hour")} for row in LOG]
    )
    split = prepared(tmp_path / "a", write(tmp_path / "h", history), samples=str(asked), items=str(items))
    joined = prepared(tmp_path / "b", write(tmp_path / "log", LOG), history_label=False)
    for name in ("samples.train.safetensors", "samples.test.safetensors", "events.safetensors"):
        one, two = read_columns(split / name), read_columns(joined / name)
        assert one.keys() == two.keys()
        for column in one:
            if not column.endswith("cat"):  # equal up to the numbers of the categories
                assert np.array_equal(one[column], two[column]), (name, column)


def test_hashed_items_need_no_vocabulary(tmp_path):
    data = prepared(tmp_path / "d", write(tmp_path / "log", LOG), hash_buckets=7)
    manifest = read_manifest(data)
    assert (manifest.vocabulary["item"], read_vocabulary(data, "item")) == (9, [])
    assert int(read_columns(data / "events.safetensors")["item"].min()) >= 2


BAD = [
    ({"ts": "soon"}, [], "stdin:2: $.ts: Expected"),
    ({"ts": 1.5}, [], "`ts` is 1.5, not a whole number"),
    ({"ts": 2**70}, [], "out of range"),
    ({"label": 2}, [], "`label` is '2', expected 0 or 1"),
    ({"user": ""}, [], "`user` is empty"),
    ({"cat": {"a": 1}}, ["--side", "cat"], "`cat` is neither text nor a number"),
    ({}, ["--map", "label=stars>=4"], "stdin:1: `stars` is missing"),
    ({}, ["--side", "brand"], "no row has a field `brand`"),
    ({}, ["--split", "column:nope=1"], "no row has a field `nope`"),
    ({}, ["--split", "column:cat=z"], "no row has cat=z"),
]


@pytest.mark.parametrize(("change", "more", "says"), BAD)
def test_bad_rows_are_65_with_their_line(tool, tmp_path, change, more, says):
    rows = [LOG[0], {**LOG[1], **change}, *LOG[2:]]
    done = tool(
        "longer-prep", "--out", tmp_path / "d", *more, stdin="".join(json.dumps(r) + "\n" for r in rows).encode()
    )
    assert (done.code, done.out) == (65, b"")
    assert says in done.err
    assert not (tmp_path / "d").exists()
    if change and "ts" in change:
        skipped = tool(
            "longer-prep", "--out", tmp_path / "d", "--on-bad", "skip",
            stdin="".join(json.dumps(r) + "\n" for r in rows).encode(),
        )  # fmt: skip
        assert skipped.code == 0, skipped.err
        assert skipped.rows[0]["events"] == len(LOG) - 1


def test_tables_splits_outputs_and_usage_have_their_codes(tool, tmp_path):
    ones = write(tmp_path / "ones", [{**row, "label": 1} for row in LOG])
    log = write(tmp_path / "log", LOG)

    def code(*words):
        done = tool("longer-prep", *words)
        assert done.out == b""
        return done.code, done.err

    assert code(ones, "--out", tmp_path / "d")[1].count("the train split has only positives") == 1
    bare = write(tmp_path / "bare", [{k: row[k] for k in ("user", "item", "ts")} for row in LOG])
    assert "no event has a label" in code(bare, "--out", tmp_path / "d")[1]
    (tmp_path / "t.csv").write_text("user,item,time\nu,i,3\n")
    assert code(tmp_path / "t.csv", "--out", tmp_path / "d") == (
        65, f"longer-prep: {tmp_path}/t.csv:1: no column `ts`; found user, item, time\n  --map ts=COLUMN\n",
    )  # fmt: skip
    (tmp_path / "t.csv").write_text('user,item,ts,label\nu,"i,3,1\n')
    assert "t.csv:2: not valid CSV" in code(tmp_path / "t.csv", "--out", tmp_path / "d")[1]
    (tmp_path / "t.tsv").write_text("user\titem\tts\nu\ti\n")
    assert "t.tsv:2: 2 cells under 3 columns" in code(tmp_path / "t.tsv", "--out", tmp_path / "d")[1]
    assert code("recbole:nothing-like-this", "--out", tmp_path / "d")[0] == 66
    assert code(tmp_path / "missing", "--out", tmp_path / "d")[0] == 66
    assert code(log)[0] == 2
    for more in (["--split", "random:.5"], ["--split", "temporal:.5,.5"], ["--split", "user:1"], ["--negatives", "2"],
                 ["--side", "cat", "--context", "cat"], ["--side", "label"], ["--side", "user"]):  # fmt: skip
        assert code(log, "--out", tmp_path / "d", *more)[0] == 2, more
    assert tool("longer-prep", log, "--out", tmp_path / "d").code == 0
    assert code(log, "--out", tmp_path / "d")[0] == 73


def test_a_log_of_positives_gets_negatives(tool, tmp_path):
    rows = [{"user": r["user"], "item": r["item"], "ts": r["ts"], "action": "M"} for r in LOG]
    done = tool(
        "longer-prep",
        write(tmp_path / "log", rows),
        "--event-side",
        "action",
        "--negatives",
        "4",
        "--out",
        tmp_path / "d",
    )
    assert done.code == 0, done.err
    found = done.rows[0]
    assert found["event_side"] == ["action"]
    assert sum(found["samples"].values()) > 4 * len(rows)
    assert 0.2 <= found["positive_rate"]["test"] < 0.25
    assert verify(tmp_path / "d") == []


def test_comparisons_make_labels(tool, tmp_path):
    rows = [{"u": r["user"], "item": r["item"], "ts": r["ts"], "stars": 1 + 4 * r["label"]} for r in LOG]
    done = tool("longer-prep", write(tmp_path / "log", rows), "--map", "user=u,label=stars>=4", "--out", tmp_path / "d")
    assert done.code == 0, done.err
    assert sum(label for *_, label, _ in all_samples(tmp_path / "d")) == sum(row["label"] for row in LOG)
