"""Models as GGUF files: they read back with the same logits, in every family and dtype, or nothing is written."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats import gguf_write
from minilora.formats.gguf_file import open_gguf
from minilora.formats.gguf_write import window_note
from tests import texts, tiny

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "Q8_0"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SWITCHES = [  # of a Llama's config
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}},
    {"head_dim": 32, "num_key_value_heads": 1},
]


def model(family: str = "llama", **changes) -> ml.Model:
    """A tiny model that llama.cpp can run too, of widths that Q8_0's blocks divide, with a tokenizer."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes = {"n_embd": 96, "n_inner": 64} if family == "gpt2" else wide
    network = ml.new_model(tiny.FAMILIES[family] | sizes | {"vocab_size": texts.MERGED} | changes, std=0.3)
    network.tokenizer = texts.merging_tokenizer()
    return network


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_reads_back_as_its_weights_rounded(tmp_path, family, dtype):
    """Of a Mistral the window is lost: the tokens are fewer than it is long."""
    original = model(family)
    moved = original.save_gguf(tmp_path / "m.gguf", dtype)
    file = open_gguf(tmp_path / "m.gguf")
    matrices = {tensor.dtype for name, tensor in file.tensors.items() if len(tensor.shape) == 2 and "pos" not in name}
    assert matrices == {TYPES[dtype]}
    assert {tensor.dtype for name, tensor in file.tensors.items() if len(tensor.shape) == 1} == {"float32"}
    assert file.metadata["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[dtype]
    read = ml.load_model(tmp_path / "m.gguf")
    mine, theirs = dict(original.network.named_parameters()), dict(read.network.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        bound = 0 if dtype == "f32" or parameter.ndim == 1 else moved
        assert tiny.relative_error(theirs[name].data, parameter.data) <= bound * (1 + 1e-6), name
    assert moved == 0 if dtype == "f32" else 0 < moved < {"f16": 3e-4, "bf16": 3e-3, "q8_0": 7e-3}[dtype]
    tokens = tiny.tokens(2, 5)
    original.network = read.network  # the reader's own way from weights to logits is not in question
    for name, parameter in mine.items():
        theirs[name].data = parameter.data
    np.testing.assert_allclose(original.logits(tokens), read.logits(tokens), rtol=0, atol=0)
    assert read.tokenizer.encode("hello the 123<|turn|>") == texts.merging_tokenizer().encode("hello the 123<|turn|>")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_reads_back_with_the_same_logits(tmp_path, family):
    original = model(family)
    original.save_gguf(tmp_path / "m.gguf", "f32")
    tokens = tiny.tokens(2, 5)
    found = ml.load_model(tmp_path / "m.gguf").logits(tokens)
    assert tiny.relative_error(found, original.logits(tokens)) < 1e-6


@pytest.mark.parametrize("changes", SWITCHES)
def test_the_switches_of_a_config_are_kept(tmp_path, changes):
    original = model(**changes)
    for name, parameter in original.network.named_parameters():
        if name.endswith("bias"):
            parameter.data = np.random.default_rng(0).normal(size=parameter.shape).astype(np.float32)
    original.save_gguf(tmp_path / "m.gguf", "f32")
    tokens = tiny.tokens(2, 40)
    found = ml.load_model(tmp_path / "m.gguf").logits(tokens)
    assert tiny.relative_error(found, original.logits(tokens)) < 1e-6


def test_a_merged_adapter_is_written_and_the_head_that_it_unties(tmp_path):
    original = model(tie_word_embeddings=True)
    tiny.add_random_adapter(original, "a", ml.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    expected = original.logits(tiny.tokens())
    original.merge_adapter("a")
    original.save_gguf(tmp_path / "m.gguf", "f32")
    assert "output.weight" in open_gguf(tmp_path / "m.gguf").tensors
    assert tiny.relative_error(ml.load_model(tmp_path / "m.gguf").logits(tiny.tokens()), expected) < 1e-5


def test_rows_that_blocks_do_not_divide_become_f16(tmp_path):
    model(intermediate_size=40).save_gguf(tmp_path / "m.gguf", "q8_0")
    types = {name: tensor.dtype for name, tensor in open_gguf(tmp_path / "m.gguf").tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "float16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_value_that_the_dtype_cannot_hold_is_named_and_nothing_written(tmp_path):
    original = model()
    original.network.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    (tmp_path / "m.gguf").write_bytes(b"before")
    with pytest.raises(MiniloraError, match=r"layers\.1\.mlp\.up_proj\.weight has a value that F16 cannot hold"):
        original.save_gguf(tmp_path / "m.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"before"
    original.save_gguf(tmp_path / "m.gguf", "bf16")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    original = model()
    original.tokenizer = None
    with pytest.raises(MiniloraError, match="no tokenizer, which a GGUF carries"):
        original.save_gguf(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "dtype", "message"),
    [
        ("llama", {}, "q4_0", "dtype 'q4_0' is not written here, expected one of f32, f16, bf16, q8_0"),
        (
            "qwen2",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 1e4}},
            "f16",
            'rope type "llama3" cannot be written for qwen2',
        ),
        ("qwen2", {"head_dim": 8}, "f16", "llama.cpp's qwen2 has heads of hidden_size / heads values"),
        ("qwen3", {"attention_bias": True}, "f16", "llama.cpp's qwen3 has no biases on the attention"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, changes, dtype, message):
    with pytest.raises(MiniloraError, match=message):
        model(family, **changes).save_gguf(tmp_path / "m.gguf", dtype)
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_does_not_have_is_told():
    assert "last 5 positions only" in window_note(model("mistral").config)
    assert window_note(model("mistral", sliding_window=64).config) is None
    assert window_note(model("mistral", sliding_window=None).config) is None
    assert window_note(model("llama").config) is None


def test_tensors_are_made_one_at_a_time(tmp_path, monkeypatch):
    """Encoding one forgets the one before: the file is written in the memory of its largest tensor."""
    order = []
    quantize = gguf_write.quantize
    write = gguf_write.gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf_write, "quantize", lambda *given: order.append("encode") or quantize(*given))
    monkeypatch.setattr(
        gguf_write.gguf.GGUFWriter, "write_tensor_data", lambda *given: order.append("write") or write(*given)
    )
    model().save_gguf(tmp_path / "m.gguf", "q8_0")
    assert order == ["encode", "write"] * (len(order) // 2)
