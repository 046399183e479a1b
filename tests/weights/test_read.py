"""Weights are read lazily from files, directories and pipes; a file that lies is refused by name and fault."""

import contextlib
import hashlib
import io
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from tests.tiny import tiny_model
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.weights.layout import DTYPES, MAX_HEADER_BYTES
from toolbox.weights.read import open_weights, weight_files

ROOT = Path(__file__).parents[2]


def random_bytes_tensor(dtype, elements, seed):
    """A tensor of any type with random bits (so with NaN and subnormals), made without converting numbers."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (elements,), generator=generator).to(torch.bool)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (elements * size,), generator=generator, dtype=torch.uint8).view(dtype)


def every_dtype():
    """Two tensors of each type the format has, a scalar and an empty one among them."""
    tensors = {}
    for seed, (in_torch, _) in enumerate(DTYPES.values()):
        dtype = getattr(torch, in_torch)
        tensors[f"{in_torch}.matrix"] = random_bytes_tensor(dtype, 15, seed).reshape(3, 5)
        tensors[f"{in_torch}.scalar"] = random_bytes_tensor(dtype, 1, seed).reshape(())
        tensors[f"{in_torch}.empty"] = torch.empty((0, 4), dtype=dtype)
    return tensors


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


def raw_file(header, data=b"", length=None):
    """Bytes of a file with any header: a JSON value, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def through_pipe(content):
    """A read handle on a real pipe into which a thread writes ``content``."""
    read_end, write_end = os.pipe()

    def feed():
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as out:
            out.write(content)

    threading.Thread(target=feed, daemon=True).start()
    return os.fdopen(read_end, "rb")


# --- what is right --------------------------------------------------------------------------------------------------


def test_every_type_and_shape_is_read_as_the_library_wrote_it(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt", "note": "é"})
    with open_weights(tmp_path / "w.safetensors") as weights:
        assert weights.names() == sorted(tensors)
        assert list(weights) == weights.names()
        assert len(weights) == len(tensors)
        assert weights.metadata == {"format": "pt", "note": "é"}
        assert weights.provenance is None
        for name, tensor in tensors.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert weights.dtype(name) == tensor.dtype
            assert weights.nbytes(name) == tensor.numel() * tensor.element_size()
            assert same_bits(weights.tensor(name), tensor)
            assert same_bits(weights.lazy()[name].load(), tensor)


def test_a_tensor_outlives_the_file_and_changing_it_leaves_the_file_alone(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(4.0)}, path)
    before = path.read_bytes()
    with open_weights(str(path)) as weights:
        tensor = weights["a"]
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4]
    assert path.read_bytes() == before


def test_a_copy_is_the_tensor_without_a_map_of_the_file(tmp_path):
    tensors = {"a": torch.randn(300, 7), "b": torch.tensor([1, 2**40]), "c": torch.randn(3).bfloat16(),
               "none": torch.zeros(0, 4), "one": torch.tensor(2.5)}  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        for name, tensor in tensors.items():
            copied = weights.copy(name)
            assert copied.dtype == tensor.dtype
            assert torch.equal(copied, tensor)
        maps = Path("/proc/self/maps").read_text()
        assert str(tmp_path) not in maps
        weights.tensor("a")
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        os.truncate(tmp_path / "w.safetensors", 400)
        with pytest.raises(BadData, match="is truncated"):
            weights.copy("a")
        with pytest.raises(BadData, match="has no tensor 'z'"):
            weights.copy("z")


def test_the_file_that_was_checked_is_the_file_that_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with open_weights(path) as weights:
        save_file({"a": torch.ones(3)}, tmp_path / "other")
        os.replace(tmp_path / "other", path)
        assert weights["a"].tolist() == [0, 0, 0]


