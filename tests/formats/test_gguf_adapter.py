"""llama.cpp's adapters: names, permutation and alpha as it has them, and back with the same logits."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats import gguf_adapter
from minilora.formats.gguf_file import open_gguf
from minilora.formats.gguf_names import ARCHITECTURES, permute_rows, restore_rows
from minilora.formats.gguf_write import Source, write_gguf
from tests import tiny
from tests.formats.test_mlx import CONFIGS, adapted

PLAIN = {name: config for name, config in CONFIGS.items() if not config.use_dora}


def write(model: ml.Model, path) -> None:
    tensors = {key: ml.to_numpy(tensor.data) for key, tensor in model.adapter_parameters("a").items()}
    gguf_adapter.write_adapter(path, model.adapters["a"], tensors, model.config, model.network.head_is_tied, "mine")


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_comes_back_with_the_same_logits(tmp_path, family, config):
    model = adapted(family, config)
    write(model, tmp_path / "a.gguf")
    model.load_adapter("b", tmp_path / "a.gguf")
    found = model.logits(tiny.tokens())
    model.set_adapter("a")
    assert tiny.relative_error(found, model.logits(tiny.tokens())) < 1e-6


def test_the_file_says_what_llama_cpp_asks_for(tmp_path):
    model = adapted("llama", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj", "v_proj"]))
    write(model, tmp_path / "a.gguf")
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "mine",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes == {
        f"blk.{block}.attn_{name}.weight.lora_{side}": shape
        for block in range(2)
        for name, out in (("q", 32), ("v", 16))
        for side, shape in (("a", (3, 24)), ("b", (out, 3)))
    }


def test_the_rows_of_a_llama_s_b_follow_those_of_its_q_and_k(tmp_path):
    """llama.cpp's row 2i + j of a head is Hugging Face's row i + j·half. No other matrix, no other family."""
    for family, moved in (("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False)):
        model = adapted(family, ml.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
        write(model, tmp_path / "a.gguf")
        tensors = open_gguf(tmp_path / "a.gguf").tensors
        for name, part in (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj")):
            mine = model.adapter_parameters("a")[f"base_model.model.model.layers.0.{part}.lora_B.weight"].data
            expected = mine.copy()
            if moved and name != "v":
                for head in range(len(mine) // 8):
                    for i in range(4):
                        for j in range(2):
                            expected[8 * head + 2 * i + j] = mine[8 * head + i + 4 * j]
            np.testing.assert_array_equal(tensors[f"blk.0.attn_{name}.weight.lora_b"].array(), expected)


def test_restoring_rows_undoes_permuting_them():
    rows = np.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(restore_rows(permute_rows(rows, 3), 3), rows)
    assert not np.array_equal(permute_rows(rows, 3), rows)


@pytest.mark.parametrize("config", [PLAIN["patterns"], ml.LoraConfig(r=4, alpha=6, use_rslora=True)])
def test_alpha_over_the_rank_of_b_is_the_layer_s_scale(tmp_path, config):
    """What llama.cpp multiplies with: the file's alpha over the columns of B, for every tensor."""
    model = adapted("llama", config)
    write(model, tmp_path / "a.gguf")
    file = open_gguf(tmp_path / "a.gguf")
    alpha = file.metadata["adapter.lora.alpha"]
    names = {v: k for k, v in ARCHITECTURES["llama"].block.items()}
    for path, linear in model.network.named_modules():
        slot = getattr(linear, "adapter", None)
        if slot is None:
            continue
        _, _, block, module = path.split(".", 3)
        stem = f"blk.{block}.{names[module]}.weight"
        a, b = (file.tensors[f"{stem}.lora_{side}"].array() for side in "ab")
        heads = ARCHITECTURES["llama"].permuted_heads(stem, 4, 2)
        b = b if heads is None else restore_rows(b, heads)
        layer = slot.layers["a"]
        expected = layer.scale * layer.lora_B.data @ layer.lora_A.data
        assert tiny.relative_error(alpha / b.shape[1] * b @ a, expected) < 1e-6, stem


