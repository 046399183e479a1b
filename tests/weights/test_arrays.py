"""Small files of arrays: what the safetensors library reads, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from toolbox.shell.errors import BadData, CannotCreate
from toolbox.weights.arrays import NUMPY, ArrayFile, write_arrays

KINDS = {"x": "F64", "n": "I16", "names": "U8", "none": "I32"}
ARRAYS = {
    "x": np.arange(6.0).reshape(2, 3).T / 7,  # not contiguous
    "n": np.array([-3, 4], dtype=np.int64),
    "names": np.frombuffer(b"text", np.uint8),
    "none": np.empty((0, 5), np.int32),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_arrays(tmp_path / "a.safetensors", ARRAYS, KINDS, {"ours": "told"})
    return tmp_path / "a.safetensors"


def test_what_is_written_is_read_again_by_us_and_by_the_library(file):
    from safetensors import safe_open

    found = ArrayFile(file)
    assert found.metadata == {"ours": "told"}
    with safe_open(file, framework="np") as theirs:
        assert set(theirs.keys()) == set(KINDS)
        for name, array in found.arrays(KINDS).items():
            np.testing.assert_array_equal(array, ARRAYS[name])
            np.testing.assert_array_equal(array, theirs.get_tensor(name))
            assert array.dtype == np.dtype(NUMPY[KINDS[name]]) == theirs.get_tensor(name).dtype
            assert not array.flags.writeable


def test_the_order_of_the_arrays_changes_no_byte(file, tmp_path):
    turned = dict(reversed(ARRAYS.items())), dict(reversed(KINDS.items()))
    write_arrays(tmp_path / "b.safetensors", *turned, {"ours": "told"})
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_a_missing_array_and_one_of_another_type_are_told_with_the_file_and_the_advice(file):
    found = ArrayFile(file, "make it anew")
    for kinds, message in (({"y": "F64"}, "array 'y' of type F64 is missing"), ({"x": "I32"}, "I32 is of type F64")):
        with pytest.raises(BadData, match=message) as problem:
            found.arrays(kinds)
        assert (problem.value.file, problem.value.advice) == (str(file), "make it anew")


def test_a_damaged_file_and_one_that_is_not_there(file, tmp_path):
    raw = file.read_bytes()
    for bad in (raw[:-1], raw + b"x", raw[:4], b"\x80\x04." + raw):
        file.write_bytes(bad)
        with pytest.raises(BadData, match=r"a\.safetensors"):
            ArrayFile(file)
    with pytest.raises(FileNotFoundError):
        ArrayFile(tmp_path / "none")


def test_an_existing_file_survives_unless_it_may_be_replaced(file):
    before = file.read_bytes()
    with pytest.raises(CannotCreate):
        write_arrays(file, {"x": np.zeros(1)}, {"x": "F64"}, overwrite=False)
    assert file.read_bytes() == before
    write_arrays(file, {"x": np.zeros(1)}, {"x": "F64"})
    assert ArrayFile(file).arrays({"x": "F64"})["x"].tolist() == [0.0]
