"""Completions do not depend on batching, order or sharding; they end where they should; samples follow the model."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models import generate, sampling
from toolbox.models.generate import Decoding, LocalBackend, Request, plan_batches
from toolbox.models.sampling import choose_tokens
from toolbox.shell.errors import BadData, UsageProblem

END = 258  # <|im_end|> of the tiny tokenizer


def letter_tokenizer():
    """Every id is a letter of its own, so that equal texts are equal ids."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({letter(i): i for i in range(259)}, unk_token=letter(0)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def letter(index):
    return chr(0x4E00 + index)


def piece_tokenizer():
    """As in Llama 2: "▁" for a space, one leading space dropped by the decoder, 256 bytes as a fallback."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁Sure", ",", "▁"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build(architecture):
    import transformers as hf

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": END,
        "eos_token_id": END,
        "bos_token_id": None,
    }
    match architecture:
        case "llama":
            return tiny_model(seed=1)
        case "qwen2":
            return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes)).eval()
        case "mistral":  # a sliding window shorter than the rows
            return hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=8)).eval()
        case "gpt2":
            config = hf.GPT2Config(
                vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2,
                eos_token_id=END, bos_token_id=END, pad_token_id=END,
            )  # fmt: skip
            return hf.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def letters():
    return letter_tokenizer()


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return tiny_tokenizer()


def prompts(count=8, seed=0, longest=40):
    draw = random.Random(seed)
    return [
        Request(f"row/{n}", tuple(draw.randrange(256) for _ in range(draw.randint(1, longest)))) for n in range(count)
    ]


def count_rows(model):
    """Rows of each forward call, and a handle to stop counting."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    return seen, hook


@pytest.fixture
def scripted(monkeypatch):
    """Lets every request emit the token ids it is told to, whatever the model says."""

    def install(script):
        def choose(logits, decoding, keys, position):
            ids = [script[key][position] for key in keys]
            return torch.tensor(ids), torch.zeros(len(ids)) if decoding.logprobs else None

        monkeypatch.setattr(generate, "choose_tokens", choose)

    return install


# the engine against transformers, and against itself


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mistral"])
def test_greedy_equals_transformers_row_by_row(architecture, letters):
    model, requests = build(architecture), prompts(6)
    ends = [END, 3, 17, 65, 140]  # several, so that rows end at different steps
    new_tokens = 70 if architecture == "llama" else 30  # 70 outgrow the room the cache starts with
    expected = []
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends,
            pad_token_id=END,
        )  # fmt: skip
        new = whole[0, ids.shape[1] :].tolist()
        ended = new[-1] in ends
        text = "".join(letter(token) for token in (new[:-1] if ended else new))
        expected.append((text, "stop" if ended else "length", len(request.prompt_ids), len(new)))
    for size in (1, 3, 8):
        done = LocalBackend(model, letters, end_ids=ends, batch_size=size).complete(requests, Decoding(new_tokens))
        assert [(c.text, c.finish_reason, c.n_prompt_tokens, c.n_completion_tokens) for c in done] == expected
        assert all(c.logprobs is None for c in done)


@pytest.mark.parametrize("decoding", [Decoding(16), Decoding(16, 1.0, seed=3), Decoding(16, 0.7, 0.8, seed=3)])
def test_batch_size_order_and_sharding_do_not_show(model, letters, decoding):
    requests = prompts(11)
    alone = LocalBackend(model, letters, end_ids=[END, 5, 9], batch_size=1).complete(requests, decoding)
    assert len({completion.text for completion in alone}) > 5
    for size, tokens in ((3, None), (8, None), (8, 150)):
        backend = LocalBackend(model, letters, end_ids=[END, 5, 9], batch_size=size, batch_tokens=tokens)
        assert backend.complete(requests, decoding) == alone
        order = random.Random(size).sample(range(11), 11)
        shuffled = backend.complete([requests[n] for n in order], decoding)
        assert shuffled == [alone[n] for n in order]
    assert backend.complete(requests[1::2], decoding) == alone[1::2]


