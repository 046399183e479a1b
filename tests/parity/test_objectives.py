"""Every objective's loss and gradient, as the trainer computes them, against a slow loop over rows and full logits."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import TryAgain
from toolbox.training.loop import Loop, LoopSettings
from toolbox.training.processes import start_processes
from toolbox.training.windows import Plan, Stream
from toolbox.unlearning.losses import make_forget_loss
from toolbox.unlearning.objectives import Retention, UnlearnObjective
from toolbox.unlearning.rectified import GruObjective, Rectifier
from toolbox.unlearning.registry import OBJECTIVES, resolve

SEED = 3
LAYER = 0


def rows_of(lengths, seed):
    """Rows of the given lengths; about half of the tokens from the third on labelled, with holes, the last as end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
        chosen = (torch.rand(length, generator=generator) < 0.6).tolist()
        labelled = tuple(place >= 2 and (on or place == length - 1) for place, on in enumerate(chosen))
        rows.append(Encoded(ids, labelled, tuple(place == length - 1 for place in range(length))))
    return rows


ROWS = {
    "forget": rows_of([9, 14, 5, 11], 0),
    "retain": rows_of([7, 12, 16, 6], 1),
    "refusal": rows_of([6, 8, 10, 5], 2),
}


def double_model(seed=1):
    return tiny_model(seed).double()


