"""longer-score: the cache changes no score, entries belong to model, user, history and time, lines leave at once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import product

import pytest
import torch

from tests.longer.logs import events, prepared, shared_folder, tiny_model
from tests.server import ROOT, environment
from toolbox.longer.files import load_model, read_config
from toolbox.longer.requested import Reader, as_batch
from toolbox.longer.score import Options, Server, _data_of
from toolbox.longer.serve import Key, Store, canonical_time
from toolbox.shell.errors import BadData

LOG = events()


def requests(count: int = 6, candidates: int = 5) -> list[dict]:
    names = [f"i{n % 9}" for n in range(candidates - 1)] + ["never seen"]
    return [{"id": n, "user": f"u{n % 5}", "ts": 400 + 100 * n, "candidates": names, "hour": 1} for n in range(count)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def score(tool):
    folder = shared_folder()

    def run(rows, *more, model=folder / "run", data=True):
        words = ["--data", folder / "data"] if data else []
        done = tool("longer-score", "--model", model, *words, *more, stdin=lines(rows))
        assert done.code == 0, done.err
        return done.rows

    return run


STRATEGIES = ("recent", "uniform", "recent+uniform", "learnable")


@pytest.mark.parametrize(("arch", "strategy", "layers", "dtype"), [
    *(("longer", s, n, d) for (s, n), d in zip(product(STRATEGIES, (0, 1, 3)), ("fp32", "bf16") * 6, strict=True)),
    *((arch, "recent", 1, "fp32") for arch in ("transformer", "hstu", "din", "sumpool", "base")),
])  # fmt: skip
def test_the_cache_changes_no_score(tmp_path, arch, strategy, layers, dtype):
    data = shared_folder() / "data"
    sizes = {"query_strategy": strategy} if arch == "longer" else {}
    model_dir = tiny_model(tmp_path / "run", data, arch=arch, layers=layers, globals_="cls,uid", **sizes)
    config = read_config(model_dir)
    reader = Reader(model_dir, config, _data_of(model_dir), data)
    options = Options(file="-", model=str(model_dir), cache_dtype=dtype)
    server = Server(options, load_model(model_dir), "m")
    plain = Server(dataclasses.replace(options, kv_cache=False), server.model, "m")
    some = [next(iter(reader.of_split("test")))]
    for count in (1, 7, 256 if arch == "longer" else 40):
        one = dataclasses.replace(
            some[0], candidate=torch.randint(1, 9, (count,)).numpy(), names=[None] * count,
            candidate_sides={"cat": torch.randint(1, 4, (count,)).numpy()},
        )  # fmt: skip
        (first,), (again,), (slow,) = server.answer([one]), server.answer([one]), plain.answer([one])
        assert first["scores"] == again["scores"]
        assert slow["cache"] == "off"
        tolerance = 1e-5 if dtype == "fp32" else 5e-3
        assert first["scores"] == pytest.approx(slow["scores"], abs=tolerance)
        if arch != "base" and count > 7:
            assert max(first["scores"]) - min(first["scores"]) > 0.05  # scores that could not differ prove nothing


def test_cached_tensors_do_not_depend_on_the_candidate():
    folder = shared_folder()
    model = load_model(folder / "run")
    reader = Reader(folder / "run", model.config, _data_of(folder / "run"), folder / "data")
    one = next(iter(reader.of_split("test")))
    other = dataclasses.replace(one, candidate=one.candidate[::-1] * 0 + 3)
    with torch.no_grad():
        a, b = (model.user_side(as_batch([x], [x.ts], 4)) for x in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_events_older_than_max_len_do_not_show(score):
    rows = requests(1)
    past = [{"item": f"i{n % 9}", "ts": n, "cat": "c1", "label": n % 2} for n in range(40)]
    long, short = ({**rows[0], "history": part} for part in (past, past[-16:]))  # max-len is 16
    one, two = score([long]), score([short])
    assert one[0]["scores"] == two[0]["scores"]
    assert (one[0]["hist_len"], two[0]["hist_len"]) == (40, 16)


def test_a_history_in_the_record_is_that_of_the_dataset(score):
    for row in requests():
        mine = [{key: e[key] for key in ("item", "ts", "cat", "label")} for e in LOG if e["user"] == row["user"]]
        late = [e for e in mine if e["ts"] >= row["ts"]]
        given = score([{**row, "history": mine[::-1]}])[0]  # out of order, with events of later
        stored = score([row])[0]
        assert given["scores"] == stored["scores"]
        assert given["hist_len"] == len(mine) - len(late)
        assert "history" not in given


def test_lines_keep_their_fields_and_say_what_they_are(score):
    rows = requests()
    found = score(rows, "--topk", "2", "--timings")
    for row, out in zip(rows, found, strict=True):
        assert {key: out[key] for key in row} == row
        assert out["oov"] == 1
        best = sorted(zip(out["scores"], row["candidates"], strict=True), key=lambda pair: -pair[0])[:2]
        assert out["top"] == [[name, value] for value, name in best]
        assert out["prefill_ms"] >= 0
    empty = score([{"user": "u1", "ts": 500, "candidates": []}])[0]
    assert (empty["scores"], empty["cache"]) == ([], "off")


def test_batches_of_requests_and_of_candidates_change_nothing(score):
    rows = requests(7)
    alone = [row["scores"] for row in score(rows)]
    for more in (["--batch-requests", "4"], ["--batch-candidates", "2"], ["--no-kv-cache"]):
        for one, two in zip(alone, score(rows, *more), strict=True):
            assert two["scores"] == pytest.approx(one, abs=1e-5)


def test_an_entry_is_used_only_where_model_user_history_and_time_agree(score, tool, tmp_path):
    row = requests(1)[0]
    others = [{**row, "user": "u3"}, {**row, "ts": row["ts"] + 1}, {**row, "history": []}, row]
    others.append({**row, "candidates": ["i1"]})
    assert [one["cache"] for one in score([row, *others])] == ["miss", "miss", "miss", "miss", "hit", "hit"]
    kept = tmp_path / "cache"
    first = score([row, others[1]], "--cache-save", kept)
    again = score([row, others[0]], "--cache-load", kept, "--check")
    assert [one["cache"] for one in again] == ["hit", "miss"]
    assert again[0]["scores"] == first[0]["scores"]
    folder = shared_folder()
    other = tiny_model(tmp_path / "other", folder / "data", seed=1)
    refused = tool("longer-score", "--model", other, "--cache-load", kept, stdin=lines([row]))
    assert refused.code == 65
    assert "is the cache of another model" in refused.err


def test_the_check_finds_a_cache_that_lies(tmp_path):
    folder = shared_folder()
    model = load_model(folder / "run")
    reader = Reader(folder / "run", model.config, _data_of(folder / "run"), folder / "data")
    server = Server(Options(file="-", model="x", check=True), model, "m")
    one = next(iter(reader.of_split("test")))
    key = Key(one.user, one.past.digest(), one.ts)
    with torch.no_grad():
        true = model.user_side(as_batch([one], [one.ts], 4))
    server.store.put(key, {name: t + 1 if name == "v0" else t for name, t in true.items()})
    from toolbox.longer.score import NotExact

    with pytest.raises(NotExact, match=f"user {one.user} at {one.ts}") as found:
        server.answer([one])
    assert found.value.exit_code == 1


def test_the_store_drops_the_least_recently_used():
    store = Store("m", most=3 * 400)
    for name in "abc":
        store.put(Key(name, "", 0), {"k0": torch.ones(100)})
    store.get(Key("a", "", 0))
    store.put(Key("d", "", 0), {"k0": torch.ones(100)})
    assert [store.get(Key(name, "", 0)) is not None for name in "abcd"] == [True, False, True, True]
    assert (store.bytes, store.dropped, len(store)) == (1200, 1, 3)
    store.put(Key("big", "", 0), {"k0": torch.ones(1000)})  # larger than all: given back, not kept
    assert len(store) == 3


def test_a_damaged_cache_file_is_bad_data(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c"
    save_file({"7.k0": torch.ones(2)}, path, {"model": "m", "entries": '[["u","h",1]]'})
    with pytest.raises(BadData, match="belongs to no entry"):
        Store("m", 1000).load(str(path), "cpu")


def test_a_time_bucket_scores_all_its_requests_alike(score):
    assert [canonical_time(t, last, 100) for t, last in ((457, 380), (457, 430), (457, None), (400, 399))] == [
        400, 431, 400, 400,
    ]  # fmt: skip
    assert canonical_time(457, 430, 0) == 457
    past = [{"item": "i1", "ts": 380, "label": 1, "cat": "c1"}]
    row = {"user": "u1", "candidates": ["i1", "i2"], "history": past, "hour": 1}
    rows = [{**row, "ts": ts} for ts in (457, 410, 499, 500)]
    found = score(rows, "--cache-time-bucket", "100", "--check")
    assert [row["cache"] for row in found] == ["miss", "hit", "hit", "miss"]
    assert found[0]["scores"] == found[1]["scores"] == found[2]["scores"]


def test_it_works_as_a_co_process():
    folder = shared_folder()
    with subprocess.Popen(
        [sys.executable, ROOT / "bin/longer-score", "--model", folder / "run", "--quiet"], env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        for row in requests(2):
            process.stdin.write(lines([row]))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == row["id"]  # before the next one is asked
        process.stdin.close()
        assert process.wait() == 0


@pytest.mark.parametrize(("change", "says"), [
    ({"ts": "x"}, "$.ts: Expected"), ({"ts": 1.5}, "not a whole number"), ({"candidates": 3}, "$.candidates: Expected"),
    ({"candidates": [{"cat": "c1"}]}, "without `item`"), ({"labels": [1]}, "1 labels for 5 candidates"),
    ({"labels": [3] * 5}, "expected 0 or 1"), ({"history": [{"item": "i1"}]}, "`ts` is not a number"),
    ({"user": ""}, "empty"),
])  # fmt: skip
def test_bad_requests_are_65_with_their_line(tool, change, says):
    rows = [requests(1)[0], {**requests(1)[0], **change}]
    done = tool("longer-score", "--model", shared_folder() / "run", stdin=lines(rows))
    assert done.code == 65
    assert "stdin:2:" in done.err
    assert says in done.err


def test_wrong_directories_have_their_codes(tool, tmp_path):
    folder = shared_folder()
    rows = lines(requests(1))

    def code(*words):
        return tool("longer-score", *words, stdin=rows).code

    assert code("--model", tmp_path) == 66
    assert code("--model", folder / "run", "--split", "test") == 2
    assert code("--model", folder / "run", "--no-kv-cache", "--check") == 2
    assert code("--model", folder / "run", "--data", tmp_path) == 66
    log = tmp_path / "log"
    log.write_bytes(lines([{**row, "item": row["item"] + "x"} for row in LOG]))
    assert code("--model", folder / "run", "--data", prepared(tmp_path / "other", log)) == 65
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert code("--model", tmp_path) == 65


def test_scores_of_a_split_go_straight_into_longer_eval(tool):
    folder = shared_folder()
    scored = tool("longer-score", "--model", folder / "run", "--data", folder / "data", "--split", "test")
    judged = tool("longer-eval", "--bootstrap", "20", stdin=scored.out)
    assert judged.code == 0, judged.err
    found = judged.rows[0]
    assert found["n"] == sum(len(row["scores"]) for row in scored.rows)
    assert found["auc_ci"][0] <= found["auc"] <= found["auc_ci"][1]