def test_seed_and_key_make_the_sample_and_equal_requests_are_equal(model, letters):
    backend = LocalBackend(model, letters, end_ids=[END], batch_size=8)
    prompt = (7, 8, 9)
    requests = [Request(key, prompt) for key in ("a/0", "a/1", "a/0", "a/2")]
    first = [c.text for c in backend.complete(requests, Decoding(20, 1.0, seed=0))]
    assert first[0] == first[2]
    assert len(set(first)) == 3
    other = [c.text for c in backend.complete(requests, Decoding(20, 1.0, seed=1))]
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert backend.complete(requests, Decoding(20, 1.0, seed=1))[3].text == other[3]


def test_a_tiny_temperature_is_greedy(model, letters):
    backend = LocalBackend(model, letters, end_ids=[END])
    greedy = backend.complete(prompts(4), Decoding(12))
    for temperature in (1e-6, 1e-40, 5e-324):
        assert backend.complete(prompts(4), Decoding(12, temperature, 0.9)) == greedy


def test_log_probabilities_are_those_of_a_full_forward_before_temperature(model, letters):
    ids_of = {letter(i): i for i in range(259)}
    requests = prompts(5)
    for decoding in (Decoding(15, logprobs=True), Decoding(15, 1.5, 0.9, seed=2, logprobs=True)):
        done = LocalBackend(model, letters, end_ids=(), batch_size=3).complete(requests, decoding)
        for request, completion in zip(requests, done, strict=True):
            new = [ids_of[character] for character in completion.text]
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt_ids, *new]])).logits[0].double()
            start = len(request.prompt_ids) - 1
            expected = logits.log_softmax(-1)[range(start, start + len(new)), new]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_model_in_training_completes_without_dropout_and_goes_on_training(letters):
    requests = prompts(4)
    model = build("gpt2")  # drops out a tenth in training
    expected = LocalBackend(model, letters, end_ids=[END]).complete(requests, Decoding(12))
    model.train()
    recorded = []
    hook = model.register_forward_hook(lambda _, given, output: recorded.append(output.logits.requires_grad))
    assert LocalBackend(model, letters, end_ids=[END]).complete(requests, Decoding(12)) == expected
    hook.remove()
    assert recorded
    assert not any(recorded)
    assert model.training
    ids = torch.tensor([requests[0].prompt_ids])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_models_complete(letters):
    model = tiny_model(seed=1).to(torch.bfloat16)
    done = LocalBackend(model, letters, end_ids=(), batch_size=4).complete(prompts(4), Decoding(9, 1.0, logprobs=True))
    assert [len(completion.text) for completion in done] == [9] * 4


# samples follow the distribution


def expected_distribution(logits, temperature, top_p):
    """Slow float64 reference: the sampled distribution of one position."""
    weights = np.exp((logits - logits.max()) / temperature)
    weights /= weights.sum()
    kept, mass = np.zeros_like(weights), 0.0
    for token in np.argsort(-weights, kind="stable"):
        if mass >= top_p:
            break
        kept[token] = weights[token]
        mass += weights[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.7, 0.9)])
def test_frequencies_of_first_tokens_follow_the_model(model, letters, temperature, top_p):
    from scipy.stats import chisquare

    draws, prompt = 4000, (10, 20, 30, 40)
    requests = [Request(f"q/{n}", prompt) for n in range(draws)]
    backend = LocalBackend(model, letters, end_ids=(), batch_size=1000)
    done = backend.complete(requests, Decoding(1, temperature, top_p, seed=5))
    counts = np.bincount([ord(completion.text) - 0x4E00 for completion in done], minlength=259)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double().numpy()
    expected = expected_distribution(logits, temperature, top_p) * draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    used = wanted > 0
    assert used.sum() > 5
    assert chisquare(observed[used], wanted[used]).pvalue > 0.01