def test_an_unknown_name_is_an_error_with_the_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        assert "a" in weights
        assert "b" not in weights
        for look in (weights.tensor, weights.shape, weights.dtype):
            with pytest.raises(BadData, match=r"w.safetensors: has no tensor 'b'"):
                look("b")


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_directory_of_transformers_is_read(tmp_path, shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    with open_weights(tmp_path) as weights:
        state = {name: value for name, value in model.state_dict().items() if name in weights}
        assert sorted(set(model.state_dict()) - set(state)) == ["lm_head.weight"]  # tied to the embedding
        assert weights.names() == sorted(state)
        assert all(same_bits(weights[name], value) for name, value in state.items())
    if shard_size == "20KB":
        assert len(weight_files(tmp_path)) > 2
        with open_weights(tmp_path / "model.safetensors.index.json") as again:
            assert again.names() == sorted(state)


def test_an_adapter_directory_is_read_and_a_whole_model_goes_first(tmp_path):
    save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with open_weights(tmp_path) as weights:
        assert weights.names() == ["lora_A"]
    save_file({"whole": torch.zeros(2)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert weights.names() == ["whole"]


def test_links_out_of_the_directory_are_followed_as_in_the_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model-00001-of-00001.safetensors").symlink_to("../blobs/0123")
    index = {"weight_map": {"a": "./model-00001-of-00001.safetensors"}}
    (tmp_path / "snapshot" / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_weights(tmp_path / "snapshot") as weights:
        assert weights["a"].tolist() == [1, 1]


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_through_a_real_pipe_is_read_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensors = {**every_dtype(), "large": torch.randn(700_000)}  # larger than a pipe and than one block
    content = save(tensors, {"format": "pt"})
    with through_pipe(content) as pipe, open_weights(pipe) as weights:
        assert list(tmp_path.iterdir()) == []
        assert weights.names() == sorted(tensors)
        assert all(same_bits(weights[name], tensor) for name, tensor in tensors.items())
        assert weights.sha256() == hashlib.sha256(content).hexdigest()


def test_a_small_stream_and_an_unbuffered_one_are_read(tmp_path):
    content = save({"a": torch.ones(2)})
    with open_weights(io.BytesIO(content)) as weights:
        assert weights["a"].tolist() == [1, 1]
    read_end, write_end = os.pipe()
    os.write(write_end, content)
    os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as pipe, open_weights(pipe) as weights:
        assert weights["a"].tolist() == [1, 1]


def test_a_path_that_is_a_pipe_is_read_as_the_stream_it_is(tmp_path):
    """As the shell's <(…) gives it: /dev/fd/63."""
    with through_pipe(save({"a": torch.ones(2)})) as pipe, open_weights(f"/dev/fd/{pipe.fileno()}") as weights:
        assert weights["a"].tolist() == [1, 1]


def test_a_truncated_stream_a_surplus_and_a_terminal_are_refused():
    content = save({"a": torch.ones(2000)})
    for cut, message in [(5, "holds only 5 bytes"), (20, "truncated inside its header"), (-1, "truncated")]:
        with through_pipe(content[:cut]) as pipe, pytest.raises(BadData, match=message):
            open_weights(pipe)
    for surplus in (content + b"x", save({"a": torch.ones(2)}) * 2):
        with through_pipe(surplus) as pipe, pytest.raises(BadData, match="bytes after its last tensor"):
            open_weights(pipe)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "rb", buffering=0) as terminal, pytest.raises(UsageProblem):
        open_weights(terminal)
    os.close(leader)


def test_a_stream_with_a_bad_header_is_refused_before_its_data_are_read():
    read_end, write_end = os.pipe()
    os.write(write_end, raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}) + b"x" * 512)
    with os.fdopen(read_end, "rb") as pipe, pytest.raises(BadData, match="takes 4 bytes"):
        open_weights(pipe)  # the write end is still open: waiting for data would hang here
    os.close(write_end)


def test_a_full_temporary_directory_is_named(monkeypatch):
    def full(descriptor, view):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolbox.weights.read.os.write", full)
    with pytest.raises(OSError, match=tempfile.gettempdir()):
        open_weights(io.BytesIO(save({"a": torch.ones(2)})))


# --- what lies ------------------------------------------------------------------------------------------------------


def f32(begin, end, shape=None):
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (b"", "holds only 0 bytes"),
    "five bytes": (b"\x01\x02\x03\x04\x05", "holds only 5 bytes"),
    "header length of zero": (raw_file(b"", length=0), "header of 0 bytes"),
    "header length beyond the bound": (raw_file({}, length=MAX_HEADER_BYTES + 1), "header of 100000001 bytes"),
    "header length of 2**64-1": (raw_file({}, length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "header longer than the file": (raw_file({}, length=3000), "truncated inside its header: 2 of 3000"),
    "not JSON": (raw_file(b"{hello}"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "nested a million deep": (raw_file(b'{"a":' + b"[" * 1_000_000), "not valid JSON"),
    "a number of ten thousand digits": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "NaN": (raw_file(b'{"a": NaN}'), "not valid JSON"),
    "a list": (raw_file([]), "not a JSON object"),
    "a name twice": (
        raw_file(b'{"a":%b,"a":%b}' % ((b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',) * 2), b"x"),
        "occurs twice",
    ),
    "metadata with a number": (raw_file({"__metadata__": {"a": 1}}), "must map strings to strings"),
    "metadata that is a list": (raw_file({"__metadata__": []}), "must map strings to strings"),
    "entry is a string": (raw_file({"a": "x"}), "'a': must have dtype"),
    "entry without shape": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "'a': must have dtype"),
    "unknown type": (raw_file({"a": {**f32(0, 4), "dtype": "F31"}}, b"x" * 4), "'a': type 'F31' is not known"),
    "type is a list": (raw_file({"a": {**f32(0, 4), "dtype": []}}, b"x" * 4), "'a': type"),
    "negative dimension": (raw_file({"a": f32(0, 4, [-1, -1])}, b"x" * 4), "'a': its shape must be"),
    "dimension true": (raw_file({"a": f32(0, 4, [True])}, b"x" * 4), "'a': its shape must be"),
    "dimension 1.0": (raw_file({"a": f32(0, 4, [1.0])}, b"x" * 4), "'a': its shape must be"),
    "a thousand dimensions": (raw_file({"a": f32(0, 4, [1] * 1000)}, b"x" * 4), "at most 64"),
    "overflowing shape": (raw_file({"a": f32(0, 0, [2**62, 2**62, 0])}), "too large"),
    "negative offset": (raw_file({"a": f32(-4, 0, [1])}, b"x" * 4), "must be two counts"),
    "one offset": (raw_file({"a": {**f32(0, 4), "data_offsets": [4]}}, b"x" * 4), "must be two counts"),
    "offsets the wrong way round": (raw_file({"a": f32(4, 0, [1])}, b"x" * 4), "its offsets give -4"),
    "shape and offsets disagree": (raw_file({"a": f32(0, 8, [3])}, b"x" * 8), r"F32 of shape \[3\] takes 12 bytes"),
    "overlap": (raw_file({"a": f32(0, 8), "b": f32(4, 12)}, b"x" * 12), "'b' overlaps"),
    "the same bytes twice": (raw_file({"a": f32(0, 8), "b": f32(0, 8)}, b"x" * 8), "'b' overlaps"),
    "gap": (raw_file({"a": f32(0, 4), "b": f32(8, 12)}, b"x" * 12), "'b' leaves a gap after byte 4"),
    "gap at the start": (raw_file({"a": f32(4, 8)}, b"x" * 8), "'a' leaves a gap after byte 0"),
    "data truncated": (raw_file({"a": f32(0, 8)}, b"x" * 7), "its tensors take 8 bytes, of which 7 are there"),
    "bytes behind": (raw_file({"a": f32(0, 8)}, b"x" * 9), "bytes after its last tensor"),
    "an HTML page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "not in safetensors format"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "not in safetensors format"),
    "a GGUF file": (b"GGUF\x03\x00\x00\x00" + b"\x00" * 64, "not in safetensors format|truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_lies_is_refused_with_its_name(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadData, match=message) as caught:
        open_weights(path)
    assert str(caught.value).startswith(f"{path}:")
    assert caught.value.advice
    with pytest.raises(BadData):
        open_weights(io.BytesIO(content))


def test_every_cut_of_a_good_file_is_refused(tmp_path):
    content = save({"a": torch.arange(3.0), "b": torch.zeros((), dtype=torch.int8)})
    path = tmp_path / "w.safetensors"
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(BadData):
            open_weights(path)


def test_no_descriptor_is_left_open_by_a_refusal(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE["overlap"][0])
    before = os.listdir("/proc/self/fd")
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(BadData):
            open_weights(source)
    save_file({"a": torch.zeros(1)}, path)
    with open_weights(path) as weights:
        weights.tensor("a")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        ("../secret.safetensors", BadData, "outside the directory"),
        ("/etc/passwd", BadData, "outside the directory"),
        ("a/../../secret.safetensors", BadData, "outside the directory"),
        ("", BadData, "outside the directory"),
        ("nul\0.safetensors", BadData, "outside the directory"),
        ("absent.safetensors", MissingInput, "a shard that model.safetensors.index.json names is missing"),
        ("pytorch_model.bin", BadData, "is a pickle"),
        (7, BadData, "must map names to file names"),
    ],
)
def test_an_index_may_name_only_shards_that_are_there(tmp_path, shard, error, message):
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("secret.safetensors", "model/pytorch_model.bin"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(error, match=message):
        open_weights(directory)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadData, match="weight_map"):
        open_weights(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "two.safetensors")
    for weight_map, message in [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "one.safetensors: tensor 'b' is not where the index says"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'b' is not where the index says"),
        ({"a": "one.safetensors", "b": "one.safetensors", "d": "one.safetensors"}, "'d' is missing"),
    ]:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadData, match=message):
            open_weights(tmp_path)


def test_what_is_not_there_is_missing(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(MissingInput, match=str(path)):
            open_weights(path)
        with pytest.raises(MissingInput, match=str(path)):
            weight_files(path)


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_by_what_they_are(tmp_path, zipped):
    for name in ("pytorch_model.bin", "w.safetensors", "w"):
        path = tmp_path / name
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(BadData, match="is a pickle") as caught:
            open_weights(path)
        assert "safetensors" in caught.value.advice
        with through_pipe(path.read_bytes()) as pipe, pytest.raises(BadData, match="is a pickle"):
            open_weights(pipe)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_suffix_in_a_directory_too(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"anything")
    for source in (path, tmp_path):
        with pytest.raises(BadData, match="is a pickle"):
            open_weights(source)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_not_one(tmp_path, length):
    raw = json.dumps({"a": f32(0, 8)}).encode()
    content = raw_file(raw + b" " * (length - len(raw)), b"x" * 8)
    assert content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    (tmp_path / "w.safetensors").write_bytes(content)
    with open_weights(tmp_path / "w.safetensors") as weights, open_weights(io.BytesIO(content)) as streamed:
        assert same_bits(weights["a"], streamed["a"])


def test_reading_headers_needs_no_torch():
    code = (
        "import sys, toolbox.weights.read, toolbox.weights.write, toolbox.weights.delta\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
