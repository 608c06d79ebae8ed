"""GGUF: every block type decoded as GGML defines it, names and rows as Hugging Face has them, damage refused."""

import random
import struct
import time

import gguf
import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats.checkpoint import open_checkpoint
from minilora.formats.gguf import hugging_face_config
from minilora.formats.gguf_file import open_gguf

# ---------------------------------------------------------------- block types, after ggml-quants.c


def half(block, offset):
    return float(np.frombuffer(block[offset : offset + 2], np.float16)[0])


def decode_q4_0(block):
    return [half(block, 0) * ((block[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32)]


def decode_q4_1(block):
    return [half(block, 0) * (block[4 + i % 16] >> 4 * (i // 16) & 15) + half(block, 2) for i in range(32)]


def decode_q8_0(block):
    return [half(block, 0) * value for value in struct.unpack("32b", block[2:])]


def decode_q6_k(block):
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    values = []
    for i in range(256):
        part, quarter, lane = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * part + 32 * (quarter % 2) + lane] >> 4 * (quarter // 2) & 15
        value = (nibble | (high[32 * part + lane] >> 2 * quarter & 3) << 4) - 32
        values.append(half(block, 208) * scales[8 * part + 2 * quarter + lane // 16] * value)
    return values


def k_scale(scales, group):
    """The 6-bit scale and minimum of one of the 8 groups of 32 values (get_scale_min_k4)."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    scale = scales[group + 4] & 15 | (scales[group - 4] >> 6) << 4
    return scale, scales[group + 4] >> 4 | (scales[group] >> 6) << 4


def decode_q4_k(block):
    values = []
    for i in range(256):
        scale, minimum = k_scale(block[4:16], i // 32)
        value = block[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        values.append(half(block, 0) * scale * value - half(block, 2) * minimum)
    return values


def decode_q5_k(block):
    values = []
    for i in range(256):
        scale, minimum = k_scale(block[4:16], i // 32)
        value = block[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        value |= (block[16 + i % 32] >> i // 32 & 1) << 4
        values.append(half(block, 0) * scale * value - half(block, 2) * minimum)
    return values


# type -> (decoder of one block, where its float16 scales are)
BLOCKS = {
    "Q4_0": (decode_q4_0, (0,)),
    "Q4_1": (decode_q4_1, (0, 2)),
    "Q8_0": (decode_q8_0, (0,)),
    "Q6_K": (decode_q6_k, (208,)),
    "Q4_K": (decode_q4_k, (0, 2)),
    "Q5_K": (decode_q5_k, (0, 2)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_every_type_decode_as_ggml_defines_them(name, tmp_path):
    decode, scale_offsets = BLOCKS[name]
    type_ = gguf.GGMLQuantizationType[name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    dice = np.random.default_rng(0)
    blocks = dice.integers(0, 256, (3, 2, block_bytes), np.uint8)  # 3 rows of 2 blocks
    for offset in scale_offsets:
        blocks[:, :, offset : offset + 2] = dice.normal(size=(3, 2, 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("t", blocks.reshape(3, -1), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_gguf(tmp_path / "blocks.gguf").tensors["t"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((3, 2 * block_values), name, blocks.nbytes)
    expected = [[value for block in row for value in decode(block.tobytes())] for row in blocks]
    assert tensor.array().dtype == np.float32
    np.testing.assert_allclose(tensor.array(), expected, rtol=1e-6, atol=1e-6)


def test_a_type_that_cannot_be_decoded_is_listed_and_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "q8k.gguf", "llama")
    writer.add_tensor("t", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_gguf(tmp_path / "q8k.gguf").tensors["t"]
    assert tensor.dtype == "Q8_K"
    with pytest.raises(MiniloraError, match="tensor t is stored as Q8_K, which cannot be dequantised here"):
        tensor.array()


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("type_", "dtype", "error"),
    [
        ("F32", "float32", 0),
        ("F16", "float16", 1e-3),
        ("BF16", "bfloat16", 1e-2),
        ("Q8_0", "Q8_0", 1e-2),
        ("Q4_0", "Q4_0", 0.2),
        ("Q4_1", "Q4_1", 0.2),
    ],
)
def test_a_model_comes_back_under_hugging_face_s_names_and_row_order(write_gguf, llama_tensors, type_, dtype, error):
    tensors = open_checkpoint(write_gguf(type_)).tensors
    assert set(tensors) == set(llama_tensors)
    for name, expected in llama_tensors.items():
        entry = tensors[name]
        array = entry.array()
        assert array.shape == entry.shape == expected.shape
        assert entry.dtype == (dtype if expected.ndim == 2 else "float32")
        assert array.dtype.name == (entry.dtype if entry.dtype in ("float32", "float16", "bfloat16") else "float32")
        np.testing.assert_allclose(array.astype(np.float32), expected, rtol=0, atol=error * np.abs(expected).max())


def test_plain_floats_whose_rows_stay_are_views_of_the_file(write_gguf):
    tensors = open_checkpoint(write_gguf("F16")).tensors
    entry = tensors["model.embed_tokens.weight"]
    assert np.shares_memory(entry.array(), entry.array())
    assert not entry.array().flags.writeable


def test_biases_of_q_and_k_are_put_back_in_order_too(write_gguf):
    bias = np.arange(64, dtype=np.float32)
    checkpoint = open_checkpoint(write_gguf(tensors={"model.layers.0.self_attn.q_proj.bias": bias}))
    assert checkpoint.config["attention_bias"] is True
    np.testing.assert_array_equal(checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].array(), bias)


def test_the_config_is_hugging_face_s(write_gguf):
    assert open_checkpoint(write_gguf()).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,  # exactly, not the float32 nearest to it
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_a_head_of_its_own_is_not_tied(write_gguf, llama_tensors):
    head = llama_tensors["model.embed_tokens.weight"] + 1
    checkpoint = open_checkpoint(write_gguf(tensors={"lm_head.weight": head}))
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].array(), head)


def test_key_value_heads_default_to_all_heads(write_gguf):
    square = {f"model.layers.{layer}.self_attn.k_proj.weight": None for layer in range(2)}
    path = write_gguf(metadata={"llama.attention.head_count_kv": None}, tensors=square)
    assert open_checkpoint(path).config["num_key_value_heads"] == 4


def test_linear_rotary_scaling_is_read(write_gguf):
    path = write_gguf(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    path = write_gguf(metadata={"llama.rope.scale_linear": 2.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def llama3_divisors(factor, original_context, half_width=8, theta=500000.0):
    """The loop of llama.cpp's converter (LlamaModel.generate_extra_tensors)."""
    divisors = []
    for index in range(half_width):
        wavelength = 2 * np.pi * theta ** (index / half_width)
        if wavelength < original_context / 4:
            divisors.append(1)
        elif wavelength > original_context:
            divisors.append(factor)
        else:
            smooth = (original_context / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_found_from_its_divisors(write_gguf, factor):
    path = write_gguf(tensors={"rope_freqs.weight": llama3_divisors(factor, 8192)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


@pytest.mark.parametrize("divisors", [np.arange(1, 9), llama3_divisors(8, 8192)[:4], np.full(8, np.nan)])
def test_other_rotary_divisors_are_refused(write_gguf, divisors):
    with pytest.raises(MiniloraError, match="rotary divisors"):
        open_checkpoint(write_gguf(tensors={"rope_freqs.weight": divisors.astype(np.float32)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "falcon"}, 'architecture "falcon" is not supported in GGUF, expected one of llama, qwen2'),
        ({"metadata": {"general.type": "adapter"}}, 'is of type "adapter", not a model'),
        ({"metadata": {"llama.expert_count": 8}}, "a mixture of 8 experts"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, 'rotary scaling "yarn"'),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "only 8 of 16 values per head are rotated"),
        ({"metadata": {"llama.attention.value_length": 8}}, "keys of 16 and values of 8"),
        ({"metadata": {"llama.attention.head_count": "four"}}, "llama.attention.head_count is 'four'"),
        ({"metadata": {"llama.attention.head_count": 0}}, "0 heads"),
        (
            {"metadata": {"llama.attention.head_count": 5, "llama.attention.key_length": 16}},
            "do not divide into 5 heads",
        ),
        ({"metadata": {"llama.attention.head_count_kv": [2, 2]}}, r"head_count_kv is \[2, 2\], expected a whole"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "epsilon is nan, expected a positive"),
        ({"tensors": {"model.embed_tokens.weight": None}}, "token_embd.weight is missing"),
        (
            {"tensors": {"model.layers.0.post_ffw_norm.weight": np.ones(64, np.float32)}},
            "post_ffw_norm.weight belongs to no llama model",
        ),
    ],
)
def test_what_is_no_plain_llama_is_refused_by_name(write_gguf, changes, message):
    with pytest.raises(MiniloraError, match=message) as caught:
        open_checkpoint(write_gguf(**changes))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- bad files


def read_everything(path):
    checkpoint = open_checkpoint(path)
    for entry in checkpoint.tensors.values():
        assert entry.array().shape == entry.shape
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("a b"))


@pytest.fixture
def small_gguf(write_gguf, byte_bpe):
    return write_gguf("Q8_0", metadata=byte_bpe(["a b", "ab c"]))


def test_every_truncation_is_one_clear_line(small_gguf):
    whole = small_gguf.read_bytes()
    for length in [*range(0, 3000, 13), *range(3000, len(whole), 997), len(whole) - 1]:
        small_gguf.write_bytes(whole[:length])
        with pytest.raises(MiniloraError, match=r"tiny\.gguf") as caught:
            read_everything(small_gguf)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_is_an_error_or_still_a_readable_file(small_gguf):
    whole = small_gguf.read_bytes()
    header_bytes = min(tensor.offset for tensor in open_gguf(small_gguf).tensors.values())
    dice = random.Random(0)
    refused = []
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[dice.randrange(header_bytes)] ^= 1 << dice.randrange(8)
        small_gguf.write_bytes(damaged)
        try:
            read_everything(small_gguf)
        except MiniloraError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]


@pytest.mark.parametrize("position", [8, 16])
def test_a_huge_count_is_refused_at_once(small_gguf, position):
    """Of tensors and of metadata, in the header's first bytes."""
    damaged = bytearray(small_gguf.read_bytes())
    damaged[position : position + 8] = (2**62).to_bytes(8, "little")
    small_gguf.write_bytes(damaged)
    with pytest.raises(MiniloraError):
        open_gguf(small_gguf)


def header(*metadata: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join([*metadata, *tensors])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read|not a GGUF file"),
        (b"PK\x03\x04", "does not start with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "found version 1, expected"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found a big-endian file"),
        (header(text(b"k") + struct.pack("<I", 99)), "unknown metadata type 99"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "arrays of arrays"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)), "truncated or damaged"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**61)), "truncated or damaged"),
        (header(text(b"\xff") + struct.pack("<IB", 0, 1)), "not UTF-8"),
        (header(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2), "metadata key 'k' occurs twice"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3, expected a power of two"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment is 0, expected a power of two"),
        (header(tensors=(text(b"t") + struct.pack("<IQIQ", 1, 4, 77, 0),)), "tensor t has the unknown type number 77"),
        (header(tensors=(text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0),)), "no multiple of Q4_0's 32"),
        (header(tensors=(text(b"t") + struct.pack("<I", 9),)), "tensor t has 9 dimensions"),
        (header(tensors=(text(b"t") + struct.pack("<IQQIQ", 2, 0, 2**63, 0, 0),)), "which is empty"),
        (header(tensors=(text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0),)), "end before the data of tensor t"),
        (header(tensors=(text(b"t") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0),)), "end before the data"),
    ],
)
def test_each_kind_of_damage_is_named(tmp_path, content, message):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(MiniloraError, match=message) as caught:
        open_gguf(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- SmolLM2


def test_smollm2_opens_as_the_model_that_it_is(smollm2):
    config = hugging_face_config(open_gguf(smollm2))
    expected = {
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "rope_theta": 1e5,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_smollm2_s_tensors_are_complete_and_decode_in_seconds(smollm2):
    checkpoint = open_checkpoint(smollm2)
    start = time.perf_counter()
    arrays = {name: entry.array() for name, entry in checkpoint.tensors.items()}
    seconds = time.perf_counter() - start
    assert len(arrays) == 272
    assert sum(array.size for array in arrays.values()) == 134_515_008
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert seconds < 20  # 1.2 s on two idle cores; the bound only catches a decoder that is not vectorised