def test_noise_is_splitmix64_and_gumbel_distributed():
    from scipy.stats import gumbel_r, kstest

    streams = [sampling.noise_stream(0, "a", position) for position in range(40)]
    noise = sampling.gumbel_noise(streams, 1000)
    for row, stream in ((0, streams[0]), (39, streams[39])):
        state, expected = stream % 2**64, []
        for _ in range(1000):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = state
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            expected.append(-math.log(-math.log1p(-((z >> 1) + 0.5) / 2**63)))
        assert noise[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert kstest(noise.flatten().numpy(), gumbel_r.cdf).pvalue > 0.01
    correlations = np.corrcoef(noise.numpy()) - np.eye(40)  # positions are independent of one another
    assert np.abs(correlations).max() < 5 / math.sqrt(1000)


def test_noise_streams_tell_seed_key_and_position_apart():
    named = [(seed, key, position) for seed in (0, 1, 10) for key in ("", "1", "0:1", "é") for position in (0, 1, 10)]
    assert len({sampling.noise_stream(*name) for name in named}) == len(named)


def test_nucleus_is_the_smallest_set_that_reaches_the_mass():
    p = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    assert sampling.outside_nucleus(p, 0.65).tolist() == [
        [True, False, False, True],
        [False, True, True, True],
        [False, False, False, False],  # ties with the least probable member stay
    ]
    flat = torch.arange(1.0, 5001).softmax(-1)[None] * 0 + torch.linspace(1, 2, 5000).div(7500)[None]
    kept = ~sampling.outside_nucleus(flat, 0.9)[0]
    mass = flat[0][kept].double().sum()
    assert kept.sum() > 1024
    assert mass >= 0.9 - 1e-4
    assert mass - flat[0][kept].min() < 0.9 + 1e-4
    assert bool(kept[-int(kept.sum()) :].all())


def test_greedy_ties_go_to_the_lowest_id():
    logits = torch.zeros(2, 300)
    logits[0, [41, 7, 299]] = 2.0
    ids, logprobs = choose_tokens(logits, Decoding(logprobs=True), ["a", "b"], 0)
    assert ids.tolist() == [7, 0]
    assert logprobs.tolist() == pytest.approx([2 - math.log(297 + 3 * math.exp(2)), -math.log(300)], abs=1e-5)


def test_logits_that_are_not_numbers_are_bad_data():
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 10)
        logits[1, 4] = bad
        with pytest.raises(BadData, match="not numbers"):
            choose_tokens(logits, Decoding(), ["a", "b"], 0)


# where a completion ends


def test_finished_rows_leave_the_batch_and_cost_nothing(model, letters, scripted):
    lengths = [1, 9, 4, 4, 12, 2, 7]
    requests = [Request(str(n), (n, 1, 2)[: 1 + n % 3]) for n in range(len(lengths))]
    scripted({str(n): [1] * (length - 1) + [END] for n, length in enumerate(lengths)})
    seen, hook = count_rows(model)
    done = LocalBackend(model, letters, end_ids=[END], batch_size=7).complete(requests, Decoding(12))
    hook.remove()
    assert [completion.n_completion_tokens for completion in done] == lengths
    assert seen == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_rows_that_share_a_prompt_share_its_run(model, letters):
    requests = [Request(f"{n}", (1, 2, 3) if n % 2 else (4, 5)) for n in range(6)]
    seen, hook = count_rows(model)
    together = LocalBackend(model, letters, end_ids=(), batch_size=6).complete(requests, Decoding(5, 1.0))
    hook.remove()
    assert seen == [2, 6, 6, 6, 6]
    assert together == LocalBackend(model, letters, end_ids=(), batch_size=1).complete(requests, Decoding(5, 1.0))


def test_end_token_ends_and_is_no_text_but_other_control_tokens_stay_visible(model, bytes_tokenizer, scripted):
    start = bytes_tokenizer.convert_tokens_to_ids("<|im_start|>")
    say = bytes_tokenizer.encode
    scripted({"a": [*say(" Hi"), start, *say("x"), END, *say("never")], "b": [END], "c": say("1234567")})
    requests = [Request(key, tuple(say("Question"))) for key in "abc"]
    done = LocalBackend(model, bytes_tokenizer, end_ids=[END]).complete(requests, Decoding(7, logprobs=True))
    assert [(c.text, c.finish_reason, c.n_completion_tokens, len(c.logprobs)) for c in done] == [
        (" Hi<|im_start|>x", "stop", 6, 6),
        ("", "stop", 1, 1),
        ("1234567", "length", 7, 7),
    ]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),  # across tokens: every byte is a token here
        ("so 🙂 on", ("🙂",), "so "),  # four tokens
        ("naïve", ("ï", "v"), "na"),
        ("abcdef", ("def", "cde"), "ab"),  # what completes first
        ("Answer: BQ", ("Q", "B"), "Answer: "),
        ("stop", ("stop",), ""),
        ("no such", ("zzz",), "no such"),
    ],
)
def test_stop_strings_cut_exactly(model, bytes_tokenizer, scripted, text, stop, expected):
    ids = bytes_tokenizer.encode(text)
    scripted({"a": [*ids, END]})
    request = Request("a", tuple(bytes_tokenizer.encode("stop zzz\n")))  # a stop string in the prompt is no matter
    (done,) = LocalBackend(model, bytes_tokenizer, end_ids=[END]).complete([request], Decoding(64, stop=stop))
    assert (done.text, done.finish_reason) == (expected, "stop")
    ends = [text.index(s) + len(s) for s in stop if s in text]
    assert done.n_completion_tokens == (len(text[: min(ends)].encode()) if ends else len(ids) + 1)


