"""Combined adapters against PEFT's add_weighted_adapter, and in PEFT."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import peft, peft_config, reference_logits, reference_model, torch

pytestmark = pytest.mark.parity

TOKENS = tiny.tokens(2, 11)


def pair(path, configs, dtype="float64"):
    """Two adapters "a" and "b" on one base, here and in PEFT, with the same values."""
    ours = ml.load_model(path, dtype=dtype)
    theirs = peft.get_peft_model(reference_model(path, dtype), peft_config(configs[0]), adapter_name="a")
    theirs.add_adapter("b", peft_config(configs[1]))
    parameters = dict(theirs.named_parameters())
    for seed, (name, config) in enumerate(zip("ab", configs, strict=True)):
        tiny.add_random_adapter(ours, name, config, seed)
        for key, tensor in ours.adapter_parameters(name).items():
            stem, _, last = key.rpartition(".")
            with torch.no_grad():
                parameters[f"{stem}.{name}.{last}"].copy_(torch.from_numpy(tensor.data))
    return ours, theirs


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, 0.25)])
@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", 3), ("svd", None)])
def test_a_combination_is_peft_s(combination, rank, weights, checkpoint, float64_transformers):
    configs = [
        ml.LoraConfig(r=4, alpha=8, target_modules=["q_proj", "up_proj"]),
        ml.LoraConfig(r=2, alpha=3, target_modules=["q_proj", "up_proj"]),
    ]
    ours, theirs = pair(checkpoint(tiny.llama()), configs)
    ours.combine_adapters("c", dict(zip("ab", weights, strict=True)), combination, rank)
    theirs.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type=combination, svd_rank=rank)
    theirs.set_adapter("c")
    theirs.eval()
    precision = 1e-10 if combination == "cat" else 1e-6  # PEFT decomposes the whole ΔW in float32
    assert tiny.relative_error(ours.logits(TOKENS), reference_logits(theirs, TOKENS)) < precision
    ours.set_adapter("a")
    assert tiny.relative_error(ours.logits(TOKENS), reference_logits(theirs, TOKENS)) > 1e-2


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_combination_of_different_layers_ranks_and_scales_loads_into_peft(
    combination, checkpoint, tmp_path, float64_transformers
):
    """Negative weights and differing layers too, which PEFT itself does not combine."""
    path = checkpoint(tiny.llama())
    ours = ml.load_model(path)
    tiny.add_random_adapter(ours, "a", ml.LoraConfig(r=4, alpha=8, target_modules=["q_proj", "up_proj", "lm_head"]))
    config = ml.LoraConfig(
        r=2, alpha=3, use_rslora=True, target_modules=["q_proj", "k_proj"], rank_pattern={r"layers\.1\..*q_proj": 6}
    )
    tiny.add_random_adapter(ours, "b", config, seed=1)
    ours.combine_adapters("c", {"a": 0.7, "b": -1.2}, combination)
    ours.save_adapter("c", tmp_path / "c")
    theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "c").eval()
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-10
    assert np.abs(ours.logits(TOKENS) - ml.load_model(path).logits(TOKENS)).max() > 0.1
