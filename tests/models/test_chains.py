"""Chains: their shape, how texts become one, how they are planned, dealt out and put together again."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models.chain_plan import Batch, Plan, Route, count_tokens, plan_chains, window_problem
from toolbox.models.chain_text import encode_chain
from toolbox.models.chains import Asked, Chain, NotFinite, Processes, pack_scores, score_chains, unpack_scores
from toolbox.models.tree import Branch, grow
from toolbox.shell.errors import BadData, UsageProblem


def chain_of(context, lengths, asked=((1, 2), (1, 3)), seed=0):
    """A chain with pieces of the given lengths and the same continuations everywhere."""
    draw = random.Random(seed)
    cuts = [len(context)]
    for length in lengths:
        cuts.append(cuts[-1] + length)
    ids = (*context, *(draw.randrange(259) for _ in range(cuts[-1] - len(context))))
    return Chain(ids, tuple(cuts), (tuple(asked),) * len(cuts))


# -- the shape ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cuts", "continuations"),
    [
        ((0, 3), (((1,),), ())),  # nothing before the first cut
        ((2,), (((1,),),)),  # does not reach the end
        ((3, 2, 3), ((), (), ())),
        ((), ()),
        ((1, 3), (((1,),),)),  # one cut without a list
        ((1, 3), ((), ((),))),  # a continuation without a token
        ((1, 3), ((), (Asked(2, (5,), 3),))),  # whose tokens begin behind its end
        ((1, 3), ((), (Asked(0, (5, 6), 0),))),  # which nothing predicts
        ((1, 3), ((), (Asked(4, (5, 6), 3),))),  # behind the chain
    ],
)
def test_what_is_no_chain_is_refused(cuts, continuations):
    with pytest.raises(ValueError, match=r"cuts|continuation"):
        Chain((7, 8, 9), cuts, continuations)


def test_continuations_know_their_place():
    chain = Chain((7, 8, 9), (1, 1, 3), (((1, 2),), (), (Asked(2, (5, 6), 1), (4,))))
    assert chain.asked() == [Asked(1, (1, 2), 1), Asked(2, (5, 6), 1), Asked(3, (4,), 3)]
    assert chain.whole(chain.asked()[1]) == (7, 8, 5, 6)
    assert chain.branches() == [Branch(1, (1, 2)), Branch(2, (5, 6)), Branch(3, (4,))]
    assert (chain.longest, chain.respelt) == (4, 1)


# -- texts ----------------------------------------------------------------------------------------------------------
def merging_tokenizer(*merges, trim=True):
    """Byte-level BPE over whole texts (no words), so that it merges across anything it is told to."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_like():
    """A tokenizer that puts a space before every text, with a begin-of-text token."""
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("▁xyabc\n.~AB:")}
    vocabulary = {"<unk>": 20, "<s>": 21, **letters, "▁a": 15}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.decoder = token_decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 21)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_chain_of_texts():
    tokenizer = tiny_tokenizer()
    chain = encode_chain(tokenizer, ["Why?", "Because.", "So there"], ["A) no", "B) yes"])
    assert text_of(tokenizer, chain.ids) == "Why?\nBecause.\nSo there"
    states = [text_of(tokenizer, chain.ids[:cut]) for cut in chain.cuts]
    assert states == ["Why?", "Why?\nBecause.", "Why?\nBecause.\nSo there"]
    for here in chain.continuations:
        assert [text_of(tokenizer, ids) for ids in here] == ["\nA) no", "\nB) yes"]
    assert chain.respelt == 0


def test_separators_are_left_out_behind_white_space():
    tokenizer = tiny_tokenizer()
    chain = encode_chain(tokenizer, ["Why?\n", "a", "b "], ["X"], " ", answer_separator="=> ")
    assert text_of(tokenizer, chain.ids) == "Why?\na b "
    assert [text_of(tokenizer, here[0]) for here in chain.continuations] == ["X", "=> X", "X"]


