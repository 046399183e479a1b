"""LoFiT and LoReFT: the formulas, at the right places, under padding and caches; merged; and read from disk."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import tiny_model
from toolbox.coca.intervention import FILE, Attached, config_digest, described, hooked, load_intervention
from toolbox.coca.lofit import HeadGrid, Lofit, how_many, top_heads
from toolbox.coca.loreft import Loreft, Positions, edit
from toolbox.coca.merge import merge
from toolbox.models.generate import Decoding, LocalBackend, Request
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.weights.provenance import header

GRID = HeadGrid(2, 4, 8)
IDS = torch.tensor([[5, 9, 2, 40, 7, 13, 99, 3], [1, 8, 30, 4, 77, 6, 2, 11]])


def lofit(places=(1, 6), size=0.5):
    found = Lofit(GRID, count=len(places), places=places)
    found.v.data = size * torch.randn(found.v.shape, generator=torch.Generator().manual_seed(2))
    return found


def loreft(layers=(0, 1), form="loreft", positions="f2+l1", rank=3):
    found = Loreft.drawn(layers, 32, rank, Positions.parse(positions), form, seed=4)
    for block in found.blocks.values():
        block.bias.data += 0.5  # large enough to be seen everywhere behind it
    return found


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


# -- LoFiT ------------------------------------------------------------------------------------------------------------
def by_heads(model, lofit, ids):
    """The reference: each head of each layer changed in a loop of its own."""
    handles = []
    for number, layer in enumerate(model.model.layers):

        def change(_, inputs, number=number):
            z = inputs[0].clone()
            for i in range(4):
                part = z[..., 8 * i : 8 * i + 8]
                if lofit.stage == "a":
                    part *= 1 + lofit.A[number, i]
                elif 4 * number + i in lofit.places:
                    part += lofit.v[lofit.places.index(4 * number + i)]
            return (z,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(change))
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def test_offsets_and_scales_are_those_of_a_loop_over_heads():
    model = tiny_model()
    bare = logits(model)
    offsets = lofit()
    with hooked(offsets, model):
        found = logits(model)
    torch.testing.assert_close(found, by_heads(model, offsets, IDS), rtol=0, atol=1e-6)
    assert float((found - bare).abs().max()) > 0.1
    scales = Lofit(GRID, count=2, scales=True)
    scales.A.data *= 300
    with hooked(scales, model):
        found = logits(model)
    torch.testing.assert_close(found, by_heads(model, scales, IDS), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=0)  # nothing stays behind


def test_only_the_chosen_heads_have_gradients_and_the_model_has_none():
    model = tiny_model().requires_grad_(False)
    offsets = lofit(places=(1, 6))
    with hooked(offsets, model):
        model(input_ids=IDS).logits.square().sum().backward()
    assert offsets.trainable == {"b": 2 * 8}
    assert [p.grad is not None for p in offsets.parameters()] == [True]
    assert bool((offsets.v.grad.abs().sum(1) > 0).all())
    assert all(p.grad is None for p in model.parameters())


def test_the_greatest_scores_are_chosen_and_shares_are_of_all_heads():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.9, 0.0, 0.8, 0.1]])
    assert top_heads(scores, 3) == [1, 4, 6]
    big = HeadGrid(32, 32, 128)
    assert [how_many(text, big) for text in ("3%", "32", "100%", "0.01%")] == [31, 32, 1024, 1]
    for nothing in ("0", "0%", "1025", "101%"):
        with pytest.raises(BadData):
            how_many(nothing, big)
    with pytest.raises(BadData, match=r"layers 0 to 1, query heads 0 to 3|no such head"):
        GRID.place(2, 0)


def test_a_scale_of_stage_a_is_scored_by_its_norm():
    scales = Lofit(GRID, count=2, scales=True)
    by_hand = torch.tensor(
        [[float(scales.A[li, i].detach().square().sum().sqrt()) for i in range(4)] for li in range(2)]
    )
    torch.testing.assert_close(scales.score(), by_hand)
    assert float(scales.penalty()) == pytest.approx(float(scales.A.abs().sum()))
    scales.start_offsets(top_heads(scales.score(), 2), scales.score())
    assert scales.stage == "b"
    assert set(scales.tensors()) >= {"lofit.scores"}


def test_a_merged_checkpoint_computes_what_the_hooks_do_in_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model, offsets = tiny_model(), lofit(places=(1, 2, 6))
    with hooked(offsets, model):
        wanted = logits(model)
    bare = logits(model)
    merged = merge(copy.deepcopy(model), offsets)
    merged.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert json.loads((tmp_path / "config.json").read_text())["attention_bias"] is True
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=0)  # the copy was merged, not this one


def test_an_architecture_without_that_bias_is_refused():
    from transformers import MistralConfig, Qwen2Config
    from transformers.models.mistral import MistralForCausalLM
    from transformers.models.qwen2 import Qwen2ForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    for model in (Qwen2ForCausalLM(Qwen2Config(**sizes)), MistralForCausalLM(MistralConfig(**sizes))):
        with hooked(lofit(), model):  # the hooks work there
            logits(model)
        with pytest.raises(BadData, match="no bias behind its attention heads"):
            merge(model, lofit())


# -- LoReFT -----------------------------------------------------------------------------------------------------------
def test_positions_are_capped_at_half_the_prompt_and_never_overlap():
    def of(text, start, length):
        columns, valid = Positions.parse(text).places(torch.tensor([start]), torch.tensor([length]))
        return columns[0][valid[0]].tolist()

    assert of("f2+l1", 0, 8) == [0, 1, 7]
    assert of("f6+l6", 3, 20) == [3, 4, 5, 6, 7, 8, 17, 18, 19, 20, 21, 22]
    assert of("f6+l6", 0, 5) == [0, 1, 3, 4]
    assert of("f6+l6", 2, 1) == []
    assert of("l2", 0, 7) == [5, 6]
    for bad in ("", "f0", "x6", "f6-l6", "f6+f6"):
        with pytest.raises(UsageProblem):
            Positions.parse(bad)


@pytest.mark.parametrize("form", ["loreft", "noreft", "lobireft", "direft"])
def test_an_edit_is_the_formula(form):
    module = loreft(form=form)
    block = module.blocks["1"]
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    module.prompts(torch.zeros(2, dtype=torch.int64), torch.tensor([5, 4]))
    changed = module.change(1, h)
    R = module.rotation(1).detach().double()
    b = block.bias.detach().double()
    W = None if block.weight is None else block.weight.detach().double()
    for row, length in enumerate((5, 4)):
        for column in range(5):
            x = h[row, column].double()
            if column in (0, 1, length - 1):
                inside = {"lobireft": lambda: b, "direft": lambda x=x: W @ x + b}.get(
                    form, lambda x=x: W @ x + b - R @ x
                )()
                x = x + R.T @ inside
            torch.testing.assert_close(changed[row, column].double(), x, rtol=0, atol=1e-6)
    orthonormal = float((R @ R.T - torch.eye(3, dtype=torch.float64)).abs().max())
    assert orthonormal <= 1e-6
    torch.testing.assert_close(edit(h, R.float(), block.weight, block.bias, form)[0, 0] + h[0, 0], changed[0, 0])
    assert (block.weight is None) == (form == "lobireft")


def test_the_rotation_stays_orthonormal_while_it_is_trained():
    module = loreft(layers=(0,))
    before = module.rotation(0).detach().clone()
    assert [p.ndim for p in module.parameters() if not getattr(p, "decays", True)] == [2]  # decay would break R
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0)
    h = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
    module.prompts(torch.zeros(3, dtype=torch.int64), torch.full((3,), 6))
    for _ in range(20):
        optimizer.zero_grad()
        module.change(0, h).square().sum().backward()
        optimizer.step()
    after = module.rotation(0).detach()
    assert float((after - before).abs().max()) > 0.05
    torch.testing.assert_close(after @ after.T, torch.eye(3), rtol=0, atol=1e-5)
    assert module.trainable == {"loreft": 2 * 3 * 32 + 3}


def hidden_by_hand(model, module, row_ids, prompt):
    """Layer outputs of one unpadded row in one pass, the edit applied by indexing."""
    places = sorted({0, 1, prompt - 1} if prompt >= 4 else {0, prompt - 1} if prompt >= 2 else set())
    handles = []
    for number, layer in enumerate(model.model.layers):

        def change(_, __, output, number=number):
            h = output.clone()
            block = module.blocks[str(number)]
            for place in places:
                x = h[0, place]
                h[0, place] = x + module.rotation(number).T @ (
                    block.weight @ x + block.bias - module.rotation(number) @ x
                )
            return h

        handles.append(layer.register_forward_hook(change))
    try:
        return logits(model, row_ids[None])[0]
    finally:
        for handle in handles:
            handle.remove()


def test_padding_on_either_side_and_a_cache_change_nothing_and_generated_tokens_are_not_edited():
    model, module = tiny_model(), loreft()
    rows = [torch.tensor([5, 9, 2, 40, 7]), torch.tensor([1, 8, 3]), torch.tensor([30, 31, 32, 33, 34, 35, 36])]
    made = [torch.tensor([50, 51]), torch.tensor([52, 53]), torch.tensor([54, 55])]
    wanted = [
        hidden_by_hand(model, module, torch.cat([row, more]), len(row)) for row, more in zip(rows, made, strict=True)
    ]
    untouched = logits(model, torch.cat([rows[0], made[0]])[None])[0]
    assert float((wanted[0] - untouched).abs().max()) > 0.05

    for side in ("left", "right"):
        width = 7
        pads = [width - len(row) for row in rows]
        blank = [torch.zeros(pad, dtype=torch.int64) for pad in pads]
        left = side == "left"
        ids = torch.stack([torch.cat([b, r] if left else [r, b]) for b, r in zip(blank, rows, strict=True)])
        mask = torch.stack(
            [torch.cat([b, r * 0 + 1] if left else [r * 0 + 1, b]) for b, r in zip(blank, rows, strict=True)]
        )
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with hooked(module, model):
            output = logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, (pad, prompt) in enumerate(zip(pads, rows, strict=True)):
            start = pad if left else 0
            torch.testing.assert_close(
                output[row, start : start + len(prompt)], wanted[row][: len(prompt)], rtol=0, atol=1e-5
            )

    # left-padded with a cache, a token at a time, as generation does
    with hooked(module, model), torch.no_grad():
        width = 7
        ids = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.int64), r]) for r in rows])
        mask = torch.stack([torch.cat([torch.zeros(width - len(r)), torch.ones(len(r))]).long() for r in rows])
        step = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=True
        )
        for turn in range(2):
            for row, prompt in enumerate(rows):
                torch.testing.assert_close(step.logits[row, -1], wanted[row][len(prompt) - 1 + turn], rtol=0, atol=1e-5)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
            step = model(
                input_ids=torch.stack([m[turn : turn + 1] for m in made]), attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=step.past_key_values, use_cache=True,
            )  # fmt: skip

    # without a cache: whole rows again, with the prompts' lengths told
    with hooked(module, model) as attached, attached.prompts([len(row) for row in rows]), torch.no_grad():
        whole = [torch.cat([row, more]) for row, more in zip(rows, made, strict=True)]
        ids = torch.stack([torch.cat([torch.zeros(9 - len(r), dtype=torch.int64), r]) for r in whole])
        mask = torch.stack([torch.cat([torch.zeros(9 - len(r)), torch.ones(len(r))]).long() for r in whole])
        output = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    for row, text in enumerate(whole):
        torch.testing.assert_close(output[row, 9 - len(text) :], wanted[row], rtol=0, atol=1e-5)


# -- on disk ----------------------------------------------------------------------------------------------------------
def stored(folder, module, model, **about):
    folder.mkdir(exist_ok=True)
    about = {"base": {"config_sha256": config_digest(model.config), "name": "tiny"}, **about}
    save_file(module.tensors(), folder / FILE, described(header("coca-train", {}, 0, {}), about))
    return folder


def both(tmp_path, model):
    grid = {"layers": 2, "heads": 4, "width": 8}
    return [
        (lofit(), stored(tmp_path / "lofit", lofit(), model, method="lofit", grid=grid)),
        (loreft(), stored(tmp_path / "loreft", loreft(), model, method="loreft", form="loreft", positions="f2+l1")),
    ]


def test_what_is_loaded_does_in_generation_what_was_trained(tmp_path, tiny):
    from transformers import AutoTokenizer

    model, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(tiny)
    requests = [Request("a", (5, 9, 2, 40, 7)), Request("b", (1, 8, 3)), Request("c", tuple(range(30, 37)))]
    backend = LocalBackend(model, tokenizer, end_ids=[258], batch_size=3)
    decoding = Decoding(6, logprobs=True)
    bare = backend.complete(requests, decoding)
    for module, folder in both(tmp_path, model):
        loaded = load_intervention(folder)
        with loaded.attach(model) as attached:
            assert isinstance(attached, Attached)
            together = backend.complete(requests, decoding)
            alone = [backend.complete([one], decoding)[0] for one in requests]
        assert [one.text for one in together] == [one.text for one in alone]
        assert [one.logprobs for one in together] != [one.logprobs for one in bare]
        with hooked(module, model):
            assert [one.text for one in backend.complete(requests, decoding)] == [one.text for one in together]
        again = backend.complete(requests, decoding)
        assert [one.logprobs for one in again] == [one.logprobs for one in bare]
        assert not any(part.requires_grad for part in loaded.module.parameters())
        for name, value in module.tensors().items():
            torch.testing.assert_close(loaded.module.tensors()[name], value, rtol=0, atol=1e-6)


def test_an_adapter_is_attached_and_taken_off_again(tmp_path):
    from toolbox.models.adapters import add_lora, save_adapter

    adapted = add_lora(tiny_model(), r=2, seed=1)
    for name, part in adapted.named_parameters():
        if "lora_B" in name:
            part.data = 0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
    wanted = logits(adapted)
    save_adapter(adapted, tmp_path, {"format": "pt"})
    model = tiny_model()
    bare = logits(model)
    names = [name for name, _ in model.named_modules()]
    loaded = load_intervention(tmp_path)
    assert loaded.method == "lora"
    with loaded.attach(model):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=0)
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(BadData, match="does not fit"), loaded.attach(tiny_model(width=64)):
        pass


def test_another_base_erasers_bare_heads_and_damage_are_refused(tmp_path):
    model = tiny_model()
    (_, good), _ = both(tmp_path, model)
    with pytest.raises(BadData, match="trained on another model"), load_intervention(good).attach(tiny_model(layers=3)):
        pass
    load_intervention(good).check_base(tiny_model(seed=9).config)  # the same shape, weights unknown
    with pytest.raises(MissingInput):
        load_intervention(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput):
        load_intervention(tmp_path / "empty")
    eraser = tmp_path / "eraser.safetensors"
    save_file({"3.leace.proj_left": torch.zeros(4, 1)}, eraser, header("coca-probe", {}, 0, {}))
    with pytest.raises(UsageProblem, match="measuring instruments"):
        load_intervention(eraser)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(BadData, match="not an intervention"):
        load_intervention(other)
    heads = Lofit(GRID, count=0, scales=True)
    heads.start_offsets([1, 5], heads.score())
    bare = stored(tmp_path / "heads", heads, model, method="lofit", grid={"layers": 2, "heads": 4, "width": 8})
    with pytest.raises(UsageProblem, match="no offsets"):
        load_intervention(bare)
    wrong = stored(tmp_path / "wrong", lofit(), model, method="lofit", grid={"layers": 2, "heads": 4, "width": 9})
    with pytest.raises(BadData, match="damaged"):
        load_intervention(wrong)


def test_the_digest_of_a_base_tells_sizes_and_not_names():
    one, two = tiny_model().config, tiny_model(seed=5).config
    two.architectures, two.transformers_version = ["Renamed"], "4.0"
    assert config_digest(one) == config_digest(two)
    assert config_digest(one) != config_digest(tiny_model(width=64).config)
