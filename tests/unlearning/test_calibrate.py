"""UWC finds the smallest share of the original that keeps enough; a mixture's ends are the two models, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch

from tests.tiny import tiny_model, tiny_model_dir
from toolbox.models.adapters import add_lora, save_adapter
from toolbox.models.chat import Encoded
from toolbox.models.extraction import extraction_strength
from toolbox.models.load import find_model, load_model
from toolbox.models.score import score_rows
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import BadData
from toolbox.training.processes import start_processes
from toolbox.unlearning.attacks import relearn
from toolbox.unlearning.calibrate import Mixture, merged, tensors_of, uwc
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_sharded


class Curve:
    """ES forget = a, ES retain by a function of whole hundredths; remembers what it was asked."""

    def __init__(self, retain):
        self.retain, self.asked = retain, []

    def __call__(self, a):
        self.asked.append(a)
        return a, self.retain(round(100 * a))


# --- the search ---


@pytest.mark.parametrize("threshold", [*range(0, 12), 49, 50, 51, 89, 90, 91, 99, 100])
def test_a_rising_curve_is_met_at_its_crossing_to_the_hundredth(threshold):
    curve = Curve(lambda hundredths: 1.0 if hundredths >= threshold else 0.5)
    found = uwc(curve, original_retain=1.0)
    assert found.a == threshold / 100
    assert (found.es_forget, found.es_retain) == (threshold / 100, 1.0)
    assert len(curve.asked) == len(set(curve.asked)) <= 15
    assert found.scanned == tuple((a, *Curve(curve.retain)(a)) for a in sorted(curve.asked))
    assert threshold == 0 or (threshold - 1) / 100 in curve.asked


def test_a_straight_line_by_hand():
    # .2 + .6a >= .9 · .8 where a >= .8667
    found = uwc(lambda a: (a / 2, 0.2 + 0.6 * a), original_retain=0.8, keep=0.9)
    assert found.a == 0.87
    assert found.as_record() == {
        "a": 0.87, "es_forget": 0.435, "es_retain": pytest.approx(0.722), "keep": 0.9,
        "scanned": [list(one) for one in found.scanned],
    }  # fmt: skip


def test_what_keeps_enough_is_left_alone():
    curve = Curve(lambda hundredths: 0.95)
    assert uwc(curve, 1.0).a == 0
    assert curve.asked == [0]
    assert uwc(Curve(lambda hundredths: 0.0), original_retain=0.0).a == 0


def test_a_later_dip_does_not_matter():
    up = set(range(35, 56)) | set(range(71, 101))
    curve = Curve(lambda hundredths: float(hundredths in up))
    assert uwc(curve, 1.0).a == 0.35
    assert max(curve.asked) == 0.4


def test_a_rise_within_a_tenth_is_below_the_resolution_of_the_scan():
    up = set(range(42, 48)) | set(range(83, 101))
    assert uwc(Curve(lambda hundredths: float(hundredths in up)), 1.0).a == 0.83


@pytest.mark.parametrize("seed", range(25))
def test_on_a_noisy_curve_it_is_a_crossing_and_no_earlier_tenth_keeps_enough(seed):
    noise = random.Random(seed)
    values = [h / 100 + noise.gauss(0, 0.2) for h in range(101)]
    curve = Curve(lambda hundredths: values[hundredths])
    found = uwc(curve, 1.0, keep=0.7)
    place = round(100 * found.a)
    assert place == 100 or values[place] >= 0.7
    assert place == 0 or values[place - 1] < 0.7
    assert all(values[tenth] < 0.7 for tenth in range(0, place, 10))
    assert len(curve.asked) == len(set(curve.asked)) <= 15


def test_the_original_itself_always_keeps_enough():
    """It may score a hair less than before: another batch, another rounding."""
    assert uwc(Curve(lambda hundredths: 0.999 if hundredths == 100 else 0.0), 1.0, keep=1.0).a == 1.0


def test_a_mean_that_meets_the_bar_but_for_rounding_meets_it():
    bar = 0.9 * 0.7
    assert uwc(lambda a: (0.0, bar - 1e-12), 0.7).a == 0
    assert uwc(lambda a: (0.0, bar - 1e-3 if a < 0.5 else bar), 0.7).a == 0.5


@pytest.mark.parametrize(("original", "keep"), [(1.0, 0.0), (1.0, 1.1), (-0.1, 0.9), (float("nan"), 0.9)])
def test_senseless_bars_are_refused(original, keep):
    with pytest.raises(ValueError, match=r"keep must|must be a number"):
        uwc(lambda a: (a, a), original, keep)


# --- the mixture ---


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Directories of an original (seed 0) and another model (seed 1) of one shape, with tied weights."""
    home = tmp_path_factory.mktemp("two")
    return tiny_model_dir(home / "original", seed=0), tiny_model_dir(home / "unlearned", seed=1)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lazy", [True, False])