def moved(model, seed=9, by=0.05):
    """A copy whose parameters have moved: something to compare with."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


# -- the slow version -------------------------------------------------------------------------------------------------
def logits(model, row):
    """Logits that predict each labelled token of one row, and the tokens."""
    found = model(input_ids=torch.tensor([row.ids])).logits[0]
    places = [place for place in range(1, len(row.ids)) if row.labelled[place]]
    return found[[place - 1 for place in places]], torch.tensor([row.ids[place] for place in places])


def nll(model, row):
    z, y = logits(model, row)
    return torch.stack([torch.logsumexp(z[i], 0) - z[i, y[i]] for i in range(len(y))])


def hidden(model, row):
    kept = []
    hook = model.model.layers[LAYER].register_forward_hook(lambda _, __, out: kept.append(out))
    model(input_ids=torch.tensor([row.ids]))
    hook.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return output.reshape(len(row.ids), -1)[[place for place in range(len(row.ids)) if row.labelled[place]]]


def tokens(rows):
    return sum(row.n_labelled for row in rows)


def kl(model, reference, rows):
    total = 0.0
    for row in rows:
        p, q = logits(model, row)[0].log_softmax(-1), logits(reference, row)[0].log_softmax(-1)
        total = total + (q.exp() * (q - p)).sum()
    return total / tokens(rows)


def slow(name, model, reference, c):
    """The loss of the whole window, written from the definitions."""
    forget, retain, refusal = ROWS["forget"], ROWS["retain"], ROWS["refusal"]
    n = tokens(forget)
    mean_nll = lambda rows: sum(nll(model, row).sum() for row in rows) / tokens(rows)  # noqa: E731
    sums = [(nll(model, row), nll(reference, row).detach()) for row in forget]

    def bounded(margins):
        return sum(-(2 / c.beta) * torch.log(torch.sigmoid(c.beta * one)) for one in margins) / len(margins)

    def weighted(weight):
        return -sum((weight(x.detach(), r) * x).sum() for x, r in sums) / n

    match name:
        case "ga":
            return weighted(lambda x, r: torch.ones_like(x))
        case "graddiff":
            return weighted(lambda x, r: torch.ones_like(x)) + c.alpha * mean_nll(retain)
        case "klmin":
            return weighted(lambda x, r: torch.ones_like(x)) + c.alpha * kl(model, reference, retain)
        case "npo":
            return bounded([x.sum() - r.sum() for x, r in sums])
        case "simnpo":
            return c.gamma * bounded([x.mean() - c.delta_margin for x, _ in sums])
        case "idk":
            return mean_nll(refusal) + c.alpha * mean_nll(retain)
        case "dpo":
            return bounded([
                (nll(reference, b).detach().sum() - nll(model, b).sum()) - (r.sum() - x.sum())
                for b, (x, r) in zip(refusal, sums, strict=True)
            ])  # fmt: skip
        case "wga":
            return weighted(lambda x, r: torch.exp(-x))
        case "satimp":
            factor = lambda x, r: torch.exp(-x) ** c.beta1 * (1 - torch.exp(-x)) ** c.beta2  # noqa: E731
            return weighted(factor) + c.alpha * mean_nll(retain)
        case "tnpo" | "wtnpo":
            a = 1.5 if name == "wtnpo" else 0.0
            return weighted(lambda x, r: 2 * torch.exp(-x * (4 + a)) / (torch.exp(-4 * x) + torch.exp(-4 * r) + 1e-5))
        case "rmu":
            draw = torch.rand(32, generator=torch.Generator().manual_seed(SEED)).double()
            target = c.steer * draw / draw.norm()
            away = sum(((hidden(model, row) - target) ** 2).sum() for row in forget) / 32 / n
            near = sum(((hidden(model, row) - hidden(reference, row).detach()) ** 2).sum() for row in retain)
            return away + c.alpha * near / 32 / tokens(retain)
        case "undial":
            total = 0.0
            for row in forget:
                (z, y), (q, _) = logits(model, row), logits(reference, row)
                for i, label in enumerate(y.tolist()):
                    lowered = q[i].detach().clone()
                    lowered[label] -= c.beta
                    total = total - (lowered.softmax(-1) * z[i].log_softmax(-1)).sum()
            return total / n
        case "ceu":
            total, count = 0.0, 0
            for row in forget:
                z, y = logits(model, row)
                for i, label in list(enumerate(y.tolist()))[1:]:
                    others = z[i].detach().clone()
                    others[label] = -torch.inf
                    t = others.softmax(-1)
                    keep = torch.arange(len(t)) != label
                    total = total - (t[keep] * z[i].log_softmax(-1)[keep]).sum()
                    count += 1
            return total / count
    raise AssertionError(name)


# -- what the trainer computes ----------------------------------------------------------------------------------------
def needed(name):
    entry = OBJECTIVES[name]
    names = ["forget", "retain", *(["refusal"] if entry.refusals else [])]
    return {key: ROWS[key] for key in names}


def objective(name, constants, rows=None):
    entry = OBJECTIVES[name]
    kind = entry.retain_loss or "nll"
    retain = Retention(kind, constants.alpha, layer=constants.layer) if constants.alpha > 0 else None
    forget = make_forget_loss(name, constants, SEED)
    return UnlearnObjective(rows or needed(name), 0, forget, gamma=constants.gamma, retain=retain, seed=SEED)


def run(model, reference, made, steps=1, lr=1.0, micro_batch="auto", batch=4):
    """``steps`` steps of plain gradient descent; the events."""
    head = TokenLoss(model, chunk=3, reference=copy.deepcopy(reference).requires_grad_(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    plan = Plan(Stream("forget", 4, batch), [Stream("retain", 4, batch)], steps * batch / 4, seed=0)
    settings = LoopSettings(lr=lr, micro_batch=micro_batch, save_every=0)
    loop = Loop(start_processes(), head, made, [optimizer], plan, settings)
    return list(loop.run())


def constants_of(name):
    return resolve(name, {"layer": LAYER, "steer": 3.0} if name == "rmu" else {"delta_margin": 0.3}
                   if name == "simnpo" else {})  # fmt: skip


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("micro_batch", ["auto", 1, 3])
def test_loss_and_gradient_equal_the_definition(name, micro_batch):
    c = constants_of(name)
    model = double_model()
    reference = moved(model)
    slow_model = copy.deepcopy(model)
    made = objective(name, c)
    if made.forget.reference:  # the trainer would take the first model; something else shows more
        rows = ROWS["forget"] + (ROWS["refusal"] if name == "dpo" else [])
        made.reference = torch.cat([nll(reference, row).detach() for row in rows])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    (event,) = run(model, reference, made, micro_batch=micro_batch)
    expected = slow(name, slow_model, reference, c)
    expected.backward()
    # transformers' norm rounds to fp32 whatever the model's dtype; RMU's loss shows it most.
    assert event["loss"] == pytest.approx(expected.item(), rel=1e-7 if name == "rmu" else 1e-10)
    for key, parameter in slow_model.named_parameters():
        found = before[key] - dict(model.named_parameters())[key].detach()  # lr 1
        gradient = torch.zeros_like(found) if parameter.grad is None else parameter.grad
        rtol, atol = (1e-6, 1e-7) if name == "rmu" else (1e-9, 1e-11)
        torch.testing.assert_close(found, gradient, rtol=rtol, atol=atol, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["npo", "tnpo", "wtnpo", "dpo"])
def test_the_reference_is_the_first_model(name):
    model = double_model()
    made = objective(name, resolve(name, {}))
    first = copy.deepcopy(model)
    events = run(model, model, made, steps=3, lr=1e-2)
    rows = ROWS["forget"] + (ROWS["refusal"] if name == "dpo" else [])
    torch.testing.assert_close(made.reference, torch.cat([nll(first, row) for row in rows]).detach().float())
    if name in ("npo", "dpo"):  # log σ(0) where nothing has moved yet
        assert events[0]["loss"] == pytest.approx(2 / 0.1 * 0.6931471805599453, rel=1e-4)


def test_gradient_ascent_descends_the_negative_loss():
    """The sign that everything else hangs on: what is descended is −NLL, and one small step raises the NLL."""
    model = double_model()
    before = sum(nll(model, row).sum() for row in ROWS["forget"]).item()
    (event,) = run(model, model, objective("ga", resolve("ga", {})), lr=1e-3)
    assert event["loss"] == pytest.approx(-before / tokens(ROWS["forget"]), rel=1e-10)
    assert sum(nll(model, row).sum() for row in ROWS["forget"]).item() > before


def test_kl_over_all_positions_counts_padding_whatever_the_split():
    """As TOFU's code: the sum over every position of rows padded to the window's longest, over rows · length."""
    model = double_model()
    reference = moved(model)
    rows = ROWS["retain"]
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([list(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    p, q = (one(input_ids=ids).logits.log_softmax(-1) for one in (model, reference))
    expected = ((q.exp() * (q - p)).sum() / (len(rows) * longest)).item()
    for micro_batch in ("auto", 1, 3):
        c = resolve("ga", {})
        made = UnlearnObjective(
            needed("ga"), 0, make_forget_loss("ga", c, 0), retain=Retention("kl", 2.0, positions="all")
        )
        (event,) = run(copy.deepcopy(model), reference, made, micro_batch=micro_batch)
        assert event["loss_retain"] == pytest.approx(expected, rel=1e-10)
        assert event["loss"] == pytest.approx(event["loss_forget"] + 2 * expected, rel=1e-10)


# -- GRU --------------------------------------------------------------------------------------------------------------
def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def naive_gru(model, reference, name, steps, lr, *, m, scope="model", cos_clip=None, add_retain=0.0, add_kl=0.0):
    """GRU over one vector of all parameters, in float64, windows of all rows."""
    c = resolve(name, {})
    average = None
    found = []
    sizes = [p.numel() for p in model.parameters()]
    retain_loss = lambda: sum(nll(model, row).sum() for row in ROWS["retain"]) / tokens(ROWS["retain"])  # noqa: E731
    for _ in range(steps):
        gradients = []
        for loss in (retain_loss(), slow(name, model, reference, c), kl(model, reference, ROWS["retain"])):
            model.zero_grad()
            loss.backward()
            gradients.append(flat(model))
        g_r, g_u, g_kl = gradients
        average = m * g_r if average is None else m * g_r + (1 - m) * average
        product = torch.dot(g_u, average)
        cos = product / g_u.norm() / average.norm()
        g = g_u.clone()
        if scope == "tensor":
            parts = []
            for one, mean in zip(g.split(sizes), average.split(sizes), strict=True):
                conflict = torch.dot(one, mean)
                parts.append(one - conflict / torch.dot(mean, mean) * mean if conflict < 0 else one)
            g = torch.cat(parts)
        elif product < 0 and cos_clip is not None:
            g = g - g_u.norm() * max(cos.item(), cos_clip) * average / average.norm()
        elif product < 0:
            g = g - product / torch.dot(average, average) * average
        after = torch.dot(g, average) / g.norm() / average.norm()
        g = g + add_retain * g_r + add_kl * g_kl
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), g.split(sizes), strict=True):
                parameter -= lr * step.view_as(parameter)
        found.append({"dot": product.item(), "cos": cos.item(), "norm_forget": g_u.norm().item(),
                      "norm_retain": average.norm().item(), "cos_after": after.item(),
                      "cos_fresh": (torch.dot(g_r, average) / g_r.norm() / average.norm()).item(),
                      "update_cos": -(torch.dot(g, average) / g.norm() / average.norm()).item()})  # fmt: skip
    return found


def gru(name, **settings):
    c = resolve(name, {})
    own = Retention("nll", c.alpha) if c.alpha > 0 else None
    return GruObjective(
        needed(name), 0, make_forget_loss(name, c, SEED), Rectifier(**settings), retain=Retention(), own=own,
        gamma=c.gamma, seed=SEED,
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch", ["auto", 1, 3])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ga", {"ema": 1.0}),
        ("ga", {"ema": 0.8}),
        ("graddiff", {"ema": 0.8}),
        ("satimp", {"ema": 0.6}),
        ("ga", {"ema": 0.8, "cos_clip": -0.05}),
        ("ga", {"ema": 0.8, "scope": "tensor"}),
        ("ga", {"ema": 0.8, "add_retain": 0.7}),
        ("wga", {"ema": 0.8, "add_kl": 0.7, "add_retain": 0.2}),
    ],
)
def test_six_steps_equal_the_naive_whole_vector_version(name, settings, micro_batch):
    model = double_model()
    reference = moved(model, by=0.02)
    other = copy.deepcopy(model)
    events = run(model, reference, gru(name, **settings), steps=6, lr=2e-2, micro_batch=micro_batch)
    expected = naive_gru(other, reference, name, 6, 2e-2, m=settings["ema"],
                         **{key: value for key, value in settings.items() if key != "ema"})  # fmt: skip
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one - two).abs().max() <= 1e-6
    assert any(event["rectified"] for event in events) or name in ("graddiff", "satimp")  # they retain by themselves
    for event, numbers in zip(events, expected, strict=True):
        assert bool(event["rectified"]) == (numbers["dot"] < 0) or "scope" in settings
        for key, value in numbers.items():
            assert event[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key


def test_without_rectifying_it_is_the_bare_objective_with_conflicts_reported():
    model = double_model()
    bare = copy.deepcopy(model)
    events = run(model, model, gru("graddiff", rectify=False), steps=4, lr=1e-2)
    plain = run(bare, bare, objective("graddiff", resolve("graddiff", {})), steps=4, lr=1e-2)
    for one, two in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert [event["loss"] for event in events] == pytest.approx([event["loss"] for event in plain], rel=1e-9)
    assert not any(event["rectified"] for event in events)
    assert all(event["cos_after"] == event["cos"] for event in events)


def test_rectified_steps_do_not_raise_the_retain_loss_to_first_order():
    """With plain gradient steps and no smoothing the retain loss of the very window stays where it is."""

    def rise(rectified):
        model = double_model()
        events = run(model, model, gru("ga", ema=1.0, rectify=rectified), steps=5, lr=1e-4)
        assert all(event["cos"] < 0 for event in events)
        return events[-1]["loss_retain"] - events[0]["loss_retain"]

    assert rise(False) > 1e-4
    assert abs(rise(True)) < 0.01 * rise(False)


def test_adamw_steps_are_bound_by_the_optimizer_geometry_only():
    """The projection binds the gradient, not AdamW's step; --geometry optimizer binds the step."""

    def steps(geometry):
        model = double_model().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        plan = Plan(Stream("forget", 4, 2), [Stream("retain", 4, 2)], 4, seed=0)
        settings = LoopSettings(lr=1e-2, save_every=0)
        made = gru("npo", geometry=geometry)
        return list(Loop(start_processes(), TokenLoss(model), made, [optimizer], plan, settings).run())

    assert any(event["update_cos"] > 1e-3 for event in steps("raw"))
    corrected = steps("optimizer")
    assert any(event["corrected"] for event in corrected)
    assert all(event["update_cos"] <= 1e-6 for event in corrected)


def test_the_geffect_adds_up_to_the_product_of_the_two_gradients():
    for ema in (1.0, 0.8):
        model = double_model()
        events = run(model, model, gru("ga", ema=ema, geffect=True), steps=3, lr=1e-2)
        for event in events:
            assert sum(event["log"]["geffect"]["geffect"].values()) == pytest.approx(event["dot"], rel=1e-9) or ema < 1
        effects = events[0]["log"]["geffect"]["geffect"]
        assert list(effects) == ["embedding", "layer 0", "layer 1", "norm"]


def test_the_average_is_part_of_the_state():
    model = double_model()
    made = gru("npo", ema=0.5)
    run(model, model, made, steps=2, lr=1e-2)
    kept = {key: value.clone() for key, value in made.state().items()}
    assert "reference" in kept
    fresh = gru("npo", ema=0.5)
    fresh.load_state(kept)
    for one, two in zip(made.average.tensors, fresh.average.tensors, strict=True):
        assert torch.equal(one, two)


def test_a_gradient_that_is_not_finite_never_reaches_the_average():
    model = double_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    made = gru("ga")
    with pytest.raises(TryAgain, match="the retain gradient is not finite"):
        run(model, model, made)
    assert made.average.tensors == []
    assert not made.ahead