@pytest.mark.parametrize(("prompt", "joint"), [("<|im_start|>assistant\n", ""), ("Answer:", "\n")])
def test_a_context_of_tokens_is_taken_as_it_is(prompt, joint):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    chain = encode_chain(tokenizer, [ids, "One.", "Two."], ["A"])
    assert chain.ids[: len(ids)] == tuple(ids)
    assert chain.cuts[0] == len(ids)
    assert text_of(tokenizer, chain.ids[len(ids) :]) == f"{joint}One.\nTwo."
    assert [text_of(tokenizer, here[0]) for here in chain.continuations] == [f"{joint}A", "\nA", "\nA"]


def test_control_tokens_that_a_text_spells_out_are_text():
    tokenizer = tiny_tokenizer()
    special = set(tokenizer.all_special_ids)
    chain = encode_chain(tokenizer, ["a<|im_end|>", "b<|im_end|>"], ["<|im_end|>"])
    assert not special & {*chain.ids, *(token for here in chain.continuations for ids in here for token in ids)}


def test_the_begin_of_text_comes_once_and_only_where_the_tokenizer_puts_it():
    tokenizer = sentencepiece_like()
    chain = encode_chain(tokenizer, ["ab", "c"], ["b"])
    assert chain.ids == tuple(tokenizer("ab\nc")["input_ids"])
    assert chain.ids[0] == tokenizer.bos_token_id
    assert chain.ids.count(tokenizer.bos_token_id) == 1
    ids = tokenizer("ab")["input_ids"]
    assert encode_chain(tokenizer, [ids, "c"], ["b"]).ids[: len(ids)] == tuple(ids)


def test_what_follows_tokens_goes_on_without_a_space_of_its_own():
    tokenizer = sentencepiece_like()
    ids = tokenizer("x")["input_ids"]
    chain = encode_chain(tokenizer, [ids, "ab", "c"], ["b", "a"], separator="")
    assert text_of(tokenizer, chain.ids[1:]) == "xabc"
    assert [len(here) for here in chain.continuations] == [2, 2, 2]
    assert text_of(tokenizer, chain.whole(chain.asked()[1])[1:]) == "xa"
    # texts that would merge with the guard are spelled as training spells them: alone
    merged = encode_chain(merging_tokenizer(("Ċ", "Ċ")), [[5], "\n\n"], ["\n"], separator="")
    assert len(merged.ids) == 2


@pytest.mark.parametrize("trim", [True, False])
def test_a_full_stop_that_merges_with_the_line_break(trim):
    """The tokenizer spells ".\\n" as one token, which neither the text "a." nor the chain up to there has."""
    tokenizer = merging_tokenizer((".", "Ċ"), trim=trim)
    dot, line = tokenizer.convert_tokens_to_ids([".", ".Ċ"])
    (a, b, c, x, y) = tokenizer("abcxy", add_special_tokens=False)["input_ids"]
    chain = encode_chain(tokenizer, ["a.", "b.", "c"], ["x", "xy"])
    assert chain.ids == (a, line, b, line, c)
    # the merged token ends behind the context, so it is the first of the piece after it
    assert chain.cuts == (1, 3, 5)
    assert chain.continuations[0] == (Asked(2, (x,), 1), Asked(2, (x, y), 1))
    assert chain.continuations[1] == (Asked(4, (x,), 3), Asked(4, (x, y), 3))
    assert [len(one) for one in chain.continuations[2]] == [2, 3]  # "\\n" stands alone behind "c"
    assert chain.respelt == 4
    whole = tokenizer("a.\nb.\nxy", add_special_tokens=False)["input_ids"]
    assert chain.whole(chain.continuations[1][1]) == tuple(whole)
    # the state's own spelling is another one
    assert tokenizer("a.", add_special_tokens=False)["input_ids"] == [a, dot]


