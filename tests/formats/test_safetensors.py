"""Safetensors: read as mapped views, written atomically, refused when truncated or malformed."""

import errno
import json
import random

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from minilora.errors import MiniloraError
from minilora.formats.safetensors import (
    open_model_tensors,
    open_safetensors,
    read_metadata,
    save_checkpoint_tensors,
    save_tensors,
)

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "brain": np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "double": np.array(3.5),
    "ids": np.arange(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS)
    return tmp_path / "a.safetensors"


def assert_same(entries, tensors):
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        read = entries[name].array()
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert (entries[name].shape, entries[name].dtype) == (tensor.shape, tensor.dtype.name)
        assert entries[name].nbytes == tensor.nbytes
        np.testing.assert_array_equal(read, tensor)


def test_tensors_come_back_bit_for_bit(file):
    assert_same(open_safetensors(file), TENSORS)


def test_the_library_reads_what_is_written(file):
    with safetensors.safe_open(file, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(opened.get_tensor("weight"), TENSORS["weight"])


def test_what_the_library_writes_is_read(tmp_path):
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "brain"}
    safetensors.numpy.save_file(plain, tmp_path / "b.safetensors", metadata={"note": "x"})
    assert_same(open_safetensors(tmp_path / "b.safetensors"), plain)


def test_an_array_is_a_read_only_view_of_the_file(file):
    entry = open_safetensors(file)["weight"]
    first, second = entry.array(), entry.array()
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


def test_a_view_outlives_the_replacement_of_its_file(file):
    view = open_safetensors(file)["weight"].array()
    save_tensors(file, {"weight": np.zeros((3, 4), np.float32)})
    np.testing.assert_array_equal(view, TENSORS["weight"])


def test_a_transposed_array_is_written_in_its_own_order(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"t": TENSORS["weight"].T})
    np.testing.assert_array_equal(open_safetensors(tmp_path / "t.safetensors")["t"].array(), TENSORS["weight"].T)


def test_a_dtype_without_a_name_in_the_format_is_refused(tmp_path):
    with pytest.raises(MiniloraError, match="tensor t has dtype complex128"):
        save_tensors(tmp_path / "t.safetensors", {"t": np.zeros(2, np.complex128)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_file(file, monkeypatch):
    def fail(*arguments, **options):
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: No space (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(MiniloraError, match="disk is full"):
        save_tensors(file, {"weight": np.zeros(3)})
    assert_same(open_safetensors(file), TENSORS)
    assert len(list(file.parent.iterdir())) == 1


def test_an_unsupported_dtype_can_be_listed_but_not_read(tmp_path):
    header = json.dumps({"t": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    entry = open_safetensors(tmp_path / "t.safetensors")["t"]
    assert entry.shape == (2,)
    with pytest.raises(MiniloraError, match="tensor t has dtype F8_E8M0, which is not supported"):
        entry.array()


# ---------------------------------------------------------------- bad files


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MiniloraError, match=r"a\.safetensors"):
        open_safetensors(tmp_path / "a.safetensors")


def test_every_truncation_is_one_clear_line(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(MiniloraError, match=r"a\.safetensors") as caught:
            open_safetensors(file)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_is_an_error_or_still_a_readable_file(file):
    whole = file.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    dice = random.Random(0)
    refused = 0
    for position in range(header_bytes):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        try:
            for entry in open_safetensors(file).values():
                assert entry.array().shape == entry.shape
        except MiniloraError:
            refused += 1
    assert refused > header_bytes // 2


# ---------------------------------------------------------------- whole models


def test_a_small_model_is_one_file(tmp_path):
    save_checkpoint_tensors(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(open_model_tensors(tmp_path), TENSORS)


def test_a_large_model_is_shards_and_an_index(tmp_path):
    tensors = {f"t{number}": np.full(10, number, np.float32) for number in range(5)}
    save_checkpoint_tensors(tmp_path, tensors, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    for file in set(index["weight_map"].values()):
        assert sum(entry.nbytes for entry in open_safetensors(tmp_path / file).values()) <= 100
    assert_same(open_model_tensors(tmp_path), tensors)


def test_a_tensor_over_the_limit_gets_a_shard_of_its_own(tmp_path):
    tensors = {"small": np.zeros(2, np.float32), "large": np.ones(100, np.float32), "last": np.zeros(2, np.float32)}
    save_checkpoint_tensors(tmp_path, tensors, shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_same(open_model_tensors(tmp_path), tensors)


def test_no_file_of_an_earlier_save_is_left_to_be_read_instead(tmp_path):
    save_checkpoint_tensors(tmp_path, {"a": np.zeros(30, np.float32), "b": np.zeros(30, np.float32)}, shard_bytes=150)
    save_checkpoint_tensors(tmp_path, {"a": np.ones(30, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    save_checkpoint_tensors(tmp_path, {"a": np.zeros(30, np.float32), "b": np.zeros(30, np.float32)}, shard_bytes=150)
    assert not (tmp_path / "model.safetensors").exists()
    assert set(open_model_tensors(tmp_path)) == {"a", "b"}


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a.bin", 3, ""])
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, file):
    write_index(tmp_path, {"t": file})
    with pytest.raises(MiniloraError, match='expected "weight_map" to give a file name of this directory'):
        open_model_tensors(tmp_path)


def test_an_index_that_its_files_contradict_is_an_error(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"t": np.zeros(2)})
    write_index(tmp_path, {"t": "a.safetensors", "u": "a.safetensors"})
    with pytest.raises(MiniloraError, match=r"tensor u is in a\.safetensors, which does not hold it"):
        open_model_tensors(tmp_path)
    write_index(tmp_path, {"t": "gone.safetensors"})
    with pytest.raises(MiniloraError, match=r"gone\.safetensors"):
        open_model_tensors(tmp_path)


def test_pickles_alone_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MiniloraError, match=r"found only pytorch_model\.bin, a pickle that could run code"):
        open_model_tensors(tmp_path)


def test_a_file_may_be_read_by_whoever_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", TENSORS)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_notes_in_the_header_come_back(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, {"training": '{"step": 3}'})
    assert read_metadata(tmp_path / "a.safetensors") == {"training": '{"step": 3}'}
    safetensors.numpy.save_file(TENSORS, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors") == {}
    (tmp_path / "b.safetensors").write_bytes(b"short")
    with pytest.raises(MiniloraError, match="not a whole safetensors file"):
        read_metadata(tmp_path / "b.safetensors")
    with pytest.raises(MiniloraError, match="cannot read"):
        read_metadata(tmp_path / "missing.safetensors")