def test_both_ends_are_the_models_bit_for_bit_and_between_it_is_linear(two, lazy):
    ends = [load_model(find_model(str(path))) for path in two]
    original, unlearned = map(state, ends)
    model = load_model(find_model(str(two[1])))
    with open_weights(two[0]) as there, open_weights(two[1]) as here:
        mixture = Mixture(model, there, here) if lazy else Mixture(model, original, unlearned)
        for a in (0.3, 1, 0.01, 0, 0.99, 0.5):
            mixture.set(a)
            found = state(model)
            if a in (0, 1):
                assert same_bits(found, original if a else unlearned)
                continue
            for name, tensor in found.items():
                exact = a * original[name].double() + (1 - a) * unlearned[name].double()
                bound = 2.0**-22 * (original[name].abs() + unlearned[name].abs()).double()
                assert ((tensor.double() - exact).abs() <= bound).all(), name
        mixture.set(1)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, ends[0](ids).logits)


def test_tied_weights_stay_tied_and_are_mixed_once(two):
    model = load_model(find_model(str(two[1])))
    before = model.lm_head.weight
    assert before is model.model.embed_tokens.weight
    with open_weights(two[0]) as there, open_weights(two[1]) as here:
        assert "lm_head.weight" not in there
        Mixture(model, there, here).set(0.5)
        half = (there["model.embed_tokens.weight"] + here["model.embed_tokens.weight"]) / 2
    assert model.lm_head.weight is before is model.model.embed_tokens.weight
    torch.testing.assert_close(before.detach(), half)


