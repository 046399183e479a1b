"""lwi-fuse from end to end on tiny nets: what is written, what is refused, and that a run can be repeated."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from tests.lwi.nets import save_net


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """``nets("llama", 1)`` is a directory; made once."""
    folder = tmp_path_factory.mktemp("nets")

    def get(name, seed=0):
        path = folder / f"{name}-{seed}"
        return path if path.exists() else save_net(name, path, seed)

    return get


def weights(path):
    return load_file(path / "model.safetensors")


def logits(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) % 61).logits


def fused(tool, *words, code=0):
    done = tool("lwi-fuse", *words)
    assert done.code == code, done.err
    return done


def test_a_shuffled_model_comes_back_and_loads_in_plain_transformers(tool, nets, tmp_path):
    net, out = nets("llama"), tmp_path / "out"
    done = fused(tool, net, net, "--shuffle-seed", "1", "--groups", ".", "--no-diversion", "-o", out, "--plot",
                 tmp_path / "p.svg", "--report", tmp_path / "r.jsonl")  # fmt: skip
    *groups, end = done.rows
    assert [row["group"] for row in groups][:3] == ["residual", "layers.0.kv", "layers.0.qin"]
    assert all(row["recovered"] == 1 and row["mode"] == "similar" and row["moved"] > 0 for row in groups)
    assert all(row["cos_before"] < row["cos_after"] and row["cos_after"] > 0.99999 for row in groups)
    assert end["verified"] == "full"
    assert end["verified_max_rel"] < 1e-4
    assert (end["k"], end["lossy"], end["groups"]) == ([0.5], False, len(groups))
    assert torch.equal(logits(out), logits(net))
    assert (tmp_path / "r.jsonl").read_bytes() == done.out
    assert "<svg" in (tmp_path / "p.svg").read_text()
    perms = load_file(out / "permutations.safetensors")
    assert perms["0/residual"].dtype == torch.int32
    assert perms["0/layers.1.vo"].shape == (3, 8)
    with safe_open(out / "model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["toolbox"])
    assert told["command"] == "lwi-fuse"
    assert told["options"]["shuffle_seed"] == 1
    assert set(told["inputs"]) == {"model0", "model1"}
    assert str(tmp_path) not in json.dumps(told)
    assert json.loads((out / "run.json").read_text())["peak_memory_mib"] > 0


def test_aligned_old_is_bitwise_a_relabelling_in_its_own_type(tool, nets, tmp_path):
    old, new = tmp_path / "old", nets("llama", 1)
    shutil.copytree(nets("llama"), old)
    save_file(
        {key: value.bfloat16() for key, value in weights(old).items()}, old / "model.safetensors", {"format": "pt"}
    )
    out = tmp_path / "aligned"
    done = fused(tool, old, new, "--align-only", "--groups", ".", "--shuffle-seed", "3", "--max-shard-size", "20KB",
                 "-o", out)  # fmt: skip
    assert done.rows[-1]["k"] == []
    perms = {
        name.removeprefix("0/"): value.long() for name, value in load_file(out / "permutations.safetensors").items()
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    found = {key: load_file(out / file)[key] for key, file in index["weight_map"].items()}
    before = weights(old)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    for key, value in found.items():
        assert torch.equal(value.flatten().sort().values, before[key].flatten().sort().values), key
    # OLD was shuffled first; the stored permutations are on top of that, so residual columns come back together.
    assert sorted(perms["residual"].tolist()) == list(range(48))
    torch.testing.assert_close(logits(out), logits(old), rtol=1e-3, atol=1e-3)


def test_averages_are_k_old_and_the_rest_new_in_news_type(tool, nets, tmp_path):
    one, two, three = (nets("gpt2", seed) for seed in (0, 1, 2))
    still = ["--matching", "identity"]
    a, b, c = (weights(path) for path in (one, two, three))

    def check(words, mean, tolerance=1e-6):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        done = fused(tool, *words, *still, "-o", out)
        for key, value in weights(out).items():
            assert value.dtype == a[key].dtype
            assert (value - mean(key)).abs().max() <= tolerance, key
        return done.rows

    check([one, two, "--k", "0.3"], lambda key: 0.3 * a[key] + 0.7 * b[key])
    rows = check([one, two, three, "--k", "0.5"], lambda key: 0.25 * a[key] + 0.25 * b[key] + 0.5 * c[key])
    assert {row.get("step") for row in rows[:-1]} == {1, 2}
    assert rows[-1]["k"] == [0.5, 0.5]
    mean = lambda key: 0.5 * a[key] + 0.3 * b[key] + 0.2 * c[key]  # noqa: E731
    check([one, two, three, "--weights", ".5,.3,.2"], mean)
    check([one, two, three, "--weights", "5,3,2", "--anchor", "first"], mean)
    check([one, two, three, "--anchor", "first"], lambda key: (a[key] + b[key] + c[key]) / 3)
    rows = [{"model": one.name}, {"model": two.name, "k": 0.9}]
    done = tool("lwi-fuse", "-", "--root", one.parent, *still, "-o", tmp_path / "list",
                stdin="".join(json.dumps(row) + "\n" for row in rows).encode())  # fmt: skip
    assert done.rows[-1]["k"] == [0.9]
    assert all((v - 0.9 * a[k] - 0.1 * b[k]).abs().max() <= 1e-6 for k, v in weights(tmp_path / "list").items())


def test_three_relabelled_models_fuse_to_the_one_they_are(tool, nets, tmp_path):
    net = nets("cifar-resnet")
    for number in (0, 1):
        fused(tool, net, net, "--shuffle-seed", number, "--align-only", "--max-sweeps", "1", "--matching", "identity",
              "-o", tmp_path / f"twin{number}")  # fmt: skip
    for anchor in ("order", "first"):
        out = tmp_path / anchor
        fused(tool, tmp_path / "twin0", tmp_path / "twin1", net, "--anchor", anchor, "--no-diversion", "-o", out)
        twin, plain = weights(out), weights(net if anchor == "order" else tmp_path / "twin0")
        assert max(float((twin[key].float() - plain[key].float()).abs().max()) for key in plain) <= 1e-6


def relabel_classes(directory, labels, rows=None):
    """Change the class names of a copied directory, and its head's rows."""
    config = json.loads((directory / "config.json").read_text())
    config["id2label"] = {str(n): label for n, label in enumerate(labels)}
    config["label2id"] = {label: n for n, label in enumerate(labels)}
    config["lwi_tasks"] = [labels]
    (directory / "config.json").write_text(json.dumps(config))
    if rows is not None:
        values = weights(directory)
        for key in ("classifier.weight", "classifier.bias"):
            values[key] = values[key][rows].clone()
        save_file(values, directory / "model.safetensors", {"format": "pt"})


