"""lit-tune: its losses against float64, its batches against one another, resuming, what it writes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.contract.commands import lines
from tests.lit.vlms import chats, data_uri, picture, processor
from tests.server import ROOT, environment
from toolbox.lit.data import Labelling, Rows
from toolbox.lit.images import ImageStore
from toolbox.lit.lines import CAPTIONS, TURNS
from toolbox.lit.method import MODES, NORMALIZE, Weights
from toolbox.lit.objective import LabelledTokens, VisionLoss
from toolbox.lit.rows import Counts, Reading, samples_of
from toolbox.models.load import find_model
from toolbox.models.spans import Aligner, Kind
from toolbox.models.vlm import NotCausal, check_causal, load_processor, load_vlm
from toolbox.shell.errors import BadData
from toolbox.shell.records import RecordReader
from toolbox.training.objective import Pass
from toolbox.training.windows import Window

TRAIN = Pass("train", "train")
SHORT = ["--epochs", "1", "--batch-size", "3", "--lr", "1e-2", "--quiet"]


def samples(rows):
    reader = RecordReader((*TURNS, *CAPTIONS))
    records = reader(io.BufferedReader(io.BytesIO(lines(rows))), "rows")
    return [one for record in records for one in samples_of(record, Reading(), Counts())]


def labelled(llava, rows, **how) -> Rows:
    found = Rows(Aligner(load_processor(find_model(str(llava)))), ImageStore(None), Labelling(**how))
    found.add(samples(rows), lambda sample, problem: pytest.fail(str(problem)))
    return found


@pytest.fixture(scope="module")
def model(llava):
    return load_vlm(find_model(str(llava)))


def by_hand(model, rows: Rows, weights: Weights, normalize: str) -> tuple[float, float, float]:
    """The loss from each row's full logits alone, unpadded, in float64."""
    sides, own = [], []
    for place, row in enumerate(rows.rows):
        aligned = rows.aligned(place)
        inputs = {name: torch.tensor(np.array(value)) for name, value in aligned.inputs.items()}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([aligned.ids]), **inputs).logits[0].double()
        nll = [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, aligned.ids[t]]) for t in row.places]
        for value, on in zip(nll, row.response, strict=True):
            sides.append((value, on, weights.response if on else weights.instruction, place))
    answers, others = ([v for v, on, _, _ in sides if on is side] for side in (True, False))
    means = [float(np.mean(one)) if one else 0.0 for one in (answers, others)]
    if normalize == "tokens":
        loss = sum(v * w for v, _, w, _ in sides) / sum(w for _, _, w, _ in sides)
    elif normalize == "segment":
        loss = weights.response * means[0] + weights.instruction * means[1]
    else:
        for place in range(len(rows.rows)):
            mine = [(v, w) for v, _, w, at in sides if at == place]
            own.append(sum(v * w for v, w in mine) / sum(w for _, w in mine))
        loss = float(np.mean(own))
    return loss, means[0], means[1]


@pytest.mark.parametrize("mode", MODES)
def test_losses_equal_a_recomputation_from_full_logits_in_float64(llava, model, mode):
    rows = labelled(llava, chats(4), mode=mode, templates=frozenset({"Sure?"}))
    for normalize, weights in zip(NORMALIZE, (Weights(), Weights(1.0, 0.25), Weights(2.0, 0.5)), strict=True):
        objective = LabelledTokens(rows, 258, weights, normalize)
        objective.before_window(Window(1, 1, True, {"train": (0, 1, 2, 3)}))
        total = torch.zeros(())
        sums: dict[str, float] = {}
        for part in ([0, 3], [2], [1]):
            loss, found = objective.loss(VisionLoss(model, chunk=7), TRAIN, objective.batch(TRAIN, part), 1.0)
            total = total + loss.detach()
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        report = objective.report(sums, {"train": 1.0})
        loss, answers, others = by_hand(model, rows, weights, normalize)
        assert float(total) == pytest.approx(loss, abs=1e-5)
        assert report["loss_response"] == pytest.approx(answers, abs=1e-5)
        assert (report["loss_instruction"] or 0.0) == pytest.approx(others, abs=1e-5)


def test_vit_is_the_model_s_own_loss_on_the_same_labels(llava, model):
    rows = labelled(llava, chats(2)[:1], mode="vit")
    row, aligned = rows.rows[0], rows.aligned(0)
    labels = torch.full((1, len(aligned.ids)), -100)
    for place in row.places:
        labels[0, place] = aligned.ids[place]
    inputs = {name: torch.tensor(np.array(value)) for name, value in aligned.inputs.items()}
    theirs = model(input_ids=torch.tensor([aligned.ids]), labels=labels, **inputs).loss
    assert by_hand(model, rows, Weights(), "tokens")[0] == pytest.approx(float(theirs.detach()), abs=1e-5)


