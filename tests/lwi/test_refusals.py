"""What lwi-fuse refuses: one line, the right code, and nothing under the output's name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lwi.nets import save_net
from toolbox.lwi.spec import builtin_specs


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return save_net("llama", tmp_path_factory.mktemp("nets") / "llama")


@pytest.fixture
def refuse(tool, tmp_path):
    def run(code, says, *words, stdin=b""):
        out = tmp_path / "out"
        done = tool("lwi-fuse", *words, *([] if "-o" in words else ["-o", out]), stdin=stdin)
        assert done.code == code, (done.code, done.err)
        assert done.out == b""
        lines = done.err.splitlines()
        assert says in lines[0], lines
        assert len(lines) <= 2
        assert not out.exists()
        assert not out.with_name("out.partial").exists()

    return run


def changed(net, folder, change):
    shutil.copytree(net, folder)
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


def config(net, folder, **settings):
    shutil.copytree(net, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **settings}))
    return folder


def test_models_that_do_not_fit_together(refuse, net, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    less = changed(net, tmp_path / "less", lambda values: values.pop(key))
    refuse(65, f"has no '{key}'", less, net)
    narrow = changed(net, tmp_path / "narrow", lambda values: values.update({key: values[key][:, :9].clone()}))
    refuse(65, f"differ in shape: '{key}' [40, 9] and [40, 48]", narrow, net)
    untied = changed(
        net, tmp_path / "untied", lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"] + 1})
    )
    refuse(65, "ties its output to its embedding, the other does not", net, untied)
    odd = changed(net, tmp_path / "odd", lambda values: values.update({"model.odd.weight": torch.ones(3)}))
    refuse(65, f"{odd}: the spec llama leaves 1 of", odd, odd)
    bare = tmp_path / "bare.safetensors"
    save_file({"fc1.weight": torch.randn(3, 4), "fc2.weight": torch.randn(2, 3)}, bare)
    refuse(65, "a bare file beside a model directory", bare, net)


def test_weights_that_are_not_numbers_or_not_plain(refuse, net, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"

    def spoil(values):
        values[key][3, 4] = float("nan")

    refuse(65, f"tensor '{key}' holds values that are not finite", changed(net, tmp_path / "nan", spoil), net)
    refuse(65, f"tensor '{key}' holds values that are not finite", net, tmp_path / "nan")
    refuse(65, "its weights are quantised", config(net, tmp_path / "q", quantization_config={"bits": 4}), net)
    byte = changed(net, tmp_path / "int8", lambda values: values.update({key: values[key].to(torch.int8)}))
    refuse(65, f"tensor '{key}' is quantised", byte, net)
    evil = tmp_path / "evil"
    shutil.copytree(net, evil)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refuse(65, "pickle", evil, net)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refuse(65, "an adapter, not a model", adapter, net)
    refuse(66, "no such file", tmp_path / "missing", net)
    refuse(66, "no such file", tmp_path / "missing.safetensors", net)


def test_options_that_do_not_fit(refuse, net, tmp_path):
    refuse(2, "--k 1.5", net, net, "--k", "1.5")
    refuse(2, "--k half", net, net, "--k", "half")
    refuse(2, "--k auto: OLD does not say", net, net, "--k", "auto")
    refuse(2, "--deep 3: there are 2 such groups", net, net, "--deep", "3")
    refuse(2, "--deep nothing: fits no group", net, net, "--deep", "nothing")
    refuse(2, "--deep: layers.1.ff may not move", net, net, "--deep", "1", "--groups", "kv")
    refuse(2, "exclude one another", net, net, "--deep", "1", "--no-diversion")
    refuse(2, "--groups nothing: fits none", net, net, "--groups", "nothing")
    refuse(2, "--groups [: not a regular expression", net, net, "--groups", "[")
    refuse(2, "--weights names 3, there are 2 models", net, net, "--weights", "1,1,1")
    refuse(2, "--weights 1,x", net, net, "--weights", "1,x")
    refuse(2, "--soft needs a soft plan", net, net, "--soft")
    refuse(2, "--align-only takes two models", net, net, net, "--align-only")
    refuse(2, "one model cannot be fused", net)
    refuse(2, "no models")
    refuse(2, "- is a list of models", "-", net)
    refuse(2, "--max-shard-size 5 potatoes", net, net, "--max-shard-size", "5 potatoes")
    refuse(2, "cannot write a figure", net, net, "--plot", "x.gif")
    refuse(65, "the list of models is empty", "-")
    refuse(65, "stdin:1: $.k: Expected `float` <= 1.0", "-", stdin=b'{"model": "x", "k": 2}\n')


def test_an_existing_output_and_a_small_disk(tool, refuse, net, tmp_path, monkeypatch):
    done = tmp_path / "done"
    assert tool("lwi-fuse", net, net, "--groups", "ff", "-o", done).code == 0
    before = (done / "model.safetensors").read_bytes()
    refuse(73, "exists already", net, net, "-o", done)
    assert (done / "model.safetensors").read_bytes() == before
    assert tool("lwi-fuse", net, net, "--k", "1", "--groups", "ff", "-o", done, "--overwrite").code == 0

    from toolbox.lwi import output
    from toolbox.shell.errors import IoFailure

    with pytest.raises(IoFailure, match="are needed") as caught:
        output.check_space(tmp_path / "not" / "there" / "yet", 10**18)
    assert caught.value.exit_code == 74


def test_an_unknown_architecture_is_told_and_its_template_can_be_filled_in(tool, refuse, net, tmp_path):
    strange = config(net, tmp_path / "strange", architectures=["StrangeForCausalLM"])
    refuse(65, "no spec knows StrangeForCausalLM; its tensors are 'model.embed_tokens.weight'", strange, strange)
    shown = tool("lwi-fuse", strange, "--print-spec")
    assert (shown.code, shown.err) == (0, "")
    spec = tmp_path / "mine.yaml"
    spec.write_bytes(shown.out)
    assert "model.layers.{i}.mlp.up_proj.weight: [-, -]" in shown.out.decode()
    text = shown.out.decode()
    for name in ("gate", "up"):
        text = text.replace(f"model.layers.{{i}}.mlp.{name}_proj.weight: [-, -]",
                            f"model.layers.{{i}}.mlp.{name}_proj.weight: ['ff{{i}}', -]")  # fmt: skip
    half = tmp_path / "half.yaml"
    half.write_text(text)
    known = config(net, tmp_path / "known")
    refuse(65, f"{half}: the spec mine does not keep the function", known, known, "--spec", half)
    whole = tmp_path / "whole.yaml"
    whole.write_text(text.replace("mlp.down_proj.weight: [-, -]", "mlp.down_proj.weight: [-, 'ff{i}']"))
    done = tool("lwi-fuse", known, known, "--spec", whole, "--shuffle-seed", "1", "-o", tmp_path / "ok")
    assert done.code == 0, done.err
    assert [(row["group"], row["recovered"]) for row in done.rows[:-1]] == [("layers.0.ff", 1), ("layers.1.ff", 1)]
    # A class that cannot be run cannot be verified.
    refuse(65, "its network cannot be run here", strange, strange, "--spec", whole)
    assert tool("lwi-fuse", strange, strange, "--spec", whole, "--no-verify", "-o", tmp_path / "no").code == 0


BROKEN = {
    "a wrong group": ("model.layers.{i}.self_attn.v_proj.weight: [\"kv{i}/vo{i}[kv{i}]\", residual]",
                      "model.layers.{i}.self_attn.v_proj.weight: [\"kv{i}/other{i}[kv{i}]\", residual]", "other moves"),
    "an axis missing": ("model.layers.{i}.mlp.down_proj.weight: [residual, \"ff{i}\"]",
                        "model.layers.{i}.mlp.down_proj.weight: [residual, -]", "ff moves"),
    "a norm forgotten": ("model.norm.weight: [residual]", "model.norm.weight: [-]", "residual moves"),
    "key dimensions under rotary positions": ("self_attn.k_proj.weight: [\"kv{i}/-\", residual]",
                                              "self_attn.k_proj.weight: [\"kv{i}/x{i}[kv{i}]\", residual]", "x moves"),
    "an unclaimed tensor": ("  model.norm.weight: [residual]\n", "", "unclaimed: 'model.norm.weight'"),
    "unequal sizes": ("model.norm.weight: [residual]", "model.norm.weight: [\"ff{i}\"]", "no counter 'i'"),
    "sizes that differ": ("model.layers.{i}.mlp.up_proj.weight: [\"ff{i}\", residual]",
                          "model.layers.{i}.mlp.up_proj.weight: [residual, \"ff{i}\"]", "axis 0 has 40 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_spec_writes_nothing(refuse, net, tmp_path, name):
    before, after, says = BROKEN[name]
    ours = next(one for one in builtin_specs() if one.name == "llama")
    text = open(ours.where).read()  # noqa: SIM115
    assert before in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace(before, after))
    refuse(65, says, net, net, "--spec", mine)


def test_a_built_in_spec_that_fails_is_our_fault(net, monkeypatch):
    import dataclasses

    import yaml

    from toolbox.lwi.checkpoint import open_checkpoint
    from toolbox.lwi.expand import expand
    from toolbox.lwi.spec import parse_spec
    from toolbox.lwi.verify import check_spec
    from toolbox.shell.errors import InternalError

    ours = next(one for one in builtin_specs() if one.name == "llama")
    content = yaml.safe_load(open(ours.where).read())  # noqa: SIM115
    content["tensors"]["model.norm.weight"] = ["-"]
    spec = parse_spec(content, ours.where, builtin=True)
    checkpoint = open_checkpoint(str(net))
    plan = expand(spec, {key: checkpoint.shape(key) for key in checkpoint.names()}, checkpoint.config)
    with pytest.raises(InternalError, match="residual moves") as caught:
        check_spec(spec, checkpoint, plan, 0, 1e9)
    assert caught.value.exit_code == 70
    with pytest.raises(InternalError, match="a two-layer LlamaForCausalLM"):
        check_spec(spec, checkpoint, plan, 0, 0)
    assert dataclasses.is_dataclass(spec)