def test_head_rows_pair_by_label_and_follow_the_last_group(tool, nets, tmp_path):
    """OLD knows bee and ant, in another order and other channels; NEW knows ant, bee, cat and dog."""
    net = nets("cifar-resnet")
    old, new = tmp_path / "old", tmp_path / "new"
    fused(tool, net, net, "--shuffle-seed", "5", "--matching", "identity", "--align-only", "-o", old)
    relabel_classes(old, ["bee", "ant"], [1, 0])
    shutil.copytree(net, new)
    relabel_classes(new, ["ant", "bee", "cat", "dog"], [0, 1, 2, 2])
    done = fused(tool, old, new, "--k", "0.25", "--no-diversion", "-o", tmp_path / "out")
    assert done.rows[-1]["verified"] == "full"
    found, wanted = weights(tmp_path / "out"), weights(new)
    for key in wanted:
        assert (found[key].float() - wanted[key].float()).abs().max() <= 1e-6, key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["ant", "bee", "cat", "dog"]
    auto = fused(tool, old, new, "--k", "auto", "--no-diversion", "-o", tmp_path / "auto")
    assert auto.rows[-1]["k"] == [0.5]
    bad = fused(tool, new, old, "-o", tmp_path / "bad", code=65)
    assert "has no label 'cat', 'dog'" in bad.err