def test_a_text_that_is_spelt_anew_with_what_follows():
    """ "ab" + "c" becomes a + bc: the token bc ends behind the text, a does not."""
    tokenizer = merging_tokenizer(("b", "c"), ("a", "b"))
    (a, bc, ab) = tokenizer.convert_tokens_to_ids(["a", "bc", "ab"])
    chain = encode_chain(tokenizer, ["ab"], ["c"], separator="")
    assert chain.ids == (ab,)
    assert chain.continuations == ((Asked(0, (a, bc), 1),),)


def test_what_cannot_be_encoded_is_said():
    tokenizer = tiny_tokenizer()
    with pytest.raises(BadData, match="context has no token"):
        encode_chain(tokenizer, ["", "a"], ["x"])
    with pytest.raises(BadData, match="answer has no token"):
        encode_chain(tokenizer, ["a"], [""], separator="")
    with pytest.raises(BadData, match="one token"):
        encode_chain(merging_tokenizer(("a", "b")), ["a"], ["b"], separator="")


class Slow:
    """A tokenizer that does not know where its tokens end."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *texts, **more):
        assert "return_offsets_mapping" not in more
        return self._tokenizer(*texts, **more)


def test_a_slow_tokenizer_serves_where_nothing_merges():
    parts, answers = ["a.", "b"], ["x"]
    plain = merging_tokenizer()
    assert encode_chain(Slow(plain), parts, answers) == encode_chain(plain, parts, answers)
    with pytest.raises(UsageProblem, match="where its tokens end"):
        encode_chain(Slow(merging_tokenizer((".", "Ċ"))), parts, answers)


@pytest.mark.parametrize("seed", range(10))
def test_a_continuation_is_the_whole_text_from_where_it_begins(seed):
    """Over random texts and merges: the whole is what the tokenizer makes of it, and exactly the tokens that end behind
    the text are the continuation's."""
    draw = random.Random(seed)
    symbols = ["a", "b", ".", "Ċ", "Ġ", "ab", ".Ċ", "aa"]
    pairs = {(draw.choice(symbols[:5]), draw.choice(symbols[:5])) for _ in range(6)}
    tokenizer = merging_tokenizer(*sorted(pairs), trim=False)
    parts = ["".join(draw.choice("ab. ") for _ in range(draw.randint(1, 6))) + "a" for _ in range(4)]
    answers = ["".join(draw.choice("ab. \n") for _ in range(draw.randint(1, 5))) for _ in range(3)]
    separator = draw.choice(["\n", " ", ""])
    chain = encode_chain(tokenizer, ["a" + parts[0], *parts[1:]], answers, separator)
    asked = iter(chain.asked())
    text = "a" + parts[0]
    for number, part in enumerate(parts):
        text = text if number == 0 else text + separator + part
        for answer in answers:
            one = next(asked)
            found = tokenizer(text + separator + answer, add_special_tokens=False, return_offsets_mapping=True)
            assert chain.whole(one) == tuple(found["input_ids"])
            ends = [end for _, end in found["offset_mapping"]]
            assert all(end <= len(text) for end in ends[: one.start])
            assert all(end > len(text) for end in ends[one.start :])
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert chain.ids == tuple(own["input_ids"])
    assert chain.cuts[-1] == len(chain.ids)