class Counting(Mapping):
    """A state dict that notes which tensors are read."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __contains__(self, name):
        return name in self.tensors


def test_without_the_unlearned_weights_it_remembers_them_itself():
    original, model = state(tiny_model(0)), tiny_model(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1
        model.model.norm.weight[0] = -0.0
    original["model.norm.weight"][0] = 0.0
    unlearned = state(model)
    counting = Counting(original)
    mixture = Mixture(model, counting)
    counting.read.clear()
    mixture.set(1)
    assert set(counting.read) == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}
    assert same_bits(state(model), original)
    assert not torch.signbit(model.model.norm.weight[0])
    mixture.set(0.25)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(state(model)[name], original[name] + 0.075, rtol=1e-5, atol=1e-6)
    mixture.set(0)
    assert same_bits(state(model), unlearned)
    assert torch.signbit(model.model.norm.weight[0])


def test_a_narrower_model_holds_the_rounded_ends(two):
    model = load_model(find_model(str(two[1])), dtype="bf16")
    with open_weights(two[0]) as there, open_weights(two[1]) as here:
        mixture = Mixture(model, there, here)
        for a, end in ((1, there), (0, here)):
            mixture.set(a)
            assert all(torch.equal(model.state_dict()[name], end[name].bfloat16()) for name in end)
        mixture.set(0.3)  # rounded once, behind the mixing in fp32
        name = "model.layers.0.mlp.up_proj.weight"
        exact = here[name] + 0.3 * (there[name] - here[name])
        assert torch.equal(model.state_dict()[name], exact.bfloat16())


def test_an_adapter_on_the_original_is_mixed_by_its_merged_weights(two, tmp_path):
    base = load_model(find_model(str(two[0])))
    original = state(base)
    adapted = add_lora(base, r=2, seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    save_adapter(adapted, tmp_path, {})
    model = load_model(find_model(str(tmp_path)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        spoken = model(ids).logits
    with pytest.raises(ValueError, match="merge"):
        Mixture(model, original)
    model = merged(model)
    whole = state(model)
    with tensors_of(find_model(str(two[0]))) as weights:
        mixture = Mixture(model, weights)
        mixture.set(0.75)
        for name, tensor in state(model).items():
            torch.testing.assert_close(tensor, original[name] + 0.25 * (whole[name] - original[name]), msg=name)
        mixture.set(1)
        assert same_bits(state(model), original)
        mixture.set(0)
        torch.testing.assert_close(model(ids).logits, spoken, rtol=1e-4, atol=1e-4)
    with tensors_of(find_model(str(tmp_path))) as weights:  # and an adapter can be the other side
        assert same_bits(dict(weights), whole)


def test_models_that_do_not_fit_are_told_apart_by_name(two, tmp_path):
    model = tiny_model(1)
    fitting = state(tiny_model(0))
    with pytest.raises(BadData, match=r"has no tensor 'model.layers.2.*\(9 names differ\)") as caught:
        Mixture(tiny_model(0, layers=3), fitting)
    assert caught.value.exit_code == 65
    assert caught.value.advice
    with pytest.raises(BadData, match=r"the original model: has a tensor 'model.layers.2.* that the other model lacks"):
        Mixture(model, state(tiny_model(0, layers=3)))
    with pytest.raises(BadData, match="the unlearned model: has no tensor"):
        Mixture(model, fitting, {})
    wide = tiny_model_dir(tmp_path / "wide", width=64)
    with open_weights(wide) as weights, pytest.raises(BadData, match=r"wide: '.*' has shape \[259, 64\], not"):
        Mixture(model, weights)
    with pytest.raises(BadData, match=r"'model.norm.weight' is of type torch.int64"):
        Mixture(model, fitting | {"model.norm.weight": torch.zeros(32, dtype=torch.int64)})
    with pytest.raises(ValueError, match="the model's own memory"):
        Mixture(model, fitting, model.state_dict())


def test_whole_numbers_are_kept_and_must_agree():
    class Counted(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2,), float(count)))
            self.register_buffer("steps", torch.tensor(count))

    model = Counted(3)
    same = {"weight": torch.zeros(2), "steps": torch.tensor(3)}
    ours = {"weight": torch.full((2,), 3.0), "steps": torch.tensor(3)}
    Mixture(model, same, ours).set(0.5)
    assert model.weight.tolist() == [1.5, 1.5]
    assert int(model.steps) == 3
    with pytest.raises(BadData, match="integer tensors"):
        Mixture(model, same | {"steps": torch.tensor(4)}, ours).set(0.5)


@pytest.mark.parametrize("a", [-0.01, 1.01, float("nan")])
def test_only_shares_are_mixed(a):
    with pytest.raises(ValueError, match="0 ≤ a ≤ 1"):
        Mixture(tiny_model(1), state(tiny_model(0))).set(a)


# --- both together ---


def test_two_models_end_to_end(tmp_path):
    """A model that recites everything and the one it was tuned from, which recites nothing: what is kept comes back
    with what was to be forgotten."""
    model = tiny_model(5)
    write_sharded(tmp_path / "unlearned", state(model), {})
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(6):
        ids = tuple(torch.randint(0, 250, (12,), generator=generator).tolist())
        rows.append(Encoded(ids, (False,) * 6 + (True,) * 6, (False,) * 11 + (True,)))
    head = TokenLoss(model)
    relearn(head, rows, pad_id=258, steps=40, lr=0.01, batch_size=6, seed=0, accelerator=start_processes())
    write_sharded(tmp_path / "original", state(model), {})

    def es(rows):
        return sum(extraction_strength(one) for one in score_rows(head, rows)) / len(rows)

    forget, retain = rows[:2], rows[2:]
    assert es(retain) == 1
    with open_weights(tmp_path / "original") as there, open_weights(tmp_path / "unlearned") as here:
        mixture = Mixture(model, there, here)

        def both(a):
            mixture.set(a)
            return es(forget), es(retain)

        found = uwc(both, original_retain=1.0)
        assert 0 < found.a < 1
        assert found.es_retain >= 0.9 > both(found.a - 0.01)[1]
        assert both(found.a) == (found.es_forget, found.es_retain)
        assert found.es_forget > both(0)[0] + 0.2