def test_whole_numbers_are_news_and_batch_norm_moves_with_its_group(tool, nets, tmp_path):
    old, new = tmp_path / "old", nets("cifar-resnet")
    shutil.copytree(nets("cifar-resnet", 1), old)
    values = weights(old)
    values["stem.norm.num_batches_tracked"].fill_(77)
    save_file(values, old / "model.safetensors", {"format": "pt"})
    fused(tool, old, new, "--k", "1", "--deep", "2", "-o", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found["stem.norm.num_batches_tracked"] == weights(new)["stem.norm.num_batches_tracked"]
    perm = load_file(tmp_path / "out" / "permutations.safetensors")["0/stages.2.stream"].long()
    assert (perm != torch.arange(12)).any()
    for part in ("weight", "bias", "running_mean", "running_var"):
        name = f"stages.2.blocks.0.norm2.{part}"
        assert torch.allclose(found[name], values[name][perm])


def test_batch_norm_statistics_are_estimated_anew_by_the_fused_weights(tool, nets, tmp_path):
    from torch.nn import functional as F

    from toolbox.classify.augment import normalise
    from toolbox.classify.images import load_images
    from toolbox.classify.manifest import read_manifest
    from toolbox.shell.streams import Streams

    rows = [{"image": f"digits:{n}", "label": n % 2} for n in range(300)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [nets("cifar-resnet"), nets("cifar-resnet", 1), "--no-diversion"]
    done = fused(tool, *words, "--recalibrate", tmp_path / "m.jsonl", "-o", tmp_path / "new")
    plain = fused(tool, *words, "-o", tmp_path / "plain")
    assert (done.rows[-1]["recalibrated"], plain.rows[-1]["recalibrated"]) == (True, False)
    new, old = weights(tmp_path / "new"), weights(tmp_path / "plain")
    changed = {key for key in new if not torch.equal(new[key], old[key])}
    assert changed == {key for key in new if key.endswith(("running_mean", "running_var"))}
    images = load_images(read_manifest(str(tmp_path / "m.jsonl"), Streams(0, 1)), 16)
    maps = F.conv2d(normalise(images.pixels).double(), new["stem.convolution.weight"].double(), padding=1)
    halves = [half.transpose(0, 1).flatten(1) for half in maps.tensor_split(2)]
    for part, wanted in (("mean", [h.mean(1) for h in halves]), ("var", [h.var(1) for h in halves])):
        torch.testing.assert_close(new[f"stem.norm.running_{part}"], (sum(wanted) / 2).float(), rtol=1e-4, atol=1e-5)
    bad = fused(tool, nets("vit"), nets("vit", 1), "--recalibrate", "digits", "-o", tmp_path / "v", code=2)
    assert "has no batch norm" in bad.err
    assert not (tmp_path / "v").exists()


def test_a_stream_carries_weights_and_the_lines_go_to_the_report(tool, nets, tmp_path):
    words = [nets("vit"), nets("vit", 1), "--no-diversion", "--groups", "ff"]
    to_stdout = fused(tool, *words, "-o", "-", "--report", tmp_path / "r.jsonl")
    fused(tool, *words, "-o", tmp_path / "out")
    streamed, stored = load(to_stdout.out), weights(tmp_path / "out")
    assert all(torch.equal(streamed[key], stored[key]) for key in stored)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "done"
    assert {line["group"] for line in lines[:-1] if line["mode"] == "similar"} == {"layers.0.ff", "layers.1.ff"}


def test_a_soft_plan_is_marked_lossy_and_is_not_a_permutation(tool, nets, tmp_path):
    words = [nets("cifar-resnet"), nets("cifar-resnet", 1), "--solver", "sinkhorn", "--tau", "2", "--no-diversion"]
    hard = fused(tool, *words, "--k", "1", "-o", tmp_path / "hard")
    soft = fused(tool, *words, "--k", "1", "--soft", "-o", tmp_path / "soft")
    assert (hard.rows[-1]["lossy"], soft.rows[-1]["lossy"]) == (False, True)
    name = "stem.convolution.weight"
    one, two, old = (weights(path)[name] for path in (tmp_path / "hard", tmp_path / "soft", words[0]))
    assert torch.equal(one.flatten().sort().values, old.flatten().sort().values)
    assert two.std() < 0.9 * old.std()  # means over channels vary less
    # A plan's rows sum to 1: what all channels agree on is kept.
    assert torch.allclose(two.sum(0), old.sum(0), atol=1e-2)


# -- again ----------------------------------------------------------------------------------------------------------
def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "run.json"}


def test_the_same_run_gives_the_same_bytes_by_any_number_of_workers(tool, nets, tmp_path):
    words = [nets("qwen2"), nets("qwen2", 1), "--groups", "ff|kv|qin|vo", "--deep", "1"]
    one = fused(tool, *words, "-o", tmp_path / "a" / "out")
    again = fused(tool, *words, "-o", tmp_path / "b" / "out")
    threads = fused(tool, *words, "--workers", "3", "-o", tmp_path / "c" / "out")
    assert one.out == again.out == threads.out
    expected = files(tmp_path / "a" / "out")
    assert files(tmp_path / "b" / "out") == files(tmp_path / "c" / "out") == expected


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tool, nets, tmp_path):
    """Groups that are independent are dealt out; with the residual stream all depend on one another."""
    for number, groups in enumerate(("ff|kv|qin|vo", ".")):
        words = [nets("qwen2"), nets("qwen2", 1), "--groups", groups, "--deep", "1"]
        one = fused(tool, *words, "-o", tmp_path / f"one{number}" / "out")
        two = fused(tool, *words, "-j", "2", "-o", tmp_path / f"two{number}" / "out")
        assert one.out == two.out
        assert files(tmp_path / f"one{number}" / "out") == files(tmp_path / f"two{number}" / "out")