def test_a_stop_string_inside_a_token_cuts_the_token(scripted):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["Hi", "!ĊĊQ:", "Ċ", "ĊQ", ":Ġwhy", "ðŁĻ", "Ĥ.ðŁ"]  # "Ġ" is a space, "Ċ" a line feed, the last two 🙂
    backend_tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_tokenizer)
    scripted({"inside": [0, 1, 0, 0], "across": [0, 2, 3, 4], "emoji": [0, 5, 6, 0], "cut": [0, 5, 6, 5]})
    backend = LocalBackend(tiny_model(seed=1), tokenizer, end_ids=())
    requests = [Request(key, (0,)) for key in ("inside", "across", "emoji", "cut")]
    done = backend.complete(requests, Decoding(3, stop=("\n\nQ:", "🙂.")))
    assert [(c.text, c.finish_reason, c.n_completion_tokens) for c in done] == [
        ("Hi!", "stop", 2),
        ("Hi\n\nQ", "length", 3),
        ("Hi", "stop", 3),
        ("Hi", "stop", 3),
    ]
    done = backend.complete(requests[1:], Decoding(4, stop=("\n\nQ:",)))
    assert [(c.text, c.finish_reason) for c in done] == [
        ("Hi", "stop"),
        ("Hi🙂.\ufffdHi", "length"),
        ("Hi🙂.\ufffd\ufffd", "length"),  # two characters begun, none finished
    ]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), piece_tokenizer()], ids=["byte-level", "byte-fallback"])
def test_the_incremental_search_finds_every_stop_string_at_once(model, tokenizer, scripted):
    draw = random.Random(4)
    requests, scripts, expected = [], {}, {}
    stops = ("🙂🙃", "éa", "aa", "\n\n", "🙂a🙂", "   ", "longer than a few characters")
    alphabet = ["🙂", "🙃", "é", "a", "\n", "漢", " ", "longer than a few characters"]
    byte_ids = [tokenizer.convert_tokens_to_ids(t) for t in byte_tokens(tokenizer)]
    for n in range(60):
        text = "".join(draw.choices(alphabet, weights=[3, 3, 3, 2, 2, 3, 2, 0.2], k=40))
        ids = [byte_ids[byte] for byte in text.encode()]
        prefixes = (tokenizer.decode([byte_ids[120], *ids[:k]])[1:] for k in range(1, len(ids) + 1))
        expected[f"{n}"] = (text, "length", len(ids))
        for k, prefix in enumerate(prefixes, 1):
            found = [prefix.find(stop) for stop in stops if stop in prefix]
            if found:
                expected[f"{n}"] = (prefix[: min(found)], "stop", k)
                break
        scripts[f"{n}"] = [*ids, END]
        requests.append(Request(f"{n}", (byte_ids[120],)))
        if expected[f"{n}"][1] == "length":
            expected[f"{n}"] = (text, "stop", len(ids) + 1)  # by the end token
    scripted(scripts)
    done = LocalBackend(model, tokenizer, end_ids=[END], batch_size=60).complete(requests, Decoding(400, stop=stops))
    assert {r.key: (c.text, c.finish_reason, c.n_completion_tokens) for r, c in zip(requests, done, strict=True)} == (
        expected
    )