# -- what it costs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("q", "piece", "pieces", "k", "m", "without", "merged"),
    [(60, 20, 5, 4, 4, 14.4, 18.7), (100, 25, 10, 5, 7, 22.3, 27.6), (150, 60, 60, 4, 6, 119.9, 134.8)],
)
def test_tokens_saved_on_equal_thoughts(q, piece, pieces, k, m, without, merged):
    """Against one pass a pair and one a state: the ratios of the formula, for answers with a stem of three tokens."""
    answers = [(0, 1, 2, *(100 * (place + 1) + number for number in range(m - 3))) for place in range(k)]
    chain = chain_of((5,) * q, (piece,) * pieces, answers)
    states = sum(q + number * piece for number in range(pieces + 1))
    pairs = count_tokens(chain, "naive") - len(chain.ids)
    assert pairs == k * states + (pieces + 1) * k * m
    assert states == (pieces + 1) * (q + pieces * piece / 2)
    thoughts = states - q  # a pass more for every state but the first, where states are scored apart
    assert count_tokens(chain, "prefix") == count_tokens(chain, "tree", merge=False)
    assert count_tokens(chain, "prefix") == q + pieces * piece + (pieces + 1) * k * (m - 1)
    assert count_tokens(chain, "tree") == q + pieces * piece + (pieces + 1) * (3 + k * (m - 4))
    assert round((pairs + thoughts) / count_tokens(chain, "prefix"), 1) == without
    assert round((pairs + thoughts) / count_tokens(chain, "tree"), 1) == merged


def test_letters_of_one_stem_cost_the_stem_whatever_their_number():
    counts = {
        k: count_tokens(chain_of((5,) * 10, (4, 4), [(1, 2, 3, 50 + place) for place in range(k)]), "tree")
        for k in (2, 5, 26)
    }
    assert counts == dict.fromkeys((2, 5, 26), 18 + 3 * 3)


def test_a_continuation_that_goes_on_from_another_is_fed_once():
    forest = grow([Branch(4, (1, 2)), Branch(4, (1, 2, 3)), Branch(4, (1,)), Branch(4, (1, 2)), Branch(5, (1, 2))])
    assert forest.tokens.tolist() == [1, 2, 1]
    assert grow([Branch(4, (1, 2)), Branch(4, (1, 2))], merge=False).rows == 2
    assert grow([]).rows == grow([Branch(1, (1,))]).rows == 0


# -- planning -------------------------------------------------------------------------------------------------------
def plan(chains, route=None, **more):
    return plan_chains(chains, route or Route("tree"), **{"batch_tokens": 4096, "batch_chains": 1, **more})


def test_chains_that_share_their_context_follow_one_another():
    one, two = (1, 2, 3), (1, 2, 4)
    chains = [chain_of(context, (2,), seed=seed) for seed, context in enumerate([one, two, one, (9,), two, one])]
    batches = plan(chains).batches
    assert [batch.chains for batch in batches] == [(0,), (2,), (5,), (1,), (4,), (3,)]
    assert [batch.context for batch in batches] == [3, 3, 3, 3, 3, 0]
    assert plan(chains).tokens == sum(count_tokens(chain, "tree") for chain in chains) - 3 * 3
    # a single pass a pair has no use for it
    assert {batch.context for batch in plan(chains, Route("naive")).batches} == {0}


