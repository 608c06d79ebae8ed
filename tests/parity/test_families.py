"""Every family's adapters, merged models and generation against PEFT and transformers.

Logits, gradients and training of the families are lines in test_logits.py, test_gradients.py and test_training.py.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import minilora as ml
from minilora.generate import generate_batch
from tests import tiny
from tests.parity.reference import (
    peft,
    peft_config,
    peft_parameters,
    reference_logits,
    reference_model,
    torch,
)

pytestmark = pytest.mark.parity

families = pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "llama"])
CONFIG = ml.LoraConfig(r=3, alpha=7)
TOKENS = tiny.tokens(2, 11)


@families
def test_an_adapter_saved_here_has_the_same_logits_in_peft(family, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(tiny.FAMILIES[family])
    ours = ml.load_model(path)
    base = ours.logits(TOKENS)
    tiny.add_random_adapter(ours, "a", CONFIG)
    ours.save_adapter("a", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "adapter").eval()
    assert tiny.relative_error(ours.logits(TOKENS), base) > 1e-2
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-10


@families
def test_an_adapter_saved_by_peft_has_the_same_logits_here(family, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(tiny.FAMILIES[family])
    theirs = peft.get_peft_model(reference_model(path), peft_config(CONFIG)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peft_parameters(theirs).values():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(path)
    base = ours.logits(TOKENS)
    ours.load_adapter("a", tmp_path / "adapter")
    expected = reference_logits(theirs, TOKENS)
    assert tiny.relative_error(expected, base) > 1e-2
    assert tiny.relative_error(ours.logits(TOKENS), expected) < 1e-10
    assert set(ours.adapter_parameters("a")) == set(peft_parameters(theirs))


@families
def test_a_merged_model_has_the_same_logits_in_transformers(family, checkpoint, tmp_path, float64_transformers):
    ours = ml.load_model(checkpoint(tiny.FAMILIES[family]))
    tiny.add_random_adapter(ours, "a", CONFIG)
    adapted = ours.logits(TOKENS)
    ours.merge_adapter("a")
    ours.save(tmp_path / "merged")
    assert tiny.relative_error(reference_logits(reference_model(tmp_path / "merged"), TOKENS), adapted) < 1e-10


@families
def test_greedy_completions_beyond_the_window_are_those_of_transformers(family, checkpoint):
    path = checkpoint(tiny.FAMILIES[family])
    # A default end token would stop transformers where a random model happens to give it.
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").unlink(missing_ok=True)
    model, reference = ml.load_model(path), reference_model(path)
    prompts = [[5, 9, 1, 33, 7], [4, 8], [11, 3, 3, 60, 2, 19, 7, 7, 40]]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = reference.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0, use_cache=True
    )
    assert generate_batch(model, prompts, 16, stop=[]) == np.asarray(generated[:, longest:]).tolist()


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def test_gpt2_files_of_the_model_without_its_head_load(checkpoint, tmp_path):
    """As OpenAI's on the hub: no "transformer." before the names."""
    reference = reference_model(checkpoint(tiny.gpt2(), "float32"), "float32")
    reference.transformer.save_pretrained(tmp_path / "bare")
    found = ml.load_model(tmp_path / "bare").logits(TOKENS)
    assert tiny.relative_error(found, reference_logits(reference, TOKENS)) < 1e-5


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["mlp.c_proj", "lm_head"], ["lm_head"]])
def test_an_adapter_of_gpt2_goes_to_peft_and_back(targets, checkpoint, tmp_path, float64_transformers):
    """PEFT has no need to put fan_in_fan_out right for a Conv1D layer: it would warn."""
    path = checkpoint(tiny.gpt2())
    ours = ml.load_model(path)
    tiny.add_random_adapter(ours, "a", ml.LoraConfig(r=2, alpha=4, target_modules=targets))
    ours.save_adapter("a", tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "ours").eval()
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-10
    theirs.save_pretrained(tmp_path / "theirs")
    again = ml.load_model(path)
    again.load_adapter("b", tmp_path / "theirs")
    assert tiny.relative_error(again.logits(TOKENS), ours.logits(TOKENS)) < 1e-12