def byte_tokens(tokenizer):
    """The token of each byte, in order."""
    if "<0x00>" in tokenizer.get_vocab():
        return [f"<0x{byte:02X}>" for byte in range(256)]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def test_the_space_before_the_first_word_is_kept(model, scripted):
    tokenizer = piece_tokenizer()
    sure, comma = tokenizer.convert_tokens_to_ids(["▁Sure", ","])
    scripted({"a": [sure, comma, sure], "b": [sure, comma, sure]})
    backend = LocalBackend(model, tokenizer, end_ids=())
    whole, half = (0x41, 0x42), (0x41, 0xF0)  # the second prompt ends inside a character
    done = backend.complete([Request("a", whole), Request("b", half)], Decoding(3))
    assert [completion.text for completion in done] == [" Sure, Sure", "Sure, Sure"]
    (stopped,) = backend.complete([Request("a", whole)], Decoding(3, stop=(" Sure",)))
    assert (stopped.text, stopped.n_completion_tokens) == ("", 1)


# limits


def test_the_window_caps_new_tokens_and_refuses_prompts_that_fill_it(letters):
    model = build("gpt2")  # 512 learned positions: one more would be an index error
    backend = LocalBackend(model, letters, end_ids=(), batch_size=3)
    requests = [Request(str(held), tuple(n % 250 for n in range(held))) for held in (500, 511, 100)]
    assert [backend.room(request, Decoding(20)) for request in requests] == [12, 1, 20]
    done = backend.complete(requests, Decoding(20))
    assert [(c.n_completion_tokens, c.finish_reason) for c in done] == [(12, "length"), (1, "length"), (20, "length")]
    for held in (512, 600):
        with pytest.raises(BadData, match=f"the prompt has {held} tokens.*window of 512"):
            backend.complete([*requests, Request("long", (1,) * held)], Decoding(20))


def test_nothing_asked_for_is_nothing_run(model, letters):
    seen, hook = count_rows(model)
    backend = LocalBackend(model, letters, end_ids=[END])
    assert backend.complete([], Decoding()) == []
    done = backend.complete(prompts(3), Decoding(0, logprobs=True))
    hook.remove()
    assert seen == []
    assert [(c.text, c.finish_reason, c.n_completion_tokens, c.logprobs) for c in done] == [("", "length", 0, ())] * 3
    assert [c.n_prompt_tokens for c in done] == [len(request.prompt_ids) for request in prompts(3)]


def test_an_empty_prompt_is_bad_data(model, letters):
    for decoding in (Decoding(), Decoding(0)):
        with pytest.raises(BadData, match="prompt is empty"):
            LocalBackend(model, letters, end_ids=[END]).complete([Request("a", ())], decoding)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"stop": ("a", "")},
    ],
)
def test_impossible_decoding_is_refused(wrong):
    with pytest.raises(UsageProblem):
        Decoding(**wrong)


def test_models_without_a_key_value_cache_are_refused(letters):
    from transformers import MambaConfig, MambaForCausalLM

    with pytest.raises(UsageProblem, match="Mamba"):
        LocalBackend(
            MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1)), letters, end_ids=()
        )


# planning


@pytest.mark.parametrize("seed", range(20))
def test_batches_cut_the_rows_by_length_within_their_bounds(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 90) for _ in range(draw.randint(0, 60))]
    size, tokens = draw.randint(1, 9), draw.choice([None, 50, 200, 400])
    batches = plan_batches(lengths, size, tokens)
    flat = [row for batch in batches for row in batch]
    assert flat == sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for batch in batches:
        assert 1 <= len(batch) <= size
        longest = lengths[batch[-1]]
        assert tokens is None or len(batch) == 1 or len(batch) * longest <= tokens
        assert plan_batches([lengths[row] for row in batch], size, tokens) == [list(range(len(batch)))]
    for batch, after in itertools.pairwise(batches):  # none could have been longer
        grown = (len(batch) + 1) * lengths[after[0]]
        assert len(batch) == size or (tokens is not None and grown > tokens)


def test_impossible_batches_are_refused_before_any_work(model, letters):
    for sizes in ({"batch_size": 0}, {"batch_tokens": 0}):
        with pytest.raises(UsageProblem):
            LocalBackend(model, letters, end_ids=(), **sizes)


def test_the_interface_costs_no_torch():
    code = (
        "import sys, toolbox.models.generate, toolbox.models.sampling\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