def test_a_continuation_from_inside_the_context_keeps_its_chain_apart():
    inside = Chain((1, 2, 3, 4), (3, 4), ((Asked(2, (7, 8), 2),), ()))
    assert [batch.context for batch in plan([inside, inside]).batches] == [0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_batches_hold_every_chain_once_within_their_bounds(seed):
    draw = random.Random(seed)
    chains = [
        chain_of((draw.randint(0, 2),) * draw.randint(1, 3), [draw.randint(1, 30) for _ in range(draw.randint(0, 5))])
        for _ in range(25)
    ]
    most, tokens = draw.choice([2, 5, 64]), draw.choice([10, 150, 4096])
    found = plan(chains, batch_chains=most, batch_tokens=tokens)
    assert sorted(number for batch in found.batches for number in batch.chains) == list(range(25))
    for batch in found.batches:
        members = [chains[number] for number in batch.chains]
        assert len(members) <= most
        assert len(members) == 1 or len(members) * max(len(chain.ids) for chain in members) <= tokens
        if batch.context:
            assert len({chain.ids[: batch.context] for chain in members}) == 1
        assert batch.tokens == sum(count_tokens(chain, "tree") - batch.context for chain in members)
    contexts = {chains[batch.chains[0]].ids[: batch.context] for batch in found.batches if batch.context}
    assert found.tokens == sum(batch.tokens for batch in found.batches) + sum(map(len, contexts))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_whole_disjoint_and_even(ranks):
    draw = random.Random(ranks)
    batches = tuple(Batch((number,), "tree", 0, draw.randint(100, 400)) for number in range(40))
    found = Plan(batches, 0, ())
    shares = [found.share(rank, ranks) for rank in range(ranks)]
    assert sorted(number for share in shares for batch in share for number in batch.chains) == list(range(40))
    assert all(share == sorted(share, key=lambda batch: batch.chains) for share in shares)
    costs = [sum(batch.tokens for batch in share) for share in shares]
    assert max(costs) - min(costs) <= 400


def test_a_chain_that_does_not_fit_the_window_is_named_with_its_lengths():
    chain = chain_of((1, 2, 3), (4,), [(1, 2), (1, 2, 3, 4)])
    assert window_problem(chain, 11) is window_problem(chain, None) is None
    assert window_problem(chain, 10) == "7 tokens and a continuation of 4 are too many for the model's window of 10"
    assert window_problem(chain, 6) == "it has 7 tokens, too many for the model's window of 6"
    with pytest.raises(BadData, match=r"chain 1: 7 tokens and a continuation of 4 .* window of 10"):
        plan([chain_of((1,), ()), chain], window=10)
    model = tiny_model()
    with pytest.raises(BadData, match="it has 600 tokens, too many for the model's window of 512"):
        score_chains(model, [chain_of((1,) * 600, ())])


def test_what_is_done_otherwise_than_asked_is_noted():
    short, long = chain_of((1,), (3,)), chain_of((1,), (30,))
    spelt = Chain((1, 2), (2,), ((Asked(2, (3,), 1), (4,)),))
    assert plan([short, long]).notes == ()
    notes = plan([short, long, spelt], Route("tree", None, 20, 30)).notes
    assert notes == (
        "1 of 3 chains, longer than 30 tokens, are scored by the naive method",
        "1 of 10 continuations are spelt otherwise behind their text than apart from it",
    )
    assert plan([short], Route("prefix", "it takes no mask")).notes == (
        "scored by the prefix method: it takes no mask",
    )
    assert [Route("tree", None, 5, 9).of(length) for length in (5, 6, 9, 10)] == ["tree", "prefix", "prefix", "naive"]
    assert [Route("prefix", None, 5, 9).of(length) for length in (6, 10)] == ["prefix", "naive"]


# -- results --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return tiny_model(1)


@pytest.fixture(scope="module")
def chains():
    contexts = [(1, 2, 3), (4, 5), (1, 2, 3), (6, 7, 8, 9), (4, 5), (1, 2, 3)]
    return [chain_of(context, (3, 1 + seed), seed=seed) for seed, context in enumerate(contexts)]


def same(one, other):
    assert np.array_equal(one.chain_logprob, other.chain_logprob, equal_nan=True)
    for mine, theirs in ((one.logprob, other.logprob), (one.n_tokens, other.n_tokens)):
        assert [values.tolist() for values in mine] == [values.tolist() for values in theirs]
    assert one.method == other.method


def test_scores_are_shaped_as_asked_and_add_up(model, chains):
    chain = Chain(chains[0].ids, chains[0].cuts, (((1, 2), (3,)), (), ((4,), (5,), (6, 7))))
    (scores,) = score_chains(model, [chain])
    assert [values.tolist() for values in scores.n_tokens] == [[2, 1], [], [1, 1, 2]]
    assert [values.shape for values in scores.logprob] == [(2,), (0,), (3,)]
    assert {values.dtype for values in (*scores.logprob, scores.chain_logprob)} == {np.dtype("float64")}
    # two tokens after one another are as probable as the second in a chain that has the first
    longer = Chain((*chain.ids, 6), (len(chain.ids), len(chain.ids) + 1), (((6,),), ((7,),)))
    (more,) = score_chains(model, [longer])
    assert scores.logprob[2][2] == pytest.approx(more.logprob[0][0] + more.logprob[1][0], abs=1e-5)
    assert more.chain_logprob[-1] == more.logprob[0][0]
    value, count = scores.between(0, chain.cuts[0])
    assert count == chain.cuts[0] - 1  # nothing predicts the first
    assert value == math.fsum(scores.chain_logprob[1 : chain.cuts[0]])
    parts = [scores.between(start, stop) for start, stop in ((0, 3), (3, 6), (6, len(chain.ids)))]
    assert sum(count for _, count in parts) == len(chain.ids) - 1
    assert scores.between(3, 3) == (0.0, 0)


def test_all_next_tokens_together_are_certain(model):
    chain = Chain((1, 2, 3), (2, 3), (tuple((token,) for token in range(259)),) * 2)
    (scores,) = score_chains(model, [chain])
    for values in scores.logprob:
        assert np.exp(values).sum() == pytest.approx(1, abs=1e-5)


def test_results_come_in_the_order_of_the_chains_as_soon_as_they_can(model, chains):
    scoring = score_chains(model, chains)
    assert [batch.chains for batch in scoring.plan.batches] != [(number,) for number in range(len(chains))]
    for scores, chain in zip(scoring, chains, strict=True):
        assert len(scores.chain_logprob) == len(chain.ids)
    first = next(iter(score_chains(model, chains)))
    same(first, next(iter(scoring)))
    assert list(score_chains(model, [])) == []


def test_packed_scores_are_the_same_to_the_bit(model, chains):
    scores = dict(enumerate(score_chains(model, chains)))
    again = unpack_scores(pack_scores(scores))
    assert list(again) == list(scores)
    for number, one in scores.items():
        same(one, again[number])
    assert unpack_scores(pack_scores({})) == {}


class Gather:
    """Processes as threads: each gives its bytes and gets those of all."""

    def __init__(self, ranks):
        self.given = [b""] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def of(self, rank):
        def gather(data):
            self.given[rank] = data
            self.barrier.wait()
            return list(self.given)

        return gather


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_give_the_same_bits_as_one(model, chains, ranks):
    alone = list(score_chains(model, chains))
    gather, found, shares = Gather(ranks), [None] * ranks, [None] * ranks

    copies = [tiny_model(1) for _ in range(ranks)]

    def work(rank):
        scoring = score_chains(copies[rank], chains, processes=Processes(rank, ranks, gather.of(rank)))
        shares[rank] = [number for batch in scoring.mine for number in batch.chains]
        found[rank] = list(scoring)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for share in shares for number in share) == list(range(len(chains)))
    assert all(shares)
    for results in found:
        for one, other in zip(results, alone, strict=True):
            same(one, other)


@pytest.mark.parametrize("where", ["cut", "own"])
def test_a_log_probability_that_is_no_number_is_told_with_its_place(chains, where):
    model = tiny_model(1, tied=False)
    token = 200
    # The logit of one token is NaN; every log-probability is, or none that counts.
    with torch.no_grad():
        model.lm_head.weight[token] = math.inf
    with pytest.raises(NotFinite, match="in float32 are not numbers") as caught:
        list(score_chains(model, [chains[0]] if where == "cut" else [chain_of((1, 2, 3), (2,), [])]))
    assert caught.value.exit_code == 1
    assert (caught.value.chain, caught.value.cut) == (0, 0 if where == "cut" else None)


def test_what_cannot_be_scored_is_refused(model):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UsageProblem, match="T5ForConditionalGeneration is an encoder-decoder"):
        score_chains(T5ForConditionalGeneration(config), [chain_of((1,), (2,))])
    with pytest.raises(UsageProblem, match="at least one chain"):
        score_chains(model, [], batch_tokens=0)


def test_importing_costs_no_torch():
    code = "import sys, toolbox.models.chains, toolbox.models.chain_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