def test_an_embedding_s_a_is_looked_up_by_token(tmp_path):
    model = adapted("llama", ml.LoraConfig(r=2, alpha=4, target_modules=["embed_tokens", "lm_head"]))
    write(model, tmp_path / "a.gguf")
    tensors = open_gguf(tmp_path / "a.gguf").tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "token_embd.weight.lora_a": (61, 2),
        "token_embd.weight.lora_b": (24, 2),
        "output.weight.lora_a": (2, 24),
        "output.weight.lora_b": (61, 2),
    }
    model.load_adapter("b", tmp_path / "a.gguf")
    found = model.logits(tiny.tokens())
    model.set_adapter("a")
    assert tiny.relative_error(found, model.logits(tiny.tokens())) < 1e-6


@pytest.mark.parametrize(
    ("family", "config", "changes", "message"),
    [
        ("llama", ml.LoraConfig(use_dora=True), {}, "DoRA, which llama.cpp's adapters do not know: merge it instead"),
        (
            "llama",
            ml.LoraConfig(target_modules=["lm_head"]),
            {"tie_word_embeddings": True},
            "lm_head of a base with a tied",
        ),
        (
            "llama",
            ml.LoraConfig(target_modules=["embed_tokens"]),
            {"tie_word_embeddings": True},
            "embed_tokens of a base",
        ),
        ("gpt2", ml.LoraConfig(target_modules=["lm_head"]), {}, "lm_head of a base with a tied head"),
        ("gpt2", ml.LoraConfig(target_modules=["wpe"]), {}, "wpe, to which llama.cpp applies none"),
        (
            "llama",
            ml.LoraConfig(modules_to_save=["norm"]),
            {},
            "norm.weight, which an adapter file of llama.cpp has no",
        ),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused(tmp_path, family, config, changes, message):
    with pytest.raises(MiniloraError, match=message) as caught:
        write(adapted(family, config, **changes), tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- bad files

LORA = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
Q = "blk.0.attn_q.weight"
A, B = np.zeros((2, 24), np.float32), np.zeros((32, 2), np.float32)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.type": "model"}, {}, "general.type is 'model', expected \"adapter\""),
        ({"adapter.type": "control_vector"}, {}, "adapter.type is 'control_vector', expected \"lora\""),
        ({}, {}, "holds no lora_a and lora_b"),
        ({}, {f"{Q}.lora_a": A}, "blk.0.attn_q.weight has lora_a only"),
        ({}, {f"{Q}.lora_a": A, f"{Q}.lora_b": B[:, :1]}, r"lora_a \(2, 24\) and lora_b \(32, 1\), expected one rank"),
        ({}, {f"{Q}.lora_a": A, f"{Q}.lora_b": B[:31]}, "31 rows, expected 4 equal heads"),
        ({}, {"blk.0.attn_norm.weight": A[0]}, "found blk.0.attn_norm.weight"),
        ({}, {"blk.0.attn_x.weight.lora_a": A, "blk.0.attn_x.weight.lora_b": B}, "attn_x.weight belongs to no llama"),
    ],
)
def test_a_file_that_is_no_adapter_for_this_base_is_refused(tmp_path, metadata, tensors, message):
    path = tmp_path / "a.gguf"
    write_gguf(path, "llama", LORA | metadata, {name: Source.of(array) for name, array in tensors.items()})
    model = ml.new_model(tiny.llama())
    with pytest.raises(MiniloraError, match=message) as caught:
        model.load_adapter("a", path)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    write(adapted("qwen2", ml.LoraConfig()), tmp_path / "a.gguf")
    with pytest.raises(MiniloraError, match=r"general\.architecture is 'qwen2', expected \"llama\""):
        ml.new_model(tiny.llama()).load_adapter("a", tmp_path / "a.gguf")


def test_no_alpha_is_a_scale_of_one_as_in_llama_cpp(tmp_path):
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in (A.shape, B.shape))
    sources = {f"{Q}.lora_a": Source.of(a), f"{Q}.lora_b": Source.of(b)}
    write_gguf(tmp_path / "a.gguf", "llama", LORA | {"adapter.lora.alpha": 0.0}, sources)
    config, _ = gguf_adapter.read_adapter(tmp_path / "a.gguf", ml.new_model(tiny.llama()).config)
    assert config.scale(config.r, config.alpha) == 1.0