def test_killed_at_any_saved_state_and_resumed_gives_the_same_bytes(nets, tmp_path, monkeypatch):
    """In one process: the run is broken off after its first, second ... saved state, then resumed."""
    from toolbox.lwi import fusion
    from toolbox.lwi.choices import Options
    from toolbox.lwi.fuse import run
    from toolbox.shell.command import Invocation
    from toolbox.shell.progress import Reporter
    from toolbox.shell.streams import Streams

    class Killed(BaseException):
        pass

    def go(out, resume=False, stop_after=None):
        with open(tmp_path / "lines", "wb") as lines:
            streams = Streams(stdin_fd=0, stdout_fd=lines.fileno())
            options = Options(models=(str(nets("gpt2")), str(nets("gpt2", 1))), out=str(out), groups=".", deep="1",
                              resume=resume)  # fmt: skip
            settings = {"groups": ".", "deep": "1"}
            monkeypatch.setattr(fusion, "SAVE_EVERY", -1.0)
            save, count = fusion.Fusion._save, [0]

            def counted(self, *words, **more):
                save(self, *words, **more)
                count[0] += 1
                if count[0] == stop_after:
                    raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(fusion.Fusion, "_save", counted)
                run(options, Invocation("lwi-fuse", streams, Reporter("lwi-fuse", True), settings, False))
        return (tmp_path / "lines").read_bytes(), count[0]

    expected, saves = go(tmp_path / "whole" / "out")
    assert saves > 3
    for stop in (1, 2, saves - 1, saves):
        out = tmp_path / str(stop) / "out"
        with pytest.raises(Killed):
            go(out, stop_after=stop)
        assert not out.exists()
        assert list(out.with_name("out.partial").glob("step-*/state.json"))
        lines, more = go(out, resume=True)
        assert more <= saves - stop + 1
        assert lines == expected
        assert files(out) == files(tmp_path / "whole" / "out")


def test_a_killed_run_leaves_no_output_and_may_be_resumed(tool, nets, tmp_path):
    out, null = tmp_path / "out", open("/dev/null", "rb")  # noqa: SIM115
    words = [nets("vit"), nets("vit", 1), "--groups", ".", "-o", out]
    with null, open("/dev/null", "wb") as sink:
        running = tool.start("lwi-fuse", *words, fds=(null.fileno(), sink.fileno(), sink.fileno()))
        deadline = time.monotonic() + 60
        while not out.with_name("out.partial").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        import os

        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert not out.exists()
    assert fused(tool, *words, "--resume").rows[-1]["event"] == "done"
    finished = fused(tool, *words, "--resume")
    assert finished.rows[-1]["event"] == "done"
    assert "finished already" in finished.err
