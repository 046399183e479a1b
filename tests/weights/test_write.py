"""What we write, others read: the library's bytes, transformers' directories, one tensor in memory at a time."""

import ctypes
import gc
import io
import json
import os
import pty
import resource
import signal
import stat
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from tests.tiny import tiny_model, tiny_model_dir
from toolbox.shell.errors import BadData, InternalError, UsageProblem, from_os_error
from toolbox.weights.layout import DTYPES, LazyTensor
from toolbox.weights.read import open_weights, weight_files
from toolbox.weights.write import write_file, write_sharded, write_stream

ALL_DTYPES = [getattr(torch, in_torch) for in_torch, _ in DTYPES.values()]


def written(tensors, metadata=None):
    handle = io.BytesIO()
    write_file(handle, tensors, metadata)
    return handle.getvalue()


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def of_dtype(dtype, *shape):
    """Any bits, NaN included, except that a bool is 0 or 1."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(count) % 2).to(torch.bool).reshape(shape)
    size = torch.empty((), dtype=dtype).element_size()
    return ((torch.arange(count * size) * 37 + 200) % 256).to(torch.uint8).view(dtype).reshape(shape)


def every_dtype():
    tensors = {}
    for dtype in reversed(ALL_DTYPES):
        tensors[f"b.{dtype}"] = of_dtype(dtype, 2, 3)
        tensors[f"a.{dtype}"] = of_dtype(dtype)
        tensors[f"ä\n{dtype}"] = of_dtype(dtype, 0, 3)
    return tensors


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"toolbox": '{"a":"é\\u0000"}'}])
def test_our_bytes_are_those_of_the_library(metadata):
    tensors = every_dtype()
    assert written(tensors, metadata) == save(tensors, metadata or None)


def test_our_bytes_are_read_by_the_library_bit_for_bit(tmp_path):
    tensors = every_dtype()
    (tmp_path / "w").write_bytes(written(tensors, {"b": "1", "a": "2"}))
    got = load_file(tmp_path / "w")
    assert {name: bits(tensor) for name, tensor in got.items()} == {name: bits(t) for name, t in tensors.items()}
    with safe_open(tmp_path / "w", "pt") as opened:
        assert opened.metadata() == {"a": "2", "b": "1"}


def test_the_header_is_aligned_and_every_tensor_lies_at_a_multiple_of_its_width():
    content = written(every_dtype(), {"odd": "x"})
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    for entry in header.values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]][1] == 0


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes():
    tensors, metadata = every_dtype(), {"z": "1", "a": "2", "m": "3"}
    turned = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert written(tensors, metadata) == written(*turned)


def test_views_shared_storage_and_parameters_are_written_by_value():
    base = torch.arange(12.0).reshape(3, 4)
    complex_base = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "shared": base,
        "again": base,
        "parameter": torch.nn.Parameter(base[1]),
        "conjugated": complex_base.conj(),
        "negative": complex_base.conj().imag,
    }
    got = load(written(tensors))
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor.detach().clone()), name
    assert got["conjugated"].tolist() == [1 - 2j, 3 + 4j]
    assert got["negative"].tolist() == [-2, 4]


def test_what_the_format_cannot_hold_is_refused_before_a_byte_is_written():
    handle = io.BytesIO()
    with pytest.raises(BadData, match=r"'x': safetensors has no type torch\.complex128"):
        write_file(handle, {"a": torch.zeros(2), "x": torch.zeros(2, dtype=torch.complex128)})
    assert handle.getvalue() == b""
    with pytest.raises(BadData, match="'x' is sparse"):
        written({"x": torch.eye(3).to_sparse()})


def test_a_tensor_that_is_not_as_announced_is_our_fault():
    for given in (torch.zeros(3), torch.zeros(2, dtype=torch.float16)):
        with pytest.raises(InternalError, match="'x' was announced"):
            written({"x": LazyTensor(torch.float32, (2,), lambda given=given: given)})


class SlowDevice(io.RawIOBase):
    """A raw handle that takes at most seven bytes a call, as a slow device may."""

    def __init__(self):
        self.got = b""

    def writable(self):
        return True

    def write(self, view):
        self.got += bytes(view[:7])
        return len(view[:7])


def test_a_handle_that_takes_little_gets_everything():
    tensors = {"a": torch.randn(100), "b": torch.randn(3)}
    device = SlowDevice()
    write_file(device, tensors)
    assert device.got == written(tensors)


# --- streams --------------------------------------------------------------------------------------------------------


def test_weights_go_through_a_pipe_from_writer_to_reader():
    tensors = {"a": torch.randn(300_000), "b": torch.arange(5)}
    read_end, write_end = os.pipe()

    def send():
        with os.fdopen(write_end, "wb") as out:
            write_stream(out, tensors, {"format": "pt"})

    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(read_end, "rb") as pipe, open_weights(pipe) as weights:
        assert weights.metadata == {"format": "pt"}
        assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    sender.join()


def test_a_terminal_is_refused():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "wb", buffering=0) as terminal, pytest.raises(UsageProblem, match="terminal"):
        write_stream(terminal, {"a": torch.zeros(1)})
    os.close(leader)


# --- directories ----------------------------------------------------------------------------------------------------


def test_transformers_loads_a_directory_of_three_shards_bit_for_bit(tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_model_dir(tmp_path / "source", layers=3)
    state = load_file(source / "model.safetensors")
    largest = sum(tensor.nbytes for tensor in state.values()) / 2.8
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    with open_weights(source) as weights:
        paths = write_sharded(target, weights, weights.metadata, max_shard_bytes=largest)
    assert [path.name for path in paths] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert weight_files(target) == paths[:3]
    index = json.loads(paths[3].read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert sorted(index["weight_map"]) == sorted(state)
    for path in paths[:3]:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= largest
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    reference = tiny_model(layers=3)
    for name, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)


def test_what_fits_is_one_file_without_an_index_and_old_shards_go(tmp_path):
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(6)}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-extra.safetensors").write_text("of someone else")
    write_sharded(tmp_path, tensors, max_shard_bytes=80)
    assert len(weight_files(tmp_path)) == 3
    assert write_sharded(tmp_path, tensors) == [tmp_path / "model.safetensors"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model-extra.safetensors", "model.safetensors"]
    write_sharded(tmp_path, tensors, max_shard_bytes=80)
    assert not (tmp_path / "model.safetensors").exists()
    assert all(torch.equal(open_weights(tmp_path)[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_has_one_alone_and_the_order_is_kept(tmp_path):
    tensors = {"z": torch.zeros(5), "large": torch.zeros(100), "a": torch.zeros(5), "b": torch.zeros(5)}
    paths = write_sharded(tmp_path, tensors, max_shard_bytes=100)
    assert [sorted(load_file(path)) for path in paths[:-1]] == [["z"], ["large"], ["a", "b"]]


def test_another_stem_makes_an_adapter(tmp_path):
    assert write_sharded(tmp_path, {"a": torch.zeros(1)}, stem="adapter_model") == [
        tmp_path / "adapter_model.safetensors"
    ]
    assert open_weights(tmp_path).names() == ["a"]


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        paths = write_sharded(tmp_path, {f"{i}": torch.zeros(10) for i in range(3)}, max_shard_bytes=50)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o644] * 4


def test_a_sharded_copy_holds_one_tensor_at_a_time(tmp_path):
    alive, most = set(), 0

    def make(number):
        nonlocal most
        tensor = torch.full((1000,), float(number))
        alive.add(number)
        most = max(most, len(alive))
        weakref.finalize(tensor, alive.discard, number)
        return tensor

    tensors = {f"{n}": LazyTensor(torch.float32, (1000,), lambda n=n: make(n)) for n in range(20)}
    write_sharded(tmp_path, tensors, max_shard_bytes=20_000)
    assert most == 1
    assert open_weights(tmp_path)["7"][0] == 7


def anonymous_memory():
    """Bytes of this process that are not pages of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_a_copy_of_large_weights_takes_the_memory_of_a_few_tensors(tmp_path):
    """Of twelve never more than half at once: one, and what the allocator has not given back yet."""
    size, count, peak = 16 << 20, 12, 0
    made = {
        f"{n}": LazyTensor(torch.uint8, (size,), lambda n=n: torch.full((size,), n, dtype=torch.uint8))
        for n in range(count)
    }

    def watched(item):
        def load():
            nonlocal peak
            tensor = item.load()
            tensor[0] += 1  # a page of our own, to see that the map is private
            peak = max(peak, anonymous_memory() - before)
            return tensor

        return item._replace(load=load)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have left
    before = anonymous_memory()
    write_sharded(tmp_path / "a", {name: watched(item) for name, item in made.items()}, max_shard_bytes=4 * size)
    assert size <= peak < 6 * size
    peak = 0
    with open_weights(tmp_path / "a") as weights:
        copy = {name: watched(item) for name, item in weights.lazy().items()}
        write_sharded(tmp_path / "b", copy)
    assert peak < 6 * size
    with open_weights(tmp_path / "a") as a, open_weights(tmp_path / "b") as b:
        assert [(int(a[f"{n}"][0]), int(b[f"{n}"][0]), int(b[f"{n}"][-1])) for n in range(count)] == [
            (n + 1, n + 2, n) for n in range(count)
        ]


def test_a_disk_that_fills_up_leaves_no_torn_shard(tmp_path):
    """A file-size limit with SIGXFSZ ignored fails in write(2) as a full disk does, with EFBIG in place of ENOSPC."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        tensors = {"a": torch.zeros(100), "b": torch.zeros(1 << 20)}
        try:
            write_sharded(tmp_path / "out", tensors, max_shard_bytes=1000)
        except OSError as error:
            os._exit(from_os_error(error).exit_code if "00002-of-00002.safetensors" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 74
    assert os.listdir(tmp_path / "out") == ["model-00001-of-00002.safetensors"]