def test_images_and_padding_are_never_learned(llava):
    for mode in MODES:
        rows = labelled(llava, chats(6), mode=mode)
        for row in rows.rows:
            assert not {Kind(row.kinds[place]) for place in row.places} & {Kind.IMAGE, Kind.PAD}
        batch = LabelledTokens(rows, 258, Weights(), "tokens").batch(TRAIN, range(6))
        assert bool(batch.inputs["attention_mask"].flatten()[batch.where].all())


@pytest.mark.parametrize("others", [("1",), pytest.param(("2", "two"), marks=pytest.mark.slow)])
def test_any_split_into_micro_batches_and_processes_gives_the_same_model(tool, llava, tmp_path, others):
    """That two processes give what one gives is asked of every command by the contract suite too."""
    text = lines(chats(9))
    found = {}
    for name in ("all", *others):
        more = ["-j", "2", "--micro-batch", "1"] if name == "two" else ["--micro-batch", {"all": "8"}.get(name, name)]
        out = tmp_path / name
        done = tool("lit-tune", "--model", llava, "--out", out, "--optimizer", "sgd", "--lr", "0.05", "--batch-size",
                    "3", "--max-grad-norm", "0", "--group-by-length", *more, stdin=text)  # fmt: skip
        assert done.code == 0, done.err
        assert [row["steps"] for row in done.rows if row["event"] == "done"] == [3]
        found[name] = load_file(out / "model.safetensors")
    for name in others:
        gap = max(float((found["all"][key] - found[name][key]).abs().max()) for key in found["all"])
        assert gap < 2e-5, (name, gap)


def test_a_killed_run_goes_on_bit_for_bit(tool, llava, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(chats(10)))
    words = ["lit-tune", rows, "--model", llava, "--batch-size", "1", "--lr", "1e-2", "--save-every", "1", "--quiet"]
    whole = tool(*words, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    read_out, write_out = os.pipe()
    with open(os.devnull, "r+b") as null:
        running = tool.start(*words, "--out", tmp_path / "cut", fds=(null.fileno(), write_out, null.fileno()))
    os.close(write_out)
    with open(read_out, "rb") as events:
        for line in events:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 6:
                os.kill(running.pid, signal.SIGKILL)
                break
    running.wait()
    resumed = tool(*words, "--out", tmp_path / "cut", "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.rows[0]["event"] == "resume"
    assert resumed.rows[0]["step"] >= 5
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert both[0] == both[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "events.jsonl").read_text().splitlines()
             if '"step"' in line and json.loads(line)["event"] == "step"]  # fmt: skip
    assert steps == list(range(1, 11))


@pytest.mark.slow
def test_a_tuned_folder_loads_in_plain_transformers_and_says_the_same(tool, llava, tmp_path):
    done = tool("lit-tune", "--model", llava, "--out", tmp_path / "out", *SHORT, stdin=lines(chats(6)))
    assert done.code == 0, done.err
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
made = AutoProcessor.from_pretrained(sys.argv[1])
text = made.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
                                add_generation_prompt=True)
