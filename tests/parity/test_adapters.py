"""Adapters and merged models: saved here and loaded by PEFT and transformers, and the other way round."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers

import minilora as ml
from minilora.errors import MiniloraError
from tests import tiny
from tests.parity.reference import (
    peft,
    peft_config,
    peft_pair,
    peft_parameters,
    reference_logits,
    reference_model,
    torch,
    transformers,
)

pytestmark = pytest.mark.parity

CONFIGS = {
    "all linear": ml.LoraConfig(r=3, alpha=7),
    "two layers": ml.LoraConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj"], dropout=0.1),
    "rslora": ml.LoraConfig(r=4, alpha=8, use_rslora=True, target_modules=["o_proj", "down_proj"]),
    "patterns": ml.LoraConfig(
        r=2, alpha=4, target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 3}, alpha_pattern={"up_proj": 9, "0.*k_proj": 1},
    ),
    "rslora with patterns": ml.LoraConfig(
        r=2, alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 9},
        alpha_pattern={"up_proj": 1.5},
    ),
    "one layer": ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "exclusions": ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.0\..*"),
    "regular expression": ml.LoraConfig(r=2, alpha=4, target_modules=r".*\.0\.mlp\.(up|down)_proj"),
    "head": ml.LoraConfig(r=2, alpha=4, target_modules=["lm_head", "v_proj"]),
}  # fmt: skip
# What PEFT does not take in one config, and is saved all the same.
OWN_CONFIGS = {
    "expression and layers": ml.LoraConfig(r=2, alpha=4, target_modules=r".*\.mlp\..*", layers_to_transform=[1]),
    "all linear of one layer": ml.LoraConfig(r=2, alpha=4, layers_to_transform=[0]),
}
TOKENS = tiny.tokens(2, 11)
PRECISION = {"float32": 1e-5, "float64": 1e-10}


@pytest.mark.parametrize("name", CONFIGS | OWN_CONFIGS)
def test_an_adapter_saved_here_has_the_same_logits_in_peft(name, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(tiny.llama())
    ours = ml.load_model(path)
    base = ours.logits(TOKENS)
    tiny.add_random_adapter(ours, "a", (CONFIGS | OWN_CONFIGS)[name])
    ours.save_adapter("a", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "adapter").eval()
    assert tiny.relative_error(ours.logits(TOKENS), base) > 1e-2
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_saved_by_peft_has_the_same_logits_here(name, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(tiny.llama())
    theirs = peft.get_peft_model(reference_model(path), peft_config(CONFIGS[name])).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peft_parameters(theirs).values():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(path)
    ours.load_adapter("a", tmp_path / "adapter")
    expected = reference_logits(theirs, TOKENS)
    assert tiny.relative_error(expected, reference_logits(reference_model(path), TOKENS)) > 1e-2
    assert tiny.relative_error(ours.logits(TOKENS), expected) < 1e-10
    assert set(ours.adapter_parameters("a")) == set(peft_parameters(theirs))


def test_a_head_that_peft_saved_with_its_adapter_has_to_be_the_base_s_own(checkpoint, tmp_path):
    path, other = checkpoint(tiny.llama(), "float32"), checkpoint(tiny.llama(), "float32", seed=1)
    _, theirs = peft_pair(path, CONFIGS["head"], "float32")
    theirs.save_pretrained(tmp_path / "adapter")
    ml.load_model(path, dtype="bfloat16").load_adapter("a", tmp_path / "adapter")
    with pytest.raises(MiniloraError, match=r"first base_model.model.lm_head.base_layer.weight: is it another model"):
        ml.load_model(other).load_adapter("a", tmp_path / "adapter")


@pytest.mark.parametrize("name", ["all linear", "rslora with patterns"])
def test_training_goes_on_in_the_other_program(name, checkpoint, tmp_path, float64_transformers):
    """What is loaded is trained on: the same gradients, so the scale and the shapes are understood alike."""
    path = checkpoint(tiny.llama())
    ours, theirs = peft_pair(path, CONFIGS[name])
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = ml.load_model(path)
    loaded.load_adapter("a", tmp_path / "adapter")
    _, gradients = tiny.gradients(loaded, TOKENS)
    _, expected = tiny.gradients(ours, TOKENS)
    for key, gradient in expected.items():
        assert tiny.relative_error(gradients[key], gradient) < 1e-12


def test_an_adapter_that_is_not_to_be_trained_computes_the_same(checkpoint, tmp_path):
    path = checkpoint(tiny.llama(), "float32")
    ours, theirs = peft_pair(path, CONFIGS["all linear"], "float32")
    theirs.save_pretrained(tmp_path / "adapter")
    fixed = ml.load_model(path)
    fixed.load_adapter("a", tmp_path / "adapter", trainable=False)
    assert fixed.parameters() == {}
    assert np.array_equal(fixed.logits(TOKENS), ours.logits(TOKENS))


# --- merged models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["all linear", "head", "rslora with patterns"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_has_the_same_logits_in_transformers(name, dtype, tied, checkpoint, tmp_path, request):
    if dtype == "float64":
        request.getfixturevalue("float64_transformers")
    ours = ml.load_model(checkpoint(tiny.llama(tie_word_embeddings=tied), dtype))
    tiny.add_random_adapter(ours, "a", CONFIGS[name])
    adapted = ours.logits(TOKENS)
    ours.merge_adapter("a")
    ours.save(tmp_path / "merged")
    merged = ours.logits(TOKENS)
    # Half-precision weights are rounded by merging: compared are the weights that were saved, computed with in float32.
    compute = "float32" if dtype == "bfloat16" else dtype
    theirs = reference_model(tmp_path / "merged", compute)
    assert tiny.relative_error(reference_logits(theirs, TOKENS), merged) < PRECISION[compute]
    assert tiny.relative_error(merged, adapted) < {"bfloat16": 0.1, "float32": 1e-5, "float64": 1e-13}[dtype]
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert stored.dtype == getattr(torch, dtype)
    assert stored.config.tie_word_embeddings == (tied and name != "head")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_that_peft_merges(dtype, checkpoint):
    """In float32 to its rounding; PEFT adds in bfloat16, where one rounding here stands against two there."""
    path = checkpoint(tiny.llama(), dtype)
    ours = ml.load_model(path)
    tiny.add_random_adapter(ours, "a", CONFIGS["all linear"])
    theirs = peft.get_peft_model(reference_model(path, dtype), peft_config(CONFIGS["all linear"]))
    for key, parameter in peft_parameters(theirs).items():
        parameter.data = torch.from_numpy(ours.adapter_parameters("a")[key].data)
    ours.merge_adapter("a")
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert set(merged) == {name for name, _ in ours.network.named_parameters()}
    for name, tensor in ours.network.named_parameters():
        found = ml.to_numpy(tensor.data).astype(np.float32)
        error = tiny.relative_error(found, merged[name].detach().float())
        assert error < (1e-6 if dtype == "float32" else 1e-2), name


def test_a_merged_directory_has_its_tokenizer(checkpoint, tmp_path):
    path = checkpoint(tiny.llama(), "float32")
    words = {f"w{index}": index for index in range(tiny.VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w2").save_pretrained(path)
    ours = ml.load_model(path)
    tiny.add_random_adapter(ours, "a", CONFIGS["all linear"])
    ours.merge_adapter("a")
    ours.save(tmp_path / "merged")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "w5 w60 w17 nowhere"
    assert theirs(text)["input_ids"] == ours.tokenizer.encode(text) == [5, 60, 17, 0]
    assert theirs.eos_token_id == 2
    model = reference_model(tmp_path / "merged", "float32")
    ids = np.array([theirs(text)["input_ids"]])
    assert tiny.relative_error(reference_logits(model, ids), ours.logits(ids)) < 1e-5
