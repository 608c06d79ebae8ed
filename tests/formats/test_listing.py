"""What a file or directory holds is listed without reading a tensor."""

import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats.checkpoint import save_checkpoint
from minilora.formats.gguf_file import GGUFTensor
from minilora.formats.listing import list_tensors
from minilora.formats.peft import write_adapter
from minilora.formats.safetensors import SafetensorsEntry, save_tensors
from minilora.lora.config import LoraConfig

TENSORS = {"base_model.model.q.lora_A.weight": np.zeros((2, 4), np.float16)}


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    def refuse(self):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsEntry, "array", refuse)
    monkeypatch.setattr(GGUFTensor, "stored", refuse)


def described(listing):
    return {name: (entry.shape, entry.dtype, entry.nbytes) for name, entry in listing.tensors.items()}


def test_a_model_directory(tmp_path):
    save_checkpoint(tmp_path, {"model_type": "llama"}, TENSORS)
    listing = list_tensors(tmp_path)
    assert (listing.kind, listing.format, listing.nbytes) == ("model", "safetensors", 16)
    assert listing.config["model_type"] == "llama"
    assert described(listing) == {"base_model.model.q.lora_A.weight": ((2, 4), "float16", 16)}


def test_an_adapter(tmp_path):
    write_adapter(tmp_path, LoraConfig(r=2, target_modules=["q"]), TENSORS, base_model="org/base")
    listing = list_tensors(tmp_path)
    assert (listing.kind, listing.format) == ("adapter", "peft")
    assert listing.config["base_model_name_or_path"] == "org/base"
    assert described(listing) == {"base_model.model.q.lora_A.weight": ((2, 4), "float16", 16)}


def test_a_gguf_file_of_any_architecture(write_gguf, byte_bpe):
    listing = list_tensors(write_gguf("Q4_1", architecture="gpt2", metadata=byte_bpe([])))
    assert (listing.kind, listing.format) == ("model", "gguf")
    assert listing.config["general.architecture"] == "gpt2"
    assert "tokenizer.ggml.tokens" not in listing.config
    assert described(listing)["blk.0.attn_q.weight"] == ((64, 64), "Q4_1", 64 * 64 // 32 * 20)


def test_a_safetensors_file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS)
    listing = list_tensors(tmp_path / "a.safetensors")
    assert (listing.kind, listing.format, listing.config) == ("tensors", "safetensors", {})


def test_what_is_none_of_these_is_refused(tmp_path):
    with pytest.raises(MiniloraError, match="does not exist, expected a model, an adapter"):
        list_tensors(tmp_path / "gone")
    with pytest.raises(MiniloraError, match=r"expected model\.safetensors"):
        list_tensors(tmp_path)
    (tmp_path / "notes.txt").write_text("some text")
    with pytest.raises(MiniloraError, match="does not start with the letters GGUF"):
        list_tensors(tmp_path / "notes.txt")