inputs = made(text=[text], images=[Image.open(sys.argv[2])], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print("toolbox" in " ".join(sys.modules), out[0, inputs["input_ids"].shape[1]:].tolist())
"""
    picture(5).save(tmp_path / "p.png")
    plain = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out", tmp_path / "p.png"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    ours = load_vlm(find_model(str(tmp_path / "out")))
    aligner = Aligner(load_processor(find_model(str(tmp_path / "out"))))
    prompt = aligner.align([("user", (None, "What?"))], [picture(5)], generation=True)
    inputs = {name: torch.tensor(np.array(value)) for name, value in prompt.inputs.items()}
    ids = torch.tensor([prompt.ids])
    out = ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=8, do_sample=False)
    assert plain.stdout.strip() == f"False {out[0, len(prompt.ids) :].tolist()}", plain.stderr
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in names  # tied, stored once
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["rows"]["kept"] == 6
    assert (tmp_path / "out" / "task_templates.jsonl").read_bytes() == b""


def test_parts_stages_adapters_and_cached_features(tool, llava, tmp_path):
    text = lines(chats(6))
    before = load_file(llava / "model.safetensors")

    def changed(out, *more, stdin=text):
        done = tool("lit-tune", "--model", llava, "--out", tmp_path / out, *SHORT, *more, stdin=stdin)
        assert done.code == 0, done.err
        after = load_file(tmp_path / out / "model.safetensors")
        return {key for key in before if not torch.equal(before[key], after[key])}, done.rows[-1], after

    every, plain, weights = changed("default")
    assert {key.split(".")[0] for key in every} == {"language_model", "multi_modal_projector"}
    again, cached, same = changed("cached", "--cache-vision", tmp_path / "features")
    assert again == every
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-3)  # features are kept in bf16
    assert {key.split(".")[0] for key in same} == {key.split(".")[0] for key in weights}  # the tower is back
    captions = lines([{"id": str(i), "image": data_uri(i), "captions": [f"A {i}", f"The {i}"]} for i in range(3)])
    aligned, done, _ = changed("pre", "--stage", "pretrain", stdin=captions)
    assert {key.split(".")[0] for key in aligned} == {"multi_modal_projector"}
    assert (done["steps"], done["loss_instruction"]) == (2, None)
    last, _, _ = changed("last", "--train-parts", "lm:1")
    assert {key.split(".layers.")[1][0] for key in last} == {"1"}


@pytest.mark.slow
def test_adapters_keep_the_connector_whole_beside_them(tool, llava, tmp_path):
    """peft alone takes seconds to import."""
    text, before = lines(chats(6)), load_file(llava / "model.safetensors")
    done = tool("lit-tune", "--model", llava, "--out", tmp_path / "lora", *SHORT, "--lora-r", "2", stdin=text)
    assert done.code == 0, done.err
    tuned = load_vlm(find_model(str(tmp_path / "lora")))
    moved = load_file(tmp_path / "lora" / "connector.safetensors")
    assert torch.equal(tuned.get_base_model().model.multi_modal_projector.linear_1.weight, moved["linear_1.weight"])
    assert not torch.equal(before["multi_modal_projector.linear_1.weight"], moved["linear_1.weight"])


def test_a_model_that_looks_ahead_is_refused(llava, model):
    rows = labelled(llava, chats(1))
    aligned, place = rows.aligned(0), rows.rows[0].places[5]
    check_causal(model, aligned, place, 258)
    layers = model.model.language_model.layers
    original = [layer.self_attn.forward for layer in layers]
    for layer, attend in zip(layers, original, strict=True):

        def both_ways(*a, attend=attend, layer=layer, **k):
            out = attend(*a, **k)
            return (out[0] + out[0].mean(1, keepdim=True), *out[1:])

        layer.self_attn.forward = both_ways
    try:
        with pytest.raises(NotCausal, match="see each other") as refused:
            check_causal(model, aligned, place, 258)
        assert refused.value.exit_code == 1
    finally:
        for layer, attend in zip(layers, original, strict=True):
            layer.self_attn.forward = attend


HOSTILE = [
    ({"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
     "0 <image> marks for 1 images"),
    ({"messages": [{"role": "user", "content": "an <image>"}, {"role": "assistant", "content": "y"}]},
     "<image> without an image"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "two user turns in a row"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
     "an empty assistant turn"),
    ({"messages": [{"role": "user", "content": "x\ue000"}, {"role": "assistant", "content": "y"}]}, "private-use"),
    ({"image": "https://example.org/a.jpg", "caption": "x"}, "nothing is ever fetched"),
    ({"image": "FILE:///etc/passwd", "caption": "x"}, "nothing is ever fetched"),
    ({"image": "../outside.png", "caption": "x"}, "leads out of the image root"),
    ({"image": "/etc/hostname", "caption": "x"}, "leads out of the image root"),
    ({"image": "link.png", "caption": "x"}, "leads out of the image root"),
    ({"image": "a\0.png", "caption": "x"}, "not a file name"),
    ({"image": "none.png", "caption": "x"}, "is missing"),
    ({"image": "cut.png", "caption": "x"}, "cannot be decoded"),
    ({"image": "huge.png", "caption": "x"}, "pixels, more than --max-image-pixels"),
    ({"image": "pipe", "caption": "x"}, "is no file"),
    ({"image": "data:text/html;base64,QQ==", "caption": "x"}, "a data URI must be"),
    ({"image": "easy-vqa:train/../../x.png", "caption": "x"}, "is no image of easy-VQA"),
]  # fmt: skip
GOOD = {"id": "g", "image": "good.png", "captions": ["fine"]}


@pytest.fixture
def root(tmp_path):
    """An image root with a good image, a cut one, a link out of it, a pipe, and 900 million pixels in a small file."""
    import zlib

    folder = tmp_path / "root"
    folder.mkdir()
    picture().save(tmp_path / "outside.png")
    picture().save(folder / "good.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    os.mkfifo(folder / "pipe")
    squeeze = zlib.compressobj(1)
    data = b"".join(squeeze.compress(bytes(375100)) for _ in range(300)) + squeeze.flush()
    header = (30000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = b""
    for name, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        chunks += len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return folder


_OPENED: list[tuple[str, str]] | None = None


def _watch(event: str, given: tuple) -> None:
    if _OPENED is not None and (event == "open" or event.startswith("socket.")):
        _OPENED.append((event, os.path.realpath(given[0]) if event == "open" and isinstance(given[0], str) else ""))


def test_hostile_rows_are_65_with_their_line_and_nothing_is_opened_outside_the_root(root):
    """As lit-tune reads rows, in this process, so that what it opens can be watched."""
    global _OPENED  # a hook cannot be taken out again: it sleeps
    sys.addaudithook(_watch)
    aligner, store = Aligner(processor()), ImageStore(str(root))
    told: list[BadData] = []
    keep = lambda raw, problem: told.append(problem)  # noqa: E731
    reader = RecordReader((*TURNS, *CAPTIONS), on_bad="skip", rejects=keep)
    rows = Rows(aligner, store, Labelling(stage="pretrain"))
    text = lines([GOOD, *(row for row, _ in HOSTILE), {**GOOD, "id": "last"}])
    _OPENED = []
    try:
        records = reader(io.BufferedReader(io.BytesIO(text)), "rows")  # type: ignore[arg-type]
        for record in records:
            try:
                rows.add(samples_of(record, Reading(), Counts()), lambda sample, problem: told.append(problem))
            except BadData as problem:
                told.append(problem)
        seen = _OPENED
    finally:
        _OPENED = None
    assert [row.sample.id for row in rows.rows] == ["g", "last"]
    assert [(problem.exit_code, problem.file, problem.line) for problem in told] == [
        (65, "rows", number) for number in range(2, 2 + len(HOSTILE))
    ]
    for problem, (row, says) in zip(told, HOSTILE, strict=True):
        assert says in problem.reason, row
    libraries = (sys.prefix, sys.base_prefix, *map(os.path.realpath, (sys.prefix, *sys.path[1:])))
    opened = {path for event, path in seen if event == "open" and not path.startswith(libraries)}
    assert opened <= {str(root / name) for name in ("good.png", "cut.png", "huge.png")}
    assert not [event for event, _ in seen if event.startswith("socket.")]


def test_a_hostile_row_ends_the_command_with_65_or_is_skipped(tool, llava, root, tmp_path):
    words = ["lit-tune", "--model", llava, "--out", tmp_path / "out", "--image-root", root, "--stage", "pretrain"]
    done = tool(*words, *SHORT, stdin=lines([GOOD, {"image": "link.png", "caption": "x"}]))
    assert (done.code, done.out) == (65, b""), done.err
    assert done.err.startswith("lit-tune: stdin:2:")
    assert not (tmp_path / "out").exists()
    text = lines([GOOD, *(row for row, _ in HOSTILE)])
    skipped = tool(*words, "--dry-run", *SHORT, "--on-bad", "skip", stdin=text)
    assert (skipped.code, skipped.rows[0]["rows"]) == (0, 1), skipped.err
    assert f"{len(HOSTILE)} bad rows left out" in skipped.err


@pytest.mark.slow
def test_hostile_rows_take_little_memory(llava, root, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines([GOOD, *(row for row, _ in HOSTILE)]))
    code = """
import sys
from toolbox.commands.lit_tune import main
try:
    main()
finally:
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""
    words = [tmp_path / "rows.jsonl", "--model", llava, "--out", tmp_path / "out", "--image-root", root, "--dry-run",
             "--stage", "pretrain", "--on-bad", "skip", "--quiet"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 1.5e6  # kB


def test_options_that_do_not_fit_together_are_2(tool, llava, tmp_path):
    for more in (
        ["--stage", "pretrain", "--mode", "lit"], ["--lora-alpha", "3"], ["--train-parts", "head"],
        ["--cache-vision", "x", "--train-parts", "vision"], ["--split", "letters"],
        ["--response-weight", "0", "--instruct-weight", "0"],
    ):  # fmt: skip
        done = tool("lit-tune", "--model", llava, "--out", tmp_path / "out", *more, stdin=lines(chats(2)))
        assert (done.code, done.out) == (2, b""), (more, done.err)


def test_long_rows_are_dropped_cut_or_refused_as_asked(llava):
    rows = chats(4)
    whole = labelled(llava, rows)
    length = sorted(len(row.aligned.ids) for row in whole.rows)[1]
    dropped = labelled(llava, rows, max_length=length)
    assert (dropped.tally.kept, dropped.tally.dropped_overlong) == (2, 2)
    cut = labelled(llava, rows, max_length=length, overlong="truncate-response")
    assert all(len(row.aligned.ids) <= length for row in cut.rows)
    assert cut.tally.truncated + cut.tally.dropped_overlong == 2


def test_a_processor_s_own_failure_is_bad_data_of_the_row(llava):
    made = processor()
    made.image_processor = None
    rows = Rows(Aligner(made), ImageStore(None), Labelling())
    told = []
    rows.add(samples(chats(1)), lambda sample, problem: told.append(problem.what))
    assert len(told) == 1
    assert "rows:1" in told[0]
